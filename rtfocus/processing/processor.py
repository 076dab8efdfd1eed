"""FrameProcessor: whole frames through one device, several in flight.

It owns the order of the frames, their errors, the threads and the queues between
them; all of them hold a frame at most once and so are bounded::

    submit ─▶ [own] enqueue ─▶ [estimate] ─▶ [restore] ─▶ ticket.result
                ▲                  └▶ ticket.estimate ─┐
                └──────── seats: frames in flight ─────┘

Estimates have a thread of their own, so that the next one never waits for a
restoration. A frame that fails takes its error to its ticket; the others go on.
Seats are freed as frames leave, so a device with few of them slows `submit`.
Several devices of one kind may share the frames of a series: each has this chain to
itself, and a frame goes to the one that has least to do.
`open_processor` chooses the devices from an ordered list with reasons.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count

from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.frame import SeriesStart, Slot, TileGrid
from rtfocus.machine import usable
from rtfocus.processing.channel_plan import ChannelPlan, plan_channel
from rtfocus.processing.classify import common_grid, estimate_frame
from rtfocus.processing.device import (
    DEVICES,
    Device,
    Job,
    LostDeviceError,
    Prepared,
    Ticket,
    frame_fault,
    refuse_no_numbers,
    result_of,
    without_frames,
)
from rtfocus.workers import AbortedError, BoundedQueue, in_steps

logger = logging.getLogger(__name__)


class FrameProcessor:
    """Estimates and restores the frames of one series after the other.

    Lifecycle: `start` once per series, then `submit` for every slot, then `close`.

    Parameters
    ----------
    config
        Sections ``processing``, ``camera``, ``channels`` and ``store``.
    devices
        Tried in this order at the start of every series: one that cannot run it
        leaves it to the next, and says so. A failure during a series is not
        answered by another of them: its results would differ within one run.
        Those in a tuple are of one kind and share the frames of a series; they
        stand in for each other.
    """

    def __init__(
        self, config: Config, devices: Sequence[Device | tuple[Device, ...]]
    ) -> None:
        self._config = config
        self._teams = [one if isinstance(one, tuple) else (one,) for one in devices]
        self._series: SeriesStart | None = None
        self._plans: list[ChannelPlan] = []
        self._slots = 0
        self._jobs: dict[int, Job] = {}
        """The newest of every slot."""
        self._runs: list[_Run] = []
        """The devices that share the frames of the series."""
        self._opening: list[_Run] = []
        """Given up while they opened their engines, as after Ctrl-C."""
        self._turns = count()

    def start(
        self, series: SeriesStart, slots: int, *, any_size: bool = False
    ) -> TileGrid | None:
        """Prepare engines, PSFs and buffers for a series.

        Parameters
        ----------
        series
            Shape, dtype and channels of the frames.
        slots
            Frames the caller holds at once.
        any_size
            Take even frames that are too small to tell their defocus.

        Returns
        -------
        TileGrid or None
            Of the defocus maps; None where no channel is classified.

        Raises
        ------
        EngineError
            If an engine is missing, damaged or unfit, or no device runs it.
        ConfigError
            If the flat field does not fit, or frames are too small.
        """
        self.close()
        for run in self._opening:
            # Until then its device is not free.
            run.join()
        self._opening = []
        self._slots = slots
        plan = partial(plan_channel, self._config, series, any_size=any_size)
        self._plans = [plan(channel) for channel in series.channels]
        for team, following in zip(self._teams, (*self.devices[1:], None), strict=True):
            try:
                # One after the other: what the first builds and keeps, the next finds.
                for device in team[:slots]:
                    self._runs.append(_Run(device, slots, self._take_over))
                    self._runs[-1].open(self._plans, series)
            except BaseException as error:
                self.close()
                if following is None or not isinstance(error, EngineError):
                    raise
                logger.warning(
                    "this series is processed on the %s: %s", following, error
                )
            else:
                break
        self._series = series
        return self._runs[0].grid if self._runs else None

    def submit(self, slot: Slot, *, unrestored: str | None = None) -> Ticket:
        """Begin work on a frame; waits while the processor is full.

        Parameters
        ----------
        slot
            Of the pool whose size was given to `start`.
        unrestored
            Why restoration is to be left out; None: restore.

        Raises
        ------
        LostDeviceError
            If every device of the series stopped answering at an earlier frame.
        ValueError
            Before `start`, after `close`, or for a slot of another pool.
        """
        header, series = slot.frame(), self._series
        if series is None:
            msg = "a frame was submitted before start or after close"
            raise ValueError(msg)
        channel = header.index.get("c", 0)
        job = Job(Ticket(slot), self._plans[channel], channel, unrestored)
        fault = frame_fault(header, series)
        if fault is not None:
            job.fail(fault)
            return job.ticket
        if not 0 <= slot.index < self._slots:
            msg = f"slot {slot.index} is none of the {self._slots} of this series"
            raise ValueError(msg)
        if not self._hand_on(job):
            kind = type(self._runs[0].lost or LostDeviceError())
            raise kind("; ".join(self.lost()))
        return job.ticket

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices it may use, first choice first."""
        return tuple(" and ".join(one.name for one in team) for team in self._teams)

    @property
    def expects_error(self) -> bool:
        """Whether a channel of the series states the error left in restored frames."""
        return any(plan.expects_error for plan in self._plans)

    def backends(self) -> dict[str, str]:
        """Tell what each engine runs on, of every device that says another."""
        runtimes: dict[str, list[str]] = {}
        for run in self._runs:
            for name, runtime in run.prepared.backends.items():
                runtimes.setdefault(name, []).append(runtime)
        return {name: "; ".join(dict.fromkeys(all_)) for name, all_ in runtimes.items()}

    def lost(self) -> tuple[str, ...]:
        """Tell which devices of the series stopped answering, and why."""
        causes = [run.lost.__cause__ for run in self._runs if run.lost is not None]
        return tuple(map(str, causes))

    def close(self) -> None:
        """Stop threads, fail what is in flight and free the device; twice is once.

        A device that is still opening engines frees itself afterwards, without a wait.
        """
        for run in self._runs:
            run.abort()
        for run in self._runs:
            if run.is_opening:
                self._opening.append(run)
            else:
                run.join()
        for job in self._jobs.values():
            if not job.ticket.result.done():
                job.fail(EngineError("the processor was closed before the frame"))
        self._runs, self._jobs, self._series = [], {}, None

    def _hand_on(self, job: Job) -> bool:
        """Give a frame to the device with least to do; False: all are lost."""
        alive = [run for run in self._runs if run.lost is None]
        if not alive:
            return False
        # Of equal ones each in its turn.
        turn = next(self._turns) % len(alive)
        run = min(alive[turn:] + alive[:turn], key=lambda run: run.held)
        self._jobs[job.slot.index] = job
        run.submit(job)
        return True

    def _take_over(self, job: Job) -> bool:
        """Give a frame of a lost device to another one; False: all are lost.

        Its pixels lie in its slot, untouched. What waits for it waits on.
        """
        return self._hand_on(Job(job.ticket, job.plan, job.channel, job.unrestored))


