"""Folder: which run folder a series goes to, whether it fits, who may change it how.

One process at a time writes a run folder, and everybody can see which. The operating
system holds the lock, on Windows, Linux, macOS and on network disks that can lock, and
lets it go with the process, also after ``kill -9``. A frozen process keeps it. Beside
the lock lies who holds it. Some disks forget locks when they reconnect, so a writer
looks at that file again before it changes anything it has not looked at for a second:
a writer that was replaced touches nothing.
"""

import ctypes
import logging
import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from uuid import uuid4

import msgspec
from filelock import FileLock, Timeout

from rtfocus.config.model import RunConfig
from rtfocus.config.sections import StoreConfig
from rtfocus.errors import BusyError, WriterError, writing
from rtfocus.files import PATIENCE, nearest_existing, refuse_links, remove
from rtfocus.frame import SeriesStart
from rtfocus.images.metadata import COMPANION
from rtfocus.machine import check_space
from rtfocus.writers.header import (
    HEADER_NAME,
    HOLDER_NAME,
    JOURNAL_NAME,
    LOCK_NAME,
    LOCK_NAMES,
    REJECTED_NAME,
    REPORT_NAME,
    RunHeader,
    image_specs,
    is_bare,
    is_finished,
    read_header,
    sizes_fault,
    write_json,
)
from rtfocus.writers.layout import group_documents
from rtfocus.writers.places import Plan

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""How long a lock is waited for: a recorder that was replaced is closing."""
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Who writes a run folder."""

    doing: str
    """``recording``, ``repairing`` ..."""
    host: str
    process: int
    since_ns: int
    """Unix time."""
    token: str
    """Of this one lock."""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_ns / 1e9))
        return f"process {self.process} on {self.host}, {self.doing} since {since}"


class RunLock:
    """The right to change a run folder; held from its making to `release`.

    Parameters
    ----------
    folder
        Must exist.
    doing
        What the holder does with the folder, for those that are refused.

    Raises
    ------
    BusyError
        If another process holds it; names that process.
    WriterError
        If the folder cannot be locked.
    """

    def __init__(self, folder: Path, doing: str) -> None:
        self._folder = folder
        self._lock = FileLock(folder / LOCK_NAME, thread_local=False)
        try:
            self._lock.acquire(timeout=PATIENCE_S, poll_interval=0.05)
        except Timeout as error:
            raise BusyError(_busy(folder)) from error
        except (OSError, NotImplementedError) as error:
            raise WriterError(_not_lockable(folder, error)) from error
        self._holder = LockHolder(
            doing=doing,
            host=platform.node() or "this machine",
            process=os.getpid(),
            since_ns=time.time_ns(),
            token=uuid4().hex,
        )
        self._looked_s = time.time()
        try:
            write_json(folder / HOLDER_NAME, asdict(self._holder))
        except BaseException:
            self._lock.release()
            raise

    def assert_held(self, *, now: bool = False) -> None:
        """Raise if another process has taken the folder over.

        Looks at the disk once a second at most, unless `now` is given.

        Raises
        ------
        BusyError
            Then nothing in the folder may be touched any more.
        WriterError
            If it cannot be known, for longer than a virus scanner or a network disk
            takes: then nothing may be touched either.
        """
        # The wall clock goes on while a machine sleeps, the monotonic one may not.
        if not now and abs(time.time() - self._looked_s) < _LOOK_AGAIN_S:
            return
        holders: list[LockHolder | None] = []
        with writing(self._folder, WriterError):
            PATIENCE.insist(
                lambda: holders.append(_holder_in(self._folder)),
                f"'{self._folder}' cannot be read any more",
            )
        if (holder := holders[0]) is None or holder.token != self._holder.token:
            by = "is gone" if holder is None else f"was taken over by {holder}"
            msg = (
                f"'{self._folder}' {by}: this process leaves it as it is; what is "
                "durable is in it"
            )
            raise BusyError(msg)
        self._looked_s = time.time()

    def release(self) -> None:
        """Let others write; called twice does nothing."""
        if not self._lock.is_locked:
            return
        holder = _read_holder(self._folder)
        if holder is not None and holder.token == self._holder.token:
            with suppress(OSError):  # it hinders no one: the lock decides
                (self._folder / HOLDER_NAME).unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder_of(folder: Path) -> LockHolder | None:
    """Return who writes the folder now; None: no process, as far as is known.

    Changes nothing: a folder that was never locked, or may only be read, stays as it
    is.
    """
    lock = folder / LOCK_NAME
    if not lock.is_file() or lock.is_symlink():
        return None
    try:
        with FileLock(lock, timeout=0):
            return None
    except Timeout:
        return _read_holder(folder) or LockHolder("writing", "a machine", 0, 0, "")
    except (OSError, NotImplementedError):
        return None


def _read_holder(folder: Path) -> LockHolder | None:
    with suppress(OSError):
        return _holder_in(folder)
    return None


def _holder_in(folder: Path) -> LockHolder | None:
    """Return who is named in the folder; OSError: it cannot be read now."""
    try:
        data = (folder / HOLDER_NAME).read_bytes()
        return msgspec.json.decode(data, type=LockHolder)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError, ValueError):
        return None


