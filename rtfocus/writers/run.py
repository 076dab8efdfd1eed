"""Run: writes one series into its run folder.

::

    append ─▶ open shards ─▶ tensorstore ─▶ commit thread ─▶ journal ─▶ on_durable
              (held)         (outstanding)  (in order)                   on_free

A frame's pixels stay in its slot until they are committed; nothing else holds
frames, so `outstanding` bounds the memory and a slow disk makes `append` wait.
Frames that share a shard are held and written together: tensorstore rewrites a shard
at every write. One frame per shard is written at once.
"""

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from rtfocus.config.sections import StoreConfig
from rtfocus.errors import beside
from rtfocus.frame import FrameResult, SeriesEnd, SeriesStart, Slot, TileGrid
from rtfocus.machine import RUN_CLOCK, DiskWatch
from rtfocus.metrics import Accounting
from rtfocus.writers.arrays import Commit, RunImages
from rtfocus.writers.commit import Bookkeeping, CommitQueue, Entry, Tally, WriterStatus
from rtfocus.writers.finish import finish_run
from rtfocus.writers.folder import RunLock, begin_folder, leave_folder, take_folder
from rtfocus.writers.header import HEADER_NAME, JOURNAL_NAME, RunHeader, read_header
from rtfocus.writers.journal import (
    FOCUS,
    IN_ERROR,
    WRITTEN,
    JournalFile,
    frame_line,
    journal_lines,
    missing_line,
)
from rtfocus.writers.places import (
    GapFinder,
    Index,
    Missing,
    Plan,
    Planned,
    TakenPlaces,
    complete,
)
from rtfocus.writers.recovery import is_damaged, mend_journal, read_rejected


