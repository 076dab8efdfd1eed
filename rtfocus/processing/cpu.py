"""CpuProcessor: frames through NumPy, a CPU network and FFTs, several in flight.

Each frame is an entry on two queues::

    submit ─▶ [classify] ─ 1 thread ─▶ estimate ready ─▶ [restore] ─ n threads ─▶ result

Classification has threads of its own, so the estimate of the next frame never
waits for a restoration. Both queues hold each slot at most once and so are
bounded by the number of slots. A frame that fails takes its error to
`wait_result`; the others go on.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.frame import DefocusMap, Estimate, FrameResult, SeriesStart, TileGrid
from rtfocus.processing.correction import Marks, luminance
from rtfocus.processing.estimate import estimate_frame
from rtfocus.processing.plan import ChannelPlan, Threads, plan_channel, share_threads
from rtfocus.slots import Slot
from rtfocus.workers import AbortedError, BoundedQueue

Image = NDArray[np.float32]


@dataclass
class _Job:
    """One frame in work, with the buffers that belong to its slot."""

    signal: Image
    """Corrected frame; becomes the restored one."""
    restored: NDArray[Any] | None
    """Result on the camera's scale; None where no channel is restored."""
    slot: Slot | None = None
    plan: ChannelPlan | None = None
    restore: bool = True
    marks: Marks = field(default_factory=lambda: Marks((), None))
    estimate: Estimate | None = None
    defocus: DefocusMap | None = None
    result: FrameResult | None = None
    error: EngineError | None = None
    stage_ms: dict[str, float] = field(default_factory=dict)
    estimated: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)

    def begin(self, slot: Slot, plan: ChannelPlan, *, restore: bool) -> None:
        """Take a new frame; what the last one left is forgotten."""
        self.slot, self.plan, self.restore = slot, plan, restore
        self.estimate = self.defocus = self.result = self.error = None
        self.stage_ms = {}
        self.estimated.clear()
        self.finished.clear()

    def of(self) -> tuple[Slot, ChannelPlan]:
        """Return the slot and the plan of the frame in work."""
        if self.slot is None or self.plan is None:
            msg = "a job without a frame was queued"
            raise ValueError(msg)
        return self.slot, self.plan

    def fail(self, error: EngineError) -> None:
        """Wake everybody who waits for this frame with an error."""
        self.error = error
        self.estimated.set()
        self.finished.set()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage in milliseconds."""
        begun = time.perf_counter()
        yield
        self.stage_ms[name] = (time.perf_counter() - begun) * 1e3


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
        self._jobs: dict[int, _Job] = {}
        self._threads: list[threading.Thread] = []
        self._to_classify: BoundedQueue[_Job] = BoundedQueue("classify", 1)
        self._to_restore: BoundedQueue[_Job] = BoundedQueue("restore", 1)
        self._series: SeriesStart | None = None

    def start(self, series: SeriesStart, slots: int) -> TileGrid | None:
        """Prepare engines, PSFs and per-slot buffers; EngineError where none fits.

        Returns the grid of the defocus maps; None where no channel is classified.
        """
        self.close()
        total = self._config.processing.threads or _usable_cores()
        threads = share_threads(total)
        self._series = series
        try:
            for channel in series.channels:
                self._plans.append(plan_channel(self._config, series, channel, threads))
            grid = _common_grid(self._plans)
        except Exception:
            self.close()
            raise
        self._jobs = {i: self._allocate(series) for i in range(slots)}
        self._begin_threads(threads, slots)
        return grid

    def submit(self, slot: Slot, *, restore: bool = True) -> None:
        """Begin work on a frame; waits while the processor is full."""
        header = slot.frame()
        series = self._series
        if series is None:
            msg = "a frame was submitted before start or after close"
            raise ValueError(msg)
        job = self._job(slot)
        plan = self._plans[header.index.get("c", 0)]
        job.begin(slot, plan, restore=restore)
        if tuple(header.shape) != tuple(series.shape) or header.dtype != series.dtype:
            msg = (
                f"frame {header.sequence} is {header.shape} {header.dtype}, the series "
                f"is {series.shape} {series.dtype}; start a new series for it"
            )
            job.fail(EngineError(msg))
            return
        self._to_classify.put(job)

    def wait_estimate(self, slot: Slot) -> tuple[Estimate, DefocusMap] | None:
        """Wait for the defocus of a frame; None: this channel has no classifier."""
        job = self._job(slot)
        job.estimated.wait()
        if job.error is not None:
            raise job.error
        if job.estimate is None or job.defocus is None:
            return None
        return job.estimate, job.defocus

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

    def _job(self, slot: Slot) -> _Job:
        """Return the buffers of a slot; ValueError for one of another pool."""
        job = self._jobs.get(slot.index)
        if job is None:
            msg = f"slot {slot.index} is none of the {len(self._jobs)} of this series"
            raise ValueError(msg)
        return job

    def _allocate(self, series: SeriesStart) -> _Job:
        """Make the buffers of one slot."""
        wanted = any(plan.restorer is not None for plan in self._plans)
        as_float = self._config.store.restored_dtype == "float32"
        dtype = np.dtype(np.float32) if as_float else np.dtype(series.dtype)
        return _Job(
            signal=np.empty(series.shape, dtype=np.float32),
            restored=np.empty(series.shape, dtype=dtype) if wanted else None,
        )

    def _begin_threads(self, threads: Threads, slots: int) -> None:
        self._to_classify = BoundedQueue("classify", slots)
        self._to_restore = BoundedQueue("restore", slots)
        self._threads = [
            threading.Thread(target=self._classify_all, name="rtfocus-classify")
        ]
        self._threads += [
            threading.Thread(target=self._restore_all, name=f"rtfocus-restore-{i}")
            for i in range(threads.restore)
        ]
        for thread in self._threads:
            thread.start()

    def _classify_all(self) -> None:
        """Thread: frames in the order they came."""
        try:
            for job in self._to_classify:
                if _attempt(_classify, job):
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
                if _attempt(partial(_restore, scratch=scratch), job):
                    job.finished.set()
        except AbortedError:
            return


def _usable_cores() -> int:
    """Return the cores this process may use, which a container or job limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _attempt(step: Callable[[_Job], None], job: _Job) -> bool:
    """Apply a step; a failure goes to whoever waits for this frame."""
    try:
        step(job)
    except Exception as error:  # any fault of one frame must not end the thread
        sequence = job.slot.frame().sequence if job.slot is not None else None
        msg = f"frame {sequence} could not be processed: {error}"
        failure = EngineError(msg)
        failure.__cause__ = error
        job.fail(failure)
        return False
    return True


