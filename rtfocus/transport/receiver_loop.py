"""Receiver loop: the processor side of the protocol, in its I/O thread."""

import threading
import time
from collections.abc import Container

import zmq

from rtfocus.config.processor import TransportConfig
from rtfocus.errors import ProtocolError
from rtfocus.frame import Estimate
from rtfocus.metrics import Accounting
from rtfocus.transport import messages as m
from rtfocus.transport.frames_in import FramesIn
from rtfocus.transport.io_thread import Waker
from rtfocus.transport.link import PAUSE_S, Link
from rtfocus.transport.session import Session
from rtfocus.transport.sockets import Context, control_client, frames_client
from rtfocus.transport.tally import Tally

_MESSAGES_PER_TURN = 64
"""Bounds how long control messages can hold up frames."""
_FRAMES_PER_TURN = 4
"""Bounds how long frames can hold up credit and durability reports."""


class ReceiverLoop:
    """Owns the sockets and runs one `Session` after the other."""

    def __init__(
        self,
        context: Context,
        waker: Waker,
        config: TransportConfig,
        accounting: Accounting,
    ) -> None:
        self.session: Session | None = None
        self.turned = threading.Condition()
        """Notified after every turn until frames are wanted."""
        self.estimates_dropped = 0
        self._estimate: Estimate | None = None
        self._estimate_lock = threading.Lock()
        self._waker = waker
        self._tally = Tally(
            "frames", lambda reason: accounting.count("rejected", reason)
        )
        self._poller = zmq.Poller()
        self._poller.register(waker.fileno(), zmq.POLLIN)
        self._frames = FramesIn(
            Link(
                lambda: frames_client(context, config),
                config.frames,
                config.curve_keys,
                self._poller,
            )
        )
        self._control = Link(
            lambda: control_client(context, config),
            config.control,
            config.curve_keys,
            self._poller,
        )

    @property
    def is_key_refused(self) -> bool:
        """The publisher does not know our CURVE key."""
        return self._control.is_key_refused or self._frames.link.is_key_refused

    @property
    def rejected(self) -> str | None:
        """What was wrong with the newest message that could not be used."""
        return self._tally.last

    def offer_estimate(self, estimate: Estimate) -> None:
        """Have an estimate sent unless a newer one comes first; any thread."""
        with self._estimate_lock:
            self.estimates_dropped += self._estimate is not None
            self._estimate = estimate

    def open_session(self, session: Session) -> None:
        """Leave the last series and look for another."""
        self._leave("another series is wanted")
        self._frames.subscribe(None)
        self.session = session

    def turn(self) -> None:
        """Wait for something to do, and do it."""
        session = self.session
        wait_s = 1.0
        if session is not None:
            wait_s = max(session.next_turn_s - time.monotonic(), 0.0)
        if self._control.is_broken or self._frames.link.is_broken:
            wait_s = min(wait_s, PAUSE_S)
        ready = dict(self._poller.poll(int(wait_s * 1000) + 1))
        self._waker.clear()
        self._look_after_links(ready)
        # Frames first: control may say that no more will come.
        if self._frames.link.socket in ready:
            self._read_frames()
        if self._control.socket in ready:
            self._read_control()
        if session is not None:
            now_s = time.monotonic()
            self._frames.subscribe(session.topic)
            session.watch(now_s)
            for message in session.say(now_s):
                self._say(message)
            self._send_estimate()
        if session is not None and session.intake is None:
            with self.turned:
                self.turned.notify_all()

    def close(self) -> None:
        """Report what is durable, say good-bye, close the sockets."""
        if self.session is not None and self.session.intake is not None:
            self.session.intake.stop()
        self._leave("receiver closed")
        self._frames.link.close()
        self._control.close()

    def _read_frames(self) -> None:
        for _ in range(_FRAMES_PER_TURN):
            try:
                message = self._frames.receive()
                if message is None:
                    return
                if self.session is not None and self.session.intake is not None:
                    self.session.heard_frame(time.monotonic())
                    self.session.intake.take(*message)
            except ProtocolError as error:
                self._tally.reject(error.reason, str(error))

    def _read_control(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            try:
                parts = self._control.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = m.unpack_from_publisher(parts[0] if len(parts) == 1 else b"")
            except ProtocolError as error:
                self._tally.reject(error.reason, f"control: {error}")
                continue
            if self.session is not None:
                self.session.handle(message, time.monotonic())

    def _look_after_links(self, ready: Container[object]) -> None:
        now_s, session, frames = time.monotonic(), self.session, self._frames.link
        if frames.monitor in ready and frames.look(now_s):
            if session is not None and session.is_running:
                # Frames that were lost with it show as a hole.
                self._tally.reject(
                    "disconnected",
                    "the frames connection broke: network, or a message of more "
                    "than transport.max_frame_mb",
                )
        if self._control.monitor in ready:
            self._control.look(now_s)
        self._frames.mend(now_s)
        self._control.mend(now_s)

    def _leave(self, reason: str) -> None:
        if self.session is not None:
            for message in self.session.last_words(reason):
                self._say(message)

    def _say(self, message: m.FromRecorder) -> None:
        try:
            self._control.socket.send(m.pack(message), zmq.NOBLOCK)
        except zmq.Again:
            # No publisher reads this; what matters is said again at a heartbeat.
            return

    def _send_estimate(self) -> None:
        with self._estimate_lock:
            estimate, self._estimate = self._estimate, None
        if estimate is not None:
            self._say(estimate)
