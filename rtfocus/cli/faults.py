"""Faults: every error in one line; the traceback of an unexpected one in a file."""

import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from rtfocus import __version__
from rtfocus.errors import ExitCode, RtfocusError, WorkerError


def tell(error: Exception) -> int:
    """Say on standard error what happened, in one line; return the exit code.

    What a user can act on (`RtfocusError`, or an operation that the system
    refused) is told as such. Anything else is a fault of rtfocus: its traceback is
    written to a file that the line names. ``RTFOCUS_DEBUG=1`` shows it at once.
    """
    if os.environ.get("RTFOCUS_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    if _is_ours(error):
        code, line = int(getattr(error, "exit_code", ExitCode.FAILED)), _said(error)
    else:
        code, line = ExitCode.FAULT, f"{_said(error)}; {_fault(error)}"
    sys.stderr.write(f"error: {line}\n")
    return code


def _is_ours(error: BaseException) -> bool:
    """Whether a user can act on it."""
    if isinstance(error, WorkerError) and error.__cause__ is not None:
        return _is_ours(error.__cause__)
    return isinstance(error, RtfocusError | MemoryError) or (
        isinstance(error, OSError) and error.strerror is not None
    )


def _said(error: BaseException) -> str:
    if isinstance(error, RtfocusError):
        return _in_one_line(str(error))
    if isinstance(error, MemoryError):
        return "not enough memory for this; close programs, or take less at once"
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f"'{error.filename}': "
        return _in_one_line(f"{where}{error.strerror}")
    return _in_one_line(f"{type(error).__name__}: {error}")


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _fault(error: Exception) -> str:
    path = write_traceback(error)
    if path is None:
        return (
            "this is a fault of rtfocus; its traceback could not be written anywhere, "
            "show it with RTFOCUS_DEBUG=1"
        )
    return f"this is a fault of rtfocus, please report it with '{path}'"


def write_traceback(error: Exception) -> Path | None:
    """Write the traceback to the first folder that takes it; None: none does."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    text = "\n".join(
        [
            f"rtfocus {__version__}, Python {platform.python_version()}, "
            f"{platform.platform()}",
            f"command: {sys.argv}",
            f"folder: {os.getcwd()}",
            "",
            "".join(traceback.format_exception(error)),
        ]
    )
    for folder in _log_folders():
        path = folder / f"fault-{stamp}-{os.getpid()}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return path
    return None


def _log_folders() -> Iterator[Path]:
    """Yield the user's folder of logs, then the system's temporary one."""
    from platformdirs import user_log_path

    logs = user_log_path("rtfocus", appauthor=False)
    # Without a home it would be a folder called "~" where one works.
    if logs.is_absolute():
        yield logs
    yield Path(tempfile.gettempdir())
