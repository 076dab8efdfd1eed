"""Stored run: its planes, its frames so far, and what its folder says of them.

For a finished run as for one that is being written: the journal is read on from where
it was, and only what is durable is shown. `Traces` holds the frames of any run, stored
or live, as columns that only grow.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import CameraConfig
from rtfocus.errors import InputError, RtfocusError
from rtfocus.frame import Role, SeriesStart
from rtfocus.monitor import FOCUS_LOG, LATENCIES
from rtfocus.processing.camera import saturation_counts
from rtfocus.runs import Kind as ImageName
from rtfocus.runs import Run, open_run
from rtfocus.transport.viewer import (
    FailureLine,
    FocusLine,
    HoldLine,
    LookLine,
    Point,
    RequestLine,
    VerdictLine,
    focus_line,
    saturation_blocks,
)
from rtfocus.view.codec import MAPS, Flag, Picture, PicturePlane, PlaneKind, map_plane
from rtfocus.writers.header import JOURNAL_NAME
from rtfocus.writers.journal import IN_ERROR, MISSING, WRITTEN, Line

MOST_POINTS = 200_000
"""A page draws no more: of a longer run the first."""
_CHUNK = 20_000


class Traces:
    """Points by sequence, each taken once, from whichever source is first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[int] = set()
        self._rows: list[list[Any]] = []
        self._marks: list[list[Any]] = []

    def add(self, point: Point, started_ns: int) -> None:
        """Take a frame in, of a series that began then."""
        seconds = (point.captured_ns - started_ns) / 1e9
        measured = [seconds, point.z_um, point.defocus_um, point.confidence]
        is_probe = int(point.role == Role.FOCUS.value)
        row = [*measured, is_probe, *place_of(point.index), point.sequence]
        with self._lock:
            if point.sequence in self._seen or len(self._rows) >= MOST_POINTS:
                return
            self._seen.add(point.sequence)
            self._rows.append(row)

    def mark(self, kind: str, seconds: float, text: str, z_um: float | None) -> None:
        """Take an event in, as a ``move``, ``refusal``, ``verdict`` or ``loss``."""
        with self._lock:
            if len(self._marks) < MOST_POINTS:
                self._marks.append([kind, seconds, text, z_um])

    def since(self, rows: int, marks: int) -> dict[str, Any] | None:
        """Return what was added after so many rows and marks; None: nothing."""
        with self._lock:
            new = self._rows[rows : rows + _CHUNK]
            events = self._marks[marks : marks + _CHUNK]
        return {"rows": new, "marks": events} if new or events else None


def note_focus_line(traces: Traces, line: dict[str, Any], started_ns: int) -> None:
    """Take a line of ``focus.ndjson`` in, where it says something to look at."""
    read = focus_line(line)
    if read is not None and (mark := _mark_of(read)) is not None:
        kind, text, z_um = mark
        traces.mark(kind, (read.time_ns - started_ns) / 1e9, text, z_um)


def _mark_of(line: FocusLine) -> tuple[str, str, float | None] | None:
    match line:
        case HoldLine(step_um=step_um) if step_um:
            return "move", f"held {step_um:+.2f} µm", None
        case LookLine(refusal=refusal) if refusal:
            return "refusal", f"refused: {refusal}", line.z_um
        case LookLine(decision="Move" | "Probe"):
            decision = line.decision.lower()
            return decision, f"{decision} {line.way_um:+.2f} µm", line.z_um
        case VerdictLine(focused=True):
            return "verdict", "focused", line.end_um
        case VerdictLine():
            return "refusal", f"not focused: {line.reason}", line.end_um
        case FailureLine():
            return "refusal", f"failed: {line.reason}", None
        case RequestLine():
            return "request", f"asked for: {line.what}".replace("_", " "), None
    return None


Place = tuple[int, int, int, int]
"""t, p, c, z."""


def _captured_s(line: Line, started_ns: int) -> float | None:
    """Return when a frame was taken; None: a repair found it, and it is not known."""
    captured_ns = line.get("captured_ns")
    return None if captured_ns is None else (int(captured_ns) - started_ns) / 1e9


def place_of(index: Mapping[str, int]) -> Place:
    """Return the place that an index says."""
    t, p, c, z = (int(index.get(axis, 0)) for axis in "tpcz")
    return t, p, c, z


SIDE_PX = 1024
"""Pictures are reduced to at most this side; a region is then asked for on its own."""
_READ_BYTES = 4 << 20
_IMAGES: tuple[tuple[ImageName, PlaneKind], ...] = (
    ("raw", PlaneKind.RAW),
    ("restored", PlaneKind.RESTORED),
)


@dataclass(frozen=True)
class Cutout:
    """Part of a frame in pixels: y0 <= y < y1."""

    y0: int
    x0: int
    y1: int
    x1: int


