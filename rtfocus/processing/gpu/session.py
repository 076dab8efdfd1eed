"""Session: everything a series has on one GPU, and how a frame is enqueued there.

::

    copy in   ──[frame n+1]──────▶
    classify        ──[frame n]── estimate copied ──▶
    restore               ──[frame n]──────▶
    copy out                    ──[frame n-1]──▶

Four CUDA streams, ordered by events: a stream waits on the GPU for the one before
it in the picture, never the host for either. Classification has a stream of its own
so that the next estimate does not wait for a restoration. Made, used and closed in
the one thread that owns the GPU.
"""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.frame import SeriesStart, TileGrid
from rtfocus.processing.gpu.cuda_memory import CudaMemory
from rtfocus.processing.gpu.cuda_stream import CudaStream, Kernels, new_event
from rtfocus.processing.gpu.device_slot import DeviceSlot
from rtfocus.processing.gpu.driver import LostGpuError, import_driver, translated
from rtfocus.processing.gpu.frame_maps import MapLayout
from rtfocus.processing.gpu.gpu_channel import GpuChannel, open_channel
from rtfocus.processing.gpu.gpu_job import GpuJob
from rtfocus.processing.gpu.kernel_compiler import compiled_kernels, why_driver_too_old
from rtfocus.processing.gpu.pinning import PinnedMemory
from rtfocus.processing.gpu.seam import GpuDevice
from rtfocus.processing.grids import common_grid

logger = logging.getLogger(__name__)

# Once as it is, once to record it, see `rtfocus.processing.gpu.graphs`.
_WARM_UPS = 2


