"""Cache folder: where a user's plans and compiled kernels are kept."""

import os
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "RTFOCUS_CACHE"
"""Environment variable that names another folder, e.g. on a fast local disk."""


def cache_folder() -> Path:
    """Return the folder of this user's cache, which may not exist yet."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else user_cache_path("rtfocus", appauthor=False)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a kill, never meets half of it.

    Raises
    ------
    OSError
        If the folder or the file cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    unfinished = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
