"""Errors: one tree, every message names value, rule and remedy.

Foreign exceptions are translated at the boundary with ``raise ... from error``;
programmer errors stay ``ValueError`` and ``TypeError``.

::

    RtfocusError
    ├── ConfigError        a config file or option that cannot be used
    │   └── OpticsError    values that no microscope has; a ValueError too
    ├── InputError         a file or folder that cannot be read as images
    ├── OutputError        a place that cannot, or must not, be written to
    ├── TransportError     sockets, peers, protocol, stalls
    │   ├── ProtocolError  one message that breaks the wire protocol
    │   ├── StoppedError   ended by the user before anything was sent
    │   ├── TakenOverError another recorder has the series now
    │   ├── PeerGoneError  a peer is silent, and its port is closed
    │   └── PeerLostError  a peer is silent, and may still come back
    ├── MicroscopeError    Micro-Manager, adapters, devices, acquisition
    ├── EngineError        an engine that cannot be loaded, fitted or run
    ├── WriterError        the run folder: disk, store, journal
    │   ├── BusyError      another process writes the run folder
    │   └── NoRunError     not a run folder
    ├── IncompleteError    the work ended, but not all that was planned is there
    └── WorkerError        a thread of the loop failed; names it, keeps the cause

Every class carries the exit code that a command ends with when it raises it.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, unique
from pathlib import Path
from typing import ClassVar


@unique
class ExitCode(IntEnum):
    """What a command's exit code says: the table of ``docs/reference/commands.md``."""

    DONE = 0
    """Everything planned is on disk, and ``rtfocus check`` agrees."""
    FAILED = 1
    """The work failed, or the answer is no: ``check`` found problems, ``doctor`` misses
    something."""
    USAGE = 2
    """The command line is not understood: unknown command, option or value."""
    CONFIG = 3
    """A config, plan or option cannot be used; nothing was acquired or written."""
    INPUT = 4
    """An input cannot be read as images, is no run folder, or an output is refused;
    nothing was changed."""
    INCOMPLETE = 5
    """The work ended and what is on disk is sound, but not all that was planned is
    there: fewer frames than the plan has, frames dropped or in error, some of several
    inputs or files. A planned series ended by Ctrl-C counts; one without a planned end
    does not."""
    ENGINE = 6
    """An engine is missing, damaged, or does not fit."""
    BUSY = 7
    """Another process writes the run folder or works at the batch (nothing was
    changed), or has moved or removed the folder amid the run."""
    FAULT = 70
    """A fault of rtfocus itself; one line says where the traceback was written."""
    INTERRUPTED = 130
    """Ctrl-C, a request to end, or a closed terminal before there was a result."""


class RtfocusError(Exception):
    """Anything that a user can act on; the CLI prints it without a traceback."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    """What a command that ends with this error exits with."""


class ConfigError(RtfocusError):
    """A config file or option cannot be used."""

    exit_code = ExitCode.CONFIG


class OpticsError(ConfigError, ValueError):
    """Optics that no microscope has, refused where they are made.

    Also a ``ValueError``: pydantic and msgspec then name the place in a config or
    message.
    """


class InputError(RtfocusError):
    """A file or folder cannot be read as images."""

    exit_code = ExitCode.INPUT


class OutputError(RtfocusError):
    """A file or folder cannot, or must not, be written, replaced or removed."""

    exit_code = ExitCode.INPUT


class TransportError(RtfocusError):
    """A socket, a peer or the exchange with it failed."""


class ProtocolError(TransportError):
    """One message breaks the wire protocol; counted, never ends a run.

    Parameters
    ----------
    message
        What is wrong with it.
    reason
        The word it is counted under, e.g. ``truncated``.
    """

    def __init__(self, message: str, reason: str = "malformed") -> None:
        super().__init__(message)
        self.reason = reason


class StoppedError(TransportError):
    """The user ended the series before a frame of it was sent."""

    exit_code = ExitCode.INTERRUPTED


class TakenOverError(TransportError):
    """Another recorder has the series now; this one leaves its run folder as it is."""

    exit_code = ExitCode.BUSY


class PeerGoneError(TransportError):
    """A silent peer's port is closed: its process, or the way to it, has ended."""


class PeerLostError(TransportError):
    """A peer has been silent for too long; it may be frozen and go on later."""


class MicroscopeError(RtfocusError):
    """Micro-Manager, a device or the acquisition failed."""


class EngineError(RtfocusError):
    """An engine cannot be loaded, does not fit or failed to run."""

    exit_code = ExitCode.ENGINE


class WriterError(RtfocusError):
    """The run folder cannot be written or read back."""


class BusyError(WriterError):
    """Another process writes the run folder; the message says which."""

    exit_code = ExitCode.BUSY


class NoRunError(WriterError):
    """What is given as a run folder is not one, or cannot be opened."""

    exit_code = ExitCode.INPUT


class IncompleteError(RtfocusError):
    """The work ended, but not all that was planned is there; what is there is sound.

    The message says how many of how many, and why.
    """

    exit_code = ExitCode.INCOMPLETE


class WorkerError(RtfocusError):
    """A thread of the loop failed; the message names it, the cause is kept."""


_TERSE = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)
"""Errors whose text alone says nothing to a reader."""

FREE_SPACE = "free space"
_FULL = ("no space left", "disk full", "not enough space")
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def remedy(error: BaseException, text: str = "") -> str:
    """Return what helps where the system refused to write.

    Parameters
    ----------
    error
        With its number, where it has one.
    text
        The words of a library that keeps no number.
    """
    number, words = getattr(error, "errno", None), text.lower()
    if number == errno.EFBIG or "file too large" in words:
        return (
            "a file there is as long as this system lets it be; raise the limit "
            "(ulimit -f; FAT32 has 4 GB)"
        )
    if number == errno.EDQUOT or "quota" in words:
        return "your quota there is used up; free space of it, or have it raised"
    if number == errno.ENOSPC or any(hint in words for hint in _FULL):
        return FREE_SPACE
    if number in _NOT_ALLOWED:
        return "allow writing there, or give another place"
    return "see to its disk"


def why_not_written(error: OSError) -> str:
    """Return why the system refused to write, and what helps."""
    reason = error.strerror or str(error)
    return f"{reason}; {remedy(error, reason)}"


@contextmanager
def writing(path: Path, kind: type[RtfocusError]) -> Iterator[None]:
    """Tell as an error of `kind` what is refused to the block, which writes a path."""
    try:
        yield
    except OSError as error:
        msg = f"'{path}' cannot be written: {why_not_written(error)}"
        raise kind(msg) from error
    except OutputError as error:  # of `rtfocus.files`
        if kind is OutputError:
            raise
        raise kind(str(error)) from error


def one_line(error: BaseException) -> str:
    """Return what a foreign error says as one line of bounded length."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, _TERSE):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 200 else f"{text[:200]}..."


def number_of(count: int, what: str) -> str:
    """Return a count and what is counted, ``1 image`` or ``2 images``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def replacement(failure: RtfocusError | None) -> RtfocusError | None:
    """Return the error that says that another process has the series or the folder."""
    causes = () if failure is None else (failure, failure.__cause__)
    return next((e for e in causes if isinstance(e, (TakenOverError, BusyError))), None)


@contextmanager
def beside(first: RtfocusError | None, doing: str) -> Iterator[None]:
    """Add what fails in the block as a note to `first`, where there is one.

    Cleaning up after a failure mostly fails of the same cause: raised, it would hide
    what went wrong first.
    """
    try:
        yield
    except RtfocusError as error:
        if first is None:
            raise
        first.add_note(f"{doing} failed too: {error}")
