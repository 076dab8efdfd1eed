"""Run: writes one series into its run folder.

::

    append ─▶ open shards ─▶ tensorstore ─▶ commit thread ─▶ journal ─▶ on_durable
              (held)         (outstanding)  (in order)                   on_free

A frame's pixels stay in its slot until they are committed; nothing else holds
frames, so `outstanding` bounds the memory and a slow disk makes `append` wait.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rtfocus.config.processor import StoreConfig
from rtfocus.frame import FrameResult, SeriesEnd, SeriesStart, TileGrid
from rtfocus.metrics import Accounting
from rtfocus.slots import Slot
from rtfocus.writers.commit import CommitQueue, Entry
from rtfocus.writers.disk import DiskWatch
from rtfocus.writers.finish import finish_run
from rtfocus.writers.folder import prepare_folder
from rtfocus.writers.gaps import GapFinder, Missing
from rtfocus.writers.header import JOURNAL_NAME, RunHeader, read_header
from rtfocus.writers.images import RunImages
from rtfocus.writers.journal import (
    FOCUS,
    IN_ERROR,
    WRITTEN,
    JournalFile,
    frame_line,
    missing_line,
    read_journal,
)
from rtfocus.writers.ledger import Ledger
from rtfocus.writers.plan import Plan, Planned, complete
from rtfocus.writers.shards import Held, OpenShards
from rtfocus.writers.tally import TakenPlaces, Tally


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


def open_run(
    folder: Path,
    series: SeriesStart,
    store: StoreConfig,
    *,
    grid: TileGrid | None,
    restored: bool,
    accounting: Accounting,
    on_durable: Callable[[int], None],
    on_free: Callable[[Slot], None],
    provenance: dict[str, Any],
) -> "RunWriter":
    """Open a new run folder, or the one of this series that was cut off.

    All metadata is complete, and valid for readers, when this returns.

    Parameters
    ----------
    folder
        ``NAME.rtfocus``; its parents are made.
    series
        What will come.
    store
        What is written and how.
    grid
        Of the defocus maps; None: no classifier, no maps.
    restored
        Whether there is a restored image.
    accounting
        Receives ``written``, ``focus`` and ``in_error``; those of an earlier
        process are added when a run is resumed.
    on_durable
        Called in order for every sequence, from the commit thread.
    on_free
        Called with each appended slot once, from the commit thread.
    provenance
        Kept in the run folder: config, versions.

    Raises
    ------
    WriterError
        If the folder holds another run, or the disk has too little space.
    """
    header = RunHeader(series, store, grid, restored, provenance)
    resumes = prepare_folder(folder, header)
    return RunWriter(
        folder,
        read_header(folder) if resumes else header,
        accounting=accounting,
        on_durable=on_durable,
        on_free=on_free,
        resumes=resumes,
    )


class RunWriter:
    """Appends frames of one series; made by `open_run`, used from one thread.

    A failed write fails the run: the next `append` or `close` raises it. Use as a
    context manager: leaving it without `close` is an `abort`.
    """

    def __init__(
        self,
        folder: Path,
        header: RunHeader,
        *,
        accounting: Accounting,
        on_durable: Callable[[int], None],
        on_free: Callable[[Slot], None],
        resumes: bool,
    ) -> None:
        self.folder = folder
        self._header = header
        self._accounting = accounting
        self._tally = Tally(Plan(header.series))
        self._taken = TakenPlaces(self._tally.plan)
        if resumes:
            self._read_back()
        self.next_sequence = self._tally.next_sequence
        """First sequence that is not durable: where a resumed run goes on."""
        self._images = RunImages(folder, header, create=not resumes)
        if not resumes:
            header.write(folder)
        self._disk = DiskWatch(folder, int(header.store.min_free_mb * 1e6))
        self._gaps = GapFinder(self._tally.plan, self._tally.before)
        self._unplaced: list[Entry] = []
        """Gaps that wait for their places."""
        self._journal = JournalFile(folder / JOURNAL_NAME, fsync=header.store.fsync)
        self._ledger = Ledger(
            folder, self._journal, self._tally, accounting, on_durable, on_free
        )
        self._commits = CommitQueue(header.store.outstanding, self._ledger, self._seal)
        self._shards = OpenShards(
            self._images, header.store.shard_frames, self._commits.seal
        )
        self._order = threading.RLock()
        """Held while shards or gaps change: the commit thread may start held writes."""
        self._failure_raised = False

    # -- frames ---------------------------------------------------------------

    def append(self, slot: Slot, result: FrameResult) -> None:
        """Start to write a frame; waits while `outstanding` frames are under way.

        Raises
        ------
        WriterError
            If an earlier write failed or the disk is nearly full.
        """
        self._store(slot, result, error=None)

    def record_error(self, slot: Slot, reason: str) -> None:
        """Store the raw pixels of a frame whose processing failed."""
        self._store(slot, None, error=reason)

    def record_focus(self, slot: Slot, result: FrameResult) -> None:
        """Journal an autofocus probe; it is not stored."""
        self._begin()
        self._put_line(slot, FOCUS, result)

    def mark_missing(self, first: int, count: int, reason: str) -> None:
        """Mark frames that never arrived, at their own places."""
        self._begin()
        entry = Entry(sequences=range(first, first + count))
        with self._order:
            self._gaps.lose(first, count, reason)
            self._unplaced.append(entry)
            self._commits.put(entry)

    # -- end ------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until everything appended is durable or lost, and counted."""
        with self._order:
            self._shards.flush()
            self._place_gaps(self._gaps.end())
        self._commits.drain()

    def drain(self) -> None:
        """Wait until everything appended is durable; raises a failed write."""
        self.settle()
        self._raise_failure()

    def close(self, end: SeriesEnd, report: dict[str, Any]) -> Path:
        """Finish the run folder: lengths, totals, journal arrays, report.

        After a failed write it finishes what is durable.

        Parameters
        ----------
        end
            How the series ended.
        report
            Goes into ``report.json``; its accounting is brought up to date.

        Returns
        -------
        Path
            The run folder.

        Raises
        ------
        WriterError
            If a write failed that nothing else has raised yet, or the folder
            cannot be finished.
        """
        self.settle()
        self._stop()
        self._accounting.set_acquired(end.frames_sent)
        report = report | {
            "accounting": self._accounting.summary(),
            "reason": end.reason,
        }
        if self._commits.error is not None:
            report["write_error"] = str(self._commits.error)
        finish_run(self.folder, self._header, self._images, self._tally, report)
        if not self._failure_raised:
            self._raise_failure()
        return self.folder

    def abort(self) -> None:
        """Discard what is not durable; the folder can be resumed or repaired."""
        self._stop()

    def status(self) -> WriterStatus:
        """Return numbers for the live display; cheap, from any thread."""
        return WriterStatus(
            durable_upto=self._tally.next_sequence,
            outstanding=len(self._commits),
            bytes_written=self._ledger.bytes_written,
            free_bytes=self._disk.sample(),
            time_to_full_s=self._disk.time_to_full_s(),
        )

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.abort()

    # -- inside ---------------------------------------------------------------

    def _read_back(self) -> None:
        """Take up what an earlier process made durable."""
        for line in read_journal(self.folder / JOURNAL_NAME):
            self._tally.add(line)
            if line["status"] == WRITTEN:
                self._taken.take(complete(line["index"]))
        self._tally.restore(self._accounting)

    def _begin(self) -> None:
        """Wait for room, unless the run has failed or the disk is nearly full."""
        self._raise_failure()
        self._disk.check()
        self._commits.wait_room()
        self._raise_failure()

    def _raise_failure(self) -> None:
        error = self._commits.error
        if error is not None:
            self._failure_raised = True
            raise error

    def _stop(self) -> None:
        """End the commit thread and close the journal."""
        self._commits.close()
        self._journal.close()

    def _store(self, slot: Slot, result: FrameResult | None, error: str | None) -> None:
        """Start the writes of a frame, or journal why it has no place."""
        self._begin()
        with self._order:
            self._arrange(slot, result, error)

    def _arrange(
        self, slot: Slot, result: FrameResult | None, error: str | None
    ) -> None:
        header = slot.frame()
        index = complete(header.index)
        if not self._tally.plan.contains(index):
            self._put_line(slot, IN_ERROR, result, place="index", error=error)
            return
        if index in self._taken:
            # The first frame of a place stays; this one is counted, not stored.
            self._put_line(slot, IN_ERROR, result, place="duplicate", error=error)
            return
        self._place_gaps(self._gaps.arrive(Planned(header.event_index, index)))
        pixels = self._images.pixels(slot.pixels, result)
        if not pixels:
            self._put_line(slot, IN_ERROR, result, place="restore", error=error)
            return
        self._taken.take(index)
        line = frame_line(
            header, WRITTEN, _unix_ns(slot), result, stored=tuple(pixels), error=error
        )
        entry = Entry(
            sequences=range(header.sequence, header.sequence + 1),
            lines=[line],
            slot=slot,
            size_bytes=sum(array.nbytes for array in pixels.values()),
        )
        self._commits.put(entry)
        self._shards.add(Held(entry, index, pixels))

    def _put_line(
        self,
        slot: Slot,
        status: str,
        result: FrameResult | None,
        place: str | None = None,
        error: str | None = None,
    ) -> None:
        """Journal a frame without pixels."""
        header = slot.frame()
        line = frame_line(
            header, status, _unix_ns(slot), result, place=place, error=error
        )
        sequences = range(header.sequence, header.sequence + 1)
        self._commits.put(Entry(sequences, [line], slot, sealed=True))

    def _seal(self) -> None:
        """Start everything that is held back, because somebody waits for it."""
        with self._order:
            self._shards.flush()
            self._place_gaps(self._gaps.postpone())

    def _place_gaps(self, found: list[Missing]) -> None:
        """Journal lost frames, now that their places are known as well as can be."""
        unplaced, self._unplaced = self._unplaced, []
        not_sent = [missing for missing in found if missing.sequence is None]
        for entry in unplaced:
            entry.lines += [
                missing_line(missing)
                for missing in found
                if missing.sequence is not None and missing.sequence in entry.sequences
            ]
            self._commits.seal(entry, [])
        if not_sent:
            lines = [missing_line(missing) for missing in not_sent]
            self._commits.put(Entry(range(0), lines, sealed=True))


def _unix_ns(slot: Slot) -> int:
    """Return the frame's arrival as Unix time; the slot has the monotonic clock."""
    return time.time_ns() - (time.monotonic_ns() - slot.received_ns)
