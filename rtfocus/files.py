"""Files: written whole, replaced and removed whole, under names every system takes.

Nothing here decides whether something may be replaced; it makes sure that what is
replaced or removed is there whole or gone at every moment, even if interrupted. What a
viewer, a virus scanner or a network drive holds open is tried again for seconds.
"""

import errno
import hashlib
import logging
import os
import platform
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from rtfocus.errors import (
    InputError,
    OutputError,
    WriterError,
    why_not_written,
    writing,
)

PATIENCE_S = 5.0
"""How long a file that another program holds open is tried again."""
MOST_NAME_BYTES = 200
"""File systems take 255; the rest is for endings and what is added to a name."""

_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$", "clock$"]
    + [f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"]
)
_FOREIGN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')
_HELD = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.ENOTEMPTY)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long, and by which clock, a held file is tried again."""

    deadline_s: float = PATIENCE_S
    pause_s: float = 0.1
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def insist(self, action: Callable[[], object], failure: str) -> None:
        """Do `action`, again while the file is held open, up to the deadline.

        Raises
        ------
        OutputError
            `failure` with the system's reason, once the time is up or at once where
            waiting cannot help.
        """
        end_s = self.clock() + self.deadline_s
        while True:
            try:
                action()
            except OSError as error:
                held = error.errno in _HELD
                if not held or self.clock() >= end_s:
                    raise OutputError(_refusal(failure, error, held)) from error
                self.sleep(self.pause_s)
            else:
                return


PATIENCE = Patience()
"""Of everything that names no other."""


def _refusal(failure: str, error: OSError, held: bool) -> str:
    reason = error.strerror or str(error)
    remedy = "; close what has it open, or allow writing there" if held else ""
    return f"{failure}: {reason}{remedy}"


def replace(part: Path, target: Path, patience: Patience = PATIENCE) -> None:
    """Move `part`, a file or folder, to `target` in place of what stands there.

    What stands there is kept until `part` has its place, and put back if that fails.

    Parameters
    ----------
    part
        On the same file system as `target`.
    target
        A file, a folder or nothing.
    patience
        For what is held open.

    Raises
    ------
    OutputError
        If it cannot be done; then both are as they were.
    """
    failure = f"'{target}' cannot be replaced"
    if not (part.is_dir() or _is_folder(target)) or not os.path.lexists(target):
        patience.insist(lambda: os.replace(part, target), failure)
        return
    # No system swaps a folder for another in one step.
    old = _hidden_name(target, "old")
    patience.insist(lambda: target.rename(old), failure)
    try:
        patience.insist(lambda: part.rename(target), failure)
    except BaseException:
        if not os.path.lexists(target):
            old.rename(target)
        raise
    _clear(old, patience)


def remove(path: Path, patience: Patience = PATIENCE) -> None:
    """Remove a file, a link (not what it leads to) or a whole folder, if it exists.

    A folder first loses its name in one step, so it is there whole or gone.

    Raises
    ------
    OutputError
        If it cannot be removed; then it is as it was.
    """
    failure = f"'{path}' cannot be removed"
    if not _is_folder(path):
        patience.insist(lambda: path.unlink(missing_ok=True), failure)
        return
    gone = _hidden_name(path, "gone")
    patience.insist(lambda: path.rename(gone), failure)
    _clear(gone, patience)


def sync(path: Path) -> None:
    """Bring a file, or a folder with all in it, to the disk: a power cut spares it.

    Its name is synced by `sync_names` of the folder it lies in, once it has its place.

    Raises
    ------
    OSError
        If the disk refuses what was written.
    """
    for folder, _, names in os.walk(path):
        for name in names:
            _sync_file(Path(folder) / name)
        sync_names(Path(folder))
    if not path.is_dir():
        _sync_file(path)


def sync_names(*folders: Path) -> None:
    """Bring the names in folders to the disk, where the system has them kept apart."""
    if os.name == "nt":
        return  # NTFS keeps a journal of them, and opens no folder
    for folder in folders:
        with suppress(OSError):  # network drives that know no such thing
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def sync_everything() -> None:
    """Bring what any process wrote so far to the disk, where the system can."""
    if hasattr(os, "sync"):
        os.sync()


def _sync_file(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def whole(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a free path beside `target`; what is written there is moved there whole.

    Missing parent folders are made. When the block is left by an exception, Ctrl-C
    included, nothing of it remains; what a killed try left for the same target is
    cleared away.

    Parameters
    ----------
    target
        A file or folder.
    overwrite
        Replace what stands at `target`, even if it came there during the block.

    Raises
    ------
    OutputError
        If `target` exists and `overwrite` is not given, or the system refuses to
        write; the message names the target.
    """
    new_folders = _make_folders(target.parent)
    part = _hidden_name(target, "part")
    try:
        recover(target)
        _refuse_existing(target, overwrite)
        with writing(target, OutputError):
            yield part
        _refuse_existing(target, overwrite)
        replace(part, target)
    finally:
        with suppress(OutputError):
            remove(part)
        for folder in new_folders:
            with suppress(OSError):  # holds something: then it is needed
                folder.rmdir()


def recover(*targets: Path) -> None:
    """Clear away what killed processes left beside `targets`.

    Something that one of them was just replacing comes back to its place.
    """
    by_tag = {(target.parent, _tag(target)): target for target in targets}
    with suppress(OSError):
        for folder in {target.parent for target in targets}:
            for left in sorted(folder.glob(".rtfocus-*-*-*-*")):
                _, tag, host, process, kind = left.name.split("-", 4)
                target = by_tag.get((folder, tag))
                if target is None or host != _host() or not process.isdigit():
                    continue
                if _is_alive(int(process)):
                    continue
                if kind.endswith(".old") and not os.path.lexists(target):
                    left.rename(target)
                else:
                    _clear(left, PATIENCE)


