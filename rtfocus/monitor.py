"""Monitor: what a run is doing, for the live table, the preview and the report.

And the log of what autofocus did meanwhile.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from rtfocus.config import Config
from rtfocus.errors import RtfocusError, WriterError, writing
from rtfocus.frame import (
    Act,
    Estimate,
    FrameResult,
    SeriesEnd,
    SeriesStart,
    Slot,
)
from rtfocus.machine import RUN_CLOCK
from rtfocus.metrics import Accounting, StageTimes
from rtfocus.optics.normalisation import BELOW_OFFSET, told_below
from rtfocus.processing.camera import saturation_counts
from rtfocus.transport.messages import is_json
from rtfocus.transport.viewer import (
    ShownSeries,
    focus_line,
    in_words,
    requests_refused,
)
from rtfocus.workers import BoundedQueue

logger = logging.getLogger(__name__)

RATE_WINDOW_S = 5.0
"""Frames/s are those of the last few seconds, so that a stall shows at once."""

LATENCIES = ("capture_to_estimate", "arrival_to_result", "arrival_to_durable")
"""Stages whose percentiles a viewer shows."""


class RecentEstimate(NamedTuple):
    """One estimate among the last ones."""

    time_s: float
    """Of ``time.perf_counter``."""
    defocus_um: float | None
    """None: background alone."""
    z_offset_um: float
    """Distance from the reference plane of its stack."""
    c: int
    latency_ms: float
    """From arrival to estimate."""


_MOST_ESTIMATES = 512
_MOST_LINES = 1000


@dataclass
class Monitor:
    """Numbers of one series; the workers write them, anybody reads them."""

    accounting: Accounting = field(default_factory=Accounting)
    times: StageTimes = field(default_factory=StageTimes)
    series: SeriesStart | None = None
    estimate: Estimate | None = None
    """The newest."""
    focus: str | None = None
    """The newest move of autofocus in words; None: none yet."""
    queues: tuple[BoundedQueue[Any], ...] = ()
    free_slots: int = 0
    slots: int = 0
    durable_upto: int = 0
    free_bytes: int | None = None
    time_to_full_s: float | None = None
    backends: dict[str, str] = field(default_factory=dict)
    """What runs the engines, e.g. ``delpnet: openvino bf16``."""
    devices: Counter[str] = field(default_factory=Counter)
    """Frames that each device processed, e.g. ``GPU 0``."""
    restored: int = 0
    flagged: int = 0
    """Frames marked ``nan``, ``saturated`` or ``below_offset``."""
    held: Counter[str] = field(default_factory=Counter)
    """Frames of the focus channel that hold ``looked_at``, and those ``left_out``."""
    alarms: Counter[str] = field(default_factory=Counter)
    """Raised, delivered by each way, and failed."""
    broken_by: Callable[[], RtfocusError | None] = lambda: None
    """Asked at an end without an announcement: what failed, or None: it was stopped."""
    _estimates: deque[RecentEstimate] = field(
        default_factory=lambda: deque(maxlen=_MOST_ESTIMATES)
    )
    _estimated: int = 0
    """How many there were in all."""
    _before: int = 0
    """Frames that an earlier process wrote into this run."""
    _first_ns: int | None = None
    _last_ns: int = 0
    _offset_counts: float = 0.0
    _below_offset: set[str] = field(default_factory=set)
    """Channels of which it is told."""
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    _cpu_s: float = field(default_factory=time.process_time)

    def begin(self, series: SeriesStart, offset_counts: float = 0.0) -> None:
        """Forget the time spent waiting for the series, and what was before it."""
        self.series, self._offset_counts = series, offset_counts
        self._before = self.accounting.written
        self._cpu_s = time.process_time()

    def arrived(self, slot: Slot) -> None:
        """Note a frame that was received."""
        if self._first_ns is None:
            self._first_ns = slot.received_ns

    def estimated(self, slot: Slot, estimate: Estimate) -> None:
        """Note a frame whose defocus is known and published."""
        self.estimate = estimate
        latency_ms = _ms_since(slot.received_ns)
        self.times.add("arrival_to_estimate", latency_ms)
        defocus_um, z_offset_um = estimate.defocus_um, estimate.z_offset_um
        now_s, c = time.perf_counter(), estimate.index.get("c", 0)
        self._estimates.append(
            RecentEstimate(now_s, defocus_um, z_offset_um, c, latency_ms)
        )
        self._estimated += 1
        captured_ms = (RUN_CLOCK.now_ns() - estimate.captured_ns) / 1e6
        self.times.add("capture_to_estimate", captured_ms)

    def estimates_since(self, number: int) -> tuple[int, list[RecentEstimate]]:
        """Return how many estimates there were, and those from `number` on.

        At most the last 512 are kept.
        """
        recent, sampled = list(self._estimates), self._estimated
        return sampled, recent[max(0, len(recent) - (sampled - number)) :]

    @property
    def planned(self) -> int | None:
        """Images planned; None: no series yet, or one without an end."""
        return None if self.series is None else self.series.planned

    def finished(self, slot: Slot, result: FrameResult) -> None:
        """Note a frame whose result is known."""
        for stage, value_ms in result.stage_ms.items():
            self.times.add(stage, value_ms)
        self.times.add("arrival_to_result", _ms_since(slot.received_ns))
        self.devices[result.device] += 1
        self.restored += result.restored is not None
        self.flagged += bool(result.flags)
        if BELOW_OFFSET in result.flags:
            self._tell_below_offset(slot)

    def _tell_below_offset(self, slot: Slot) -> None:
        """Warn of a channel's first frame that lies below the camera's offset."""
        series, header = self.series, slot.header
        assert series is not None
        assert header is not None
        channel = series.channels[header.index.get("c", 0)].name
        if channel not in self._below_offset:
            self._below_offset.add(channel)
            fault = told_below(slot.pixels, self._offset_counts)
            logger.warning(
                "frame %d, channel '%s': %s", header.sequence, channel, fault
            )

    def committed(self, slot: Slot) -> None:
        """Note a frame that is on the disk."""
        self.times.add("arrival_to_durable", _ms_since(slot.received_ns))
        self._last_ns = time.perf_counter_ns()
        now = time.perf_counter()
        self._recent.append(now)
        while now - self._recent[0] > RATE_WINDOW_S:
            self._recent.popleft()

    @property
    def frames_per_s(self) -> float:
        """Frames written per second over the last few seconds."""
        number = len(self._recent)
        if number < 2:
            return 0.0
        # Asked for at every frame: counts no frame anew. In a stall the time since
        # the first one grows, and the rate falls.
        return (number - 1) / max(time.perf_counter() - self._recent[0], 1e-9)

    def throughput(self) -> dict[str, float | None]:
        """Return seconds and frames/s from the first arrival to the last commit.

        Both are of this process alone: a run that was resumed has more frames.
        """
        if self._first_ns is None or self._last_ns <= self._first_ns:
            return {"seconds": None, "frames_per_s": None, "cpu_s_per_frame": None}
        seconds = (self._last_ns - self._first_ns) / 1e9
        written = max(self.accounting.written - self._before, 1)
        cpu_s = time.process_time() - self._cpu_s
        return {
            "seconds": seconds,
            "frames_per_s": written / seconds,
            "cpu_s_per_frame": cpu_s / written,
        }

    def report(self) -> dict[str, Any]:
        """Return everything about the series as plain numbers."""
        return {
            "accounting": self.accounting.summary(),
            "restored": self.restored,
            "flagged": self.flagged,
            "throughput": self.throughput(),
            "stages": self.times.summary(),
            "backends": self.backends,
            "devices": dict(self.devices),
            "held": dict(self.held),
            "alarms": dict(self.alarms),
            "came_by": dict(self.accounting.came_by),
            "queues": {q.name: {"capacity": q.capacity} for q in self.queues},
            "slots": self.slots,
        }

    def snapshot(self) -> dict[str, Any]:
        """Return the few numbers that go with every estimate."""
        summary = self.accounting.summary()
        return {
            "frames_per_s": self.frames_per_s,
            "durable_upto": self.durable_upto,
            "free_slots": self.free_slots,
            "time_to_full_s": self.time_to_full_s,
            **summary,
        }

    def shown(
        self, config: Config, folder: Path, ask: Callable[[Act], None]
    ) -> ShownSeries:
        """Return the series under way as viewers see it.

        `ask` passes on what they ask the microscope side for.
        """
        assert self.series is not None
        dtype, depth = np.dtype(self.series.dtype), self.series.bit_depth
        return ShownSeries(
            self.series,
            folder.resolve(),
            self.observed,
            saturation_counts(config.camera, dtype, depth),
            ask,
            requests_refused(config, self.series),
        )

    def observed(self) -> dict[str, Any]:
        """Return what a viewer shows of the loop, as plain numbers."""
        return {
            **self.snapshot(),
            "slots": self.slots,
            "queues": {q.name: [len(q), q.capacity] for q in self.queues},
            "latency_ms": {
                stage: [self.times[stage].percentile(percent) for percent in (50, 99)]
                for stage in LATENCIES
            },
            "restored": self.restored,
            "flagged": self.flagged,
            "backends": dict(self.backends),
            "free_bytes": self.free_bytes,
        }


def _ms_since(received_ns: int) -> float:
    return (time.perf_counter_ns() - received_ns) / 1e6


FOCUS_LOG = "focus.ndjson"
"""Every image, decision and correction of autofocus, in the run folder."""


class FocusLog:
    """Processor side: ``focus.ndjson`` of a run, from the metadata of its frames.

    Parameters
    ----------
    folder
        The run folder.
    also
        Called with the lines of every frame that has some.
    """

    def __init__(
        self,
        folder: Path,
        also: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    ) -> None:
        self._path = folder / FOCUS_LOG
        self._also = also

    def take(self, slot: Slot) -> str | None:
        """Write down what the microscope side did since the frame before.

        Returns
        -------
        str or None
            The newest move in one line, for a terminal; None: there was none.
        """
        lines = _focus_lines(slot.frame().frame_meta)
        if not lines:
            return None
        self._write(lines)
        # What a peer sends in another form is kept, not shown.
        read = [found for line in lines if (found := focus_line(line)) is not None]
        texts = [text for line in read if (text := in_words(line)) is not None]
        return texts[-1] if texts else None

    def end(self, end: SeriesEnd) -> None:
        """Write down what the microscope side did after its last frame."""
        if lines := _entries(end.focus_log):
            self._write(lines)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._also(lines)
        with writing(self._path, WriterError), self._path.open("ab") as file:
            file.writelines(msgspec.json.encode(line) + b"\n" for line in lines)


def _focus_lines(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of ``focus.ndjson`` that a frame's metadata bring."""
    found: Any = meta
    for key in ("extra", "rtfocus", "focus_log"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return _entries(found)


def _entries(found: object) -> list[dict[str, Any]]:
    """Return what of a log is a line that a file can hold, up to a number of them."""
    lines = found[:_MOST_LINES] if isinstance(found, list | tuple) else ()
    return [one for one in lines if isinstance(one, dict) and is_json(one)]
