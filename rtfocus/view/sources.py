"""Sources: the threads that fill the scene, from a processor or from a run folder."""

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rtfocus.errors import ProtocolError, RtfocusError
from rtfocus.frame import PROTOCOL_VERSION, Act
from rtfocus.transport.preview_messages import (
    Preview,
    PreviewStatus,
    PreviewViewer,
    Request,
)
from rtfocus.view.codec import Flag, Kind, Picture, Plane
from rtfocus.view.scene import Scene
from rtfocus.view.source_run import (
    StoredRun,
    Traces,
    defocus_plane,
    note_focus_line,
    report_of,
)

_LOOK_S = 0.1
_GONE_S = 2.0
"""A processor that says nothing for so long is gone: it speaks four times a second."""
_IDLE_S = 10.0
"""Nobody looks for so long: the processor is left alone until somebody does."""
_READ_S = 0.3


class Source(threading.Thread):
    """Fills a scene until it is closed. A context manager."""

    def __init__(self, scene: Scene, name: str) -> None:
        super().__init__(name=name)
        self.scene = scene
        self.closing = threading.Event()

    def __enter__(self) -> "Source":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.scene.watched.set()
        self.join()


class RunSource(Source):
    """A run folder, also one that is being written."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        super().__init__(scene, "view run")
        traces = Traces()
        stored = StoredRun.open(folder, traces)
        scene.begin(stored.series, stored, traces, stored.saturation_counts)
        scene.state = "recording"
        self._stored = stored

    def run(self) -> None:
        """Read the journal on while somebody looks."""
        scene, stored = self.scene, self._stored
        while not self.closing.is_set():
            scene.watched.wait()
            more = stored.read_on()
            if not more and scene.state != "finished" and stored.is_finished:
                scene.state = "finished"
                with contextlib.suppress(RtfocusError):
                    scene.numbers = report_of(stored.run)
            elif not more:
                self.closing.wait(_READ_S)
            else:
                scene.numbers = {
                    "written": stored.written,
                    "dropped": dict(stored.lost),
                }
            if more or scene.state == "finished":
                scene.changed()
            if scene.state == "finished":
                self.closing.wait()


class LiveSource(Source):
    """A processor, through its preview socket, and its run folder if it lies here.

    Parameters
    ----------
    scene
        Filled.
    endpoint
        ``transport.preview.endpoint`` of the processor.
    curve_keys
        Folder of keys, where the processor has them.
    """

    def __init__(self, scene: Scene, endpoint: str, curve_keys: Path | None) -> None:
        super().__init__(scene, "view live")
        self._endpoint, self._curve_keys = endpoint, curve_keys
        self._open().close()
        self._asked: list[_Question] = []
        self._last_s = 0.0
        self._points = self._focus = -1
        scene.act = self._ask

    def run(self) -> None:
        """Receive while somebody looks."""
        while not self.closing.is_set():
            self.scene.watched.wait()
            if not self.closing.is_set():
                with self._open() as viewer:
                    self._receive(viewer)

    def _open(self) -> PreviewViewer:
        return PreviewViewer(self._endpoint, self._curve_keys)

    def _receive(self, viewer: PreviewViewer) -> None:
        scene, idle_since_s = self.scene, time.monotonic()
        next_read_s = 0.0
        while not self.closing.is_set() and time.monotonic() - idle_since_s < _IDLE_S:
            if scene.watched.is_set():
                idle_since_s = time.monotonic()
            self._answer(viewer)
            try:
                came = viewer.received(_LOOK_S)
            except ProtocolError:
                scene.refused["preview"] += 1
                continue
            self._take(came)
            now_s = time.monotonic()
            stored = scene.stored
            if stored is not None and now_s > next_read_s:
                next_read_s = now_s + _READ_S
                if stored.read_on():
                    scene.changed()
            if scene.state != "gone" and now_s - self._last_s > _GONE_S:
                finished = stored is not None and stored.is_finished
                scene.state = "finished" if finished else "gone"
                scene.changed()

    def _take(self, came: list[Preview | PreviewStatus]) -> None:
        newest: dict[int, Preview] = {}
        for one in came:
            self._last_s = time.monotonic()
            if isinstance(one, PreviewStatus):
                self._take_status(one)
            elif one.header.frame is not None:
                channel = one.header.frame.index.get("c", 0)
                self.scene.skipped += channel in newest
                newest[channel] = one
        for preview in newest.values():
            self._show(preview)

    def _take_status(self, status: PreviewStatus) -> None:
        scene = self.scene
        scene.may_ask = status.control is not None
        self._control = status.control
        if status.series is None:
            stored = scene.stored
            done = stored is not None and stored.is_finished
            scene.state = "finished" if done else "waiting"
            scene.changed()
            return
        shown = scene.series
        if shown is None or shown.series_uid != status.series.series_uid:
            self._begin(status)
        scene.state = "running"
        scene.numbers = {**status.metrics, "preview_dropped": status.dropped}
        traces, started_ns = scene.traces, status.series.started_ns
        for point in status.points:
            traces.add(
                point.sequence,
                seconds=(point.captured_ns - started_ns) / 1e9,
                place=_place(point.index),
                role=point.role,
                z_um=point.z_um,
                defocus_um=point.defocus_um,
                confidence=point.confidence,
            )
        for number, line in status.focus:
            # The folder's own log has them too, where it lies here.
            if number > self._focus and scene.stored is None:
                self._focus = number
                note_focus_line(traces, line, started_ns)
        scene.changed()

    def _begin(self, status: PreviewStatus) -> None:
        series, scene = status.series, self.scene
        assert series is not None
        self._focus = -1
        traces = Traces()
        stored: StoredRun | None = None
        with contextlib.suppress(RtfocusError, OSError):
            stored = StoredRun.open(Path(status.folder), traces)
            if stored.series.series_uid != series.series_uid:
                stored = None
        scene.folder, scene.host = status.folder, status.host
        full = status.saturation_counts
        scene.begin(series, stored, traces, np.inf if full is None else full)

    def _show(self, preview: Preview) -> None:
        header = preview.header
        frame, series = header.frame, self.scene.series
        assert frame is not None
        if series is None or frame.series_uid != series.series_uid:
            return
        planes = [Plane(Kind.RAW, preview.pixels, step=header.reduced)]
        for plane in header.planes:
            pixels = preview.planes.get(plane.name)
            if pixels is None:
                continue
            if plane.name == "restored":
                planes.append(Plane(Kind.RESTORED, pixels, step=header.reduced))
            elif plane.name == "saturation":
                planes.append(Plane(Kind.SATURATION, pixels, step=plane.block_px))
            elif plane.name == "defocus" and header.grid is not None:
                planes.append(defocus_plane(pixels, header.grid))
        estimate = header.estimate
        height, width = frame.shape[:2]
        place = _place(frame.index)
        picture = Picture(
            planes=tuple(planes),
            shape=(height, width),
            index=frame.index,
            sequence=frame.sequence,
            z_um=frame.z_um,
            captured_s=(frame.captured_ns - series.started_ns) / 1e9,
            exposure_ms=frame.exposure_ms,
            saturated=header.saturated,
            defocus_um=None if estimate is None else estimate.defocus_um,
            confidence=0.0 if estimate is None else estimate.confidence,
            signed=estimate is not None and estimate.signed,
            flags=Flag.LIVE,
        )
        self.scene.show(place, picture)

    def _ask(self, what: Act) -> str:
        """Pass a request on, from a thread of the server; wait for the answer."""
        question = _Question(what)
        self._asked.append(question)
        if not question.answered.wait(10):
            return "the processor does not answer"
        return question.why

    def _answer(self, viewer: PreviewViewer) -> None:
        while self._asked:
            question = self._asked.pop(0)
            series = self.scene.series
            if self._control is None or series is None:
                question.why = (
                    "the config of this run allows no requests "
                    "(transport.preview.control)"
                )
            else:
                request = Request(PROTOCOL_VERSION, series.series_uid, question.what)
                question.why = viewer.ask(self._control, request).why
            question.answered.set()

    _control: str | None = None


@dataclass
class _Question:
    what: Act
    why: str = ""

    def __post_init__(self) -> None:
        self.answered = threading.Event()


def _place(index: dict[str, int]) -> tuple[int, int, int, int]:
    t, p, c, z = (index.get(axis, 0) for axis in "tpcz")
    return t, p, c, z