def path_given(given: object, what: str) -> Path:
    """Return what a script gives for a path, `what` for the message, as one.

    Raises
    ------
    InputError
        If it is not a path.
    """
    if not isinstance(given, (str, os.PathLike)):
        msg = f"{what} is of type {type(given).__name__}; give a path"
        raise InputError(msg)
    return Path(given)


def nearest_existing(path: Path) -> Path:
    """Return a path, or the innermost of its parents that is there.

    Raises
    ------
    WriterError
        If none is: on Windows a drive may be missing.
    """
    for place in (path.absolute(), *path.absolute().parents):
        if os.path.exists(place):
            return place
    msg = f"'{path}': there is no '{place}'; connect that drive, or choose another"
    raise WriterError(msg)


def try_writing(folder: Path) -> None:
    """Make a file in a folder and remove it; OSError: it takes none.

    On Windows `tempfile` would try name after name, for hours, where it may not write.
    """
    path = _hidden_name(folder / "try", "part")
    path.open("xb").close()
    remove(path)


def is_reserved_name(text: str) -> bool:
    """Tell whether Windows refuses or changes a file of this name.

    That is ``con``, ``nul``, ``com1`` and their like with any ending, and names that
    end in a dot or a space.
    """
    stem = text.split(".", 1)[0].rstrip(" ").casefold()
    return stem in _RESERVED or text != text.rstrip(". ")


def portable_name(text: str) -> str:
    """Turn foreign text into a file name that every system takes.

    Parameters
    ----------
    text
        E.g. the name of a series or position; may hold slashes, line ends, anything.

    Returns
    -------
    str
        Never empty, hidden, reserved, a path. One of more than `MOST_NAME_BYTES` is cut
        and gets a digest of the whole, so that long names that differ stay different.
        Other texts that differ may give the same name.

    Examples
    --------
    >>> portable_name("Pos/0: A?"), portable_name("con"), portable_name("..")
    ('Pos_0_ A_', 'con_', '_')
    """
    name = _FOREIGN.sub("_", unicodedata.normalize("NFC", text)).strip().rstrip(". ")
    if name.startswith("."):
        name = f"_{name[1:]}"
    if is_reserved_name(name):
        stem, dot, ending = name.partition(".")
        name = f"{stem.rstrip(' ')}_{dot}{ending}"
    encoded = name.encode()
    if len(encoded) > MOST_NAME_BYTES:
        digest = _digest(text.encode(errors="surrogatepass"))
        cut = encoded[: MOST_NAME_BYTES - len(digest) - 1].decode(errors="ignore")
        name = f"{cut.rstrip('. ')}~{digest}"
    return name or "_"


def same_name(name: str) -> str:
    """Return what is equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _is_folder(path: Path) -> bool:
    """Tell a folder from a link to one, which is removed as a file is."""
    return path.is_dir() and not path.is_symlink()


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(target):
        msg = f"'{target}' exists; choose another output or give --overwrite"
        raise OutputError(msg)


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder with its parents; return those made, the innermost first."""
    missing = []
    for parent in (folder, *folder.parents):
        if parent.exists():
            break
        missing.append(parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"folder '{folder}' cannot be made: {why_not_written(error)}"
        raise OutputError(msg) from error
    return missing


def _hidden_name(target: Path, kind: str) -> Path:
    """Return a free hidden name beside `target` that tells whose it is."""
    unique = uuid4().hex[:8]
    name = f".rtfocus-{_tag(target)}-{_host()}-{os.getpid()}-{unique}.{kind}"
    return target.with_name(name)


def _tag(target: Path) -> str:
    return _digest(os.fsencode(target.name))


def _host() -> str:
    """Tell machines apart that share a drive: process ids mean nothing elsewhere."""
    return _digest(platform.node().encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    return process == os.getpid() or psutil.pid_exists(process)


def _clear(path: Path, patience: Patience) -> None:
    """Delete what has lost its name already; what resists is logged, not raised."""
    try:
        patience.insist(
            lambda: shutil.rmtree(path) if _is_folder(path) else path.unlink(),
            f"'{path}' is left over and cannot be removed",
        )
    except OutputError as error:
        logger.warning("%s", error)


_PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """Return the folder ``engines`` or ``configs`` that belongs to this install.

    Raises
    ------
    FileNotFoundError
        If neither place has it: a broken installation.
    """
    places = [_PACKAGE / "_data" / name, _PACKAGE.parent / name]
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(str(place) for place in places)
    msg = f"no folder '{name}' at {looked}; reinstall rtfocus"
    raise FileNotFoundError(msg)


_MOUNT_POINT = 0xA0000003
"""``stat.IO_REPARSE_TAG_MOUNT_POINT``, which only Windows has."""


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
            folders += _folders_in(folders.pop())
        except OSError as error:
            msg = f"'{error.filename}' cannot be read: {error.strerror}"
            raise WriterError(msg) from error


def _folders_in(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() or _is_junction(entry):
                msg = (
                    f"'{entry.path}' is a link; a run folder that leads elsewhere is "
                    "only read: replace the link by what it leads to"
                )
                raise WriterError(msg)
            if entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _is_junction(entry: "os.DirEntry[str]") -> bool:
    """Tell a Windows junction, which is no symbolic link to Python."""
    status = entry.stat(follow_symlinks=False) if os.name == "nt" else None
    return bool(getattr(status, "st_reparse_tag", 0) == _MOUNT_POINT)
