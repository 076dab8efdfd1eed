"""Microscope: acquires frames through Micro-Manager and hands them to a sink."""

import importlib
import logging
import os
import tempfile
from pathlib import Path

from platformdirs import user_data_path

_LOG_VARIABLE = "PYMM_LOG_FILE"


def _keep_the_log_writable() -> None:
    """Send pymmcore-plus' log elsewhere where a home cannot be written.

    It opens its log when it is imported, and the import fails where it cannot. So
    this runs before any module of this package.
    """
    named = os.environ.get(_LOG_VARIABLE, "")
    usual = user_data_path("pymmcore-plus") / "logs" / "pymmcore-plus.log"
    log = Path(named).absolute() if named else usual
    if named.lower() not in ("0", "false", "no", "none") and not _is_writable(log):
        _log_elsewhere(log)
    if _is_closed(usual.parent):
        _import_without_home()


def _log_elsewhere(log: Path) -> None:
    instead = Path(tempfile.gettempdir()) / f"pymmcore-plus-{os.getpid()}.log"
    # In the environment, so that child processes find it and need not tell it again.
    os.environ[_LOG_VARIABLE] = str(instead) if _is_writable(instead) else "0"
    logging.getLogger(__name__).warning(
        "pymmcore-plus cannot write its log '%s'; it goes to '%s' (set %s)",
        log,
        os.environ[_LOG_VARIABLE],
        _LOG_VARIABLE,
    )


def _import_without_home() -> None:
    """Import pymmcore-plus without the home, which is another user's.

    It looks there for adapters whenever a core is made, and would fail.
    """
    variable = "XDG_DATA_HOME"
    before = os.environ.get(variable)
    # Below a file there is nothing, and nothing can be put there.
    os.environ[variable] = f"{os.devnull}/none"
    try:
        importlib.import_module("pymmcore_plus")
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def _is_closed(folder: Path) -> bool:
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return False


def _is_writable(log: Path) -> bool:
    # Without a home its name would be a folder called "~" where one works.
    if not log.is_absolute():
        return False
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab"):
            return True
    except OSError:
        return False


_keep_the_log_writable()
