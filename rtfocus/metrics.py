"""Metrics: frame accounting, stage times; how much of a series there is.

The loss identity ``acquired = written + dropped(by place) + in error`` holds
because every term is counted where it happens, never by subtraction. Before it
stands ``planned = acquired + lost by the camera + not acquired``.

``run``, ``acquire``, ``process`` and ``check`` judge a series by `Outcome`, so that
none of them calls complete what another does not.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from rtfocus.errors import ExitCode

# Stage times between 1 us and 1000 s in bins of 2 %: constant memory however
# long a run lasts, and percentiles good to 1 %.
_LOWEST_MS = 1e-3
_RATIO = 1.02
_BINS = 1050

STEPS = {
    "correct": "camera correction",
    "normalise": "preparing for the network",
    "classify": "estimating defocus",
    "restore": "restoring",
    "arrival_to_estimate": "arrival to defocus known",
    "capture_to_estimate": "exposure to defocus known",
    "arrival_to_result": "arrival to restored",
    "arrival_to_durable": "arrival to saved on disk",
}
"""What ``report.json`` measures, by the names that it has there."""


class Histogram:
    """Distribution of a time in milliseconds; percentiles good to 1 %."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, dtype=np.int64)
        self._lock = threading.Lock()
        self.total_ms = 0.0
        self.max_ms = 0.0

    def add(self, value_ms: float) -> None:
        """Count one value."""
        place = np.log(max(value_ms, _LOWEST_MS) / _LOWEST_MS) / np.log(_RATIO)
        with self._lock:
            self._counts[min(int(place), _BINS - 1)] += 1
            self.total_ms += value_ms
            self.max_ms = max(self.max_ms, value_ms)

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self._counts.sum())

    def percentile(self, percent: float) -> float | None:
        """Return the value below which `percent` of all lie; None when empty."""
        with self._lock:
            cumulative = np.cumsum(self._counts)
        if cumulative[-1] == 0:
            return None
        place = int(np.searchsorted(cumulative, percent / 100 * cumulative[-1]))
        # The centre of a bin, never beyond the largest value seen.
        return float(min(_LOWEST_MS * _RATIO ** (place + 0.5), self.max_ms))

    def summary(self) -> dict[str, float | int | None]:
        """Return count, mean, p50, p95, p99 and max as plain numbers."""
        count = self.count
        return {
            "count": count,
            "mean_ms": self.total_ms / count if count else None,
            "p50_ms": self.percentile(50),
            "p95_ms": self.percentile(95),
            "p99_ms": self.percentile(99),
            "max_ms": self.max_ms if count else None,
        }


@dataclass
class Accounting:
    """Where every acquired frame went; safe to use from any thread."""

    acquired: int = 0
    """Frames the sender says it acquired (``SeriesEnd.frames_sent``) or, before
    the end, the highest sequence seen + 1."""
    written: int = 0
    """Frames whose pixels and journal line are committed."""
    focus: int = 0
    """Autofocus probes: processed and counted, by design never stored."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Frames lost, by place: ``gap``, ``stall``, ``restart`` ..."""
    in_error: Counter[str] = field(default_factory=Counter)
    """Frames that arrived and could not be written, by place."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Messages that were no frames at all, by reason; outside the identity."""
    came_by: Counter[str] = field(default_factory=Counter)
    """Frames that came by ``shared memory`` or ``TCP``; outside the identity."""
    planned: int | None = None
    """Images planned; None: no plan, or one without an end."""
    camera_lost: int = 0
    """Planned images that the camera never gave, as the sender says."""
    not_acquired: int = 0
    """Planned images whose turn never came."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, term: str, place: str | None = None, number: int = 1) -> None:
        """Add to a term; `place` is required by the terms that are split by it."""
        with self._lock:
            if place is None:
                setattr(self, term, getattr(self, term) + number)
            else:
                getattr(self, term)[place] += number

    def set_acquired(self, number: int) -> None:
        """State how many frames the sender acquired; never decreases."""
        with self._lock:
            self.acquired = max(self.acquired, number)

    def end(
        self,
        frames_sent: int,
        *,
        planned: int | None,
        camera_lost: int = 0,
        not_acquired: int = 0,
    ) -> None:
        """State what the sender says at the end of its series.

        Whatever is planned, was not sent and not lost was not acquired, also where
        the sender is gone or says less.
        """
        self.set_acquired(frames_sent)
        with self._lock:
            self.planned, self.camera_lost = planned, camera_lost
            sent = self.acquired - self.focus
            remaining = 0 if planned is None else planned - sent - camera_lost
            self.not_acquired = max(not_acquired, remaining)

    def rejected_messages(self) -> dict[str, int]:
        """Return the messages that were no frames, by reason."""
        with self._lock:
            return dict(self.rejected)

    @property
    def unaccounted(self) -> int:
        """Frames that no term explains; 0 in every finished run."""
        lost = sum(self.dropped.values()) + sum(self.in_error.values())
        return self.acquired - self.written - self.focus - lost

    def summary(self) -> dict[str, Any]:
        """Return the terms as plain numbers."""
        with self._lock:
            return {
                "planned": self.planned,
                "camera_lost": self.camera_lost,
                "not_acquired": self.not_acquired,
                "acquired": self.acquired,
                "written": self.written,
                "focus": self.focus,
                "dropped": dict(self.dropped),
                "in_error": dict(self.in_error),
                "rejected_messages": dict(self.rejected),
                "unaccounted": self.unaccounted,
            }


class Terms(msgspec.Struct):
    """The terms as a report has them, see `Accounting.summary`; older have fewer."""

    acquired: int
    written: int
    focus: int
    dropped: dict[str, int]
    in_error: dict[str, int]
    planned: int | None = None
    camera_lost: int = 0
    not_acquired: int = 0
    unaccounted: int = 0
    rejected_messages: dict[str, int] = {}


class StageTimes:
    """One histogram per stage, made on first use."""

    def __init__(self) -> None:
        self._stages: defaultdict[str, Histogram] = defaultdict(Histogram)
        self._lock = threading.Lock()

    def add(self, stage: str, value_ms: float) -> None:
        """Count one time of one stage."""
        self[stage].add(value_ms)

    def __getitem__(self, stage: str) -> Histogram:
        with self._lock:
            return self._stages[stage]

    def summary(self) -> dict[str, dict[str, float | int | None]]:
        """Return every stage's summary by name."""
        return {name: stage.summary() for name, stage in list(self._stages.items())}


