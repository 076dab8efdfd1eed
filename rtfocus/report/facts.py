"""Facts: what a run folder says, as arrays and a few frames; nothing else is asked.

A folder may be cut off, damaged or a million frames long: lines of the journal that
are no lines are counted, and of a long journal every n-th frame is read.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import WriterError, number_of
from rtfocus.metrics import Accounting, Outcome
from rtfocus.monitor import FOCUS_LOG
from rtfocus.transport.viewer import (
    FailureLine,
    FocusLine,
    HoldLine,
    VerdictLine,
    focus_line,
)
from rtfocus.writers.arrays import FrameArray
from rtfocus.writers.commit import report_of
from rtfocus.writers.header import (
    DEFOCUS,
    JOURNAL_NAME,
    RAW,
    RESTORED,
    RunHeader,
    image_specs,
    read_header,
)
from rtfocus.writers.layout import image_groups

MOST_FRAMES = 50_000
"""Frames read of a journal; of a longer one every n-th."""
_MOST_FOCUS_LINES = 100_000
_TYPICAL_LINE_BYTES = 600


class _Estimate(msgspec.Struct):
    defocus_um: float | None = None
    confidence: float | None = None
    signed: bool = False


class _JournalFrame(msgspec.Struct):
    """What the page shows of a line of the journal."""

    status: str
    sequence: int | None = None
    index: dict[str, Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]] | None = None
    captured_ns: int | None = None
    received_ns: int | None = None
    durable_ns: int | None = None
    z_um: float | None = None
    estimate: _Estimate | None = None
    engines: dict[str, str] | None = None
    skipped: str | None = None
    error: str | None = None
    reason: str | None = None
    place: str | None = None
    flags: list[str] | None = None
    stored: list[str] = []
    expected_error_counts: float | None = None


@dataclass(frozen=True)
class ShownFrame:
    """One frame with its images."""

    title: str
    """Which it is: best, median or worst."""
    index: dict[str, int]
    defocus_um: float | None
    raw: NDArray[Any]
    restored: NDArray[Any] | None
    defocus: NDArray[Any] | None
    """Tile by tile, um; NaN = background."""


@dataclass
class RunFacts:
    """A run folder as the page needs it."""

    folder: Path
    header: RunHeader
    report: dict[str, Any] | None
    """``report.json``; None: the run is not finished."""
    every: int = 1
    """Every so many-th frame of the journal was read."""
    damaged_lines: int = 0
    seconds: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Since the first frame, by frame."""
    defocus_um: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    z_um: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    durable_ms: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """From arrival to durable, by frame."""
    position: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    signed: bool = False
    statuses: Counter[str] = field(default_factory=Counter)
    engines: dict[str, Counter[str]] = field(default_factory=dict)
    """By channel: what worked on its frames."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why frames are missing, in error or not restored."""
    flags: Counter[str] = field(default_factory=Counter)
    focus_log: list[FocusLine] = field(default_factory=list)
    first_ns: int = 0
    """Unix time of the first frame."""
    frames: list[_JournalFrame] = field(default_factory=list, repr=False)

    @property
    def left_out_by_hold(self) -> str | None:
        """How many frames hold had no time to look at; None: there was none."""
        return left_out_by_hold(self.report or {})

    @property
    def errors_said(self) -> str:
        """What is expected to be left in restored frames; empty: not known."""
        errors = [f.expected_error_counts for f in self.frames]
        known = [counts for counts in errors if counts is not None]
        if not known:
            return ""
        low, middle, high = np.percentile(known, (5, 50, 95))
        return (
            f"Error expected in restored frames (RMS): {middle:.3g} counts in median, "
            f"{low:.3g} to {high:.3g} in nine of ten"
        )

    @property
    def outcome(self) -> Outcome | None:
        """Whether everything planned is there; None: not finished."""
        return None if self.report is None else Outcome.of_report(self.report)

    @property
    def accounting(self) -> dict[str, Any]:
        """The terms of the loss identity; of an unfinished run, as far as known."""
        if self.report is not None:
            return dict(self.report["accounting"])
        terms = Accounting(planned=self.header.series.planned)
        for status, number in self.statuses.items():
            if status in ("written", "focus"):
                terms.count(status, number=number * self.every)
        terms.dropped.update(
            _nothing_less(self.statuses["missing"] * self.every, "gap")
        )
        broken = _nothing_less(self.statuses["in_error"] * self.every, "journal")
        terms.in_error.update(broken)
        lost = sum(terms.dropped.values()) + sum(terms.in_error.values())
        terms.set_acquired(terms.written + terms.focus + lost)
        return terms.summary()


