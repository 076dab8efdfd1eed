"""Frames in: the socket that frames arrive on, one topic at a time."""

import zmq

from rtfocus.errors import ProtocolError
from rtfocus.transport.link import Link


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