def _busy(folder: Path) -> str:
    holder = _read_holder(folder)
    return (
        f"'{folder}' is being written by {holder or 'another process'}; let it finish, "
        "or end that process, also if it hangs, and start again"
    )


def _not_lockable(folder: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"'{folder}' cannot be locked against other writers: {reason}; a run needs a "
        "folder that may be written on a disk that locks files"
    )


SUFFIX = ".rtfocus"


def take_folder(folder: Path, header: RunHeader) -> tuple[RunLock, bool]:
    """Make or take up a run folder; True: it holds this series, cut off.

    A finished run is replaced where ``store.overwrite`` says so. What is refused is
    refused before anything is made or changed.

    Raises
    ------
    BusyError
        If another process writes the folder.
    WriterError, OutputError
        If it holds another run; if the disk has too little space.
    """
    _check_series(folder, header)
    resumes = _resumes(folder, header)
    # A resumed run has part of its frames on the disk already.
    planned = 0 if resumes else planned_bytes(header)
    check_space(nearest_existing(folder), planned, int(header.store.min_free_mb * 1e6))
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
    with writing(journal, WriterError):
        journal.touch()
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
    groups = group_documents(folder.absolute(), header, image_specs(header))
    if folder.absolute().as_posix().startswith("//"):
        msg = f"'{folder}' takes no images: connect it as a drive, and give that"
        raise WriterError(msg)
    longest = max(len(str(path)) for path in groups) + _WITHIN_GROUP
    if longest > (most := _most_characters()):
        msg = (
            f"'{folder}' would hold paths of {longest} characters, and Windows opens "
            f"{most}: shorten run.folder or run.name, or switch on its long paths "
            "(LongPathsEnabled)"
        )
        raise WriterError(msg)


_WITHIN_GROUP = len("/0/c.1234567.12.1234.0.0.__lock")
"""Characters of the longest file below an image's group: a shard that is written."""


def _most_characters() -> int:
    """Return how many characters of a path the system opens, whatever a disk does."""
    if sys.platform == "win32":
        is_long = getattr(ctypes.windll.ntdll, "RtlAreLongPathsEnabled", bool)
        return sys.maxsize if is_long() & 0xFF else 259
    else:
        return sys.maxsize


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
    with writing(folder, WriterError):
        remove(folder)
        folder.mkdir()
    return RunLock(folder, "recording")


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
        if (added := added_to(folder)) is not None:
            msg = (
                f"'{folder}' is not replaced: '{added}' is not of the run; move it "
                "away, or choose another run.name"
            )
            raise WriterError(msg)
        return False
    if not (folder / HEADER_NAME).exists():
        if folder.exists() and not (folder.is_dir() and is_bare(folder)):
            msg = f"'{folder}' is not empty and no run folder; choose another run.name"
            raise WriterError(msg)
        return False
    held_uid = read_header(folder).series.series_uid
    if held_uid != uid:
        msg = (
            f"'{folder}' holds the cut-off series {held_uid}, not {uid}; choose "
            f"another run.name, or finish it with: rtfocus check {folder} --repair"
        )
        raise WriterError(msg)
    return True


def run_folder(run: RunConfig, store: StoreConfig, series: SeriesStart) -> Path:
    """Return the folder for `series`: ``NAME.rtfocus``, else ``NAME-2.rtfocus`` ...

    A folder that already holds this series unfinished comes first, so that a
    restarted processor goes on with it. With ``store.overwrite`` a finished
    ``NAME.rtfocus`` is taken, which `open_writer` replaces, unless somebody has added
    something to it.
    """
    for number in count(1):
        name = run.name if number == 1 else f"{run.name}-{number}"
        folder = run.folder / f"{name}{SUFFIX}"
        if not _exists(folder) or holds_unfinished(folder, series.series_uid):
            return folder
        if store.overwrite and number == 1 and is_finished(folder):
            if (added := added_to(folder)) is None:
                return folder
            logger.warning("'%s' is kept: '%s' is not of the run", folder, added)
    raise AssertionError  # count() never ends


_NAMES = (
    *(HEADER_NAME, JOURNAL_NAME, REPORT_NAME, REJECTED_NAME, *LOCK_NAMES),
    *("frames.zarr", "report.html", "focus.ndjson", "focus.png", "picture.png"),
    # Frames that no line names, and what file managers leave where somebody looks.
    *("set_aside", ".DS_Store", "Thumbs.db", "desktop.ini"),
)
"""What may lie in the folder of a finished run beside its images."""


def added_to(folder: Path) -> Path | None:
    """Return what was added to a finished run; None: nothing.

    Notes beside its images are that, and labels that a viewer saved in one. A header
    that cannot be read counts as added too.
    """
    known = {folder / name for name in _NAMES}
    try:
        header = read_header(folder)
        groups = group_documents(folder, header, image_specs(header))
    except WriterError:
        return folder / HEADER_NAME
    for group in groups:
        known |= {group, *group.parents}
        known |= {group / name for name in ("zarr.json", "0", Path(COMPANION).name)}
    places = [place for place in (folder, *groups) if place.is_dir()]
    others = (path for place in places for path in place.iterdir() if path not in known)
    return next(others, None)


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
        # One that another process is just beginning is not ours.
        return holder_of(folder) is None
    try:
        return read_header(folder).series.series_uid == series_uid
    except WriterError:
        return False
