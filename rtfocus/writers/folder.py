"""Folder: which run folder a series goes to, whether it fits, who may change it how."""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from rtfocus.config.model import RunConfig
from rtfocus.config.sections import StoreConfig
from rtfocus.errors import OutputError, WriterError
from rtfocus.files import remove, replace
from rtfocus.frame import SeriesStart
from rtfocus.writers.header import (
    HEADER_NAME,
    JOURNAL_NAME,
    RunHeader,
    image_specs,
    is_bare,
    is_finished,
    read_header,
    sizes_fault,
)
from rtfocus.writers.layout import group_documents
from rtfocus.writers.lock import RunLock, holder_of
from rtfocus.writers.places import Plan

SUFFIX = ".rtfocus"
ASIDE_NAME = "set_aside"
_MOUNT_POINT = 0xA0000003
"""``stat.IO_REPARSE_TAG_MOUNT_POINT``, which only Windows has."""
_SAMPLE_S = 0.25
_WINDOW = 40
"""Ten seconds of samples: the rate of a run, not of one frame."""


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


def run_folder(run: RunConfig, store: StoreConfig, series: SeriesStart) -> Path:
    """Return the folder for `series`: ``NAME.rtfocus``, else ``NAME-2.rtfocus`` ...

    A folder that already holds this series unfinished comes first, so that a
    restarted processor goes on with it. With ``store.overwrite`` a finished
    ``NAME.rtfocus`` is taken, to be replaced by `open_run`.
    """
    for number in count(1):
        name = run.name if number == 1 else f"{run.name}-{number}"
        folder = run.folder / f"{name}{SUFFIX}"
        if not _exists(folder) or holds_unfinished(folder, series.series_uid):
            return folder
        if store.overwrite and number == 1 and is_finished(folder):
            return folder
    raise AssertionError  # count() never ends


def _exists(folder: Path) -> bool:
    """Tell whether anything stands there.

    Raises
    ------
    WriterError
        If the system cannot tell, e.g. because the path is too long.
    """
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        msg = f"'{folder}' cannot be a run folder: {error.strerror}; set run.folder"
        raise WriterError(msg) from error
    return True


def holds_unfinished(folder: Path, series_uid: str) -> bool:
    """Tell whether `folder` is a cut-off run of this very series, or of none yet."""
    if is_finished(folder):
        return False
    if folder.is_dir() and is_bare(folder):
        # One that another process is just beginning is somebody else's.
        return holder_of(folder) is None
    try:
        return read_header(folder).series.series_uid == series_uid
    except WriterError:
        return False


def set_aside(folder: Path, files: list[Path]) -> Path | None:
    """Move files of a run folder to ``set_aside/N``, each at its own relative path.

    Returns
    -------
    Path or None
        Where they are now; None: there were none.

    Raises
    ------
    WriterError
        If one cannot be moved.
    """
    if not files:
        return None
    target = next(
        path
        for number in count(1)
        if not (path := folder / ASIDE_NAME / str(number)).exists()
    )
    try:
        for file in files:
            moved = target / file.relative_to(folder)
            moved.parent.mkdir(parents=True, exist_ok=True)
            replace(file, moved)
    except OSError as error:
        msg = f"cannot make '{target}': {error.strerror}"
        raise WriterError(msg) from error
    except OutputError as error:
        raise WriterError(str(error)) from error
    return target


def refuse_links(folder: Path) -> None:
    """Refuse to write a folder that leads elsewhere: nothing there is of this run.

    Raises
    ------
    WriterError
        If a file or folder in it is a link; names it.
    """
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink() or _is_junction(entry):
                        msg = (
                            f"'{entry.path}' is a link; a run folder that leads "
                            "elsewhere is only read: replace the link by what it "
                            "leads to"
                        )
                        raise WriterError(msg)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
        except OSError as error:
            msg = f"'{error.filename}' cannot be read: {error.strerror}"
            raise WriterError(msg) from error


def _is_junction(entry: "os.DirEntry[str]") -> bool:
    """Tell a Windows junction, which is no symbolic link to Python."""
    if os.name != "nt":
        return False
    found = entry.stat(follow_symlinks=False)
    tag: int = getattr(found, "st_reparse_tag", 0)
    return tag == _MOUNT_POINT


def free_bytes(folder: Path) -> int:
    """Return what is free for this user on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def check_space(folder: Path, planned: int | None, min_free: int) -> None:
    """Refuse a run that does not fit.

    Parameters
    ----------
    folder
        An existing folder on the disk in question.
    planned
        Bytes of all planned pixels before compression; None: unbounded.
    min_free
        Bytes that must be left.

    Raises
    ------
    WriterError
        Names what is planned, what is free and the remedy.
    """
    free = free_bytes(folder)
    if free < (planned or 0) + min_free:
        needed = "an unbounded run" if planned is None else f"{_mb(planned)} planned"
        msg = (
            f"disk of '{folder}' has {_mb(free)} free, too little for {needed} and "
            f"store.min_free_mb={min_free / 1e6:.0f}; free space, choose another "
            "run.folder, record less or lower store.min_free_mb"
        )
        raise WriterError(msg)


class DiskWatch:
    """Watches the free space while a run goes on; asks the system 4 times a second."""

    def __init__(
        self,
        folder: Path,
        min_free: int,
        *,
        free: Callable[[Path], int] = free_bytes,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._min_free = min_free
        self._free = free
        self._clock_s = clock_s
        self._samples: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self.sample()

    def sample(self) -> int:
        """Return the free bytes, measured now or a moment ago."""
        now = self._clock_s()
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((now, self._free(self._folder)))
        return self._samples[-1][1]

    def check(self) -> None:
        """Raise WriterError when less than the minimum is left."""
        free = self.sample()
        if free < self._min_free:
            msg = (
                f"disk of '{self._folder}' has only {_mb(free)} free, less than "
                f"store.min_free_mb={self._min_free / 1e6:.0f}: the run ends here; "
                "free space before the next one"
            )
            raise WriterError(msg)

    def time_to_full_s(self) -> float | None:
        """Return seconds until the minimum is reached at the current rate.

        None while the disk does not fill.
        """
        if len(self._samples) < 2:
            return None
        (began, free_then), (now, free_now) = self._samples[0], self._samples[-1]
        used = free_then - free_now
        if used <= 0:
            return None
        return max(free_now - self._min_free, 0) * (now - began) / used


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
