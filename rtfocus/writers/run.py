"""Run: writes one series into its run folder.

::

    append ─▶ open shards ─▶ tensorstore ─▶ commit thread ─▶ journal ─▶ on_durable
              (held)         (outstanding)  (in order)                   on_free

A frame's pixels stay in its slot until they are committed; nothing else holds
frames, so `outstanding` bounds the memory and a slow disk makes `append` wait.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rtfocus.config.sections import StoreConfig
from rtfocus.frame import FrameResult, SeriesEnd, SeriesStart, Slot, TileGrid
from rtfocus.machine import DiskWatch
from rtfocus.metrics import Accounting
from rtfocus.writers.arrays import RunImages
from rtfocus.writers.commit import Ledger, Tally, read_rejected
from rtfocus.writers.finish import finish_run
from rtfocus.writers.folder import RunLock, begin_folder, leave_folder, take_folder
from rtfocus.writers.header import JOURNAL_NAME, RunHeader, read_header
from rtfocus.writers.journal import FOCUS, WRITTEN, JournalFile, journal_lines
from rtfocus.writers.places import Plan, TakenPlaces, complete
from rtfocus.writers.recovery import is_damaged, mend_journal
from rtfocus.writers.writes import Intake


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
    BusyError
        If another process writes the folder; nothing in it is touched.
    WriterError
        If the folder holds another run, or the disk has too little space.
    """
    header = RunHeader(series, store, grid, restored, provenance)
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
    """Appends frames of one series; made by `open_run`, used from one thread.

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
        self._accounting = accounting
        self._tally = Tally(Plan(header.series))
        taken = TakenPlaces(self._tally.plan)
        if not resumes:
            begin_folder(folder, header)
        # A process killed before its first frame may have left some of them.
        self._images = RunImages(folder, header, create=True)
        if resumes:
            if is_damaged(folder, self._tally.plan):
                mend_journal(folder, header, self._images)
            for line in journal_lines(folder / JOURNAL_NAME, self._tally.plan):
                self._tally.add(line)
                if line["status"] == WRITTEN:
                    taken.take(complete(line["index"]))
            self._tally.restore(accounting)
            for reason, number in read_rejected(folder).items():
                accounting.count("rejected", reason, number)
        self.next_sequence = self._tally.next_sequence
        """First sequence that is not durable: where a resumed run goes on."""
        self._journal = JournalFile(folder / JOURNAL_NAME, fsync=header.store.fsync)
        self._disk = DiskWatch(folder, int(header.store.min_free_mb * 1e6))
        self._ledger = Ledger(
            folder, lock, self._journal, self._tally, accounting, on_durable, on_free
        )
        self._intake = Intake(
            self._images,
            self._tally.plan,
            taken,
            self._tally.before,
            self._ledger,
            outstanding=header.store.outstanding,
            shard_frames=header.store.shard_frames,
        )
        self._failure_raised = False

    # -- frames ---------------------------------------------------------------

    def append(self, slot: Slot, result: FrameResult) -> None:
        """Start to write a frame; waits while `outstanding` frames are under way.

        Raises
        ------
        WriterError
            If an earlier write failed or the disk is nearly full.
        """
        self._wait_room()
        self._intake.store(slot, result, error=None)

    def record_error(self, slot: Slot, reason: str) -> None:
        """Store the raw pixels of a frame whose processing failed."""
        self._wait_room()
        self._intake.store(slot, None, error=reason)

    def record_focus(self, slot: Slot, result: FrameResult) -> None:
        """Journal an autofocus probe; it is not stored."""
        self._wait_room()
        self._intake.note(slot, FOCUS, result)

    def mark_missing(self, first: int, count: int, reason: str) -> None:
        """Mark frames that never arrived, at their own places."""
        self._wait_room()
        self._intake.lose(first, count, reason)

    # -- end ------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until everything appended is durable or lost, and counted."""
        self._intake.settle()

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
        failed = self._intake.commits.error
        if failed is not None:
            report["write_error"] = str(failed)
        finish_run(
            self.folder,
            self._header,
            self._images,
            self._tally,
            report,
            unnamed_too=failed is None,
        )
        self._lock.release()
        if not self._failure_raised:
            self._raise_failure()
        return self.folder

    def abort(self) -> None:
        """Discard what is not durable; the folder can be resumed or repaired."""
        self._stop()
        self._ledger.note_rejected(at_once=True)
        self._lock.release()

    def status(self) -> WriterStatus:
        """Return numbers for the live display; cheap, from any thread."""
        return WriterStatus(
            durable_upto=self._tally.next_sequence,
            outstanding=len(self._intake.commits),
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

    def _wait_room(self) -> None:
        """Wait for room, unless the run has failed or the disk is nearly full."""
        self._raise_failure()
        self._disk.check()
        self._intake.commits.wait_room()
        self._raise_failure()

    def _raise_failure(self) -> None:
        error = self._intake.commits.error
        if error is not None:
            self._failure_raised = True
            raise error

    def _stop(self) -> None:
        """End the commit thread and close the journal."""
        self._intake.commits.close()
        self._journal.close()
