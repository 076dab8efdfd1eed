"""Receiver loop: the processor side of the protocol, in its I/O thread."""

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Container
from pathlib import Path

import zmq

from rtfocus.config.sections import TransportConfig
from rtfocus.errors import ProtocolError
from rtfocus.frame import Act, Estimate
from rtfocus.metrics import Accounting
from rtfocus.transport import messages as m
from rtfocus.transport.dialogue import Dialogue
from rtfocus.transport.io_thread import Waker
from rtfocus.transport.sockets import (
    Context,
    Socket,
    connect,
    control_client,
    frames_client,
)
from rtfocus.transport.validation import Rejections
from rtfocus.workers import Newest

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


MOST_ASKS = 8
_MESSAGES_PER_TURN = 64
"""Bounds how long control messages can hold up frames."""
_FRAMES_PER_TURN = 4
"""Bounds how long frames can hold up credit and durability reports."""


class ReceiverLoop:
    """Owns the sockets and runs one `Dialogue` after the other."""

    def __init__(
        self,
        context: Context,
        waker: Waker,
        config: TransportConfig,
        accounting: Accounting,
    ) -> None:
        self.dialogue: Dialogue | None = None
        self.turned = threading.Condition()
        """Notified after every turn until frames are wanted."""
        self.estimates: Newest[Estimate] = Newest()
        """To be sent; put them here from any thread, then wake the loop."""
        self.asks: deque[Act] = deque()
        """The same, for what viewers ask of the microscope side; `MOST_ASKS` wait."""
        self._waker = waker
        self._rejections = Rejections(
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
        return self._rejections.last

    def open_dialogue(self, dialogue: Dialogue) -> None:
        """Leave the last series and look for another."""
        self._leave("another series is wanted")
        self._frames.subscribe(None)
        self.dialogue = dialogue

    def turn(self) -> None:
        """Wait for something to do, and do it."""
        dialogue = self.dialogue
        wait_s = 1.0
        if dialogue is not None:
            wait_s = max(dialogue.next_turn_s - time.monotonic(), 0.0)
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
        if dialogue is not None:
            now_s = time.monotonic()
            self._frames.subscribe(dialogue.topic)
            dialogue.watch(now_s)
            for message in dialogue.say(now_s):
                self._say(message)
            self._send_estimate()
            while self.asks and dialogue.series is not None:
                series_uid = dialogue.series.series_uid
                self._say(m.Ask(dialogue.uid, series_uid, self.asks.popleft()))
        if dialogue is not None and dialogue.inflow is None:
            with self.turned:
                self.turned.notify_all()

    def close(self) -> None:
        """Report what is durable, say good-bye, close the sockets."""
        if self.dialogue is not None and self.dialogue.inflow is not None:
            self.dialogue.inflow.stop()
        self._leave("receiver closed")
        self._frames.link.close()
        self._control.close()

    def _read_frames(self) -> None:
        for _ in range(_FRAMES_PER_TURN):
            try:
                message = self._frames.receive()
                if message is None:
                    return
                if self.dialogue is not None and self.dialogue.inflow is not None:
                    self.dialogue.heard_frame(time.monotonic())
                    self.dialogue.inflow.take(*message)
            except ProtocolError as error:
                self._rejections.reject(error.reason, str(error))

    def _read_control(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            try:
                parts = self._control.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = m.unpack_from_publisher(parts[0] if len(parts) == 1 else b"")
            except ProtocolError as error:
                self._rejections.reject(error.reason, f"control: {error}")
                continue
            if self.dialogue is not None:
                self.dialogue.handle(message, time.monotonic())

    def _look_after_links(self, ready: Container[object]) -> None:
        now_s, dialogue, frames = time.monotonic(), self.dialogue, self._frames.link
        if frames.monitor in ready and frames.look(now_s):
            if dialogue is not None and dialogue.is_running:
                # Frames that were lost with it show as a hole.
                self._rejections.reject(
                    "disconnected",
                    "the frames connection broke: network, or a message of more "
                    "than transport.max_frame_mb",
                )
        if self._control.monitor in ready:
            self._control.look(now_s)
        self._frames.mend(now_s)
        self._control.mend(now_s)

    def _leave(self, reason: str) -> None:
        if self.dialogue is not None:
            for message in self.dialogue.last_words(reason):
                self._say(message)

    def _say(self, message: m.FromRecorder) -> None:
        try:
            self._control.socket.send(m.pack(message), zmq.NOBLOCK)
        except zmq.Again:
            # No publisher reads this; what matters is said again at a heartbeat.
            return

    def _send_estimate(self) -> None:
        estimate = self.estimates.take()
        if estimate is not None:
            self._say(estimate)
