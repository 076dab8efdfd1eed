"""Folder: whether a run folder may be written, and as a new run or a resumed one."""

import shutil
from pathlib import Path

from rtfocus.errors import WriterError
from rtfocus.writers.disk import check_space
from rtfocus.writers.header import (
    HEADER_NAME,
    JOURNAL_NAME,
    RunHeader,
    is_bare,
    is_finished,
    read_header,
)
from rtfocus.writers.layout import group_documents
from rtfocus.writers.plan import Plan
from rtfocus.writers.specs import image_specs


def prepare_folder(folder: Path, header: RunHeader) -> bool:
    """Make the run folder; returns True when it holds this series, cut off.

    Raises
    ------
    WriterError
        If it holds another run, or the disk has too little space.
    """
    _check_sizes(header)
    resumes = _resumes(folder, header)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make run folder '{folder}': {error.strerror}; set run.folder"
        raise WriterError(msg) from error
    # A resumed run has part of its frames on the disk already.
    planned = 0 if resumes else planned_bytes(header)
    check_space(folder, planned, int(header.store.min_free_mb * 1e6))
    return resumes


def begin_folder(folder: Path, header: RunHeader) -> None:
    """Write an empty journal and the header: from then on the run can be resumed.

    Before the images: a process killed while it makes them leaves a folder that a
    restarted one, or a repair, goes on with.

    Raises
    ------
    WriterError
        If they cannot be written, or the series does not fit the format.
    """
    # A series that is refused must not look like a run that was cut off.
    group_documents(folder, header, image_specs(header))
    journal = folder / JOURNAL_NAME
    try:
        journal.touch()
    except OSError as error:
        msg = f"cannot write journal '{journal}': {error.strerror}"
        raise WriterError(msg) from error
    header.write(folder)


def planned_bytes(header: RunHeader) -> int | None:
    """Return the bytes of all planned frames before compression; None: unbounded."""
    places = Plan(header.series).places
    if places is None:
        return None
    return places * sum(spec.frame_bytes for spec in image_specs(header))


def _check_sizes(header: RunHeader) -> None:
    """Refuse a series whose plan and lists disagree."""
    series = header.series
    listed = {"p": len(series.positions), "c": len(series.channels)}
    for axis, number in listed.items():
        if header.size(axis) != number:
            msg = (
                f"series '{series.name}' plans {header.size(axis)} along {axis} but "
                f"lists {number}; SeriesStart.sizes must agree with its lists"
            )
            raise WriterError(msg)


def _resumes(folder: Path, header: RunHeader) -> bool:
    uid = header.series.series_uid
    if is_finished(folder):
        if not header.store.overwrite:
            msg = (
                f"'{folder}' holds a finished run; choose another run.name or set "
                "store.overwrite: true"
            )
            raise WriterError(msg)
        shutil.rmtree(folder)
    if not (folder / HEADER_NAME).exists():
        if folder.exists() and not is_bare(folder):
            msg = f"'{folder}' is not empty and no run folder; choose another run.name"
            raise WriterError(msg)
        return False
    found = read_header(folder).series.series_uid
    if found != uid:
        msg = (
            f"'{folder}' holds the cut-off series {found}, not {uid}; choose another "
            f"run.name, or finish it with: rtfocus check {folder} --repair"
        )
        raise WriterError(msg)
    return True
