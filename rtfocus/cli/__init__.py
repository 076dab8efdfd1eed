"""Command line: starts at once, and every end is one line and one exit code.

Nothing here takes time to import, not even the standard library: an interrupt is
answered, and ``--version`` told, before the commands and what they need are loaded.
"""

import atexit
import codecs
import os
import sys

from rtfocus import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_INTERRUPTED = 130
"""`ExitCode.INTERRUPTED`, for an interrupt before that is loaded."""


def main() -> "NoReturn":
    """Run the command line; no traceback reaches a user.

    Exits with a code of `rtfocus.errors.ExitCode`.
    """
    ended: list[int] = []
    # Registered first, it is called last.
    atexit.register(_leave_engines, ended)
    try:
        _use_utf8()
        if sys.argv[1:] == ["--version"]:
            sys.stdout.write(f"rtfocus {__version__}\n")
            code = 0
        else:
            code = _run()
    except KeyboardInterrupt:
        code = _say_interrupted()
    finally:
        # Registered last, it is called first.
        atexit.register(_keep_the_code)
    ended.append(code)
    raise SystemExit(int(code))


def _run() -> int:
    """Run the command and translate how it ended; return its exit code."""
    from rtfocus.cli.endings import Interrupted, ended_by_signals, tell

    with ended_by_signals() as ending:
        try:
            from rtfocus.cli.commands import app

            app()
        except (KeyboardInterrupt, Interrupted):
            return _say_interrupted()
        except SystemExit as end:
            # What interrupts it amid the words of the line typer ends without a word.
            if end.code == _INTERRUPTED and ending.is_set():
                return _say_interrupted()
            raise
        except Exception as error:
            return tell(error, was_interrupted=ending.is_set())
    return 0


def _keep_the_code() -> None:
    """Ignore requests to end from here on: the process ends, and has said how."""
    import signal

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _leave_engines(ended: list[int]) -> None:
    """End an interrupted process while a device still opens its engines.

    Nothing stops that, and Python ending its thread amid OpenVINO's code aborts the
    process.
    """
    import threading

    opening = any(thread.name == "rtfocus-device" for thread in threading.enumerate())
    if _INTERRUPTED in ended and opening:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_INTERRUPTED)


def _say_interrupted() -> int:
    sys.stderr.write("interrupted\n")
    return _INTERRUPTED


def _use_utf8() -> None:
    """Write UTF-8 everywhere, also where the console's code page is another.

    Where even file names are ASCII (``LC_ALL=C`` with Python's remedy for it turned
    off), no name with another letter could be opened: Python is started again.
    """
    is_ascii = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if is_ascii and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
