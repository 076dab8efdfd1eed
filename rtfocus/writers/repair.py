"""Repair: finishes a run that was cut off and mends a damaged one; deletes no frame."""

from pathlib import Path
from typing import Any

import msgspec

from rtfocus.errors import WriterError
from rtfocus.metrics import Accounting
from rtfocus.writers.finish import finish_run
from rtfocus.writers.folder import ASIDE_NAME, refuse_links, set_aside
from rtfocus.writers.header import JOURNAL_NAME, REPORT_NAME, RunHeader
from rtfocus.writers.images import RunImages
from rtfocus.writers.journal import journal_lines
from rtfocus.writers.layout import group_documents
from rtfocus.writers.lock import RunLock
from rtfocus.writers.places import Plan
from rtfocus.writers.recovery import mend_journal
from rtfocus.writers.specs import image_specs
from rtfocus.writers.tally import Tally

INTERRUPTED = "interrupted"

_COUNTED = ("totals", "missing", "time_points", "planned_frames", "set_aside")
"""Parts of a report that follow from the journal."""


def repair_run(folder: Path, header: RunHeader) -> list[str]:
    """Finish a cut-off run, and mend the journal of any; what is durable stays.

    Frames whose line is lost are journalled anew, what is not whole is set aside. A
    run that is finished and whole is left alone.

    Returns
    -------
    list of str
        What was done, for people; empty: nothing.

    Raises
    ------
    BusyError
        If the run is being written.
    WriterError
        If the folder leads elsewhere by links or cannot be written.
    """
    # Of a folder from anywhere nothing may lead out of it.
    refuse_links(folder)
    group_documents(folder, header, image_specs(header))
    with RunLock(folder, "repairing"):
        return _repair(folder, header)


def _repair(folder: Path, header: RunHeader) -> list[str]:
    report = read_report(folder)
    steps = _set_aside_report(folder, report)
    steps += _remove_leftovers(folder)
    images = RunImages(folder, header, create=True)
    before = images.frames
    sequences = None if report is None else report["accounting"]["acquired"]
    steps += mend_journal(folder, header, images, sequences=sequences)
    if report is not None and not steps:
        return []
    tally = Tally(Plan(header.series))
    for line in journal_lines(folder / JOURNAL_NAME, tally.plan):
        tally.add(line)
    accounting = Accounting()
    tally.restore(accounting)
    # A frame found again may have no sequence.
    sent = max(tally.next_sequence, sum(tally.terms.values()))
    found: dict[str, Any] = {"reason": INTERRUPTED}
    camera_lost = 0
    if report is not None:
        found = {key: value for key, value in report.items() if key not in _COUNTED}
        camera_lost = report["accounting"]["camera_lost"]
    accounting.end(sent, planned=tally.plan.images, camera_lost=camera_lost)
    found |= {"accounting": accounting.summary(), "repaired": steps}
    finish_run(folder, header, images, tally, found)
    if images.frames != before:
        steps.append(f"set t from {before} to {images.frames}")
    steps.append(f"wrote totals, journal columns and report of {tally.lines} lines")
    return steps


def read_report(folder: Path) -> dict[str, Any] | None:
    """Return ``report.json`` of a finished run; None: there is none to be used."""
    try:
        report = msgspec.json.decode((folder / REPORT_NAME).read_bytes(), type=dict)
        terms = msgspec.convert(report["accounting"], Terms)
        msgspec.convert(report.get("reason", ""), str)
    except (OSError, msgspec.MsgspecError, ValueError, KeyError, RecursionError):
        return None
    return report | {"accounting": report["accounting"] | msgspec.to_builtins(terms)}


class Terms(msgspec.Struct):
    """The terms of the loss identity as a report has them."""

    acquired: int
    written: int
    focus: int
    dropped: dict[str, int]
    in_error: dict[str, int]
    planned: int | None = None
    camera_lost: int = 0
    not_acquired: int = 0

    @property
    def known(self) -> int:
        """Frames that a term explains."""
        lost = sum(self.dropped.values()) + sum(self.in_error.values())
        return self.written + self.focus + lost


def _set_aside_report(folder: Path, report: dict[str, Any] | None) -> list[str]:
    """Move a report that says nothing out of the way of a new one."""
    path = folder / REPORT_NAME
    if report is not None or not path.exists():
        return []
    return [f"moved the damaged report to '{set_aside(folder, [path])}'"]


def _remove_leftovers(folder: Path) -> list[str]:
    """Remove files that were never given their final name."""
    left = [
        path
        for path in (*folder.rglob("*.__lock"), *folder.rglob(".*.part"))
        if ASIDE_NAME not in path.relative_to(folder).parts
    ]
    try:
        for path in left:
            if path.is_file():
                path.unlink()
    except OSError as error:
        msg = f"cannot remove '{error.filename}': {error.strerror}"
        raise WriterError(msg) from error
    return [f"removed {len(left)} unfinished files"] if left else []