def read_facts(folder: Path) -> RunFacts:
    """Read a run folder, finished or not.

    Raises
    ------
    WriterError
        If it is no run folder.
    """
    facts = RunFacts(folder, read_header(folder), None)
    with suppress(WriterError):  # of what is damaged the page says so
        facts.report = report_of(folder)
    _read_journal(facts)
    facts.focus_log = read_focus_log(folder)
    return facts


def left_out_by_hold(report: dict[str, Any]) -> str | None:
    """Tell how many frames hold had no time to look at; None: there was none."""
    held = report.get("held", {})
    if not (left_out := held.get("left_out", 0)):
        return None
    every = left_out + held.get("looked_at", 0)
    return f"hold looked at {every - left_out} of {every} frames: they came too fast"


def throughput_in_words(report: dict[str, Any]) -> str | None:
    """Tell how fast a run was; None: not known, as of one frame."""
    throughput = report.get("throughput", {})
    parts = ("frames_per_s", "seconds", "cpu_s_per_frame")
    if not throughput.get("frames_per_s") or None in map(throughput.get, parts):
        return None
    return (
        f"{throughput['frames_per_s']:.1f} frames/s over {throughput['seconds']:.1f} "
        f"s, {1e3 * throughput['cpu_s_per_frame']:.0f} ms CPU time per frame"
    )


def read_focus_log(folder: Path) -> list[FocusLine]:
    """Return the decisions of a run; empty where autofocus did nothing."""
    path = folder / FOCUS_LOG
    if not path.is_file():
        return []
    try:
        texts = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        msg = f"focus log '{path}' cannot be read: {error.strerror}"
        raise WriterError(msg) from error
    lines = []
    for text in texts:
        # The last line of a run that was killed may be half.
        with suppress(ValueError, RecursionError):
            lines.append(focus_line(msgspec.json.decode(text)))
    return [line for line in lines[:_MOST_FOCUS_LINES] if line is not None]


def focus_in_words(lines: list[FocusLine]) -> str:
    """Sum up searches, corrections and drift in one line."""
    verdicts = [line for line in lines if isinstance(line, VerdictLine)]
    holds = [line for line in lines if isinstance(line, HoldLine)]
    count = sum(line.focused for line in verdicts)
    images = sum(line.images for line in verdicts)
    broken_off = sum(isinstance(line, FailureLine) for line in lines)
    searches = len(verdicts) + broken_off
    text = f"autofocus: {count} of {searches} searches found focus, {images} images"
    if broken_off:
        text += f", {broken_off} broke off"
    if holds:
        moves = sum(bool(line.step_um) for line in holds)
        held = number_of(len(holds), "stack")
        text += f"; held {held} with {number_of(moves, 'correction')}, drift "
        text += f"{holds[-1].drift_um:+.1f} um"
    return text


