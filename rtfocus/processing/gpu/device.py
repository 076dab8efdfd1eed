"""GpuDevice: everything a series has on one GPU, and how frames go through it.

::

    copy in   ──[frame n+1]──────▶
    classify        ──[frame n]── estimate copied ──▶
    restore               ──[frame n]──────▶
    copy out                    ──[frame n-1]──▶

Four CUDA streams, ordered by events: a stream waits on the GPU for the one before it
in the picture. Classification has a stream of its own so that the next estimate does
not wait for a restoration. A restoration is enqueued when the maps have reached the
host, which then knows the levels that are present: the others are left out.

The thread that prepares and enqueues owns the GPU: it makes, uses and drops every
object of the driver. The others wait for events, which lets every other thread run,
and hand out what has arrived.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.frame import DefocusMap, SeriesStart
from rtfocus.processing.camera import CameraCorrection, fill, write_counts
from rtfocus.processing.channel_plan import ChannelPlan, restored_dtype
from rtfocus.processing.device import Job, Prepared
from rtfocus.processing.gpu.channel import (
    ChannelSlot,
    OpenChannel,
    SlotBuffers,
)
from rtfocus.processing.gpu.classifier import MapLayout, defocus_map
from rtfocus.processing.gpu.cuda.compiler import compiled_kernels, why_driver_too_old
from rtfocus.processing.gpu.cuda.driver import (
    LostGpuError,
    current_context,
    find_device,
    import_driver,
    translated,
)
from rtfocus.processing.gpu.cuda.stream import (
    CudaMemory,
    CudaStream,
    LoadedKernels,
    PinnedMemory,
    new_event,
)
from rtfocus.runtimes.gpu import Gpu

logger = logging.getLogger(__name__)

# Once as it is, once to record it, see `rtfocus.processing.gpu.cuda.stream`.
_WARM_UPS = 2
_STAGES = ("copy in", "classify", "restore", "copy out")
"""In the order in which they happen; a frame that is not restored has two."""


def carried_as(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the type in which frames cross to the device and back.

    What cameras give crosses as it is; every other integer or float type as the
    float32 that any device computes with, turned on the host.
    """
    kind = np.dtype(dtype)
    return kind if kind.str in ("|u1", "<u2") else np.dtype(np.float32)


class HostBuffers:
    """Pinned host memory that belongs to one of the caller's slots.

    What no kernel is to meet is taken out of a frame on its way there.
    """

    def __init__(
        self,
        pinned: PinnedMemory,
        shape: tuple[int, ...],
        restored_dtype: np.dtype[Any],
        maps_bytes: int,
    ) -> None:
        self._pinned = pinned
        self.packed_maps: NDArray[np.uint8] = pinned.empty((maps_bytes,), np.uint8)
        """Copy of the maps, see `rtfocus.processing.gpu.classifier.MapLayout`."""
        self.counts: NDArray[Any] = pinned.empty(shape, carried_as(restored_dtype))
        """Copy of the restored frame, as the device gives it."""
        same = self.counts.dtype == restored_dtype
        self._restored = self.counts if same else np.empty(shape, restored_dtype)
        self._staged: NDArray[Any] | None = None
        self.invalid: NDArray[np.bool_] | None = None
        """Pixels that are NaN or infinite; None: none."""
        self._pedestal = 0.0
        """What a frame with negative values was lifted by."""
        self._lifted_flags: tuple[str, ...] | None = None
        """What is wrong with a lifted frame; None: it is not lifted."""

    def take(self, pixels: NDArray[Any], camera: CameraCorrection) -> NDArray[Any]:
        """Return pinned pixels without NaN and from 0 on: the same, or a copy."""
        self.invalid = invalid = camera.find_invalid(pixels)
        self._pedestal = camera.pedestal(pixels)
        self._lifted_flags = None
        dtype = carried_as(pixels.dtype)
        plain = invalid is None and not self._pedestal and pixels.dtype == dtype
        if plain and self._pinned.is_pinned(pixels):
            return pixels
        if (staged := self._staged) is None:
            staged = self._staged = self._pinned.empty(pixels.shape, dtype)
        np.copyto(staged, pixels, casting="unsafe")
        if invalid is not None:
            fill(staged, invalid)
        if self._pedestal:
            staged += np.float32(self._pedestal)
            self._lifted_flags = camera.mark(pixels).flags
        return staged

    def flags(self, *, saturated: bool) -> tuple[str, ...]:
        """Return what is wrong with the frame; `saturated`: by what the device got."""
        if self._lifted_flags is not None:
            # The device got other values than the camera's.
            return self._lifted_flags
        flags = {"nan": self.invalid is not None, "saturated": saturated}
        return tuple(name for name, is_so in flags.items() if is_so)

    def give(self) -> NDArray[Any]:
        """Return the restored frame that has arrived, in the type of the series."""
        if self.counts.dtype == np.float32:
            if self._pedestal:
                self.counts -= np.float32(self._pedestal)
            write_counts(self.counts, self._restored, self.invalid)
        return self._restored


