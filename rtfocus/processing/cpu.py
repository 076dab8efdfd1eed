"""CpuProcessor: frames through NumPy, a CPU network and FFTs, several in flight.

Each frame is an entry on two queues::

    submit ─▶ [classify] ─ 1 thread ─▶ estimate ready ─▶ [restore] ─ n threads ─▶ result

Classification has threads of its own, so the estimate of the next frame never
waits for a restoration. Both queues hold each slot at most once and so are
bounded by the number of slots. A frame that fails takes its error to
`wait_result`; the others go on.
"""

import threading
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.frame import DefocusMap, Estimate, FrameResult, SeriesStart, TileGrid
from rtfocus.machine import usable_threads
from rtfocus.processing.grids import common_grid
from rtfocus.processing.job import Job, attempt, classify, restore
from rtfocus.processing.plan import ChannelPlan, plan_channel, share_threads
from rtfocus.processing.seam import frame_fault
from rtfocus.slots import Slot
from rtfocus.workers import AbortedError, BoundedQueue

Image = NDArray[np.float32]


class CpuProcessor:
    """`FrameProcessor` on the CPU.

    Parameters
    ----------
    config
        Sections ``processing``, ``camera``, ``channels`` and ``store``.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._plans: list[ChannelPlan] = []
        self._jobs: dict[int, Job] = {}
        self._threads: list[threading.Thread] = []
        self._to_classify: BoundedQueue[Job] = BoundedQueue("classify", 1)
        self._to_restore: BoundedQueue[Job] = BoundedQueue("restore", 1)
        self._series: SeriesStart | None = None

    def start(self, series: SeriesStart, slots: int) -> TileGrid | None:
        """Prepare engines, PSFs and per-slot buffers; EngineError where none fits.

        Returns the grid of the defocus maps; None where no channel is classified.
        """
        self.close()
        threads = self._config.processing.threads or usable_threads()
        self._series = series
        try:
            for channel in series.channels:
                self._plans.append(plan_channel(self._config, series, channel, threads))
            grid = common_grid(
                {
                    plan.name: None if plan.classifier is None else plan.classifier.grid
                    for plan in self._plans
                }
            )
        except Exception:
            self.close()
            raise
        self._jobs = {i: self._allocate(series) for i in range(slots)}
        self._begin_threads(share_threads(threads).restore, slots)
        return grid

    def submit(self, slot: Slot, *, unrestored: str | None = None) -> None:
        """Begin work on a frame; waits while the processor is full."""
        header = slot.frame()
        series = self._series
        if series is None:
            msg = "a frame was submitted before start or after close"
            raise ValueError(msg)
        job = self._job(slot)
        plan = self._plans[header.index.get("c", 0)]
        job.begin(slot, plan, unrestored=unrestored)
        if (fault := frame_fault(header, series)) is not None:
            job.fail(fault)
            return
        self._to_classify.put(job)

    def wait_estimate(self, slot: Slot) -> tuple[Estimate, DefocusMap] | None:
        """Wait for the defocus of a frame; None: this channel has no classifier."""
        job = self._job(slot)
        job.estimated.wait()
        if job.error is not None:
            raise job.error
        if job.estimate is None or job.seen is None:
            return None
        return job.estimate, job.seen.defocus

    def wait_result(self, slot: Slot) -> FrameResult:
        """Wait for everything about a frame; EngineError tells what went wrong."""
        job = self._job(slot)
        job.finished.wait()
        if job.error is not None:
            raise job.error
        if job.result is None:
            msg = f"slot {slot.index} finished without a result"
            raise EngineError(msg)
        return job.result

    def backends(self) -> dict[str, str]:
        """Tell what each engine of the series runs on."""
        return {
            name: runtime
            for plan in self._plans
            for name, runtime in plan.backends.items()
        }

    def close(self) -> None:
        """Stop threads, fail what is in flight and free engines; twice is once."""
        self._to_classify.abort()
        self._to_restore.abort()
        for thread in self._threads:
            thread.join()
        for job in self._jobs.values():
            if job.slot is not None and not job.finished.is_set():
                job.fail(EngineError("the processor was closed before the frame"))
        for plan in self._plans:
            plan.close()
        # The jobs stay until the next start: somebody may still read a result.
        self._threads, self._plans = [], []
        self._series = None

    def _job(self, slot: Slot) -> Job:
        """Return the buffers of a slot; ValueError for one of another pool."""
        job = self._jobs.get(slot.index)
        if job is None:
            msg = f"slot {slot.index} is none of the {len(self._jobs)} of this series"
            raise ValueError(msg)
        return job

    def _allocate(self, series: SeriesStart) -> Job:
        """Make the buffers of one slot."""
        wanted = any(plan.restorer is not None for plan in self._plans)
        as_float = self._config.store.restored_dtype == "float32"
        dtype = np.dtype(np.float32) if as_float else np.dtype(series.dtype)
        return Job(
            signal=np.empty(series.shape, dtype=np.float32),
            restored=np.empty(series.shape, dtype=dtype) if wanted else None,
        )

    def _begin_threads(self, restorers: int, slots: int) -> None:
        self._to_classify = BoundedQueue("classify", slots)
        self._to_restore = BoundedQueue("restore", slots)
        self._threads = [
            threading.Thread(target=self._classify_all, name="rtfocus-classify")
        ]
        self._threads += [
            threading.Thread(target=self._restore_all, name=f"rtfocus-restore-{i}")
            for i in range(restorers)
        ]
        for thread in self._threads:
            thread.start()

    def _classify_all(self) -> None:
        """Thread: frames in the order they came."""
        try:
            for job in self._to_classify:
                if attempt(classify, job):
                    job.estimated.set()
                    self._to_restore.put(job)
        except AbortedError:
            return

    def _restore_all(self) -> None:
        """Thread: whichever frame is next, into a scratch frame of its own."""
        scratch: Image | None = None
        try:
            for job in self._to_restore:
                if scratch is None:
                    scratch = np.empty_like(job.signal)
                if attempt(partial(restore, scratch=scratch), job):
                    job.finished.set()
        except AbortedError:
            return
