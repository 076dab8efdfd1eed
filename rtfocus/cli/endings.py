"""Endings: how a command ends that is interrupted, or that fails.

Ctrl-C ends the acquisition, a second one abandons the rest. A request to end (SIGTERM),
a closed terminal (SIGHUP), Ctrl-Break and a closed console window (Windows) count as
Ctrl-C. A signal that is ignored from outside, as by ``nohup``, stays ignored.

Every error is one line; the traceback of an unexpected one goes to a file.
"""

import ctypes
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rtfocus import __version__
from rtfocus.errors import ExitCode, RtfocusError, WorkerError

CLOSE_EVENTS = (2, 5, 6)
"""Of the Windows console: window closed, log-off, shut-down."""
CLOSE_GRACE_S = 4.5
"""Windows ends the process 5 s after its window was closed, whatever it does."""


class Interrupted(BaseException):
    """A command was interrupted; kept from typer, which would say nothing."""


class _Asked(threading.Event):
    """An event that a signal handler may set, whatever it interrupts.

    Any other has a lock that a second Ctrl-C amid the first would wait for, for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition(threading.RLock())
        self._is_set = False

    def is_set(self) -> bool:
        """Tell whether the end was requested."""
        return self._is_set

    def set(self) -> None:
        """Request the end, and wake those who wait for it."""
        with self._changed:
            self._is_set = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget the request."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a request; return whether there was one."""
        with self._changed:
            return self._changed.wait_for(self.is_set, timeout)


@contextmanager
def interruptible() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Yield events ``stop`` and ``abandon``, set by the first and second Ctrl-C."""
    stop, abandon = _Asked(), _Asked()

    def interrupt(_signal: int = 0, _frame: FrameType | None = None) -> None:
        (abandon if stop.is_set() else stop).set()

    with _handled(("SIGINT", *_OTHERS), interrupt), closing_console(interrupt):
        yield stop, abandon


def heeding(
    stop: threading.Event, show: Callable[[float], None]
) -> Callable[[float], None]:
    """Return `show`, which raises `KeyboardInterrupt` from the first Ctrl-C on.

    For work that shows its share between steps that must not be cut off themselves,
    such as moves of a stage.
    """

    def shown(share: float) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        show(share)

    return shown


@contextmanager
def ended_by_signals() -> Iterator[threading.Event]:
    """Let every request to end raise `KeyboardInterrupt`, as Ctrl-C does.

    Yields an event that is set by the first.
    """
    ending = _Asked()

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        ending.set()
        raise KeyboardInterrupt

    with _handled(("SIGINT", *_OTHERS), interrupt), closing_console(_interrupt_main):
        yield ending


def stop_at_end_of_input(stop: threading.Event) -> None:
    """Set `stop` when standard input ends: the parent asks for it, or is gone.

    From here on nothing else has that input: theirs is empty.
    """
    # Windows does not say what kind of pipe it is while a thread waits for it, and
    # libraries ask that of standard input while they are loaded: they would hang.
    parent = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        # Not through sys.stdin: a thread inside its lock aborts the interpreter's end.
        while os.read(parent, 1024):
            continue
        stop.set()

    threading.Thread(target=wait, daemon=True).start()


_OTHERS = ("SIGTERM", "SIGHUP", "SIGBREAK")
_Handler = Callable[[int, FrameType | None], None]


@contextmanager
def _handled(names: tuple[str, ...], handler: _Handler) -> Iterator[None]:
    """Handle those signals that this system has and that are not ignored."""
    terminals = [fd for fd in (1, 2) if _is_terminal(fd)]

    def handle(number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            _leave(terminals)
        handler(number, frame)

    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    with ExitStack() as before:
        # Python allows handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                old = signal.getsignal(number)
                if old is not signal.SIG_IGN:
                    signal.signal(number, handle)
                    before.callback(signal.signal, number, old)
        yield


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def _leave(terminals: list[int]) -> None:
    """Write to nothing what would go to a terminal that is gone."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for terminal in terminals:
        os.dup2(nothing, terminal)
    os.close(nothing)


def _interrupt_main() -> None:
    """Act in the main thread as Ctrl-Break does."""
    import _thread

    _thread.interrupt_main(getattr(signal, "SIGBREAK", signal.SIGTERM))


class ConsoleClose:
    """What Windows calls, in a thread of its own, when something ends the console.

    Windows ends the process when this returns. So it asks for the end, and
    returns when `ended` is set, or when Windows would wait no longer.
    """

    def __init__(self, end: Callable[[], None], grace_s: float = CLOSE_GRACE_S) -> None:
        self._end = end
        self._grace_s = grace_s
        self.ended = threading.Event()

    def __call__(self, event: int) -> bool:
        """Tell whether `event` was dealt with; Ctrl-C and Ctrl-Break are signals."""
        if event not in CLOSE_EVENTS:
            return False
        self._end()
        self.ended.wait(self._grace_s)
        return True


@contextmanager
def closing_console(
    end: Callable[[], None],
    kernel32: Any = None,  # noqa: ANN401 (ctypes knows its functions by name only)
) -> Iterator[None]:
    """Call `end` when the console window is closed while the block runs.

    `kernel32` is Windows' library of that name; elsewhere there is none, and
    nothing is done.
    """
    if kernel32 is None and sys.platform == "win32":
        kernel32 = ctypes.windll.kernel32
    if kernel32 is None:
        yield
        return
    close = ConsoleClose(end)
    function = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE)
    handler = function(ctypes.c_int, ctypes.c_uint)(close)
    kernel32.SetConsoleCtrlHandler(handler, 1)
    try:
        yield
    finally:
        close.ended.set()
        kernel32.SetConsoleCtrlHandler(handler, 0)


def tell(error: Exception, *, was_interrupted: bool = False) -> int:
    """Say on standard error what happened, in one line; return the exit code.

    What a user can act on (`RtfocusError`, or an operation that the system
    refused) is reported as such. Anything else is a fault of rtfocus: its traceback is
    written to a file that the line names. ``RTFOCUS_DEBUG=1`` shows it at once.
    Of a command that was interrupted it is no fault: libraries make errors of their
    own of a `KeyboardInterrupt`, as pydantic does while it builds a class.
    """
    if os.environ.get("RTFOCUS_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    if _is_ours(error):
        code, line = int(getattr(error, "exit_code", ExitCode.FAILED)), said(error)
    elif was_interrupted:
        sys.stderr.write("interrupted\n")
        return ExitCode.INTERRUPTED
    else:
        code, line = ExitCode.FAULT, f"{said(error)}; {_fault(error)}"
    sys.stderr.write(f"error: {line}\n")
    return code


def _is_ours(error: BaseException) -> bool:
    """Whether a user can act on it."""
    if isinstance(error, WorkerError) and error.__cause__ is not None:
        return _is_ours(error.__cause__)
    return isinstance(error, RtfocusError | MemoryError) or (
        isinstance(error, OSError) and error.strerror is not None
    )


def said(error: BaseException) -> str:
    """Return in one line what happened, with the notes of an error of rtfocus."""
    if isinstance(error, RtfocusError):
        # A note says what failed after it, as closing does on a full disk.
        return _in_one_line("; ".join([str(error), *getattr(error, "__notes__", ())]))
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
