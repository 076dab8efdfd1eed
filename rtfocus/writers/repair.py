"""Repair: what is done to a run afterwards; finishes, mends and completes it.

A repair deletes no frame; a completion restores what was recorded raw only.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from rtfocus.errors import OutputError, WriterError
from rtfocus.files import refuse_links, replace
from rtfocus.frame import FrameResult
from rtfocus.metrics import Accounting
from rtfocus.writers.arrays import RunImages
from rtfocus.writers.commit import Tally, read_rejected
from rtfocus.writers.finish import finish_run
from rtfocus.writers.folder import ASIDE_NAME, RunLock, set_aside
from rtfocus.writers.header import (
    JOURNAL_NAME,
    RAW,
    REPORT_NAME,
    RESTORED,
    RunHeader,
    image_specs,
    is_finished,
    read_header,
)
from rtfocus.writers.journal import Line, is_unrestored, journal_lines
from rtfocus.writers.layout import group_documents
from rtfocus.writers.places import Plan, complete
from rtfocus.writers.recovery import mend_journal

INTERRUPTED = "interrupted"

_COUNTED = ("totals", "missing", "time_points", "planned_frames", "set_aside")
"""Parts of a report that follow from the journal."""
Restore = Callable[[NDArray[Any], str], FrameResult]
"""Raw pixels and the channel's name to a result with a restored frame."""
_RECOUNTED = ("totals", "missing", "time_points", "planned_frames")


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
    accounting = Accounting(rejected=Counter(_rejected(folder, report)))
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


def _rejected(folder: Path, report: dict[str, Any] | None) -> dict[str, int]:
    """Return the messages refused; a report knows of more than was noted on the way."""
    told = {} if report is None else report["accounting"].get("rejected_messages")
    try:
        return msgspec.convert(told or read_rejected(folder), dict[str, int])
    except msgspec.ValidationError:
        return read_rejected(folder)


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


def count_unrestored(folder: Path) -> int:
    """Return how many stored frames of a run have no restored image."""
    plan = Plan(read_header(folder).series)
    return sum(map(is_unrestored, journal_lines(folder / JOURNAL_NAME, plan)))


def complete_restoration(
    folder: Path, restore: Restore, *, on_frame: Callable[[], None] = lambda: None
) -> int:
    """Restore the frames of a finished run that were skipped; return their number.

    Nobody else writes the folder meanwhile.

    The journal is replaced as a whole once all pixels are committed, so that a
    kill on the way leaves the run as it was.

    Raises
    ------
    WriterError
        If the run is unfinished, keeps no raw frames or cannot be written.
    """
    header = read_header(folder)
    refuse_links(folder)
    with RunLock(folder, "completing"):
        return _complete(folder, header, restore, on_frame)


def _complete(
    folder: Path, header: RunHeader, restore: Restore, on_frame: Callable[[], None]
) -> int:
    if not is_finished(folder):
        msg = f"'{folder}' is not finished; first: rtfocus check {folder} --repair"
        raise WriterError(msg)
    plan = Plan(header.series)
    images = RunImages(folder, header, create=False)
    if not {RAW, RESTORED} <= set(images.names):
        msg = f"'{folder}' holds {images.names}; completing needs raw and restored"
        raise WriterError(msg)
    done: dict[int, FrameResult] = {}
    for line in journal_lines(folder / JOURNAL_NAME, plan):
        if not is_unrestored(line):
            continue
        index = complete(line["index"])
        channel = header.series.channels[index["c"]].name
        result = restore(images.read(RAW, index), channel)
        if result.restored is None:
            msg = f"frame {line['sequence']} was not restored: {result.skipped}"
            raise WriterError(msg)
        try:
            images.write(RESTORED, index, [result.restored]).result()
        except (OSError, ValueError) as error:
            msg = f"frame {line['sequence']} cannot be written to '{folder}': {error}"
            raise WriterError(msg) from error
        # Only what the journal keeps: the pixels are on the disk.
        result.restored = result.defocus = None
        done[line["sequence"]] = result
        on_frame()
    lines = [
        _restored_line(line, done.get(line["sequence"]))
        for line in journal_lines(folder / JOURNAL_NAME, plan)
    ]
    _replace_journal(folder, lines)
    tally = Tally(plan)
    for line in lines:
        tally.add(line)
    finish_run(folder, header, images, tally, _old_report(folder, len(done)))
    return len(done)


def _restored_line(line: Line, result: FrameResult | None) -> Line:
    if result is None:
        return line
    return line | {
        "stored": [*line["stored"], RESTORED],
        "skipped": None,
        "engines": result.engines,
        "completed": True,
    }


def _replace_journal(folder: Path, lines: list[Line]) -> None:
    path = folder / JOURNAL_NAME
    part = path.with_name(f".{JOURNAL_NAME}.part")
    try:
        part.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        replace(part, path)
    except OSError as error:
        msg = f"cannot write journal '{path}': {error.strerror}"
        raise WriterError(msg) from error
    except OutputError as error:
        raise WriterError(str(error)) from error


def _old_report(folder: Path, restored: int) -> dict[str, Any]:
    """Return the report as it was, less what is counted anew."""
    path = folder / REPORT_NAME
    try:
        report: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict)
    except (OSError, msgspec.DecodeError) as error:
        msg = f"'{path}' cannot be read: {error}"
        raise WriterError(msg) from error
    kept = {key: value for key, value in report.items() if key not in _RECOUNTED}
    return kept | {"restored": kept.get("restored", 0) + restored}
