"""Hostile kit: a publisher that follows the protocol and sends rubbish besides."""

import threading
import time
from collections.abc import Callable

import numpy as np
import zmq
from transport_kit import DEADLINE_S, make_header, make_series

from rtfocus.frame import SeriesEnd, SeriesStart
from rtfocus.transport import messages as m

Parts = list[bytes]
Damage = Callable[[int, int, Parts], list[Parts]]
"""Gets sequence, transmission (0: the first) and the good parts (header, pixels);
returns the messages to send instead."""


class HostilePublisher:
    """One series over bare sockets; its frames go through `damage`.

    Credit, rewind and end are as they should be, so that whatever goes wrong is
    the damage's doing.
    """

    def __init__(
        self, frames: int, damage: Damage, series: SeriesStart | None = None
    ) -> None:
        self.series = series or make_series()
        self.control_noise: list[bytes] = []
        """Sent to the recorder on the control socket, one per turn."""
        self.heard: list[m.FromRecorder] = []
        self._frames = frames
        self._damage = damage
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stream = self._context.socket(zmq.XPUB)
        self._stream.setsockopt(zmq.XPUB_NODROP, 1)
        self._control = self._context.socket(zmq.ROUTER)
        self.endpoints = tuple(
            f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
            for socket in (self._stream, self._control)
        )
        self._address = b""
        self._topic = b""
        self._sent = self._credit = self._attempt = 0
        self._transmissions: dict[int, int] = {}
        self._flowing = self._ended = False
        self._stop = threading.Event()
        self._beat_s = 0.0

    def run(self) -> None:
        """Serve until the recorder confirms the end or leaves, or `stop`."""
        deadline_s = time.monotonic() + DEADLINE_S
        try:
            while not self._ended and not self._stop.is_set():
                assert time.monotonic() < deadline_s, "the recorder does not finish"
                zmq.select([self._stream, self._control], [], [], 0.01)
                self._listen()
                if self._flowing:
                    self._send_frames()
                if self._address and self.control_noise:
                    noise = self.control_noise.pop()
                    self._control.send_multipart([self._address, noise])
                if self._address and time.monotonic() > self._beat_s:
                    self._beat()
        finally:
            self._context.destroy(linger=500)

    def stop(self) -> None:
        """Vanish without a word."""
        self._stop.set()

    def _listen(self) -> None:
        while self._stream.poll(0):
            self._stream.recv()
        while self._control.poll(0):
            sender, data = self._control.recv_multipart()
            message = m.unpack_from_recorder(data)
            self.heard.append(message)
            match message:
                case m.Hello():
                    self._address = sender
                    self._topic = f"{message.uid}/".encode()
                    welcome = m.Welcome(
                        1, message.uid, self._topic.decode(), self.series
                    )
                    self._control.send_multipart([sender, m.pack(welcome)])
                case m.Progress():
                    self._credit = message.credit_upto
                case m.Resend():
                    self._sent, self._attempt = message.sequence, message.attempt
                    self._flowing = True
                    rewind = m.Rewind(
                        1, self.series.series_uid, self._sent, self._attempt
                    )
                    self.send(m.pack(rewind))
                case m.Ended() | m.Leave():
                    self._ended = True

    def _send_frames(self) -> None:
        while self._sent < min(self._credit, self._frames):
            number = self._sent
            transmission = self._transmissions.get(number, 0)
            self._transmissions[number] = transmission + 1
            header = make_header(number, self.series.series_uid)
            pixels = np.full(self.series.shape, number, "<u2").tobytes()
            for parts in self._damage(number, transmission, [m.pack(header), pixels]):
                self.send(*parts)
            self._sent += 1

    def _beat(self) -> None:
        self._beat_s = time.monotonic() + 0.05
        uid = self.series.series_uid
        ping = m.Ping(1, uid, self._sent, self._attempt)
        self._control.send_multipart([self._address, m.pack(ping)])
        if self._flowing:
            self.send(m.pack(ping))
            if self._sent == self._frames:
                self.send(m.pack(SeriesEnd(1, uid, self._frames, "completed")))

    def send(self, *parts: bytes) -> None:
        """Send a message on the recorder's topic."""
        self._stream.send_multipart([self._topic, *parts])