@dataclass
class _Tail:
    """A file of lines that grows."""

    path: Path
    at: int = 0

    def lines(self) -> list[dict[str, Any]]:
        """Return the whole lines that are new; a broken one is left out."""
        lines = []
        try:
            with self.path.open("rb") as file:
                file.seek(self.at)
                data = file.read(_READ_BYTES)
        except OSError:
            return []
        end = data.rfind(b"\n") + 1
        self.at += end
        for text in data[:end].splitlines():
            try:
                line = msgspec.json.decode(text)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                lines.append(line)
        return lines


@dataclass
class StoredRun:
    """What can be seen of one run folder.

    Parameters
    ----------
    run
        As opened.
    traces
        Takes the frames as they become durable.
    """

    run: Run
    traces: Traces
    lost: dict[str, int] = field(default_factory=dict)
    """Frames that are not there, by what the journal says."""
    _lines: dict[Place, bytes] = field(default_factory=dict)
    """The journal's, as text: a line's objects take several times as much memory."""
    _order: list[Place] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._journal = _Tail(self.run.folder / JOURNAL_NAME)
        self._focus = _Tail(self.run.folder / FOCUS_LOG)
        config = self.run.config.get("camera", {})
        try:
            camera = CameraConfig.model_validate(config)
        except ValueError:
            camera = CameraConfig()
        series = self.series
        self.saturation_counts = saturation_counts(
            camera, np.dtype(series.dtype), series.bit_depth
        )

    @classmethod
    def open(cls, folder: Path, traces: Traces) -> "StoredRun":
        """Open a run folder; WriterError: it is none."""
        return cls(open_run(folder), traces)

    @property
    def series(self) -> SeriesStart:
        """The series as it was announced."""
        return self.run.series

    @property
    def is_finished(self) -> bool:
        """Tell whether nothing more will come."""
        try:
            return self.run.report is not None
        except RtfocusError:
            return True

    def read_on(self) -> bool:
        """Take in what became durable since the last call; True: something did."""
        started_ns = self.series.started_ns
        for line in self._focus.lines():
            note_focus_line(self.traces, line, started_ns)
        lines = self._journal.lines()
        for line in lines:
            try:
                self._take(line, started_ns)
            except (KeyError, TypeError, ValueError):
                continue
        return bool(lines)

    def _take(self, line: Line, started_ns: int) -> None:
        status, index = line["status"], line.get("index") or {}
        place = place_of(index)
        if status in (MISSING, IN_ERROR):
            why = str(line.get("place") or line.get("reason") or status)
            self.lost[why] = self.lost.get(why, 0) + 1
        elif (captured_ns := line.get("captured_ns")) is not None:
            estimate = line.get("estimate") or {}
            point = Point(
                sequence=int(line["sequence"]),
                role=str(line.get("role", "record")),
                index=index,
                captured_ns=int(captured_ns),
                z_um=line.get("z_um"),
                defocus_um=estimate.get("defocus_um"),
                signed=bool(estimate.get("signed")),
                confidence=float(estimate.get("confidence") or 0.0),
                refusal=None,
            )
            self.traces.add(point, started_ns)
        with self._lock:
            if status == WRITTEN:
                self._lines[place] = msgspec.json.encode(line)
                self._order.append(place)
            # One that came twice, or to nobody knows where, hides none that is there.
            elif status in (MISSING, IN_ERROR) and index:
                self._lines.setdefault(place, msgspec.json.encode(line))

    @property
    def written(self) -> int:
        """Frames that are durable."""
        return len(self._order)

    def newest(
        self, p: int | None = None, c: int | None = None, z: int | None = None
    ) -> Place | None:
        """Return the newest written frame at a position, channel, slice; None: any."""
        axes = ((1, p), (2, c), (3, z))
        with self._lock:
            for place in reversed(self._order):
                if all(want in (None, place[axis]) for axis, want in axes):
                    return place
        return None

    def picture(self, place: Place, region: Cutout | None = None) -> Picture:
        """Read the planes of a place, or all pixels of a region of them.

        Raises
        ------
        InputError
            If the run has no such place.
        """
        self._refuse_outside(place)
        line = self.line(place)
        height, width = self.series.shape[:2]
        fields: dict[str, Any] = {
            "shape": (height, width),
            "index": dict(zip("tpcz", place, strict=True)),
        }
        if line is None or line["status"] != WRITTEN:
            return Picture(planes=(), flags=Flag.ABSENT, **fields)
        estimate = line.get("estimate") or {}
        fields |= {
            "sequence": -1 if line["sequence"] is None else int(line["sequence"]),
            "z_um": line.get("z_um"),
            "captured_s": _captured_s(line, self.series.started_ns),
            "exposure_ms": float(line.get("exposure_ms") or 0.0),
            "defocus_um": estimate.get("defocus_um"),
            "confidence": float(estimate.get("confidence") or 0.0),
            "signed": bool(estimate.get("signed")),
        }
        if region is not None:
            part = self._region(place, region)
            return Picture(planes=part, flags=Flag.DETAIL, **fields)
        planes, saturated = self._whole(place)
        read = {plane.kind for plane in planes}
        kinds = dict(_IMAGES) | MAPS
        stored = [kinds[name] for name in line.get("stored") or () if name in kinds]
        flags = Flag.NOTHING if read.issuperset(stored) else Flag.UNREADABLE
        return Picture(planes=planes, saturated=saturated, flags=flags, **fields)

    def plane(self, name: ImageName, place: Place) -> NDArray[np.generic]:
        """Return a stored plane, (y, x) or (y, x, 3).

        Raises
        ------
        InputError
            If there is none.
        """
        self._refuse_outside(place)
        t, p, c, z = place
        image = self.run.image(name, p)
        samples = 1 if name in MAPS else self.run.header.planes
        if t >= image.shape[0]:
            msg = f"'{name}' has no time point {t} yet"
            raise InputError(msg)
        try:
            if samples == 1:
                return image[t, c, z]
            colour = image[t, samples * c : samples * (c + 1), z]
        except (OSError, ValueError, RuntimeError) as error:
            msg = f"'{name}' at t {t}, p {p}, c {c}, z {z} cannot be read: {error}"
            raise InputError(msg) from error
        return np.moveaxis(colour, 0, -1)

    def line(self, place: Place) -> Line | None:
        """Return the journal's line of a place; None: there is none yet."""
        with self._lock:
            line = self._lines.get(place)
        return None if line is None else msgspec.json.decode(line)

    def _refuse_outside(self, place: Place) -> None:
        for axis, index in zip("tpcz", place, strict=True):
            size = self.series.sizes.get(axis, 1)
            if index < 0 or (size is not None and index >= size):
                msg = f"the run has no {axis} {index}; it has {size}"
                raise InputError(msg)

    def _whole(self, place: Place) -> tuple[tuple[PicturePlane, ...], int | None]:
        step = -(-max(self.series.shape[:2]) // SIDE_PX)
        planes: list[PicturePlane] = []
        saturated = None
        for name, kind in _IMAGES:
            pixels = self._if_there(name, place)
            if pixels is None:
                continue
            planes.append(PicturePlane(kind, pixels[::step, ::step], step=step))
            if kind is PlaneKind.RAW and np.isfinite(self.saturation_counts):
                saturated, blocks, side = saturation_blocks(
                    pixels, self.saturation_counts
                )
                if blocks is not None:
                    planes.append(PicturePlane(PlaneKind.SATURATION, blocks, step=side))
        return (*planes, *self._maps(place)), saturated

    def _maps(self, place: Place) -> Iterator[PicturePlane]:
        """Yield what is stated of the frame's tiles."""
        if (grid := self.run.header.grid) is None:
            return
        for name in get_args(ImageName):
            if name in MAPS and (values := self._if_there(name, place)) is not None:
                yield map_plane(MAPS[name], values, grid)

    def _region(self, place: Place, region: Cutout) -> tuple[PicturePlane, ...]:
        height, width = self.series.shape[:2]
        y0, y1 = max(region.y0, 0), min(region.y1, height)
        x0, x1 = max(region.x0, 0), min(region.x1, width)
        if y1 <= y0 or x1 <= x0:
            msg = f"the region {region} is not in a frame of {height} x {width} pixels"
            raise InputError(msg)
        planes = []
        for name, kind in _IMAGES:
            pixels = self._if_there(name, place)
            if pixels is not None:
                planes.append(PicturePlane(kind, pixels[y0:y1, x0:x1], x0, y0))
        return tuple(planes)

    def _if_there(self, name: ImageName, place: Place) -> NDArray[np.generic] | None:
        line = self.line(place)
        if line is None or name not in (line.get("stored") or ()):
            return None
        try:
            return self.plane(name, place)
        except InputError:
            return None


def numbers_of(run: Run) -> dict[str, Any]:
    """Return the numbers of a finished run in the form of a live one's."""
    report = run.report
    if report is None:
        return {}
    rate = report.get("throughput", {}).get("frames_per_s")
    stages = report.get("stages", {})
    return {
        **report.get("accounting", {}),
        # Of one frame there is no rate.
        **({"frames_per_s": rate} if rate is not None else {}),
        "latency_ms": {
            name: [stages[name].get("p50_ms"), stages[name].get("p99_ms")]
            for name in LATENCIES
            if name in stages
        },
        "restored": report.get("restored"),
        "flagged": report.get("flagged"),
        "backends": report.get("backends", {}),
        "slots": report.get("slots"),
    }
