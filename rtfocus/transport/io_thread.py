"""I/O thread: one thread that opens, uses and closes all sockets of a side.

And the sockets of a recorder, opened anew where a link broke, the count of what was
rejected, and the last items of what is sent piece by piece.
"""

import logging
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import zmq

from rtfocus.errors import ProtocolError, RtfocusError, TransportError
from rtfocus.transport.sockets import Context, Socket, connect

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
    """Runs a loop until `close`; its failure is kept and raised in every call.

    Parameters
    ----------
    name
        Of the thread.
    open_loop
        Called in the thread; its exception is raised by this constructor.
    on_failure
        Called in the thread when the loop fails, to wake those who wait.
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
        except Exception as error:  # raised for every caller from here on
            text = error if isinstance(error, RtfocusError) else repr(error)
            failure = TransportError(f"transport thread failed: {text}")
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


_REFUSED = zmq.Event.HANDSHAKE_FAILED_AUTH
_BROKE = (
    zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)
_GOES_ON = zmq.Event.CONNECT_RETRIED | zmq.Event.HANDSHAKE_SUCCEEDED
PAUSE_S = 0.1
"""How long libzmq may take to start a retry, and between two replacements."""


class Link:
    """Keeps one endpoint connected; used in the thread that owns the sockets.

    libzmq makes a broken connection again by itself, except after a message it
    refuses (too large, no ZMTP): then it gives up for good, without a word. Only
    the socket's monitor shows it: a break that no retry follows. Disconnecting and
    connecting the same socket is no way out, because reading a multipart message
    whose connection was just disconnected aborts the process (libzmq issue 2163).

    Parameters
    ----------
    make
        Returns a new socket with its options, not connected.
    endpoint, curve_keys
        As for `connect`.
    poller
        The socket and its monitor are registered there.

    Raises
    ------
    ConfigError
        If the endpoint or the keys cannot be used.
    """

    def __init__(
        self,
        make: Callable[[], Socket],
        endpoint: str,
        curve_keys: Path | None,
        poller: zmq.Poller,
    ) -> None:
        self._make = make
        self._endpoint = endpoint
        self._curve_keys = curve_keys
        self._poller = poller
        self.is_key_refused = False
        """The other end does not know our CURVE key."""
        self._broke_s: float | None = None
        self.socket, self.monitor = self._open()

    @property
    def is_broken(self) -> bool:
        """Tell whether nothing is connected and no retry is known of."""
        return self._broke_s is not None

    def look(self, now_s: float) -> bool:
        """Read what happened; tell whether the connection broke."""
        broke = False
        while self.monitor.poll(0):
            # Not with `zmq.utils.monitor`: that brings asyncio and SSL along.
            told, _ = self.monitor.recv_multipart()
            (event,) = struct.unpack_from("=H", told)
            self.is_key_refused |= bool(event & _REFUSED)
            if event & _BROKE:
                self._broke_s = now_s
                broke |= event == zmq.Event.DISCONNECTED
            elif event & _GOES_ON:
                self._broke_s = None
        return broke

    def mend(self, now_s: float) -> bool:
        """Replace the socket if that is due; tell whether it was."""
        if self._broke_s is None or now_s < self._broke_s + PAUSE_S:
            return False
        # What arrived before the break is read first.
        if self.socket.poll(0, zmq.POLLIN):
            return False
        self._broke_s = None
        self.close()
        self.socket, self.monitor = self._open()
        return True

    def close(self) -> None:
        """Close the socket and its monitor."""
        self._poller.unregister(self.socket)
        self._poller.unregister(self.monitor)
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()

    def _open(self) -> tuple[Socket, Socket]:
        socket = self._make()
        monitor: Socket = socket.get_monitor_socket(_REFUSED | _BROKE | _GOES_ON)
        connect(socket, self._endpoint, self._curve_keys)
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        return socket, monitor


class FramesIn:
    """Receives the messages of one topic over a link."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._topic: str | None = None

    def subscribe(self, topic: str | None) -> None:
        """Receive this topic and no other; None: nothing."""
        if topic == self._topic:
            return
        if self._topic is not None:
            self.link.socket.unsubscribe(self._topic)
        if topic is not None:
            self.link.socket.subscribe(topic)
        self._topic = topic

    def mend(self, now_s: float) -> None:
        """Replace the socket if that is due, with the same subscription."""
        if self.link.mend(now_s) and self._topic is not None:
            self.link.socket.subscribe(self._topic)

    def receive(self) -> tuple[bytes, memoryview | None] | None:
        """Return header and pixels of the next message; None: there is none.

        The pixels stay in ZeroMQ's memory; they are valid as long as referenced.

        Raises
        ------
        ProtocolError
            If the message has not 2 or 3 parts.
        """
        try:
            parts = self.link.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        if len(parts) not in (2, 3):
            msg = f"message of {len(parts)} parts, not topic, header and pixels"
            raise ProtocolError(msg, "parts")
        return parts[1].bytes, parts[2].buffer if len(parts) == 3 else None


class Rejections:
    """Counts by reason; logs the 1st, 10th, 100th ... of each.

    Parameters
    ----------
    source
        Appears in the log, e.g. ``frames``.
    on_count
        Called with the reason of every rejected message.
    """

    def __init__(
        self, source: str, on_count: Callable[[str], None] = lambda _: None
    ) -> None:
        self._source = source
        self._on_count = on_count
        self.counts: dict[str, int] = {}
        self.last: str | None = None
        """What was wrong with the newest."""

    def reject(self, reason: str, detail: str) -> None:
        """Count one message that cannot be used."""
        number = self.counts.get(reason, 0) + 1
        self.counts[reason] = number
        self._on_count(reason)
        self.last = detail
        # A flood of bad messages must not become a flood of log lines.
        if str(number).strip("0") == "1":
            logger.warning(
                "%s: rejected message, %s (number %d of these): %s",
                *(self._source, reason, number, detail),
            )


class Recent(Generic[T]):
    """The last items of many, sent piece by piece; users hold a lock.

    Parameters
    ----------
    most
        So many; older ones are gone.
    """

    def __init__(self, most: int) -> None:
        self._items: deque[T] = deque(maxlen=most)
        self.count = 0
        """Of all that ever came."""
        self._told = (0, 0)

    def append(self, item: T) -> None:
        """Add the newest."""
        self._items.append(item)
        self.count += 1

    def clear(self) -> None:
        """Forget them all."""
        self._items.clear()

    def news(self, *, everything: bool) -> list[T]:
        """Return, oldest first, what came since the call before the last, or all.

        Each item is sent twice, so that a receiver may miss one message.
        """
        new = len(self._items) if everything else self.count - self._told[0]
        self._told = (self._told[1], self.count)
        return list(self._items)[-new:] if new else []
