"""Aside: files of a run folder that no journal line names are moved, never deleted."""

import os
from itertools import count
from pathlib import Path

from rtfocus.errors import OutputError, WriterError
from rtfocus.files import replace

ASIDE_NAME = "set_aside"

_MOUNT_POINT = 0xA0000003
"""``stat.IO_REPARSE_TAG_MOUNT_POINT``, which only Windows has."""


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
