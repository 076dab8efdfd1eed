"""Report: how an acquisition went, counted where it happened."""

from dataclasses import dataclass, field

from rtfocus.metrics import Histogram
from rtfocus.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Lateness:
    """Actual against planned start of the exposures, in ms."""

    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class AcquisitionReport:
    """Result of one series on the microscope side."""

    series_uid: str
    frames: int
    """Frames handed to the sink."""
    planned: int | None
    """Frames planned; None: no plan, or one without an end."""
    camera_lost: int
    """Frames the camera exposed, or should have, that never arrived."""
    not_acquired: int
    """Planned frames whose turn never came: planned = frames + lost + these."""
    reason: str
    """``completed``, ``canceled``, or why the series broke off."""
    seconds: float
    """From the first event to the last frame."""
    lateness: Lateness | None
    """None: the plan names no times."""
    most_waiting: int | None
    """Most images that waited in Micro-Manager's buffer; None: it was not used."""
    least_free: int | None
    """Fewest images that still had room in it."""
    warnings: tuple[str, ...] = ()
    """What Micro-Manager complained of without stopping."""

    @property
    def outcome(self) -> Outcome:
        """How much of the plan was handed to the sink."""
        lost = {"lost by the camera": self.camera_lost} if self.camera_lost else {}
        return Outcome(self.planned, self.frames, self.reason, lost, self.not_acquired)

    def __str__(self) -> str:
        """Sum up in a few lines for a terminal."""
        rate = self.frames / self.seconds if self.seconds > 0 else 0.0
        done = "completed: " if self.outcome.is_complete else ""
        if self.outcome.was_stopped:
            done = ""
        lines = [f"{done}{self.outcome}, in {self.seconds:.1f} s ({rate:.1f} frames/s)"]
        if self.lateness is not None:
            late = self.lateness
            lines.append(
                f"late by p50 {late.p50_ms:.0f}, p99 {late.p99_ms:.0f}, "
                f"max {late.max_ms:.0f} ms"
            )
        if self.most_waiting is not None:
            lines.append(
                f"Micro-Manager's buffer: at most {self.most_waiting} images waiting, "
                f"room for at least {self.least_free} more"
            )
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


@dataclass
class Observations:
    """What is noted while frames come in."""

    camera_lost: int = 0
    most_waiting: int | None = None
    least_free: int | None = None
    late: Histogram = field(default_factory=Histogram)

    def note_buffer(self, waiting: int, free: int) -> None:
        """Note how full Micro-Manager's buffer is."""
        self.most_waiting = max(self.most_waiting or 0, waiting)
        self.least_free = (
            free if self.least_free is None else min(self.least_free, free)
        )

    def note_start(self, planned_s: float, actual_s: float) -> None:
        """Note when an exposure should have started, and did."""
        self.late.add(max(0.0, actual_s - planned_s) * 1e3)

    def lateness(self) -> Lateness | None:
        """Return the distribution; None when no exposure had a planned time."""
        p50, p99 = self.late.percentile(50), self.late.percentile(99)
        if p50 is None or p99 is None:
            return None
        return Lateness(p50, p99, self.late.max_ms)
