"""Scene: what all viewers are shown, and the sources that fill it.

Sources fill it from their threads, out of a processor or a run folder; viewers read it
from the server's loop; a slow viewer misses what came between.
"""

import contextlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rtfocus.errors import InputError, ProtocolError, RtfocusError
from rtfocus.frame import PROTOCOL_VERSION, Act, SeriesStart
from rtfocus.transport.viewer import Preview, PreviewStatus, PreviewViewer, Request
from rtfocus.view.codec import Picture, live_picture, pack
from rtfocus.view.stored_run import (
    Cutout,
    Place,
    StoredRun,
    Traces,
    note_focus_line,
    numbers_of,
    place_of,
)

State = Literal["gone", "waiting", "running", "recording", "finished"]
"""``gone``: no processor answers; ``recording``: a folder that is not finished."""

_OVERDUE_S = 2.5
"""Longer than the processor ever rests; then the newest is read from the folder."""
_CACHE_BYTES = 128 << 20


@dataclass(frozen=True)
class Packed:
    """A picture, packed once for all viewers."""

    place: Place
    picture: Picture
    packed: bytes


@dataclass
class Scene:
    """What is shown; one for the process."""

    state: State = "gone"
    numbers: dict[str, Any] = field(default_factory=dict)
    """Of the loop, as `rtfocus.monitor.Monitor.observed` names them."""
    series: SeriesStart | None = None
    stored: StoredRun | None = None
    """The run folder, where it lies on this machine."""
    traces: Traces = field(default_factory=Traces)
    folder: str = ""
    host: str = ""
    saturation_counts: float = np.inf
    generation: int = 0
    """Counts the series shown."""
    may_ask: bool = False
    """Whether the processor takes requests."""
    cannot: Mapping[Act, str] = field(default_factory=dict)
    """Requests that the run refuses, and why."""
    act: Callable[[Act], str] = lambda _: "nothing takes requests here"
    """Passes a request on; returns why not, empty: it was passed on."""
    viewers: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Connections and messages refused, by reason."""
    skipped: int = 0
    """Pictures that came and gave way to newer ones before they were packed."""
    stalled_s: float = 5.0
    """A page that leaves its picture untaken for so long does not look: it sleeps."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._came_s = 0.0
        self._newest: dict[int, Packed] = {}
        self._cache: OrderedDict[tuple[Any, ...], Packed] = OrderedDict()
        self._listeners: list[Callable[[], None]] = []
        self.watched = threading.Event()
        """Set while a page is open."""

    def begin(
        self,
        series: SeriesStart,
        stored: StoredRun | None,
        traces: Traces,
        saturation_counts: float = np.inf,
    ) -> None:
        """Show another series from here on."""
        with self._lock:
            self.series, self.stored, self.traces = series, stored, traces
            self.saturation_counts = saturation_counts
            if stored is not None:
                self.folder = str(stored.run.folder)
            self._newest.clear()
            self._cache.clear()
            self.generation += 1
        self.changed()

    def is_finished(self) -> bool:
        """Tell whether the run folder is finished; if so, show what its report says."""
        if self.stored is None or not self.stored.is_finished:
            return False
        if self.state != "finished":
            self.state = "finished"
            with contextlib.suppress(RtfocusError):
                self.numbers = numbers_of(self.stored.run)
        return True

    def show(self, place: Place, picture: Picture) -> None:
        """Make a picture the newest of its channel."""
        packed = Packed(place, picture, pack(picture))
        with self._lock:
            self._newest[place[2]] = packed
            self._came_s = time.monotonic()
        self.changed()

    def is_live(self) -> bool:
        """Tell whether pictures come through the socket, and none is overdue."""
        late_s = time.monotonic() - self._came_s
        return self.state == "running" and late_s < _OVERDUE_S

    def newest(self, p: int | None, c: int | None, z: int | None) -> Packed | None:
        """Return the newest live picture at a place; None: there is none."""
        with self._lock:
            matching = [
                packed
                for packed in self._newest.values()
                if p in (None, packed.place[1])
                and c in (None, packed.place[2])
                and z in (None, packed.place[3])
            ]
        return max(matching, key=lambda one: one.picture.sequence, default=None)

    def read(self, place: Place, region: Cutout | None = None) -> Packed:
        """Read a picture from the run folder; packed once for all viewers.

        Raises
        ------
        InputError
            If the run has no such place, or its folder lies elsewhere.
        """
        stored = self.stored
        key = (self.generation, place, region, stored and stored.line(place) is None)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        if stored is None:
            msg = "the run folder is not on this machine; the newest frames alone are"
            raise InputError(msg)
        picture = stored.picture(place, region)
        packed = Packed(place, picture, pack(picture))
        with self._lock:
            self._cache[key] = packed
            while sum(len(one.packed) for one in self._cache.values()) > _CACHE_BYTES:
                self._cache.popitem(last=False)
        return packed

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener`, from any thread, when something changed; returns its end."""
        with self._lock:
            self._listeners.append(listener)
            self.viewers = len(self._listeners)
        self.watched.set()

        def end() -> None:
            with self._lock:
                self._listeners.remove(listener)
                self.viewers = len(self._listeners)
                if not self._listeners:
                    self.watched.clear()

        return end

    def changed(self) -> None:
        """Tell every viewer to look."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def about(self) -> dict[str, Any] | None:
        """Return what a page must know of the series; None: there is none yet."""
        series, full = self.series, self.saturation_counts
        if series is None:
            return None
        return {
            "type": "series",
            "uid": series.series_uid,
            "name": series.name,
            "shape": series.shape,
            "dtype": series.dtype,
            "bit_depth": series.bit_depth,
            "sizes": series.sizes,
            "channels": [channel.name for channel in series.channels],
            "positions": [position.name for position in series.positions[:1000]],
            "pixel_size_um": series.pixel_size_um,
            "z_step_um": series.z_step_um,
            "planned": series.planned,
            "started_ns": series.started_ns,
            "saturation": full if np.isfinite(full) else None,
            "folder": self.folder,
            "host": self.host,
            "browse": self.stored is not None,
            "control": self.may_ask,
        }

    def told(self) -> dict[str, Any]:
        """Return the numbers of the moment."""
        stored = self.stored
        return {
            "type": "state",
            "state": self.state,
            "numbers": self.numbers,
            "written": None if stored is None else stored.written,
            "newest": None if stored is None else stored.newest(),
            "viewers": self.viewers,
            "refused": dict(self.refused),
            "skipped": self.skipped,
            "browse": stored is not None,
            "control": self.may_ask,
            "cannot": dict(self.cannot),
        }


_LOOK_S = 0.1
_GONE_S = 2.0
"""A processor that says nothing for so long is gone: it speaks four times a second."""
_IDLE_S = 10.0
"""Without viewers for so long the processor is left alone until one comes."""
_READ_S = 0.3
_ANSWER_S = 10.0
_MOST_ASKED = 8
"""Requests of all pages that wait: each holds a thread of the page's server."""


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
        """Read the journal on while there are viewers."""
        scene, stored = self.scene, self._stored
        while not self.closing.is_set():
            scene.watched.wait()
            more = stored.read_on()
            if more:
                scene.numbers = {
                    "written": stored.written,
                    "dropped": dict(stored.lost),
                }
                scene.changed()
            elif scene.is_finished():
                scene.changed()
                self.closing.wait()
            else:
                self.closing.wait(_READ_S)


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
        self._room = threading.Semaphore(_MOST_ASKED)
        self._last_s = 0.0
        self._focus = -1
        self._control: str | None = None
        scene.act = self._ask

    def run(self) -> None:
        """Receive while there are viewers."""
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
                messages = viewer.received(_LOOK_S)
            except ProtocolError:
                scene.refused["preview"] += 1
                continue
            self._take(messages)
            now_s = time.monotonic()
            stored = scene.stored
            if stored is not None and now_s > next_read_s:
                next_read_s = now_s + _READ_S
                if stored.read_on():
                    scene.changed()
            if scene.state != "gone" and now_s - self._last_s > _GONE_S:
                if not scene.is_finished():
                    scene.state = "gone"
                scene.changed()

    def _take(self, messages: list[Preview | PreviewStatus]) -> None:
        newest: dict[int, Preview] = {}
        for one in messages:
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
        scene.may_ask, scene.cannot = status.control is not None, status.cannot
        self._control = status.control
        if status.series is None:
            if not scene.is_finished():
                scene.state = "waiting"
            scene.changed()
            return
        series = scene.series
        if series is None or series.series_uid != status.series.series_uid:
            self._begin(status)
        scene.state = "running"
        scene.numbers = {**status.metrics, "preview_dropped": status.dropped}
        traces, started_ns = scene.traces, status.series.started_ns
        for point in status.points:
            traces.add(point, started_ns)
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
        frame, series = preview.header.frame, self.scene.series
        assert frame is not None
        if series is not None and frame.series_uid == series.series_uid:
            picture = live_picture(preview, series.started_ns)
            self.scene.show(place_of(frame.index), picture)

    def _ask(self, act: Act) -> str:
        """Pass a request on, from a thread of the server; wait for the answer."""
        if not self._room.acquire(blocking=False):
            return f"{_MOST_ASKED} requests of viewers wait: ask again after them"
        question = _Question(act)
        self._asked.append(question)
        is_answered = question.answered.wait(_ANSWER_S)
        self._room.release()
        if not is_answered:
            # Nor does it later: something else may have been done by then.
            with contextlib.suppress(ValueError):
                self._asked.remove(question)
            return "the processor does not answer"
        return question.why

    def _answer(self, viewer: PreviewViewer) -> None:
        while self._asked:
            question = self._asked.pop(0)
            series = self.scene.series
            if self._control is None or series is None:
                question.why = "the run has no transport.preview.control"
            else:
                request = Request(PROTOCOL_VERSION, series.series_uid, question.what)
                question.why = viewer.ask(self._control, request).why
            question.answered.set()


@dataclass(eq=False)
class _Question:
    what: Act
    why: str = ""

    def __post_init__(self) -> None:
        self.answered = threading.Event()
