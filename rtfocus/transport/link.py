"""Link: a connected socket that is replaced when its connection is beyond repair.

libzmq makes a broken connection again by itself, except after a message it
refuses (too large, no ZMTP): then it gives up for good, without a word. Only the
socket's monitor shows it: a break that no retry follows. Disconnecting and
connecting the same socket is no way out, because reading a multipart message
whose connection was just disconnected aborts the process (libzmq issue 2163).
"""

from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from rtfocus.transport.sockets import Socket, connect

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
            event = recv_monitor_message(self.monitor)["event"]
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
