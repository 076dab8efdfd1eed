"""I/O thread: one thread that opens, uses and closes all sockets of a side."""

import socket
import threading
from collections.abc import Callable
from typing import Protocol

import zmq

from rtfocus.errors import RtfocusError, TransportError
from rtfocus.transport.sockets import Context


class Waker:
    """A pair of connected sockets; its reading end joins a poller.

    A ZeroMQ inproc pair would do the same, but only from one thread.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._lock = threading.Lock()
        self._pending = False
        self._closed = False

    def fileno(self) -> int:
        """Return what a poller waits on."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Make the waiting thread's poll return; callable from any thread."""
        with self._lock:
            # One byte at most is under way, so this never blocks.
            if self._pending or self._closed:
                return
            self._pending = True
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Forget earlier wake-ups; call it before looking at what they announce."""
        with self._lock:
            if self._pending:
                self._reader.recv(1)
                self._pending = False

    def close(self) -> None:
        """Close both ends; later wake-ups do nothing."""
        with self._lock:
            self._closed = True
            self._reader.close()
            self._writer.close()


_LOOK_S = 0.1
"""How often a waiting call looks for a failure of the thread."""


class IoLoop(Protocol):
    """What runs in the thread; every call comes from there."""

    def turn(self) -> None:
        """Wait for something to do, and do it."""

    def close(self) -> None:
        """Send the last words and close the sockets."""


class IoThread:
    """Runs a loop until `close`; its failure is kept and told to everybody.

    Parameters
    ----------
    name
        Of the thread.
    open_loop
        Called in the thread; its exception is raised by this constructor.
    on_failure
        Called in the thread when the loop fails, to wake whoever waits.
    """

    def __init__(
        self,
        name: str,
        open_loop: Callable[[Context, Waker], IoLoop],
        on_failure: Callable[[TransportError], None],
    ) -> None:
        self.failure: RtfocusError | None = None
        """Why the loop broke off."""
        self._waker = Waker()
        self._open_loop = open_loop
        self._on_failure = on_failure
        self._open = threading.Event()
        self._calls = threading.Lock()
        self._action: Callable[[], None] | None = None
        self._acted = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()
        self._open.wait()
        failure = self._failure_so_far()
        if failure is not None:
            self._thread.join()
            raise failure

    def wake(self) -> None:
        """Make the loop take a turn now; callable from any thread."""
        self._waker.wake()

    def call(self, action: Callable[[], None]) -> None:
        """Run `action` in the thread, between two turns, and wait for it."""
        with self._calls:
            self._acted.clear()
            self._action = action
            self._waker.wake()
            while not self._acted.wait(_LOOK_S):
                self.check()

    def check(self) -> None:
        """Raise what the loop failed with, or that it was closed."""
        if self.failure is not None:
            msg = str(self.failure)
            raise TransportError(msg) from self.failure
        if self._closing:
            msg = "the transport was closed"
            raise TransportError(msg)

    def close(self) -> None:
        """End the thread; its sockets are closed when this returns."""
        self._closing = True
        self._waker.wake()
        self._thread.join()

    def _failure_so_far(self) -> RtfocusError | None:
        return self.failure

    def _run(self) -> None:
        # A context of its own: keys and the ZAP socket belong to one side.
        context: Context = zmq.Context()
        loop = self._try_open(context)
        self._open.set()
        if loop is None:
            context.destroy(linger=0)
            self._waker.close()
            return
        try:
            while not self._closing:
                action, self._action = self._action, None
                if action is not None:
                    action()
                    self._acted.set()
                loop.turn()
        except Exception as error:  # told to every caller from here on
            failure = TransportError(f"transport thread failed: {error!r}")
            failure.__cause__ = error
            self.failure = failure
            self._on_failure(failure)
        finally:
            try:
                loop.close()
            finally:
                # Closes what a failed loop left open, or this would never return.
                context.destroy()
                self._waker.close()

    def _try_open(self, context: Context) -> IoLoop | None:
        try:
            return self._open_loop(context, self._waker)
        except RtfocusError as error:
            self.failure = error
        except Exception as error:  # raised by the constructor
            self.failure = TransportError(f"cannot open the sockets: {error!r}")
            self.failure.__cause__ = error
        return None