class _Run:
    """One series on one device, from its first to its last thread."""

    def __init__(
        self, device: Device, slots: int, take_over: Callable[[Job], bool]
    ) -> None:
        self._device = device
        self._slots = slots
        self._take_over = take_over
        self.lost: LostDeviceError | None = None
        """Why it stopped answering; None: it answers."""
        self._failure: list[BaseException] = []
        self._opened = threading.Event()
        self._to_enqueue: BoundedQueue[Job] = BoundedQueue("enqueue", slots)
        self._to_estimate: BoundedQueue[Job] = BoundedQueue("estimates", device.ahead)
        self._to_restore: BoundedQueue[Job] = BoundedQueue("results", slots)
        self._seats: BoundedQueue[int] = BoundedQueue("seats", slots)

    def open(self, plans: Sequence[ChannelPlan], series: SeriesStart) -> None:
        """Start the threads and wait until the device takes frames; raises why not."""
        self._owner = threading.Thread(
            target=self._run_device,
            args=(plans, series),
            name="rtfocus-device",
            daemon=True,
        )
        self._owner.start()
        in_steps(self._opened.wait)
        if self._failure:
            self._owner.join()
            raise self._failure[0]

    @property
    def is_opening(self) -> bool:
        """Whether it takes no frames yet."""
        return not self._opened.is_set()

    @property
    def held(self) -> int:
        """Frames it was given and has not finished."""
        return len(self._to_enqueue) + self.prepared.in_flight - len(self._seats)

    def submit(self, job: Job) -> None:
        # Never waits: the frames of all slots have room.
        self._to_enqueue.put(job)

    def abort(self) -> None:
        """Wake the threads to their end."""
        self._to_enqueue.abort()
        self._to_estimate.abort()
        self._to_restore.abort()
        self._seats.abort()

    def join(self) -> None:
        """Wait until the threads have ended and the device is free."""
        self._owner.join()

    def _run_device(self, plans: Sequence[ChannelPlan], series: SeriesStart) -> None:
        """Thread: makes, uses and frees everything of the device."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._device.entered())
                stack.callback(self._device.close)
                self._open(plans, series)
            except BaseException as error:
                self._failure.append(without_frames(error))
                return
            finally:
                self._opened.set()
            self._enqueue_all()

    def _open(self, plans: Sequence[ChannelPlan], series: SeriesStart) -> None:
        self.prepared: Prepared = self._device.prepare(plans, series, self._slots)
        self.grid = common_grid(self.prepared.grids)
        for seat in range(self.prepared.in_flight):
            self._seats.put(seat)

    def _enqueue_all(self) -> None:
        """Begin work on every frame, in the order they came."""
        threads = [threading.Thread(target=self._estimate_all, name="rtfocus-estimate")]
        threads += [
            threading.Thread(target=self._restore_all, name=f"rtfocus-restore-{i}")
            for i in range(self.prepared.restoring)
        ]
        for thread in threads:
            thread.start()
        seats = iter(self._seats)
        with suppress(AbortedError):
            for job in self._to_enqueue:
                job.seat = next(seats)
                if self._try_step(self._device.enqueue, job):
                    self._to_estimate.put(job)
                else:
                    self._seats.put(job.seat)
        for thread in threads:
            thread.join()

    def _estimate_all(self) -> None:
        """Thread: every estimate as soon as it is known, in the order of the frames."""
        with self._entered():
            for job in self._to_estimate:
                self._try_step(self._estimate, job)
                self._to_restore.put(job)

    def _restore_all(self) -> None:
        """Thread: every result as soon as it is there."""
        with self._entered():
            for job in self._to_restore:
                if not job.failed:
                    self._try_step(self._restore, job)
                self._seats.put(job.seat)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Enter the device if it can be, until the series is discarded.

        If it cannot be, its frames fail, so that nothing waits for ever.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self._device.entered())
            except EngineError as error:
                logger.error("%s", without_frames(error))
            with suppress(AbortedError):
                yield

    def _estimate(self, job: Job) -> None:
        defocus = self._device.estimate(job)
        if defocus is not None:
            job.estimated = estimate_frame(job.slot.frame(), defocus), defocus
        refuse_no_numbers(job)
        # A frame that was taken over may have its estimate already.
        if not job.ticket.estimate.done():
            job.ticket.estimate.set_result(job.estimated)
        self._device.begin_restoring(job)

    def _restore(self, job: Job) -> None:
        restored = self._device.restore(job)
        refuse_no_numbers(job)
        job.ticket.result.set_result(result_of(job, restored, self._device.name))

    def _try_step(self, step: Callable[[Job], None], job: Job) -> bool:
        """Apply a step to a frame; its failure goes to the ticket of the frame."""
        try:
            step(job)
        except Exception as error:  # any fault of one frame must not end the thread
            kind = type(error) if isinstance(error, EngineError) else EngineError
            sequence = job.slot.frame().sequence
            failure = kind(f"frame {sequence} could not be processed: {error}")
            failure.__cause__ = without_frames(error)
            if isinstance(failure, LostDeviceError):
                first, self.lost = self.lost is None, self.lost or failure
                if self._take_over(job):
                    if first:
                        logger.error("%s; the other devices do its frames", error)
                    job.failed = True
                    return False
            job.fail(failure)
            return False
        return True


def open_processor(config: Config) -> FrameProcessor:
    """Open the processor of ``processing.device``; for ``auto`` the best there is.

    For ``auto`` a GPU that cannot run a series leaves it to the CPU, and says so.

    Raises
    ------
    EngineError
        If the device that is asked for is unavailable; says what is missing.
    """
    kinds = usable(
        "frame processor",
        config.processing.device,
        DEVICES,
        lambda kind: kind.why_unavailable(),
        "; or set processing.device to cpu or auto",
    )
    return FrameProcessor(config, [kind.open_devices(config) for kind in kinds])
