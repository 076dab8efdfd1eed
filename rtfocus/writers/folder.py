"""Folder: makes or takes up a run folder, and holds its lock."""

from contextlib import suppress
from pathlib import Path

from rtfocus.errors import OutputError, WriterError
from rtfocus.files import remove
from rtfocus.writers.aside import refuse_links
from rtfocus.writers.disk import check_space
from rtfocus.writers.header import (
    HEADER_NAME,
    JOURNAL_NAME,
    RunHeader,
    is_bare,
    is_finished,
    read_header,
    sizes_fault,
)
from rtfocus.writers.layout import group_documents
from rtfocus.writers.lock import RunLock
from rtfocus.writers.places import Plan
from rtfocus.writers.specs import image_specs


def take_folder(folder: Path, header: RunHeader) -> tuple[RunLock, bool]:
    """Make or take up a run folder; True: it holds this series, cut off.

    A finished run is replaced where ``store.overwrite`` says so. What is refused is
    refused before anything is made or changed.

    Raises
    ------
    BusyError
        If another process writes the folder.
    WriterError
        If it holds another run, or the disk has too little space.
    """
    _check_series(folder, header)
    resumes = _resumes(folder, header)
    # A resumed run has part of its frames on the disk already.
    planned = 0 if resumes else planned_bytes(header)
    check_space(_existing(folder), planned, int(header.store.min_free_mb * 1e6))
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"cannot make run folder '{folder}': {error.strerror}; set run.folder"
        raise WriterError(msg) from error
    try:
        return _locked(folder, header)
    except BaseException:
        if is_new:
            leave_folder(folder)
        raise


def leave_folder(folder: Path) -> None:
    """Remove a folder in which no run was begun; one with anything in it stays."""
    with suppress(OSError):
        if is_bare(folder):
            for path in list(folder.iterdir()):
                path.unlink()
            folder.rmdir()


def begin_folder(folder: Path, header: RunHeader) -> None:
    """Write an empty journal and the header: from then on the run can be resumed.

    Before the images: a process killed while it makes them leaves a folder that a
    restarted one, or a repair, goes on with.

    Raises
    ------
    WriterError
        If they cannot be written.
    """
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


def _check_series(folder: Path, header: RunHeader) -> None:
    """Refuse a series that contradicts itself or does not fit the format."""
    if (fault := sizes_fault(header)) is not None:
        raise WriterError(fault)
    # A series that is refused must not look like a run that was cut off.
    group_documents(folder, header, image_specs(header))


def _locked(folder: Path, header: RunHeader) -> tuple[RunLock, bool]:
    lock = RunLock(folder, "recording")
    try:
        # Looked at again: it may have changed before the lock was ours.
        resumes = _resumes(folder, header)
        if is_finished(folder):
            return _replaced(folder, lock), False
        if resumes:
            refuse_links(folder)
    except BaseException:
        lock.release()
        raise
    return lock, resumes


def _replaced(folder: Path, lock: RunLock) -> RunLock:
    """Remove a finished run, whole or not at all; return the lock of the new folder."""
    # Windows moves no folder with an open file in it.
    lock.release()
    try:
        remove(folder)
        folder.mkdir()
    except OutputError as error:
        raise WriterError(str(error)) from error
    except OSError as error:
        msg = f"cannot make run folder '{folder}': {error.strerror}"
        raise WriterError(msg) from error
    return RunLock(folder, "recording")


def _existing(folder: Path) -> Path:
    """Return the nearest folder that exists: it is on the disk in question."""
    return next(
        path
        for path in (folder.absolute(), *folder.absolute().parents)
        if path.exists()
    )


def _resumes(folder: Path, header: RunHeader) -> bool:
    """Tell whether a folder holds this series, cut off; refuse it if it may not be."""
    uid = header.series.series_uid
    if is_finished(folder):
        if not header.store.overwrite:
            msg = (
                f"'{folder}' holds a finished run; choose another run.name or set "
                "store.overwrite: true"
            )
            raise WriterError(msg)
        return False
    if not (folder / HEADER_NAME).exists():
        if folder.exists() and not (folder.is_dir() and is_bare(folder)):
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