class GpuSession:
    """The device side of one series.

    Parameters
    ----------
    config
        As of the processor.
    series
        Shape, dtype and channels of the frames.
    slots
        Frames the caller holds at once.
    device
        Whose primary context is current in this thread.

    Raises
    ------
    EngineError
        If an engine does not fit or the GPU lacks memory for a single frame.
    """

    def __init__(
        self, config: Config, series: SeriesStart, slots: int, device: GpuDevice
    ) -> None:
        self.device = device
        self._settings = config.processing.gpu
        self._series = series
        self._memory = CudaMemory(device.gpu_index)
        self._slot_memories: list[CudaMemory] = []
        self._pinned = PinnedMemory()
        self._staging: dict[int, NDArray[Any]] = {}
        self.channels: list[GpuChannel] = []
        self.device_slots: list[DeviceSlot] = []
        as_float = config.store.restored_dtype == "float32"
        self._restored_dtype = np.dtype(np.float32 if as_float else series.dtype)
        try:
            self._open(config, slots)
        except BaseException:
            self.close()
            raise

    def _open(self, config: Config, slots: int) -> None:
        series, index = self._series, self.device.gpu_index
        why = why_driver_too_old(import_driver().get_driver_version())
        if why is not None:
            raise EngineError(why)
        with translated(index, "loading the kernels"):
            kernels = Kernels(compiled_kernels(self.device.compute_capability))
            self._copy_in = CudaStream(kernels)
            self._classify = CudaStream(kernels)
            self._restore = CudaStream(kernels)
            self._copy_out = CudaStream(kernels)
        for channel in series.channels:
            self.channels.append(
                open_channel(config, series, channel, self.device, self._memory)
            )
        self.grid: TileGrid | None = common_grid(
            {channel.name: channel.grid for channel in self.channels}
        )
        tiles = 1 if self.grid is None else self.grid.rows * self.grid.columns
        self.layout = MapLayout(tiles)
        with translated(index, "reserving buffers"):
            self._reserve(min(self._settings.frames_in_flight, slots))
        with translated(index, "warming up"):
            self._warm_up()
        self.jobs = [self._job() for _ in range(slots)]
        self.origin: Any = new_event()
        """When the series began."""
        with translated(index, "starting"):
            self._copy_in.record(self.origin)
            self._copy_in.synchronise()

    def used_bytes(self) -> int:
        """Return the device memory in use, networks and other processes included."""
        free, total = import_driver().mem_get_info()
        return int(total - free)

    def enqueue(self, job: GpuJob, slot: DeviceSlot) -> None:
        """Enqueue everything about a frame; returns before any of it is done.

        `DeviceSlot.estimated` is recorded behind its maps, and what
        `last_event` returns behind all of it.
        """
        channel = slot.channels[job.channel]
        pixels = self._stage(job)
        self._copy_in.record(slot.begun)
        self._copy_in.copy_in(slot.buffers.frame, pixels)
        self._copy_in.record(slot.copied_in)
        self._classify.wait(slot.copied_in)
        self._classify.record(slot.classify_begun)
        channel.classify(self._classify)
        self._classify.record(slot.classified)
        self._classify.copy_out(job.packed_maps, slot.buffers.packed_maps)
        self._classify.record(slot.estimated)
        if not self.restores(job):
            return
        self._restore.wait(slot.classified)
        self._restore.record(slot.restore_begun)
        channel.restore(self._restore)
        self._restore.record(slot.restored)
        self._copy_out.wait(slot.restored)
        self._copy_out.record(slot.copy_out_begun)
        self._copy_out.copy_out(job.counts, slot.buffers.counts)
        self._copy_out.record(slot.copied_out)

    def restores(self, job: GpuJob) -> bool:
        """Return whether a frame is to be restored."""
        channel = self.channels[job.channel]
        return job.unrestored is None and channel.restorer is not None

    def last_event(self, job: GpuJob, slot: DeviceSlot) -> Any:
        """Return the event behind everything that `enqueue` did for a frame."""
        return slot.copied_out if self.restores(job) else slot.estimated

    def close(self) -> None:
        """Wait for the GPU and free everything; called twice does nothing."""
        self._finish()
        for slot in self.device_slots:
            slot.close()
        for channel in self.channels:
            channel.close()
        self._pinned.release()
        for memory in (self._memory, *self._slot_memories):
            memory.free()
        self.device_slots, self.channels, self._slot_memories = [], [], []
        self._staging = {}

    def _finish(self) -> None:
        """Wait until nothing runs, unless the GPU is lost."""
        streams = [
            getattr(self, name)
            for name in ("_copy_in", "_classify", "_restore", "_copy_out")
            if hasattr(self, name)
        ]
        try:
            with translated(self.device.gpu_index, "finishing"):
                for stream in streams:
                    stream.synchronise()
        except LostGpuError as error:
            logger.warning("%s", str(error))

    def _reserve(self, wanted: int) -> None:
        """Make the device slots, fewer than wanted where memory ends."""
        for number in range(wanted):
            memory = CudaMemory(self.device.gpu_index)
            try:
                slot = DeviceSlot(
                    memory,
                    self.channels,
                    shape=tuple(self._series.shape),
                    dtype=self._series.dtype,
                    restored_dtype=self._restored_dtype,
                    layout=self.layout,
                    graphs=self._settings.cuda_graphs,
                )
            except EngineError as error:
                memory.free()
                may = self._settings.on_lack_of_memory == "fewer_frames"
                if number == 0 or not may or isinstance(error, LostGpuError):
                    raise
                # The text alone: whoever keeps the log must not keep the error.
                reason = str(error)
                logger.warning(
                    "%d frames in flight instead of %d: %s", number, wanted, reason
                )
                return
            self._slot_memories.append(memory)
            self.device_slots.append(slot)

    def _warm_up(self) -> None:
        """Let libraries reserve and compile before the first frame, not beside it."""
        for slot in self.device_slots:
            self._restore.zero(slot.buffers.frame)
            self._restore.zero(slot.buffers.packed_maps)
            for channel in slot.channels:
                for _ in range(_WARM_UPS):
                    # On their own streams, where they will be replayed.
                    self._restore.synchronise()
                    channel.classify(self._classify)
                    self._classify.synchronise()
                    channel.restore(self._restore)
            self._restore.synchronise()

    def _job(self) -> GpuJob:
        shape = tuple(self._series.shape)
        return GpuJob(
            packed_maps=self._pinned.empty((self.layout.size_bytes,), np.uint8),
            counts=self._pinned.empty(shape, self._restored_dtype),
        )

    def _stage(self, job: GpuJob) -> NDArray[Any]:
        """Return pinned pixels of a frame without NaN: its slot, or a copy of it."""
        slot = job.slot_in_work()
        pixels = slot.pixels
        found = self.channels[job.channel].camera.find_invalid(pixels)
        if found is None and self._pinned.is_pinned(pixels):
            return pixels
        staged = self._staging.get(slot.index)
        if staged is None:
            staged = self._pinned.empty(pixels.shape, pixels.dtype)
            self._staging[slot.index] = staged
        np.copyto(staged, pixels)
        if found is not None:
            job.invalid = found
            staged[found] = 0.0 if found.all() else np.median(staged[~found])
        return staged
