"""Receiver: the processor side's end of the transport, and its loop in the I/O thread.

Free slots of its pool are the credit the publisher sends within, so whoever
holds slots for long slows the acquisition down; nothing is lost by that.
"""

import threading
import time
from collections import deque
from collections.abc import Container, Iterator
from types import TracebackType
from typing import Self

import numpy as np
import zmq

from rtfocus.config.sections import TransportConfig
from rtfocus.errors import ProtocolError, TransportError
from rtfocus.frame import Act, Estimate, SeriesEnd, SeriesStart, Slot, SlotPool
from rtfocus.machine import RUN_CLOCK
from rtfocus.metrics import Accounting
from rtfocus.transport import messages as m
from rtfocus.transport.dialogue import Dialogue
from rtfocus.transport.inflow import Arrivals, Gap, Inflow
from rtfocus.transport.io_thread import (
    PAUSE_S,
    FramesIn,
    IoThread,
    Link,
    Rejections,
    Waker,
)
from rtfocus.transport.memory import (
    give_back_memory,
    keep_freed_memory,
    open_segment,
    slot_pool,
)
from rtfocus.transport.registrar import LOST_HEARTBEATS
from rtfocus.transport.sockets import (
    Context,
    control_client,
    frames_client,
    nobody_listens,
)
from rtfocus.workers import Newest, Wait

_LOOK_S = 0.1
"""How often a waiting call looks for a stop or a deadline."""