COMPLETED = "completed"
CANCELED = "canceled"
"""The user ended the microscope side."""
STOPPED_HERE = "stopped"
"""The user ended the processor side."""
BY_THE_USER = (CANCELED, STOPPED_HERE)
"""Reasons of an end that the user asked for."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How much of a series there is; ``str()`` is for people."""

    planned: int | None
    """Images planned; None: no plan, or one without an end."""
    present: int
    """Frames that are where they belong: sent, or written, depending on who asks."""
    reason: str
    """``completed``, ``canceled``, ``stopped``, or why the series broke off."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """Frames exposed and not kept, by what became of them."""
    not_acquired: int = 0
    """Planned images that were never exposed, because of `reason`."""

    @classmethod
    def of_report(cls, report: Mapping[str, Any]) -> "Outcome":
        """Judge a ``report.json``; reports of older versions name no plan."""
        terms = report["accounting"]
        lost = {"lost by the camera": terms.get("camera_lost", 0)}
        for name, label in (("dropped", "dropped"), ("in_error", "in error")):
            lost |= {f"{label} ({place})": n for place, n in terms[name].items()}
        return cls(
            planned=terms.get("planned"),
            present=terms["written"],
            reason=report.get("reason", COMPLETED),
            lost={term: number for term, number in lost.items() if number},
            not_acquired=terms.get("not_acquired", 0),
        )

    @property
    def was_stopped(self) -> bool:
        """Tell whether the user asked for the end."""
        return self.reason in BY_THE_USER

    @property
    def is_complete(self) -> bool:
        """Tell whether nothing is missing; a series without an end may be stopped."""
        if self.lost or self.not_acquired:
            return False
        if self.planned is None:
            return self.was_stopped or self.reason == COMPLETED
        return True

    @property
    def is_plain(self) -> bool:
        """Tell whether there is nothing to say but that the series is completed."""
        return self.is_complete and self.reason == COMPLETED

    @property
    def exit_code(self) -> ExitCode:
        """Return what a command that recorded this series ends with."""
        return ExitCode.DONE if self.is_complete else ExitCode.INCOMPLETE

    def __str__(self) -> str:
        planned = "" if self.planned is None else f"of {self.planned} planned "
        number = f"{self.present} {planned}frames"
        why = "" if self.reason == COMPLETED else f": {self.reason}"
        if self.is_complete:
            return (
                f"stopped by the user: {number}" if self.was_stopped else number + why
            )
        missing = [f"{n} {term}" for term, n in self.lost.items()]
        if self.not_acquired:
            missing.append(f"{self.not_acquired} not acquired")
        text = "; ".join([number, *([", ".join(missing)] if missing else [])])
        if self.was_stopped:
            return f"stopped by the user: {text}"
        return f"incomplete: {text}{why}"


def plan_in_words(terms: dict[str, Any]) -> str:
    """Spell out what became of the plan, before the frames came here."""
    return (
        f"{terms['planned']} planned = {terms['acquired'] - terms['focus']} acquired "
        f"+ {terms['camera_lost']} lost by the camera "
        f"+ {terms['not_acquired']} not acquired"
    )


def accounting_in_words(terms: dict[str, Any]) -> str:
    """Spell the loss identity out, every term with its places."""
    parts = [f"{terms['acquired']} acquired = {terms['written']} written"]
    if terms["focus"]:
        parts.append(f"{terms['focus']} focus probes")
    for name, word in (("dropped", "dropped"), ("in_error", "in error")):
        lost = [f"{n} {word} ({place})" for place, n in terms[name].items()]
        parts += lost or [f"0 {word}"]
    line = " + ".join(parts)
    if terms["unaccounted"]:
        line += f", and {terms['unaccounted']} unaccounted for"
    return line
