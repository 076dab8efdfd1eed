"""Waker: lets any thread wake one that waits on sockets, at once."""

import socket
import threading


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
