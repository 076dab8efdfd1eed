"""Ledger: what happens when a frame is committed or lost."""

import errno
import time
from collections.abc import Callable
from pathlib import Path

from rtfocus.errors import BusyError, WriterError
from rtfocus.metrics import Accounting
from rtfocus.slots import Slot
from rtfocus.writers.commit import Entry
from rtfocus.writers.disk import free_bytes
from rtfocus.writers.journal import JournalFile
from rtfocus.writers.lock import RunLock
from rtfocus.writers.tally import Tally, term_of

_FULL = ("no space left", "disk full", "not enough space", "file too large", "quota")


class Ledger:
    """Journals, counts and reports entries; called from the commit thread.

    Parameters
    ----------
    folder
        Named in errors.
    lock
        The right to write the folder, looked at before each change.
    journal
        Receives the lines.
    tally
        Counts them.
    accounting
        The run's loss identity.
    on_durable
        Called for every sequence in order, once pixels and line are committed.
    on_free
        Called when a slot's pixels are no longer referenced.
    """

    def __init__(
        self,
        folder: Path,
        lock: RunLock,
        journal: JournalFile,
        tally: Tally,
        accounting: Accounting,
        on_durable: Callable[[int], None],
        on_free: Callable[[Slot], None],
    ) -> None:
        self._folder = folder
        self._lock = lock
        self._journal = journal
        self._tally = tally
        self._accounting = accounting
        self._on_durable = on_durable
        self._on_free = on_free
        self.bytes_written = 0
        """Pixels committed, before compression."""

    def committed(self, entry: Entry) -> None:
        """Journal an entry, count it and report it durable."""
        now_ns = time.time_ns()
        for line in entry.lines:
            line["durable_ns"] = now_ns
        self._lock.assert_held()
        self._journal.append(entry.lines)
        for line in entry.lines:
            self._tally.add(line)
            term = term_of(line)
            # The receiver counted a gap when it met it.
            if term is not None and term[0] != "dropped":
                self._accounting.count(*term)
        self.bytes_written += entry.size_bytes
        for sequence in entry.sequences:
            self._on_durable(sequence)
        if entry.slot is not None:
            self._on_free(entry.slot)

    def lost(self, entry: Entry) -> None:
        """Count a frame that could not be made durable."""
        if entry.slot is not None:
            self._accounting.count("in_error", "write")
            self._on_free(entry.slot)

    def explain(self, error: BaseException) -> WriterError:
        """Name the place, the cause and the remedy of a failed write."""
        if isinstance(error, BusyError):
            return error
        said = str(error)
        full = isinstance(error.__cause__ or error, OSError) and (
            getattr(error.__cause__ or error, "errno", None) == errno.ENOSPC
        )
        if full or any(hint in said.lower() for hint in _FULL):
            free = free_bytes(self._folder)
            msg = (
                f"disk full: '{self._folder}' has {free / 1e6:.1f} MB free; what is "
                "durable stays; free space, then run: "
                f"rtfocus check {self._folder} --repair ({said})"
            )
            return WriterError(msg)
        return WriterError(f"write to '{self._folder}' failed: {said}")
