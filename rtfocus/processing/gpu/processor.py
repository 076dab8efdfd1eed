"""GpuProcessor: frames through one GPU, several in flight.

Three threads::

    submit ─▶ [own] enqueues ─▶ [estimates] waits ─▶ [results] waits ─▶ device slot free

The first owns the GPU: it makes, uses and drops every object of the driver. The
other two wait for events, which lets every other thread run, and hand out what has
arrived. A frame that fails takes its error to `wait_result`; a lost GPU fails every
frame from then on, and `submit` says so.
"""

import threading
from contextlib import ExitStack
from functools import partial

from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.frame import DefocusMap, Estimate, FrameResult, SeriesStart, TileGrid
from rtfocus.processing.gpu.arrivals import Arrivals, Attempts, InWork, Trace
from rtfocus.processing.gpu.device_slot import DeviceSlot
from rtfocus.processing.gpu.devices import find_device
from rtfocus.processing.gpu.driver import (
    LostGpuError,
    current_context,
    without_frames,
)
from rtfocus.processing.gpu.gpu_job import GpuJob
from rtfocus.processing.gpu.seam import GpuDevice
from rtfocus.processing.gpu.session import GpuSession
from rtfocus.processing.seam import frame_fault
from rtfocus.slots import Slot
from rtfocus.workers import AbortedError, BoundedQueue


class GpuProcessor:
    """`FrameProcessor` on one NVIDIA GPU.

    Parameters
    ----------
    config
        Sections ``processing``, ``camera``, ``channels`` and ``store``.
    trace
        Told when every stage of a frame began and ended; None: nobody is.

    Raises
    ------
    EngineError
        If there is no such GPU.
    """

    def __init__(self, config: Config, trace: Trace | None = None) -> None:
        self._config = config
        self._trace = trace
        self.memory_bytes = 0
        """Device memory in use when the last series was ready, networks included."""
        self._device: GpuDevice = find_device(config.processing.gpu.index)
        self._series: SeriesStart | None = None
        self._session: GpuSession | None = None
        self._jobs: list[GpuJob] = []
        self._lost: LostGpuError | None = None
        self._owner: threading.Thread | None = None
        self._submitted: BoundedQueue[GpuJob] = BoundedQueue("submitted", 1)
        self._opened = threading.Event()
        self._failure: BaseException | None = None
        self._grid: TileGrid | None = None
        self._backends: dict[str, str] = {}

    def start(self, series: SeriesStart, slots: int) -> TileGrid | None:
        """Prepare engines, PSFs and per-slot buffers; EngineError where none fits.

        Returns the grid of the defocus maps; None where no channel is classified.
        """
        self.close()
        self._series = series
        self._failure = None
        self._opened.clear()
        self._submitted = BoundedQueue("submitted", slots)
        self._owner = threading.Thread(
            target=self._own, args=(series, slots), name="rtfocus-gpu"
        )
        self._owner.start()
        self._opened.wait()
        if (failure := self._outcome()) is not None:
            self.close()
            raise failure
        return self._grid

    def submit(self, slot: Slot, *, unrestored: str | None = None) -> None:
        """Begin work on a frame; waits while the processor is full.

        Raises
        ------
        LostGpuError
            If the GPU stopped answering at an earlier frame.
        """
        header = slot.frame()
        series = self._series
        if series is None:
            msg = "a frame was submitted before start or after close"
            raise ValueError(msg)
        if self._lost is not None:
            raise self._lost
        job = self._job(slot)
        job.begin(slot, header.index.get("c", 0), unrestored=unrestored)
        if (fault := frame_fault(header, series)) is not None:
            job.fail(fault)
            return
        self._submitted.put(job)

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

    def backends(self) -> dict[str, str]:
        """Tell what each engine of the series runs on."""
        return dict(self._backends)

    def close(self) -> None:
        """Stop threads, fail what is in flight and free the GPU; twice is once."""
        self._submitted.abort()
        if self._owner is not None:
            self._owner.join()
        for job in self._jobs:
            if job.slot is not None and not job.finished.is_set():
                job.fail(EngineError("the processor was closed before the frame"))
        # The jobs stay until the next start: somebody may still read a result.
        self._owner = self._series = None

    def _job(self, slot: Slot) -> GpuJob:
        """Return the buffers of a slot; ValueError for one of another pool."""
        if not 0 <= slot.index < len(self._jobs):
            msg = f"slot {slot.index} is none of the {len(self._jobs)} of this series"
            raise ValueError(msg)
        return self._jobs[slot.index]

    def _outcome(self) -> BaseException | None:
        """Return what the owner's thread failed with at the start."""
        return self._failure

    def _own(self, series: SeriesStart, slots: int) -> None:
        """Thread: owns the GPU from the first to the last call of a series."""
        with ExitStack() as stack:
            try:
                stack.enter_context(current_context(self._device.gpu_index))
                session = GpuSession(self._config, series, slots, self._device)
            except BaseException as error:
                self._failure = without_frames(error)
                self._opened.set()
                return
            self._jobs, self._grid = session.jobs, session.grid
            self.memory_bytes = session.used_bytes()
            self._backends = {
                name: runtime
                for channel in session.channels
                for name, runtime in channel.backends.items()
            }
            self._opened.set()
            try:
                self._run(session)
            finally:
                session.close()

    def _run(self, session: GpuSession) -> None:
        """Enqueue every frame; returns when all that was enqueued has arrived."""
        count = len(session.device_slots)
        free: BoundedQueue[DeviceSlot] = BoundedQueue("device slots", count)
        for slot in session.device_slots:
            free.put(slot)
        to_estimate: BoundedQueue[InWork] = BoundedQueue("estimates", count)
        to_result: BoundedQueue[InWork] = BoundedQueue("results", count)
        attempts = Attempts(self._device.gpu_index, self._lose)
        arrivals = Arrivals(
            session, attempts, to_estimate, to_result, free, self._trace
        )
        threads = [
            threading.Thread(target=arrivals.estimates, name="rtfocus-gpu-estimates"),
            threading.Thread(target=arrivals.results, name="rtfocus-gpu-results"),
        ]
        for thread in threads:
            thread.start()
        slots = iter(free)
        try:
            for job in self._submitted:
                slot = next(slots)
                enqueue = partial(session.enqueue, job, slot)
                if attempts.succeeds(job, "enqueueing a frame", enqueue):
                    to_estimate.put((job, slot))
                else:
                    free.put(slot)
        except AbortedError:
            pass
        finally:
            to_estimate.close()
            for thread in threads:
                thread.join()

    def _lose(self, error: LostGpuError) -> None:
        """Refuse frames from now on."""
        self._lost = self._lost or error
