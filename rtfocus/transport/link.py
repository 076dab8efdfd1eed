"""Link: a connected socket whose connection is watched and made again.

libzmq makes a connection again by itself, except after a message it refuses
(too large, no ZMTP): then it gives up for good. A link starts over in any case.
"""

import errno
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from rtfocus.transport.sockets import Socket, connect

_EVENTS = zmq.Event.DISCONNECTED | zmq.Event.HANDSHAKE_FAILED_AUTH
PAUSE_S = 0.05
"""Shortest time between two attempts."""


class Link:
    """Connects a socket on creation; used in the socket's thread.

    Raises
    ------
    ConfigError
        If the endpoint or the keys cannot be used.
    """

    def __init__(self, socket: Socket, endpoint: str, curve_keys: Path | None) -> None:
        self.socket = socket
        self.monitor: Socket = socket.get_monitor_socket(_EVENTS)
        """Joins a poller."""
        self.is_key_refused = False
        """The other end does not know our CURVE key."""
        self.is_broken = False
        """To be connected again."""
        self._endpoint = endpoint
        self._next_s = 0.0
        connect(socket, endpoint, curve_keys)

    def look(self) -> bool:
        """Read what happened; tell whether the connection broke."""
        broke = False
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            broke |= event == zmq.Event.DISCONNECTED
            self.is_key_refused |= event == zmq.Event.HANDSHAKE_FAILED_AUTH
        self.is_broken |= broke
        return broke

    def mend(self, now_s: float) -> None:
        """Connect again if that is due."""
        if not self.is_broken or now_s < self._next_s:
            return
        self.is_broken = False
        self._next_s = now_s + PAUSE_S
        try:
            self.socket.disconnect(self._endpoint)
        except zmq.ZMQError as error:
            # libzmq has given this connection up already.
            if error.errno != errno.ENOENT:
                raise
        self.socket.connect(self._endpoint)

    def close(self) -> None:
        """Stop watching and close the socket."""
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()
