"""Commit: waits for pixels, then journals, then reports frames durable, in order.

One thread takes the frames in their order of arrival, so `durable` never has
holes; how many may be under way is bounded, and that bound is the backpressure.

`Tally` is what a journal adds up to, line by line. A run that is being written, a
resumed one, a check and a repair all count with it, so that their totals cannot differ.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from rtfocus.errors import FREE_SPACE, BusyError, WriterError, remedy
from rtfocus.frame import Slot
from rtfocus.machine import RUN_CLOCK, free_bytes
from rtfocus.metrics import Accounting, Terms
from rtfocus.writers.arrays import Commit
from rtfocus.writers.folder import RunLock
from rtfocus.writers.header import REJECTED_NAME, REPORT_NAME, write_json
from rtfocus.writers.journal import FOCUS, IN_ERROR, MISSING, WRITTEN, JournalFile, Line
from rtfocus.writers.places import (
    FrameSample,
    Index,
    Pixels,
    Plan,
    Planned,
    TakenPlaces,
    complete,
)
from rtfocus.writers.recovery import read_rejected

MOST_LISTED = 10_000
"""Missing places named one by one in the images' metadata; the journal has all."""


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
    sample: FrameSample = field(default_factory=FrameSample)
    """Of the stored frames."""

    def __post_init__(self) -> None:
        self.named = TakenPlaces(self.plan)
        """Places that hold a frame, or of which the journal says that it is lost."""

    def add(self, line: Line, pixels: Pixels | None = None) -> None:
        """Count one line; `pixels` are those of its frame, where they are at hand."""
        self.lines += 1
        if line["sequence"] is not None:
            self.next_sequence = max(self.next_sequence, line["sequence"] + 1)
        term = term_of(line)
        if term is not None:
            self.terms[term] += 1
        if line["status"] == MISSING:
            self._add_missing(line)
        else:
            self._add_frame(line, pixels or {})

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

    def _add_frame(self, line: Line, pixels: Pixels) -> None:
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
            self.sample.note(line["stored"], index, pixels)


def term_of(line: Line) -> tuple[str, str | None] | None:
    """Return a line's term of the loss identity and its place; None: not sent."""
    if line["status"] == MISSING:
        return None if line["sequence"] is None else ("dropped", "gap")
    return line["status"], line.get("place")


def report_of(folder: Path) -> dict[str, Any]:
    """Return ``report.json`` of a finished run; WriterError: it cannot be used."""
    try:
        report = msgspec.json.decode((folder / REPORT_NAME).read_bytes(), type=dict)
        msgspec.convert(report, _Report)
        terms = msgspec.convert(report["accounting"], Terms)
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        mend = f"rtfocus check {folder} --repair"
        msg = f"'{folder / REPORT_NAME}' cannot be read: {error}; run: {mend}"
        raise WriterError(msg) from error
    return report | {"accounting": report["accounting"] | msgspec.to_builtins(terms)}


_Numbers = dict[str, float | None]


class _Report(msgspec.Struct):
    """What is read of a report, so that damage in any of it is found at once."""

    accounting: Terms
    reason: str = ""
    set_aside: str = ""
    write_error: str = ""
    held: _Numbers = {}
    devices: _Numbers = {}
    came_by: _Numbers = {}
    throughput: _Numbers = {}
    warnings: list[str] = []
    totals: dict[str, Any] = {}
    backends: dict[str, str] = {}
    stages: dict[str, _Numbers] = {}


LONGEST_HOLD_S = 0.5
"""A frame in an open shard is written after this long even if no other comes: the
sender may be waiting for it, and a slow time-lapse must be safe soon."""


@dataclass(slots=True)
class Entry:
    """One frame, or one gap, on its way to the disk."""

    sequences: range
    """What becomes durable with it."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Journal lines to write once the pixels are committed."""
    slot: Slot | None = None
    """Freed when the pixels are no longer referenced."""
    futures: list[Commit] = field(default_factory=list)
    """Commits to wait for."""
    sealed: bool = False
    """False: still in an open shard or a gap without its place."""
    index: Index = field(default_factory=dict)
    """Place of a frame that is stored."""
    pixels: Pixels = field(default_factory=dict)
    """By image name; the arrays stay in the slot."""