def _classify(job: _Job) -> None:
    """Correct a frame and estimate the defocus of its tiles."""
    slot, plan = job.of()
    with job.stage("correct"):
        job.marks = plan.correction.to_signal(slot.pixels, job.signal)
    if plan.classifier is None:
        return
    with job.stage("normalise"):
        prepared = plan.classifier.prepare(luminance(job.signal))
    with job.stage("classify"):
        job.defocus = plan.classifier.classify(prepared)
        job.estimate = estimate_frame(slot.frame(), job.defocus)


def _restore(job: _Job, scratch: Image) -> None:
    """Restore a frame, or say why it was not."""
    _, plan = job.of()
    skipped = plan.skipped if job.restore else "raw_only: restoration was left out"
    restored = None
    if (
        skipped is None
        and plan.restorer is not None
        and job.defocus is not None
        and job.restored is not None
    ):
        with job.stage("restore"):
            plan.restorer.restore(
                job.signal,
                job.defocus.level,
                scratch,
                quantum=plan.correction.quantum,
            )
            restored = job.restored
            plan.correction.to_counts(scratch, restored, job.marks.invalid)
    job.result = FrameResult(
        estimate=job.estimate,
        defocus=job.defocus,
        restored=restored,
        skipped=skipped,
        flags=job.marks.flags,
        engines=dict(plan.engines),
        stage_ms=job.stage_ms,
    )


def _common_grid(plans: list[ChannelPlan]) -> TileGrid | None:
    """Return the one grid of all classified channels.

    Raises
    ------
    EngineError
        If two channels have different grids: one map cannot hold both.
    """
    grids = {
        plan.name: plan.classifier.grid for plan in plans if plan.classifier is not None
    }
    if len(set(grids.values())) > 1:
        msg = (
            f"classifiers of channels {', '.join(grids)} divide a frame into different "
            "tiles; use engines with the same tile_px and stride_px"
        )
        raise EngineError(msg)
    return next(iter(grids.values()), None)
