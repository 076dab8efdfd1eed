"""Tally: what a journal adds up to, line by line.

A run that is being written, a resumed one, a check and a repair all count with
it, so that their totals cannot differ.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rtfocus.metrics import Accounting
from rtfocus.writers.journal import FOCUS, IN_ERROR, MISSING, WRITTEN, Line
from rtfocus.writers.places import Plan, Planned, TakenPlaces, complete

MOST_LISTED = 10_000
"""Missing places named one by one in the images' metadata; the journal has all."""

GAP = "gap"


@dataclass
class Tally:
    """Totals of the journal lines seen so far."""

    plan: Plan
    lines: int = 0
    next_sequence: int = 0
    """First sequence that is not durable."""
    extent: int = 0
    """Time points that hold a frame or a known gap."""
    terms: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    """Number of frames by term of the loss identity and place."""
    stored: Counter[str] = field(default_factory=Counter)
    """Number of frames by image."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why stored frames are not restored."""
    errors: int = 0
    """Frames whose processing failed."""
    flags: Counter[str] = field(default_factory=Counter)
    engines: set[str] = field(default_factory=set)
    missing: list[Line] = field(default_factory=list)
    """The first `MOST_LISTED` places without a frame."""
    missing_count: int = 0
    before: Planned | None = None
    """The last place that a frame had or should have had."""

    def __post_init__(self) -> None:
        self.named = TakenPlaces(self.plan)
        """Places that hold a frame, or of which it is journalled that it is lost."""

    def add(self, line: Line) -> None:
        """Count one line."""
        self.lines += 1
        if line["sequence"] is not None:
            self.next_sequence = max(self.next_sequence, line["sequence"] + 1)
        term = term_of(line)
        if term is not None:
            self.terms[term] += 1
        if line["status"] == MISSING:
            self._add_missing(line)
        else:
            self._add_frame(line)

    def restore(self, accounting: Accounting) -> None:
        """Bring the accounting of a new process to what is already durable."""
        accounting.set_acquired(self.next_sequence)
        for (term, place), number in self.terms.items():
            accounting.count(term, place, number)

    def totals(self) -> dict[str, Any]:
        """Return the totals as plain numbers, as kept in ``zarr.json``."""
        return {
            "frames": self.terms[WRITTEN, None],
            "stored": dict(self.stored),
            "focus": self.terms[FOCUS, None],
            "missing": self.missing_count,
            "in_error": {
                str(place): number
                for (term, place), number in self.terms.items()
                if term == IN_ERROR
            },
            "not_restored": dict(self.skipped),
            "processing_errors": self.errors,
            "flags": dict(self.flags),
            "engines": sorted(self.engines),
        }

    def _add_missing(self, line: Line) -> None:
        self.missing_count += 1
        if line["index"] is not None:
            self.extent = max(self.extent, line["index"]["t"] + 1)
            self.before = Planned(None, line["index"])
            self.named.take(complete(line["index"]))
        if len(self.missing) < MOST_LISTED:
            self.missing.append(line)

    def _add_frame(self, line: Line) -> None:
        self.errors += "error" in line
        self.flags.update(line.get("flags") or ())
        self.engines.update((line.get("engines") or {}).values())
        if line["status"] == WRITTEN:
            index = complete(line["index"])
            self.extent = max(self.extent, index["t"] + 1)
            self.stored.update(line["stored"])
            if line.get("skipped"):
                self.skipped[line["skipped"]] += 1
            self.before = Planned(line["event_index"], index)
            self.named.take(index)


def term_of(line: Line) -> tuple[str, str | None] | None:
    """Return a line's term of the loss identity and its place; None: not sent."""
    if line["status"] == MISSING:
        return None if line["sequence"] is None else ("dropped", GAP)
    return line["status"], line.get("place")