class DeviceSlot:
    """One frame in flight; nothing of it is shared with another.

    Parameters
    ----------
    channels
        Of the series; a slot serves every one of them.
    graphs
        Whether work is recorded.
    """

    def __init__(
        self,
        gpu_index: int,
        channels: Sequence[OpenChannel],
        *,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        restored_dtype: DTypeLike,
        layout: MapLayout,
        graphs: bool,
    ) -> None:
        self._memory = memory = CudaMemory(gpu_index)
        self.channels: list[ChannelSlot] = []
        try:
            packed = memory.allocate((layout.size_bytes,), np.uint8, "maps")
            self.buffers = SlotBuffers(
                frame=memory.allocate(shape, dtype, "a frame"),
                signal=memory.allocate(shape, np.float32, "a corrected frame"),
                restored=memory.allocate(shape, np.float32, "a restored frame"),
                counts=memory.allocate(shape, restored_dtype, "a restored frame"),
                packed_maps=packed,
                maps=layout.device_arrays(packed),
            )
            self.begun: dict[str, Any] = {stage: new_event() for stage in _STAGES}
            self.ended: dict[str, Any] = {stage: new_event() for stage in _STAGES}
            """By stage; each also tells the time."""
            self.estimated: Any = new_event()
            for channel in channels:
                slot = ChannelSlot(self.buffers, memory, channel, graphs=graphs)
                self.channels.append(slot)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free contexts, recordings and memory; nothing of it is in flight."""
        for channel in self.channels:
            channel.close()
        self._memory.free()


Spans = dict[str, tuple[float, float]]
"""Begin and end of every stage in ms since the series began, by the GPU's clock."""
Trace = Callable[[int, Spans], None]
"""Told the sequence of a frame and its spans."""


