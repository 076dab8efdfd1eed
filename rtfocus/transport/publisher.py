"""Publisher: the microscope side's end of the transport.

The acquisition takes a free slot, fills it and publishes it; the slot comes
back once the recorder has the frame on disk. `PROTOCOL.md` is the contract with
publishers in other languages.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rtfocus.config.sections import TransportConfig
from rtfocus.errors import StoppedError, TransportError
from rtfocus.frame import Act, Estimate, SeriesStart, Slot, SlotPool
from rtfocus.transport.io_thread import IoThread, Waker
from rtfocus.transport.memory import slot_pool
from rtfocus.transport.publisher_loop import PublisherLoop
from rtfocus.transport.registrar import Outbox
from rtfocus.transport.sockets import Context
from rtfocus.workers import Closing, Wait


class Stall:
    """Judges waits; pure, the time comes in as a parameter.

    Parameters
    ----------
    policy
        ``wait``, ``raw_only`` (wait, but ask a living recorder to skip
        restoration) or ``abort``.
    timeout_s
        A wait longer than this is a stall.
    """

    def __init__(
        self, policy: Literal["wait", "raw_only", "abort"], timeout_s: float
    ) -> None:
        self._policy = policy
        self._timeout_s = timeout_s
        self._last_wait_s = 0.0
        self.count = 0
        """Stalls so far."""

    def watch(
        self,
        waiting_for: str,
        waited_s: float,
        *,
        alive: bool,
        stopped: bool,
        left: str | None = None,
    ) -> str | None:
        """Judge a wait that has lasted `waited_s`; return a reason for raw only.

        Raises
        ------
        TransportError
            If the wait must end.
        """
        stalled = waited_s > self._timeout_s
        # Counted once per wait, however often it is looked at.
        if stalled and not self._timeout_s < self._last_wait_s <= waited_s:
            self.count += 1
        self._last_wait_s = waited_s
        state = "is alive but too slow" if alive else "is lost"
        if left is not None and not alive:
            state = f"left ({left})"
        if stopped and (stalled or not alive):
            msg = f"stopped: {waiting_for}, the recorder {state}"
            raise TransportError(msg)
        if not stalled:
            return None
        if self._policy == "abort":
            msg = (
                f"{waiting_for} for {self._timeout_s:g} s, the recorder {state}; "
                "transport.on_stall is abort (wait or raw_only would go on)"
            )
            raise TransportError(msg)
        if self._policy == "raw_only" and alive:
            return f"{waiting_for} for {self._timeout_s:g} s"
        return None


class LinkWatch:
    """Tells a link that is too slow for the camera from a slow recorder.

    While no slot is free, frames are either on their way or at the recorder, not yet
    durable. Pure, times come in as parameters.

    Parameters
    ----------
    frame_bytes
        Of one frame.
    """

    def __init__(self, frame_bytes: int) -> None:
        self._frame_bytes = frame_bytes
        self._first: tuple[float, int] | None = None
        self._last = (0.0, 0)
        self.waited_s = 0.0
        """How long the camera waited because frames were on their way."""

    def waited(
        self, since_s: float, until_s: float, *, sent: int, received: int, durable: int
    ) -> None:
        """Note that no slot was free, and how far the frames were by its end."""
        if sent - received <= received - durable:
            return  # most are at the recorder
        self.waited_s += until_s - since_s
        self._first = self._first or (since_s, received)
        self._last = (until_s, received)

    def warning(self, lasted_s: float) -> str | None:
        """Return what to say of a series that lasted so long; None: nothing."""
        if self._first is None or self.waited_s < max(1.0, lasted_s / 10):
            return None
        taken_s, frames = (b - a for a, b in zip(self._first, self._last, strict=True))
        rate = frames * self._frame_bytes / taken_s / 1e6
        return (
            f"the link to the recorder limited the run: it carried {rate:.3g} MB/s, "
            f"and the camera waited {self.waited_s:.1f} s of {lasted_s:.1f} s for it"
        )


_LOOK_S = 0.1
"""How often a waiting call looks for a stop or a stall; a slot wakes it at once."""


@dataclass(frozen=True, slots=True)
class PublisherStatus:
    """Numbers for the live table and the report."""

    sent: int
    """Frames sent, each counted once."""
    received_upto: int
    durable_upto: int
    free_slots: int
    recorder_alive: bool
    recorder: str | None
    """Who records and where: process, user, host, folder; None: no recorder yet."""
    left: str | None
    """Why the last recorder went away, if it said so."""
    resent: int
    """Frames sent more than once."""
    stalls: int
    """Waits that were longer than `stall_timeout_s`."""
    raw_only: str | None
    """Why the recorder was asked to skip restoration; None: it was not."""
    estimate: Estimate | None
    """The newest focus estimate that came back."""


class FramePublisher(Closing):
    """Publishes one series after the other; a context manager.

    Parameters
    ----------
    config
        Endpoints are bound here; ``tcp://127.0.0.1:*`` takes a free port, see
        `endpoints`.
    on_estimate
        Called with each new focus estimate, newest wins, from the I/O thread: it
        must return at once.
    on_ask
        The same with what a viewer of the run asks for.
    waits_for_another
        Whether one that declines a series may be followed by another in time.

    Raises
    ------
    TransportError
        If an endpoint cannot be bound.
    ConfigError
        If an endpoint would be open to other machines without CURVE.
    """

    def __init__(
        self,
        config: TransportConfig,
        *,
        on_estimate: Callable[[Estimate], None] = lambda _: None,
        on_ask: Callable[[Act], None] = lambda _: None,
        waits_for_another: bool = True,
    ) -> None:
        self._config = config
        self._waits_for_another = waits_for_another
        self._outbox: Outbox | None = None
        self._pool: SlotPool | None = None
        self._stall = Stall(config.on_stall, config.stall_timeout_s)
        self._stopped = False
        self._link = LinkWatch(0)
        self._begun_s: float | None = None

        def open_loop(context: Context, waker: Waker) -> PublisherLoop:
            self._loop = PublisherLoop(context, waker, config, on_estimate, on_ask)
            return self._loop

        self._thread = IoThread("publish", open_loop, self._wake_all)
        self.endpoints: tuple[str, str] = self._loop.endpoints
        """Where frames and control are bound, with the ports that were chosen."""

    def start(self, series: SeriesStart) -> None:
        """Begin a series: allocate slots, wait until a recorder is ready.

        Raises
        ------
        TransportError
            If no recorder comes within `connect_timeout_s`; StoppedError on `stop`.
        """
        self._thread.check()
        frame_bytes = np.dtype(series.dtype).itemsize * int(np.prod(series.shape))
        pool = slot_pool(self._config, frame_bytes, shared=True)
        outbox = Outbox(series)
        self._pool, self._outbox = pool, outbox
        self._link, self._begun_s = LinkWatch(frame_bytes), None
        self._thread.call(lambda: self._loop.open_series(outbox, pool))
        self._wait_for_recorder(outbox)

    def acquire(self) -> Slot:
        """Take a free slot, waiting for one as the stall policy allows.

        Raises
        ------
        TransportError
            On a stall with policy ``abort``, after `stop` when the recorder is
            lost or stalled, or when the I/O thread failed.
        """
        outbox, pool = self._series()
        since_s, wait = time.monotonic(), Wait()
        while (slot := pool.acquire(timeout_s=_LOOK_S)) is None:
            self._thread.check()
            left = outbox.published - outbox.durable_upto
            waiting_for = f"no free slot, {left} frames are not durable"
            self._watch_stall(waiting_for, wait.look())
        now_s, recorder = time.monotonic(), self._loop.registrar.recorder
        if self._begun_s is None:
            self._begun_s = now_s
        elif recorder is not None:
            self._link.waited(
                since_s,
                now_s,
                sent=outbox.sent_upto,
                received=recorder.received_upto,
                durable=outbox.durable_upto,
            )
        return slot

    def publish(self, slot: Slot) -> None:
        """Hand over a filled slot; it is freed when its frame is durable."""
        self._thread.check()
        outbox, _ = self._series()
        outbox.append(slot)
        self._thread.wake()

    def end(
        self,
        reason: str,
        *,
        camera_lost: int = 0,
        not_acquired: int = 0,
        warnings: tuple[str, ...] = (),
        focus_log: tuple[dict[str, Any], ...] = (),
    ) -> None:
        """Say that no frame follows; wait until all of them are durable.

        The recorder learns of the end first: it may need it to finish a shard. It
        hears why, and what of the plan was never sent; see `SeriesEnd`.

        Raises
        ------
        TransportError
            As for `acquire`; names how many frames are not durable.
        """
        outbox, _ = self._series()
        if self._begun_s is not None:
            warning = self._link.warning(time.monotonic() - self._begun_s)
            warnings = (*warnings, *filter(None, [warning]))
        outbox.finish(
            reason,
            camera_lost=camera_lost,
            not_acquired=not_acquired,
            warnings=warnings,
            focus_log=focus_log,
        )
        self._thread.wake()
        durable, wait = outbox.durable_upto, Wait()
        while not self._wait(outbox, lambda: outbox.is_complete):
            if outbox.durable_upto != durable:
                durable = outbox.durable_upto
                wait.restart()
            left = outbox.published - durable
            waiting_for = f"{left} frames are not durable" if left else "no receipt"
            self._watch_stall(waiting_for, wait.look())

    def stop(self) -> None:
        """Lose patience: from now on no wait outlasts a lost or stalled recorder.

        Callable from any thread. A recorder that keeps up still gets every frame.
        """
        self._stopped = True

    def close(self) -> None:
        """Close the sockets; a recorder of an unfinished series hears of it."""
        self._thread.close()
        if self._pool is not None:
            self._pool.close()

    def status(self) -> PublisherStatus:
        """Return the numbers of the current series."""
        outbox, registrar = self._outbox, self._loop.registrar
        recorder = registrar.recorder
        return PublisherStatus(
            sent=outbox.most_sent if outbox else 0,
            received_upto=recorder.received_upto if recorder else 0,
            durable_upto=outbox.durable_upto if outbox else 0,
            free_slots=self._pool.free if self._pool else 0,
            recorder_alive=registrar.is_alive(time.monotonic()),
            recorder=registrar.recorded_by,
            left=registrar.left,
            resent=registrar.resent,
            stalls=self._stall.count,
            raw_only=self._loop.raw_only,
            estimate=self._loop.estimate,
        )

    def _series(self) -> tuple[Outbox, SlotPool]:
        if self._outbox is None or self._pool is None:
            msg = "no series was started"
            raise ValueError(msg)
        return self._outbox, self._pool

    def _wait_for_recorder(self, outbox: Outbox) -> None:
        """Wait for one to come, then, as long as it lives, for it to be ready."""
        wait = Wait()
        while not self._wait(outbox, self._is_recorder_ready):
            if self._stopped:
                msg = "stopped before a recorder was ready; nothing was acquired"
                raise StoppedError(msg)
            declined = self._loop.registrar.left
            if declined is not None and not self._waits_for_another:
                msg = f"the recorder does not take the series: {declined}"
                raise TransportError(msg)
            if self._loop.registrar.is_alive(time.monotonic()):
                wait.restart()
            elif wait.look() > self._config.connect_timeout_s:
                raise TransportError(self._nobody_came())

    def _nobody_came(self) -> str:
        registrar = self._loop.registrar
        # A peer with other keys is turned away before it can say who it is.
        keys = " and curve_keys" if self._config.curve_keys else ""
        msg = (
            f"no recorder came to {self.endpoints[1]} within "
            f"{self._config.connect_timeout_s:g} s; start `rtfocus process` with the "
            f"same config{keys}"
        )
        if registrar.left is not None:
            msg += f"; the last one left: {registrar.left}"
        if registrar.stranger is not None:
            msg += (
                f"; refused: {registrar.stranger} (one transport.pairing on both "
                "sides lets it in)"
            )
        return msg

    def _is_recorder_ready(self) -> bool:
        recorder = self._loop.registrar.recorder
        return recorder is not None and recorder.takes_frames

    def _wait(self, outbox: Outbox, condition: Callable[[], bool]) -> bool:
        """Wait a moment for `condition`; return whether it holds."""
        with outbox.changed:
            outbox.changed.wait_for(condition, timeout=_LOOK_S)
        self._thread.check()
        return condition()

    def _watch_stall(self, waiting_for: str, waited_s: float) -> None:
        """Do what the policy says about a wait that lasts this long already."""
        registrar = self._loop.registrar
        raw_only = self._stall.watch(
            waiting_for,
            waited_s,
            alive=registrar.is_alive(time.monotonic()),
            stopped=self._stopped,
            left=registrar.left,
        )
        if raw_only is not None and self._loop.raw_only is None:
            self._loop.raw_only = raw_only
            self._thread.wake()

    def _wake_all(self, _failure: TransportError) -> None:
        if self._pool is not None:
            self._pool.close()