class CommitQueue:
    """Bounded queue of entries and the thread that commits them.

    Parameters
    ----------
    capacity
        Entries under way; `put` waits beyond it.
    books
        Told about every entry that is committed or lost, by the commit thread only.
    seal
        Called from either thread when an entry has been held back for too long,
        or for as long as there is room: must seal all entries.
    """

    def __init__(
        self, capacity: int, books: "Bookkeeping", seal: Callable[[], None]
    ) -> None:
        self._capacity = capacity
        self._books = books
        self._seal = seal
        self._entries: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.error: WriterError | None = None
        """The first failed write; everything after it is lost too."""
        self._thread = threading.Thread(target=self._run, name="commit")
        self._thread.start()

    def __len__(self) -> int:
        return len(self._entries)

    def wait_room(self) -> None:
        """Wait until another entry may be put."""
        self._wait_below(self._capacity)

    def put(self, entry: Entry) -> None:
        """Append an entry; the caller has waited for room."""
        with self._changed:
            self._entries.append(entry)
            if entry.sealed:  # else no waiter can go on
                self._changed.notify_all()

    def seal(self, entry: Entry, futures: list[Commit]) -> None:
        """Say that all writes of an entry have been started."""
        with self._changed:
            entry.futures.extend(futures)
            entry.sealed = True
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything put so far is committed or lost."""
        self._wait_below(1)

    def close(self) -> None:
        """End the thread after what is in the queue; called twice does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _wait_below(self, number: int) -> None:
        """Wait for fewer entries; starts the held writes when only they are left."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        len(self._entries) < number
                        # The commit thread waits for something only `seal` starts.
                        or not (self._entries[0].sealed or self.error)
                    )
                )
                if len(self._entries) < number:
                    return
            self._seal()

    def _run(self) -> None:
        while True:
            with self._changed:
                ready = self._changed.wait_for(self._may_go_on, LONGEST_HOLD_S)
                if ready and not self._entries:
                    return
                oldest = self._entries[0] if self._entries else None
            if oldest is None:
                continue
            if not ready:
                self._start_held()
                continue
            self._finish(oldest)
            with self._changed:
                self._entries.popleft()
                self._changed.notify_all()

    def _may_go_on(self) -> bool:
        """Tell whether the oldest entry can be handled, or the thread can end."""
        if not self._entries:
            return self._closed
        return self._entries[0].sealed or self._closed or self.error is not None

    def _start_held(self) -> None:
        try:
            self._seal()
        except BaseException as error:  # kept: raised by the next append or close
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = self._books.explain(error)
            if self.error is not error:
                self.error.__cause__ = error

    def _finish(self, entry: Entry) -> None:
        """Commit one entry; a failure is kept for the producer, never swallowed."""
        failed = _failure(entry.futures)
        if failed is None and self.error is None and entry.sealed:
            try:
                self._books.committed(entry)
                return
            except BaseException as error:  # kept: raised by the next append or close
                failed = error
        if failed is not None:
            self._fail(failed)
        self._books.lost(entry)


def _failure(futures: list[Commit]) -> BaseException | None:
    """Wait for all futures, failed or not: their slot is referenced until then."""
    first: BaseException | None = None
    # The last to start is most often the last to end: one wait instead of one each.
    for future in reversed(futures):
        try:
            future.result()
        except Exception as error:  # returned, and kept by the caller
            first = error
    return first


_NOTE_EVERY_S = 1.0


@dataclass
class Bookkeeping:
    """Journals, counts and reports entries; called from the commit thread."""

    folder: Path
    """Named in errors."""
    lock: RunLock
    """The right to write the folder, looked at before each change."""
    journal: JournalFile
    tally: Tally
    accounting: Accounting
    """The run's loss identity."""
    on_durable: Callable[[int], None]
    """Called for every sequence in order, once pixels and line are committed."""
    on_free: Callable[[Slot], None]
    """Called when a slot's pixels are no longer referenced."""
    bytes_written: int = 0
    """Pixels committed, before compression."""

    def __post_init__(self) -> None:
        self._noted = read_rejected(self.folder)
        self._next_note_s = 0.0

    def committed(self, entry: Entry) -> None:
        """Journal an entry, count it and report it durable."""
        now_ns = RUN_CLOCK.now_ns()
        for line in entry.lines:
            line["durable_ns"] = now_ns
        self.lock.assert_held()
        self.journal.append(entry.lines)
        for line in entry.lines:
            self.tally.add(line, entry.pixels)
            term = term_of(line)
            # The receiver counted a gap when it met it.
            if term is not None and term[0] != "dropped":
                self.accounting.count(*term)
        self.bytes_written += sum(array.nbytes for array in entry.pixels.values())
        for sequence in entry.sequences:
            self.on_durable(sequence)
        if entry.slot is not None:
            self.on_free(entry.slot)
        self.note_rejected()

    def note_rejected(self, *, at_once: bool = False) -> None:
        """Keep what was refused, so that a later process of this run tells it too.

        At most once a second unless `at_once`: a flood must not cost a file per frame.
        """
        now_s = time.monotonic()
        if not at_once and now_s < self._next_note_s:
            return
        rejected = self.accounting.rejected_messages()
        if rejected == self._noted:
            return
        self._noted, self._next_note_s = rejected, now_s + _NOTE_EVERY_S
        # No reason to fail a run whose frames can still be written.
        with suppress(BusyError, WriterError):
            self.lock.assert_held()
            write_json(self.folder / REJECTED_NAME, rejected)

    def lost(self, entry: Entry) -> None:
        """Count a frame that could not be made durable."""
        if entry.slot is not None:
            self.accounting.count("in_error", "write")
            self.on_free(entry.slot)

    def explain(self, error: BaseException) -> WriterError:
        """Name the place, the cause and the remedy of a failed write."""
        if isinstance(error, BusyError):
            return error
        text, what = str(error), f"write to '{self.folder}' failed"
        helps = remedy(error.__cause__ or error, text)
        if helps == FREE_SPACE:
            free = free_bytes(self.folder)
            what = f"disk full: '{self.folder}' has {free / 1e6:.1f} MB free"
        repair = f"then run: rtfocus check {self.folder} --repair ({text})"
        return WriterError(f"{what}; what is durable stays; {helps}, {repair}")


@dataclass(frozen=True, slots=True)
class WriterStatus:
    """The writer at one moment."""

    durable_upto: int
    """All sequences below it are durable."""
    outstanding: int
    """Frames and gaps under way."""
    bytes_written: int
    """Pixels committed by this process, before compression."""
    free_bytes: int
    """On the disk of the run folder."""
    time_to_full_s: float | None
    """At the present rate; None while the disk does not fill."""