class GpuDevice:
    """One NVIDIA GPU; implements `rtfocus.processing.device.Device`.

    Parameters
    ----------
    config
        Sections ``processing`` and ``store``.
    trace
        Called with begin and end of every stage of a frame, if any.
    index
        Which GPU; None: the first of ``processing.gpu.index``.

    Raises
    ------
    EngineError
        If there is no such GPU.
    """

    def __init__(
        self, config: Config, trace: Trace | None = None, *, index: int | None = None
    ) -> None:
        self._config = config
        self._settings = config.processing.gpu
        self._trace = trace
        self._gpu: Gpu = find_device(
            self._settings.index[0] if index is None else index
        )
        self._index = self._gpu.gpu_index
        self.name = f"GPU {self._index}"
        self.ahead = self._settings.frames_in_flight
        self.memory_bytes = 0
        """Device memory in use when the last series was ready, networks included."""
        self._memory = CudaMemory(self._index)
        self._pinned = PinnedMemory()
        self._streams: dict[str, CudaStream] = {}
        self._channels: list[OpenChannel] = []
        self._slots: list[DeviceSlot] = []
        self._host: list[HostBuffers] = []
        self._layout = MapLayout(1)
        self._origin: Any = None
        """When the series began."""

    def entered(self) -> AbstractContextManager[None]:
        """Make the GPU's context current in a thread."""
        return current_context(self._index)

    def prepare(
        self, plans: Sequence[ChannelPlan], series: SeriesStart, slots: int
    ) -> Prepared:
        """Open engines and reserve buffers for a series, fewer where memory ends."""
        why = why_driver_too_old(import_driver().get_driver_version())
        if why is not None:
            raise EngineError(why)
        with self._translated("loading the kernels"):
            kernels = LoadedKernels(compiled_kernels(self._gpu.compute_capability))
            self._streams = {stage: CudaStream(kernels) for stage in _STAGES}
        for plan in plans:
            self._channels.append(OpenChannel(plan, self._gpu, self._memory))
        grids = [c.grid for c in self._channels if c.grid is not None]
        # The processor refuses a series whose channels have different grids.
        self._layout = MapLayout(max((g.rows * g.columns for g in grids), default=1))
        restored = restored_dtype(self._config, series)
        with self._translated("reserving buffers"):
            self._reserve(min(self._settings.frames_in_flight, slots), series, restored)
        with self._translated("warming up"):
            self._warm_up()
        of = self._pinned, tuple(series.shape), restored, self._layout.size_bytes
        self._host = [HostBuffers(*of) for _ in range(slots)]
        self._origin = new_event()
        with self._translated("starting"):
            self._streams["copy in"].record(self._origin)
            self._streams["copy in"].synchronise()
        free, total = import_driver().mem_get_info()
        self.memory_bytes = int(total - free)
        return Prepared(
            grids={channel.plan.name: channel.grid for channel in self._channels},
            in_flight=len(self._slots),
            restoring=1,
            backends={
                name: f"{runtime} on {self.name} ({self._gpu.name})"
                for channel in self._channels
                for name, runtime in channel.backends.items()
            },
        )

    def enqueue(self, job: Job) -> None:
        """Enqueue a frame up to its maps; returns before any of it is done."""
        slot, host = self._slots[job.seat], self._host[job.slot.index]
        copy_in, classify = self._streams["copy in"], self._streams["classify"]
        with self._translated("enqueueing a frame"):
            pixels = host.take(job.slot.pixels, job.plan.camera)
            copy_in.record(slot.begun["copy in"])
            copy_in.copy_in(slot.buffers.frame, pixels)
            copy_in.record(slot.ended["copy in"])
            classify.wait(slot.ended["copy in"])
            classify.record(slot.begun["classify"])
            slot.channels[job.channel].classify(classify)
            classify.record(slot.ended["classify"])
            classify.copy_out(host.packed_maps, slot.buffers.packed_maps)
            classify.record(slot.estimated)

    def estimate(self, job: Job) -> DefocusMap | None:
        """Wait until a frame's maps are on the host."""
        host, grid = self._host[job.slot.index], self._channels[job.channel].grid
        with self._translated("estimating"):
            self._slots[job.seat].estimated.synchronize()
        maps = self._layout.host_arrays(host.packed_maps)
        job.flags = host.flags(saturated=bool(maps["flags"][0]))
        return None if grid is None else defocus_map(grid, maps)

    def begin_restoring(self, job: Job) -> None:
        """Enqueue the restoration of the levels that a frame's tiles have.

        Called when its maps are on the host, from one thread that may be another than
        the owner's: what is recorded was so in the warm-up.
        """
        if job.skipped is not None:
            return
        slot, host = self._slots[job.seat], self._host[job.slot.index]
        restore, copy_out = self._streams["restore"], self._streams["copy out"]
        labels = None if job.estimated is None else job.estimated[1].level
        with self._translated("enqueueing a restoration"):
            restore.wait(slot.ended["classify"])
            restore.record(slot.begun["restore"])
            slot.channels[job.channel].restore(restore, labels)
            restore.record(slot.ended["restore"])
            copy_out.wait(slot.ended["restore"])
            copy_out.record(slot.begun["copy out"])
            copy_out.copy_out(host.counts, slot.buffers.counts)
            flags = self._layout.host_arrays(host.packed_maps)["flags"]
            copy_out.copy_out(flags, slot.buffers.maps["flags"])
            if job.plan.expects_error:
                error = self._layout.host_arrays(host.packed_maps)["expected_error"]
                copy_out.copy_out(error, slot.buffers.maps["expected_error"])
            copy_out.record(slot.ended["copy out"])

    def restore(self, job: Job) -> NDArray[Any] | None:
        """Wait until all of a frame is on the host."""
        slot, host = self._slots[job.seat], self._host[job.slot.index]
        restored: NDArray[Any] | None = None
        stages: tuple[str, ...] = _STAGES[:2]
        with self._translated("restoring"):
            if job.skipped is not None:
                slot.estimated.synchronize()
            else:
                slot.ended["copy out"].synchronize()
                maps = self._layout.host_arrays(host.packed_maps)
                job.strange = bool(maps["flags"][1])
                if job.plan.expects_error and job.estimated is not None:
                    shape = job.estimated[1].level.shape
                    error = maps["expected_error"][: prod(shape)]
                    job.expected_error = error.reshape(shape).copy()
                restored, stages = host.give(), _STAGES
            spans = {
                stage: (
                    float(slot.begun[stage].time_since(self._origin)),
                    float(slot.ended[stage].time_since(self._origin)),
                )
                for stage in stages
            }
        job.stage_ms = {stage: end - begin for stage, (begin, end) in spans.items()}
        if self._trace is not None:
            self._trace(job.slot.frame().sequence, spans)
        return restored

    def close(self) -> None:
        """Wait for the GPU and free everything; called twice does nothing."""
        try:
            with self._translated("finishing"):
                for stream in self._streams.values():
                    stream.synchronise()
        except LostGpuError as error:
            logger.warning("%s", str(error))
        for slot in self._slots:
            slot.close()
        for channel in self._channels:
            channel.close()
        self._pinned.release()
        self._memory.free()
        self._slots, self._channels, self._host = [], [], []
        self._streams, self._origin = {}, None

    def _translated(self, doing: str) -> AbstractContextManager[None]:
        return translated(self._index, doing)

    def _reserve(
        self, count: int, series: SeriesStart, restored: np.dtype[Any]
    ) -> None:
        """Make the device slots, fewer than wanted where memory ends."""
        for number in range(count):
            try:
                slot = DeviceSlot(
                    self._index,
                    self._channels,
                    shape=tuple(series.shape),
                    dtype=carried_as(series.dtype),
                    restored_dtype=carried_as(restored),
                    layout=self._layout,
                    graphs=self._settings.cuda_graphs,
                )
            except EngineError as error:
                may = self._settings.on_lack_of_memory == "fewer_frames"
                if number == 0 or not may or isinstance(error, LostGpuError):
                    raise
                # The text alone: a log record must not keep the error.
                reason = str(error)
                logger.warning(
                    "%d frames in flight instead of %d: %s", number, count, reason
                )
                return
            self._slots.append(slot)

    def _warm_up(self) -> None:
        """Let libraries reserve and compile before the first frame, not beside it."""
        classify, restore = self._streams["classify"], self._streams["restore"]
        for slot in self._slots:
            restore.zero(slot.buffers.frame)
            restore.zero(slot.buffers.packed_maps)
            for channel in slot.channels:
                for _ in range(_WARM_UPS):
                    # On their own streams, where they will be replayed.
                    restore.synchronise()
                    channel.classify(classify)
                    classify.synchronise()
                    channel.restore(restore, None)
            restore.synchronise()
