"""Completion: restores afterwards what a run recorded raw only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from rtfocus.errors import OutputError, WriterError
from rtfocus.files import replace
from rtfocus.frame import FrameResult
from rtfocus.writers.finish import finish_run
from rtfocus.writers.folder import refuse_links
from rtfocus.writers.header import (
    JOURNAL_NAME,
    REPORT_NAME,
    RunHeader,
    is_finished,
    read_header,
)
from rtfocus.writers.images import RunImages
from rtfocus.writers.journal import Line, is_unrestored, journal_lines
from rtfocus.writers.lock import RunLock
from rtfocus.writers.places import Plan, complete
from rtfocus.writers.specs import RAW, RESTORED
from rtfocus.writers.tally import Tally

Restore = Callable[[NDArray[Any], str], FrameResult]
"""Raw pixels and the channel's name to a result with a restored frame."""

_RECOUNTED = ("totals", "missing", "time_points", "planned_frames")


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
