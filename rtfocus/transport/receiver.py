"""Receiver: the processor side's end of the transport.

Free slots of its pool are the credit the publisher sends within, so whoever
holds slots for long slows the acquisition down; nothing is lost by that.
"""

import time
from collections.abc import Iterator

import numpy as np

from rtfocus.config.sections import TransportConfig
from rtfocus.errors import TransportError
from rtfocus.frame import Act, Estimate, SeriesEnd, SeriesStart, Slot, SlotPool
from rtfocus.metrics import Accounting
from rtfocus.transport.dialogue import Dialogue
from rtfocus.transport.inflow import Arrivals, Gap, Inflow
from rtfocus.transport.io_thread import IoThread, Waker
from rtfocus.transport.receiver_loop import MOST_ASKS, ReceiverLoop
from rtfocus.transport.registrar import LOST_HEARTBEATS
from rtfocus.transport.sockets import Context, nobody_listens, slot_pool

__all__ = ["FrameReceiver", "Gap"]

_LOOK_S = 0.1
"""How often a waiting call looks for a stop or a deadline."""


class FrameReceiver:
    """Records one series after the other.

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

    @property
    def estimates_dropped(self) -> int:
        """Estimates that gave way to a newer one before they were sent."""
        return self._loop.estimates.dropped

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
        since_s = time.monotonic()
        dialogue = Dialogue(
            self._config,
            since_s,
            patient=patient,
            is_gone=lambda: nobody_listens(self._config.control),
            unwanted=unwanted,
        )
        self._dialogue = dialogue
        self._thread.call(lambda: self._loop.open_dialogue(dialogue))
        while dialogue.series is None and not self._stopped:
            now_s = time.monotonic()
            if not patient:
                self._check_answer(dialogue, since_s, now_s)
            if timeout_s is not None and now_s - since_s > timeout_s:
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
            Where the series will lie; told to people on the other side.
        """
        dialogue = self._dialogue
        if dialogue is None or dialogue.series is None:
            msg = "no series to begin: call wait_series first"
            raise ValueError(msg)
        series = dialogue.series
        frame_bytes = np.dtype(series.dtype).itemsize * int(np.prod(series.shape))
        pool, arrivals = slot_pool(self._config, frame_bytes), Arrivals()
        inflow = Inflow(series, next_sequence, pool, arrivals, self._accounting)
        self._pool, self._arrivals = pool, arrivals
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

    def ask(self, what: Act) -> None:
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
        self._loop.asks.append(what)
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

    def _check_answer(self, dialogue: Dialogue, since_s: float, now_s: float) -> None:
        """Raise if no series can be hoped for."""
        if dialogue.broken is not None:
            raise dialogue.broken
        if self._loop.is_key_refused:
            msg = (
                "the publisher refuses this machine's CURVE key; copy client.key "
                "into clients/ of its key folder and restart it"
            )
            raise TransportError(msg)
        waited_s = now_s - since_s
        # A recorder that died just now still counts as alive for a while.
        grace_s = (LOST_HEARTBEATS + 2) * self._config.heartbeat_s
        if dialogue.refused is not None and waited_s > grace_s:
            raise TransportError(dialogue.refused)
        heard_s = dialogue.heard_s if dialogue.heard_s is not None else since_s
        if now_s - heard_s > self._config.connect_timeout_s:
            msg = (
                f"no publisher answers at {self._config.control} for "
                f"{self._config.connect_timeout_s:g} s; start `rtfocus acquire`, and "
                "compare endpoints and curve_keys of both sides"
            )
            if self._loop.rejected is not None:
                msg += f"; what came was refused: {self._loop.rejected}"
            raise TransportError(msg)

    def _fail(self, failure: TransportError) -> None:
        """Wake whoever iterates when the I/O thread fails."""
        dialogue = self._dialogue
        if dialogue is not None and dialogue.inflow is not None:
            dialogue.inflow.lose(str(failure))
