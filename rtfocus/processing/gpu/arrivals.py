"""Arrivals: threads that wait for the GPU and hand out what it has finished."""

from collections.abc import Callable
from functools import partial

import numpy as np

from rtfocus.frame import FrameResult
from rtfocus.processing.estimate import estimate_frame
from rtfocus.processing.gpu.device_slot import DeviceSlot
from rtfocus.processing.gpu.driver import LostGpuError, current_context, translated
from rtfocus.processing.gpu.frame_maps import defocus_map
from rtfocus.processing.gpu.gpu_job import GpuJob, failure_of
from rtfocus.processing.gpu.session import GpuSession
from rtfocus.workers import BoundedQueue

InWork = tuple[GpuJob, DeviceSlot]
Spans = dict[str, tuple[float, float]]
"""Begin and end of every stage in ms since the series began, by the GPU's clock."""
Trace = Callable[[int, Spans], None]
"""Told the sequence of a frame and its spans."""


class Attempts:
    """Applies steps to frames; a failure goes to whoever waits for the frame.

    Parameters
    ----------
    gpu_index
        For messages.
    lose
        Told when the GPU stops answering.
    """

    def __init__(self, gpu_index: int, lose: Callable[[LostGpuError], None]) -> None:
        self._gpu_index = gpu_index
        self._lose = lose

    def succeeds(self, job: GpuJob, doing: str, step: Callable[[], None]) -> bool:
        """Apply a step and return whether it succeeded."""
        try:
            with translated(self._gpu_index, doing):
                step()
        except Exception as error:  # any fault of one frame must not end the thread
            failure = failure_of(job, error)
            if isinstance(failure, LostGpuError):
                self._lose(failure)
            job.fail(failure)
            return False
        return True


class Arrivals:
    """Estimates and results in the order of the frames, each as it arrives.

    Parameters
    ----------
    session
        What the frames were enqueued on.
    attempts
        Where failures go.
    to_estimate
        Frames in flight.
    to_result
        Frames whose estimate is out; closed behind the last.
    free
        Device slots that no frame is in.
    trace
        Told the spans of every frame.
    """

    def __init__(
        self,
        session: GpuSession,
        attempts: Attempts,
        to_estimate: BoundedQueue[InWork],
        to_result: BoundedQueue[InWork],
        free: BoundedQueue[DeviceSlot],
        trace: Trace | None = None,
    ) -> None:
        self._session = session
        self._attempts = attempts
        self._to_estimate = to_estimate
        self._to_result = to_result
        self._free = free
        self._trace = trace

    def estimates(self) -> None:
        """Thread: publish every estimate when its maps have arrived."""
        with current_context(self._session.device.gpu_index):
            for job, slot in self._to_estimate:
                self._attempts.succeeds(
                    job, "estimating", partial(self._estimate, job, slot)
                )
                self._to_result.put((job, slot))
            self._to_result.close()

    def results(self) -> None:
        """Thread: hand out every result when all of it has arrived."""
        with current_context(self._session.device.gpu_index):
            for job, slot in self._to_result:
                if job.error is None and self._attempts.succeeds(
                    job, "restoring", partial(self._finish, job, slot)
                ):
                    job.finished.set()
                self._free.put(slot)

    def _estimate(self, job: GpuJob, slot: DeviceSlot) -> None:
        slot.estimated.synchronize()
        channel = self._session.channels[job.channel]
        if channel.grid is not None:
            maps = self._session.layout.host_arrays(job.packed_maps)
            job.defocus = defocus_map(channel.grid, maps)
            job.estimate = estimate_frame(job.slot_in_work().frame(), job.defocus)
        job.estimated.set()

    def _finish(self, job: GpuJob, slot: DeviceSlot) -> None:
        session = self._session
        session.last_event(job, slot).synchronize()
        restored = job.counts if session.restores(job) else None
        if (
            restored is not None
            and job.invalid is not None
            and np.issubdtype(restored.dtype, np.floating)
        ):
            restored[job.invalid] = np.nan
        channel = session.channels[job.channel]
        spans = _spans(session, slot, restored=restored is not None)
        if self._trace is not None:
            self._trace(job.slot_in_work().frame().sequence, spans)
        job.result = FrameResult(
            estimate=job.estimate,
            defocus=job.defocus,
            restored=restored,
            skipped=job.unrestored or channel.skipped,
            flags=self._flags(job),
            engines=dict(channel.engines),
            stage_ms={stage: end - begin for stage, (begin, end) in spans.items()},
        )

    def _flags(self, job: GpuJob) -> tuple[str, ...]:
        maps = self._session.layout.host_arrays(job.packed_maps)
        flags = [] if job.invalid is None else ["nan"]
        if maps["saturated"][0]:
            flags.append("saturated")
        return tuple(flags)


def _spans(session: GpuSession, slot: DeviceSlot, *, restored: bool) -> Spans:
    """Return when each stage of a frame that has arrived began and ended."""
    marks = {
        "copy in": (slot.begun, slot.copied_in),
        "classify": (slot.classify_begun, slot.classified),
    }
    if restored:
        marks["restore"] = (slot.restore_begun, slot.restored)
        marks["copy out"] = (slot.copy_out_begun, slot.copied_out)
    return {
        stage: (
            float(begin.time_since(session.origin)),
            float(end.time_since(session.origin)),
        )
        for stage, (begin, end) in marks.items()
    }
