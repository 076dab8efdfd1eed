"""Repair: finishes a run that was cut off, from its header and journal alone."""

from pathlib import Path

from rtfocus.errors import WriterError
from rtfocus.metrics import Accounting
from rtfocus.writers.finish import finish_run
from rtfocus.writers.header import JOURNAL_NAME, RunHeader, is_finished
from rtfocus.writers.images import RunImages
from rtfocus.writers.journal import JournalFile, read_journal, torn_bytes
from rtfocus.writers.plan import Plan
from rtfocus.writers.tally import Tally

INTERRUPTED = "interrupted"


def repair_run(folder: Path, header: RunHeader) -> list[str]:
    """Finish a cut-off run; what is durable stays, the rest is trimmed.

    A finished run is left alone. Must not be used while the run is being written.

    Returns
    -------
    list of str
        What was done, for people; empty: nothing.

    Raises
    ------
    WriterError
        If the journal is damaged inside or the folder cannot be written.
    """
    if is_finished(folder):
        return []
    steps = _cut_torn_line(folder, header) + _remove_leftovers(folder)
    tally = Tally(Plan(header.series))
    for line in read_journal(folder / JOURNAL_NAME):
        tally.add(line)
    accounting = Accounting()
    tally.restore(accounting)
    accounting.end(tally.next_sequence, planned=tally.plan.images)
    # A process killed before its first frame may have left some of them.
    images = RunImages(folder, header, create=tally.lines == 0)
    before = images.frames
    finish_run(
        folder,
        header,
        images,
        tally,
        {"accounting": accounting.summary(), "reason": INTERRUPTED},
    )
    if images.frames != before:
        steps.append(f"trimmed t from {before} to {images.frames}")
    steps.append(f"wrote totals, journal columns and report of {tally.lines} lines")
    return steps


def _cut_torn_line(folder: Path, header: RunHeader) -> list[str]:
    path = folder / JOURNAL_NAME
    torn = torn_bytes(path)
    if torn == 0:
        return []
    JournalFile(path, fsync=header.store.fsync).close()
    return [f"cut {torn} bytes of a torn line from the journal"]


def _remove_leftovers(folder: Path) -> list[str]:
    """Remove files that were never given their final name."""
    left = [*folder.rglob("*.__lock"), *folder.rglob(".*.part")]
    try:
        for path in left:
            path.unlink()
    except OSError as error:
        msg = f"cannot remove '{error.filename}': {error.strerror}"
        raise WriterError(msg) from error
    return [f"removed {len(left)} unfinished files"] if left else []