def open_writer(
    folder: Path,
    series: SeriesStart,
    store: StoreConfig,
    *,
    grid: TileGrid | None,
    accounting: Accounting,
    on_durable: Callable[[int], None],
    on_free: Callable[[Slot], None],
    provenance: dict[str, Any],
    expects_error: bool = False,
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
    accounting
        Receives ``written``, ``focus`` and ``in_error``; those of an earlier
        process are added when a run is resumed.
    on_durable
        Called in order for every sequence, from the commit thread.
    on_free
        Called with each appended slot once, from the commit thread.
    provenance
        Kept in the run folder: config, versions.
    expects_error
        Whether there are maps of the error left in restored frames.

    Raises
    ------
    BusyError
        If another process writes the folder; nothing in it is touched.
    WriterError, OutputError
        If the folder holds another run; if the disk has too little space.
    """
    header = RunHeader(
        series, store, grid, store.restored, provenance, expects_error, grid is not None
    )
    lock, resumes = take_folder(folder, header)
    try:
        return RunWriter(
            folder,
            read_header(folder) if resumes else header,
            lock,
            accounting=accounting,
            on_durable=on_durable,
            on_free=on_free,
            resumes=resumes,
        )
    except BaseException:
        lock.release()
        leave_folder(folder)
        raise


class RunWriter:
    """Appends frames of one series; made by `open_writer`, used from one thread.

    A failed write fails the run: the next `append` or `close` raises it. Use as a
    context manager: leaving it without `close` is an `abort`.
    """

    def __init__(
        self,
        folder: Path,
        header: RunHeader,
        lock: RunLock,
        *,
        accounting: Accounting,
        on_durable: Callable[[int], None],
        on_free: Callable[[Slot], None],
        resumes: bool,
    ) -> None:
        self.folder = folder
        self._header = header
        self._lock = lock
        self._resumes = resumes
        self._accounting = accounting
        self._tally = Tally(Plan(header.series))
        self._taken = TakenPlaces(self._tally.plan)
        if not resumes:
            begin_folder(folder, header)
        # A process killed before its first frame may have left some of them.
        self._images = RunImages(folder, header, create=True)
        if resumes:
            self._take_up()
        self.next_sequence = self._tally.next_sequence
        """First sequence that is not durable: where a resumed run goes on."""
        self._journal = JournalFile(
            folder / JOURNAL_NAME, self._images.stores, fsync=header.store.fsync
        )
        self._disk = DiskWatch(folder, int(header.store.min_free_mb * 1e6))
        self._books = Bookkeeping(
            folder, lock, self._journal, self._tally, accounting, on_durable, on_free
        )
        self._gaps = GapFinder(self._tally.plan, self._tally.before)
        self._unplaced: list[Entry] = []
        """Gaps that wait for their places."""
        # The commit thread may start what is held back: see `_start_held`.
        self._order = threading.RLock()
        self._commits = CommitQueue(
            header.store.outstanding, self._books, self._start_held
        )
        """What is under way; `append` waits for room there."""
        self._shards = _OpenShards(
            self._images, header.store.shard_frames, self._commits.seal
        )
        self._failure_raised = False

    # -- frames ---------------------------------------------------------------

    def append(self, slot: Slot, result: FrameResult) -> None:
        """Start to write a frame; waits while `outstanding` frames are under way.

        Raises
        ------
        WriterError
            If an earlier write failed, the disk is nearly full, or the pixels are not
            what their image holds.
        """
        self._wait_room()
        self._store(slot, result, error=None)

    def record_error(self, slot: Slot, reason: str) -> None:
        """Store the raw pixels of a frame whose processing failed."""
        self._wait_room()
        self._store(slot, None, error=reason)

    def record_focus(self, slot: Slot, result: FrameResult) -> None:
        """Journal an autofocus probe; it is not stored."""
        self._wait_room()
        self._note(slot, FOCUS, result)

    def mark_missing(self, first: int, count: int, reason: str) -> None:
        """Mark frames that never arrived, at their own places."""
        self._wait_room()
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
            self._place(self._gaps.end())
        self._commits.drain()

    def drain(self) -> None:
        """Wait until everything appended is durable; raises a failed write."""
        self.settle()
        self._raise_failure()

    def close(self, end: SeriesEnd, report: dict[str, Any]) -> Path:
        """Finish the run folder: lengths, totals, journal arrays, report; return it.

        After a failed write it finishes what is durable.

        Parameters
        ----------
        end
            How the series ended.
        report
            Goes into ``report.json``; its accounting is brought up to date.

        Raises
        ------
        BusyError
            If another process has taken the folder over: it is left as it is.
        WriterError
            If a write failed that nothing else has raised yet, or the folder
            cannot be finished.
        """
        self.settle()
        self._stop()
        self._lock.assert_held(now=True)
        self._accounting.end(
            end.frames_sent,
            planned=self._tally.plan.images,
            camera_lost=end.camera_lost,
            not_acquired=end.not_acquired,
        )
        report = report | {
            "accounting": self._accounting.summary(),
            "reason": end.reason,
            "warnings": end.warnings,
        }
        failed = self._commits.error
        if failed is not None:
            report["write_error"] = str(failed)
        untold = None if self._failure_raised else failed
        with beside(untold, "finishing the run folder"):
            # Removed meanwhile, the run could be neither opened nor repaired.
            if not (self.folder / HEADER_NAME).exists():
                self._header.write(self.folder)
            finish_run(
                self.folder,
                self._header,
                self._images,
                self._tally,
                report,
                # What this process began alone, it has reported completely.
                unnamed_too=failed is None and self._resumes,
            )
        self._lock.release()
        if not self._failure_raised:
            self._raise_failure()
        return self.folder

    def abort(self) -> None:
        """Discard what is not durable; the folder can be resumed or repaired."""
        self._stop()
        self._books.note_rejected(at_once=True)
        self._lock.release()

    def status(self) -> WriterStatus:
        """Return numbers for the live display; cheap, from any thread."""
        return WriterStatus(
            durable_upto=self._tally.next_sequence,
            outstanding=len(self._commits),
            bytes_written=self._books.bytes_written,
            free_bytes=self._disk.sample(),
            time_to_full_s=self._disk.time_to_full_s(),
        )

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    # -- inside ---------------------------------------------------------------

    def _take_up(self) -> None:
        """Count what an earlier process of this run left, a damaged journal mended."""
        if is_damaged(self.folder, self._tally.plan):
            mend_journal(self.folder, self._header, self._images)
        for line in journal_lines(self.folder / JOURNAL_NAME, self._tally.plan):
            self._tally.add(line)
            if line["status"] == WRITTEN:
                self._taken.take(complete(line["index"]))
        self._tally.restore(self._accounting)
        for reason, number in read_rejected(self.folder).items():
            self._accounting.count("rejected", reason, number)

    def _store(self, slot: Slot, result: FrameResult | None, error: str | None) -> None:
        """Start the writes of a frame, or journal why it has no place."""
        header = slot.frame()
        index = complete(header.index)
        with self._order:
            if not self._tally.plan.contains(index):
                self._note(slot, IN_ERROR, result, place="index", error=error)
                return
            if index in self._taken:
                # The first frame of a place stays: silence would overwrite it.
                self._note(slot, IN_ERROR, result, place="duplicate", error=error)
                return
            self._place(self._gaps.arrive(Planned(header.event_index, index)))
            pixels = self._images.pixels(slot.pixels, result)
            if not pixels:
                self._note(slot, IN_ERROR, result, place="restore", error=error)
                return
            self._taken.take(index)
            received_ns, stored = RUN_CLOCK.at_ns(slot.received_ns), tuple(pixels)
            line = frame_line(
                header, WRITTEN, received_ns, result, stored=stored, error=error
            )
            numbers = range(header.sequence, header.sequence + 1)
            entry = Entry(numbers, [line], slot, index=index, pixels=pixels)
            self._commits.put(entry)
            self._shards.add(entry)

    def _note(
        self,
        slot: Slot,
        status: str,
        result: FrameResult | None,
        *,
        place: str | None = None,
        error: str | None = None,
    ) -> None:
        """Journal a frame without storing it."""
        header = slot.frame()
        received_ns = RUN_CLOCK.at_ns(slot.received_ns)
        line = frame_line(header, status, received_ns, result, place=place, error=error)
        if not self._tally.plan.contains(complete(header.index)):
            line |= {"index": None, "reason": f"the plan has no place {header.index}"}
        numbers = range(header.sequence, header.sequence + 1)
        self._commits.put(Entry(numbers, [line], slot, sealed=True))

    def _start_held(self) -> None:
        """Start all that is held back, because it is waited for; from any thread."""
        with self._order:
            self._shards.flush()
            self._place(self._gaps.postpone())

    def _place(self, gaps: list[Missing]) -> None:
        """Journal lost frames, now that their places are known as well as can be."""
        unplaced, self._unplaced = self._unplaced, []
        for entry in unplaced:
            entry.lines += [
                missing_line(missing)
                for missing in gaps
                if missing.sequence is not None and missing.sequence in entry.sequences
            ]
            self._commits.seal(entry, [])
        lines = [missing_line(missing) for missing in gaps if missing.sequence is None]
        if lines:
            self._commits.put(Entry(range(0), lines, sealed=True))

    def _wait_room(self) -> None:
        """Wait for room, unless the run has failed or the disk is nearly full."""
        self._raise_failure()
        self._disk.check()
        self._commits.wait_room()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if (error := self._commits.error) is not None:
            self._failure_raised = True
            raise error

    def _stop(self) -> None:
        """End the commit thread and close the journal."""
        self._commits.close()
        self._journal.close()


class _OpenShards:
    """At most one open shard per column (p, c, z): frames that differ only in t.

    `on_started` gets an entry and its futures once its writes are started.
    """

    def __init__(
        self,
        images: RunImages,
        shard_frames: int,
        on_started: Callable[[Entry, list[Commit]], None],
    ) -> None:
        self._images = images
        self._shard_frames = shard_frames
        self._on_started = on_started
        self._held: dict[tuple[int, ...], list[Entry]] = {}

    def add(self, entry: Entry) -> None:
        """Take a frame; its shard is written when its last frame is there."""
        index = entry.index
        column = (index["p"], index["c"], index["z"])
        waiting = self._held.get(column, [])
        if waiting and self._shard(waiting[0].index) != self._shard(index):
            self._flush(column)
        self._held.setdefault(column, []).append(entry)
        if (index["t"] + 1) % self._shard_frames == 0:
            self._flush(column)

    def flush(self) -> None:
        """Write all open shards as they are; they are rewritten if more comes."""
        for column in list(self._held):
            self._flush(column)

    def _shard(self, index: Index) -> int:
        return index["t"] // self._shard_frames

    def _flush(self, column: tuple[int, ...]) -> None:
        for run in _consecutive(self._held.pop(column)):
            futures = [
                self._images.write(name, part[0].index, [e.pixels[name] for e in part])
                for name in self._images.names
                for part in _consecutive([one for one in run if name in one.pixels])
            ]
            for entry in run:
                self._on_started(entry, futures)


def _consecutive(frames: list[Entry]) -> list[list[Entry]]:
    """Split into runs of neighbours along t."""
    frames = sorted(frames, key=lambda frame: frame.index["t"])
    runs = [frames[:1]] if frames else []
    for before, frame in pairwise(frames):
        if frame.index["t"] == before.index["t"] + 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return runs