def shown_frames(facts: RunFacts) -> list[ShownFrame]:
    """Return the frames nearest to focus, in the middle, and farthest, with pixels.

    Where no defocus is known: the first, the middle and the last. A frame that cannot
    be read is left out.
    """
    stored = [
        frame
        for frame in facts.frames
        if frame.status == "written" and frame.index is not None and RAW in frame.stored
    ]
    far = [(abs(um), f) for f in stored if (um := _defocus(f)) is not None]
    ordered = [frame for _, frame in sorted(far, key=lambda pair: pair[0])] or stored
    names = ("best", "median", "worst") if far else ("first", "middle", "last")
    if not ordered:
        return []
    places = (0, (len(ordered) - 1) // 2, len(ordered) - 1)
    chosen: dict[int, str] = {}
    for place, name in zip(places, names, strict=True):
        chosen[place] = f"{chosen[place]}, {name}" if place in chosen else name
    images = _Images(facts.folder, facts.header)
    frames = (images.frame(ordered[place], name) for place, name in chosen.items())
    return [frame for frame in frames if frame is not None]


def _defocus(frame: _JournalFrame) -> float | None:
    return None if frame.estimate is None else frame.estimate.defocus_um


def _nothing_less(number: int, place: str) -> dict[str, int]:
    return {place: number} if number else {}


def _journal(path: Path, facts: RunFacts) -> Iterator[_JournalFrame]:
    """Yield every n-th line that is one."""
    decoder = msgspec.json.Decoder(_JournalFrame)
    try:
        lines = path.stat().st_size // _TYPICAL_LINE_BYTES
        facts.every = max(1, -(-lines // MOST_FRAMES))
        with path.open("rb") as file:
            for number, text in enumerate(file):
                if number % facts.every:
                    continue
                try:
                    yield decoder.decode(text)
                except (msgspec.MsgspecError, ValueError, RecursionError):
                    # A line being written is no damage; it is the last one then.
                    facts.damaged_lines += text.endswith(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        msg = f"journal '{path}' cannot be read: {error.strerror}"
        raise WriterError(msg) from error


def _read_journal(facts: RunFacts) -> None:
    frames = list(_journal(facts.folder / JOURNAL_NAME, facts))
    channels = [channel.name for channel in facts.header.series.channels]
    for frame in frames:
        facts.statuses[frame.status] += 1
        facts.flags.update(frame.flags or ())
        why = frame.error or frame.reason or frame.skipped or frame.place
        if why and frame.status != "focus":
            facts.reasons[why] += 1
        c = (frame.index or {}).get("c", 0)
        if frame.engines and 0 <= c < len(channels):
            worked = facts.engines.setdefault(channels[c], Counter())
            worked.update(frame.engines.values())
    exposed = [f for f in frames if f.captured_ns is not None and f.status != "missing"]
    facts.frames = exposed
    facts.first_ns = min((f.captured_ns or 0 for f in exposed), default=0)
    facts.seconds = (
        _column((f.captured_ns or 0) - facts.first_ns for f in exposed) / 1e9
    )
    facts.defocus_um = _column(_or_nan(_defocus(f)) for f in exposed)
    facts.z_um = _column(_or_nan(f.z_um) for f in exposed)
    facts.durable_ms = _column(_durable_ms(f) for f in exposed)
    facts.position = np.array([(f.index or {}).get("p", 0) for f in exposed], np.int64)
    facts.signed = any(f.estimate is not None and f.estimate.signed for f in exposed)


def _column(values: Iterator[float]) -> NDArray[np.float64]:
    return np.fromiter(values, dtype=np.float64)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _durable_ms(frame: _JournalFrame) -> float:
    if frame.durable_ns is None or frame.received_ns is None:
        return np.nan
    return (frame.durable_ns - frame.received_ns) / 1e6


class _Images:
    """The images of a run, opened where a frame of them is wanted."""

    def __init__(self, folder: Path, header: RunHeader) -> None:
        self._folder, self._header = folder, header
        self._specs = {spec.name: spec for spec in image_specs(header)}

    def frame(self, frame: _JournalFrame, title: str) -> ShownFrame | None:
        """Read a frame; None where its raw pixels cannot be read."""
        index = {axis: (frame.index or {}).get(axis, 0) for axis in "tpcz"}
        raw = self._read(RAW, index)
        if raw is None:
            return None
        others = {
            name: self._read(name, index) if name in frame.stored else None
            for name in (RESTORED, DEFOCUS)
        }
        return ShownFrame(
            title, index, _defocus(frame), raw, others[RESTORED], others[DEFOCUS]
        )

    def _read(self, name: str, index: dict[str, int]) -> NDArray[Any] | None:
        spec = self._specs.get(name)
        if spec is None:
            return None
        sizes = tuple(self._header.size(axis) for axis in "tcz")
        try:
            group = image_groups(self._folder, self._header, spec)[index["p"]]
            array = FrameArray(
                group / "0",
                spec,
                (sizes[0], sizes[1] or 1, sizes[2] or 1),
                self._header.store,
                create=False,
            )
            return array.read(index["t"], index["c"], index["z"])
        except (WriterError, IndexError):
            return None
