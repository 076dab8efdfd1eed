"""Naming: which run folder a series goes to."""

from itertools import count
from pathlib import Path

from rtfocus.config.model import RunConfig
from rtfocus.config.processor import StoreConfig
from rtfocus.errors import WriterError
from rtfocus.frame import SeriesStart
from rtfocus.writers.header import is_bare, is_finished, read_header
from rtfocus.writers.lock import holder_of

SUFFIX = ".rtfocus"


def run_folder(run: RunConfig, store: StoreConfig, series: SeriesStart) -> Path:
    """Return the folder for `series`: ``NAME.rtfocus``, else ``NAME-2.rtfocus`` ...

    A folder that already holds this series unfinished comes first, so that a
    restarted processor goes on with it. With ``store.overwrite`` a finished
    ``NAME.rtfocus`` is taken, to be replaced by `open_run`.
    """
    for number in count(1):
        name = run.name if number == 1 else f"{run.name}-{number}"
        folder = run.folder / f"{name}{SUFFIX}"
        if not exists(folder) or holds_unfinished(folder, series.series_uid):
            return folder
        if store.overwrite and number == 1 and is_finished(folder):
            return folder
    raise AssertionError  # count() never ends


def exists(folder: Path) -> bool:
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