class FrameReceiver:
    """Records one series after the other; leaving it by an error tells the publisher.

    Parameters
    ----------
    config
        Endpoints are connected to; the publisher need not be there yet.
    accounting
        Receives what the transport knows: acquired, gaps, rejected messages.
    """

    def __init__(self, config: TransportConfig, accounting: Accounting) -> None:
        self._config = config
        self._accounting = accounting
        self._stopped = False
        self._dialogue: Dialogue | None = None
        self._arrivals = Arrivals()
        self._pool: SlotPool | None = None

        def open_loop(context: Context, waker: Waker) -> ReceiverLoop:
            self._loop = ReceiverLoop(context, waker, config, accounting)
            return self._loop

        self._thread = IoThread("receive-io", open_loop, self._fail)

    @property
    def slots(self) -> SlotPool:
        """The pool frames arrive in; ValueError before `begin`."""
        if self._pool is None:
            msg = "no series has begun"
            raise ValueError(msg)
        return self._pool

    @property
    def end(self) -> SeriesEnd | None:
        """How the series ended; None while it runs."""
        return self._arrivals.end

    def wait_series(
        self,
        timeout_s: float | None = None,
        *,
        patient: bool = False,
        unwanted: dict[str, str] | None = None,
    ) -> SeriesStart | None:
        """Ask the publisher to be its recorder; wait for its next series.

        Parameters
        ----------
        timeout_s
            None: as long as the publisher answers.
        patient
            Wait for ever, whatever the publisher answers or does not, and in the
            series for a publisher that went silent and may come back.
        unwanted
            Series not to record, by uid, with the reason; those that cannot be
            received are added.

        Returns
        -------
        SeriesStart or None
            None on time-out and after `stop`.

        Raises
        ------
        TransportError
            If the publisher does not answer for `connect_timeout_s`, refuses our
            key, pairing or version, or already has a recorder.
        """
        self._thread.check()
        if self._stopped:
            return None
        dialogue = Dialogue(
            self._config,
            time.monotonic(),
            patient=patient,
            is_gone=lambda: nobody_listens(self._config.control),
            unwanted=unwanted,
        )
        self._dialogue = dialogue
        self._thread.call(lambda: self._loop.open_dialogue(dialogue))
        wait, silence, heard_s = Wait(), Wait(), dialogue.heard_s
        while dialogue.series is None and not self._stopped:
            waited_s = wait.look()
            if dialogue.heard_s != heard_s:
                heard_s = dialogue.heard_s
                silence.restart()
            if not patient:
                self._check_answer(dialogue, waited_s, silence.look())
            if timeout_s is not None and waited_s > timeout_s:
                return None
            with self._loop.turned:
                self._loop.turned.wait(_LOOK_S)
            self._thread.check()
        return None if self._stopped else dialogue.series

    def begin(self, next_sequence: int = 0, folder: str = "") -> None:
        """Allocate slots and ask for frames from `next_sequence` on.

        Parameters
        ----------
        next_sequence
            The first frame that is not durable: 0, or more after a restart.
        folder
            Where the series will be; shown to people on the other side.
        """
        dialogue = self._dialogue
        if dialogue is None or dialogue.welcome is None:
            msg = "no series to begin: call wait_series first"
            raise ValueError(msg)
        series, segment = dialogue.welcome.start, dialogue.welcome.shared
        frame_bytes = np.dtype(series.dtype).itemsize * int(np.prod(series.shape))
        pool, arrivals = slot_pool(self._config, frame_bytes), Arrivals()
        shared = open_segment(self._config, segment)
        inflow = Inflow(series, next_sequence, pool, arrivals, self._accounting, shared)
        self._pool, self._arrivals = pool, arrivals
        RUN_CLOCK.restart()
        keep_freed_memory(max(8 * frame_bytes, 64 << 20))
        self._thread.call(
            lambda: dialogue.begin(inflow, next_sequence, time.monotonic(), folder)
        )
        dialogue.stop_wanted = self._stopped
        self._thread.wake()

    def frames(self) -> Iterator[Slot | Gap]:
        """Yield frames in order, and gaps in their place, until the series ends.

        The caller gives every slot back with `release`.

        Raises
        ------
        TransportError
            After what came, if the publisher is lost for `stall_timeout_s`;
            PeerLostError where the series may go on later.
        """
        yield from self._arrivals

    def release(self, slot: Slot) -> None:
        """Give a slot back: one more frame may come; any thread."""
        self.slots.release(slot)
        if self._dialogue is None or self._dialogue.is_wake_due():
            self._thread.wake()

    def report_durable(self, sequence: int) -> None:
        """Say that all frames up to and including `sequence` are on disk.

        Gaps count as such. Callable from any thread.
        """
        dialogue = self._dialogue
        if dialogue is not None:
            dialogue.durable_upto = max(dialogue.durable_upto, sequence + 1)
            if dialogue.is_wake_due():
                self._thread.wake()

    def send_estimate(self, estimate: Estimate) -> None:
        """Send a focus estimate; a newer one replaces one not yet sent; any thread."""
        self._loop.estimates.put(estimate)
        self._thread.wake()

    def ask(self, act: Act) -> None:
        """Ask the microscope side for something, which it may refuse; any thread.

        Raises
        ------
        TransportError
            If as many requests as may wait have not been sent yet.
        """
        if len(self._loop.asks) >= MOST_ASKS:
            msg = (
                f"{MOST_ASKS} requests have not reached the microscope side yet; "
                "ask again once it answers"
            )
            raise TransportError(msg)
        self._loop.asks.append(act)
        self._thread.wake()

    def wants_raw_only(self) -> str | None:
        """Return why the publisher asks to skip restoration; None: it does not."""
        return self._dialogue.raw_only if self._dialogue is not None else None

    def stop(self) -> None:
        """End `frames` after what has arrived, and `wait_series`; any thread."""
        self._stopped = True
        if self._dialogue is not None:
            self._dialogue.stop_wanted = True
        self._thread.wake()

    def close(self) -> None:
        """Tell the publisher what is durable and leave; sockets are closed then."""
        self._thread.close()
        if self._pool is not None:
            self._pool.close()
        give_back_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self._loop.leaves_for = str(error) or type(error).__name__
        self.close()

    def _check_answer(
        self, dialogue: Dialogue, waited_s: float, silent_s: float
    ) -> None:
        """Raise if no series can be hoped for."""
        if dialogue.broken is not None:
            raise dialogue.broken
        if self._loop.is_key_refused:
            msg = (
                "the publisher refuses this machine's CURVE key; copy client.key "
                "into clients/ of its key folder and restart it"
            )
            raise TransportError(msg)
        # A recorder that died just now still counts as alive for a while.
        grace_s = (LOST_HEARTBEATS + 2) * self._config.heartbeat_s
        if dialogue.refused is not None and waited_s > grace_s:
            raise TransportError(dialogue.refused)
        if silent_s > self._config.connect_timeout_s:
            msg = (
                f"no publisher answers at {self._config.control} for "
                f"{self._config.connect_timeout_s:g} s; start `rtfocus acquire`, and "
                "compare endpoints and curve_keys of both sides"
            )
            if self._loop.rejected is not None:
                msg += f"; what came was refused: {self._loop.rejected}"
            raise TransportError(msg)

    def _fail(self, failure: TransportError) -> None:
        """Wake the iterating thread when the I/O thread fails."""
        dialogue = self._dialogue
        if dialogue is not None and dialogue.inflow is not None:
            dialogue.inflow.lose(str(failure))


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
        self.estimates: Newest[Estimate] = Newest(lambda estimate: estimate.sequence)
        """To be sent, the newest frame's; put them here, then wake the loop."""
        self.asks: deque[Act] = deque()
        """What viewers ask of the microscope side; `MOST_ASKS` wait."""
        self.leaves_for = "receiver closed"
        """What the publisher hears at the end."""
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
            lambda: control_client(context),
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
            if dialogue.welcome is not None:
                self._frames.subscribe(dialogue.welcome.topic)
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
        self._leave(self.leaves_for)
        self._frames.link.close()
        self._control.close()

    def _read_frames(self) -> None:
        for _ in range(_FRAMES_PER_TURN):
            try:
                message = self._frames.receive()
                if message is None:
                    return
                if self.dialogue is not None and self.dialogue.inflow is not None:
                    self.dialogue.heard_s = time.monotonic()
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
