"""Errors: one tree, every message names value, rule and remedy.

Foreign exceptions are translated at the boundary with ``raise ... from error``;
programmer errors stay ``ValueError`` and ``TypeError``.

::

    RtfocusError
    ├── ConfigError        a config file or option that cannot be used
    ├── InputError         a file or folder that cannot be read as images
    ├── TransportError     sockets, peers, protocol, stalls
    │   └── ProtocolError  one message that breaks the wire protocol
    ├── MicroscopeError    Micro-Manager, adapters, devices, acquisition
    ├── EngineError        an engine that cannot be loaded, fitted or run
    ├── WriterError        the run folder: disk, store, journal
    └── WorkerError        a thread of the loop failed; names it, keeps the cause
"""


class RtfocusError(Exception):
    """Anything that a user can act on; the CLI prints it without a traceback."""


class ConfigError(RtfocusError):
    """A config file or option cannot be used."""


class InputError(RtfocusError):
    """A file or folder cannot be read as images."""


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


class MicroscopeError(RtfocusError):
    """Micro-Manager, a device or the acquisition failed."""


class EngineError(RtfocusError):
    """An engine cannot be loaded, does not fit or failed to run."""


class WriterError(RtfocusError):
    """The run folder cannot be written or read back."""


class WorkerError(RtfocusError):
    """A thread of the loop failed; the message names it, the cause is kept."""
