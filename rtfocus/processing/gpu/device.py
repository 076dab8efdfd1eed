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
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.frame import DefocusMap, SeriesStart
from rtfocus.processing.channel_plan import ChannelPlan
from rtfocus.processing.device import Job, Prepared
from rtfocus.processing.gpu.channel import (
    ChannelSlot,
    OpenChannel,
    SlotBuffers,
    open_channel,
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
    Kernels,
    PinnedMemory,
    new_event,
)
from rtfocus.processing.gpu.preparation import HostBuffers, carried_as
from rtfocus.runtimes.gpu import Gpu

logger = logging.getLogger(__name__)

# Once as it is, once to record it, see `rtfocus.processing.gpu.cuda.stream`.
_WARM_UPS = 2
_STAGES = ("copy in", "classify", "restore", "copy out")
"""In the order in which they happen; a frame that is not restored has two."""


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


class Session:
    """The device side of one series; made where the GPU's context is current.

    Raises
    ------
    EngineError
        If an engine does not fit or the GPU lacks memory for a single frame.
    """

    def __init__(
        self,
        config: Config,
        plans: Sequence[ChannelPlan],
        series: SeriesStart,
        slots: int,
        device: Gpu,
    ) -> None:
        self.device = device
        self._settings = config.processing.gpu
        self._series = series
        self._memory = CudaMemory(device.gpu_index)
        self._pinned = PinnedMemory()
        self._streams: list[CudaStream] = []
        self.channels: list[OpenChannel] = []
        self.device_slots: list[DeviceSlot] = []
        as_float = config.store.restored_dtype == "float32"
        self._restored_dtype = np.dtype(np.float32 if as_float else series.dtype)
        try:
            self._open(plans, slots)
        except BaseException:
            self.close()
            raise

    def _open(self, plans: Sequence[ChannelPlan], slots: int) -> None:
        index = self.device.gpu_index
        why = why_driver_too_old(import_driver().get_driver_version())
        if why is not None:
            raise EngineError(why)
        with translated(index, "loading the kernels"):
            kernels = Kernels(compiled_kernels(self.device.compute_capability))
            self._streams = [CudaStream(kernels) for _ in _STAGES]
            self._copy_in, self._classify, self._restore, self._copy_out = self._streams
        for plan in plans:
            self.channels.append(open_channel(plan, self.device, self._memory))
        grids = [c.grid for c in self.channels if c.grid is not None]
        # The processor refuses a series whose channels have different grids.
        self.layout = MapLayout(max((g.rows * g.columns for g in grids), default=1))
        with translated(index, "reserving buffers"):
            self._reserve(min(self._settings.frames_in_flight, slots))
        with translated(index, "warming up"):
            self._warm_up()
        size = self.layout.size_bytes
        of = (self._pinned, tuple(self._series.shape), self._restored_dtype)
        self._host = [HostBuffers(*of, size) for _ in range(slots)]
        self.origin: Any = new_event()
        """When the series began."""
        with translated(index, "starting"):
            self._copy_in.record(self.origin)
            self._copy_in.synchronise()

    def used_bytes(self) -> int:
        """Return the device memory in use, networks and other processes included."""
        free, total = import_driver().mem_get_info()
        return int(total - free)

    def enqueue(self, job: Job) -> None:
        """Enqueue a frame up to its maps; returns before any of it is done."""
        slot, host = self.device_slots[job.seat], self._host[job.slot.index]
        channel = slot.channels[job.channel]
        pixels = host.take(job.slot.pixels, job.plan.camera)
        self._copy_in.record(slot.begun["copy in"])
        self._copy_in.copy_in(slot.buffers.frame, pixels)
        self._copy_in.record(slot.ended["copy in"])
        self._classify.wait(slot.ended["copy in"])
        self._classify.record(slot.begun["classify"])
        channel.classify(self._classify)
        self._classify.record(slot.ended["classify"])
        self._classify.copy_out(host.packed_maps, slot.buffers.packed_maps)
        self._classify.record(slot.estimated)

    def enqueue_restoration(self, job: Job) -> None:
        """Enqueue the restoration of the levels that a frame's tiles have.

        Called when its maps are on the host, from one thread that may be another than
        the owner's: what is recorded was so in the warm-up.
        """
        if job.skipped is not None:
            return
        slot, host = self.device_slots[job.seat], self._host[job.slot.index]
        self._restore.wait(slot.ended["classify"])
        self._restore.record(slot.begun["restore"])
        labels = None if job.estimated is None else job.estimated[1].level
        slot.channels[job.channel].restore(self._restore, labels)
        self._restore.record(slot.ended["restore"])
        self._copy_out.wait(slot.ended["restore"])
        self._copy_out.record(slot.begun["copy out"])
        self._copy_out.copy_out(host.counts, slot.buffers.counts)
        flags = self.layout.host_arrays(host.packed_maps)["flags"]
        self._copy_out.copy_out(flags, slot.buffers.maps["flags"])
        self._copy_out.record(slot.ended["copy out"])

    def wait_maps(self, job: Job) -> DefocusMap | None:
        """Wait until a frame's maps are on the host; None: it is not classified."""
        self.device_slots[job.seat].estimated.synchronize()
        host, grid = self._host[job.slot.index], self.channels[job.channel].grid
        maps = self.layout.host_arrays(host.packed_maps)
        flags = {"nan": host.invalid is not None, "saturated": maps["flags"][0]}
        job.flags = tuple(name for name, is_so in flags.items() if is_so)
        return None if grid is None else defocus_map(grid, maps)

    def wait_restored(self, job: Job) -> NDArray[Any] | None:
        """Wait until all of a frame is on the host; None: it is not restored."""
        slot, host = self.device_slots[job.seat], self._host[job.slot.index]
        if job.skipped is not None:
            slot.estimated.synchronize()
            return None
        slot.ended["copy out"].synchronize()
        job.strange = bool(self.layout.host_arrays(host.packed_maps)["flags"][1])
        return host.give()

    def spans(self, job: Job) -> dict[str, tuple[float, float]]:
        """Return when each stage of a frame that has arrived began and ended, in ms."""
        slot = self.device_slots[job.seat]
        stages = _STAGES if job.skipped is None else _STAGES[:2]
        return {
            stage: (
                float(slot.begun[stage].time_since(self.origin)),
                float(slot.ended[stage].time_since(self.origin)),
            )
            for stage in stages
        }

    def close(self) -> None:
        """Wait for the GPU and free everything; called twice does nothing."""
        self._finish()
        for slot in self.device_slots:
            slot.close()
        for channel in self.channels:
            channel.close()
        self._pinned.release()
        self._memory.free()
        self.device_slots, self.channels = [], []

    def _finish(self) -> None:
        """Wait until nothing runs, unless the GPU is lost."""
        try:
            with translated(self.device.gpu_index, "finishing"):
                for stream in self._streams:
                    stream.synchronise()
        except LostGpuError as error:
            logger.warning("%s", str(error))

    def _reserve(self, wanted: int) -> None:
        """Make the device slots, fewer than wanted where memory ends."""
        for number in range(wanted):
            try:
                slot = DeviceSlot(
                    self.device.gpu_index,
                    self.channels,
                    shape=tuple(self._series.shape),
                    dtype=carried_as(self._series.dtype),
                    restored_dtype=carried_as(self._restored_dtype),
                    layout=self.layout,
                    graphs=self._settings.cuda_graphs,
                )
            except EngineError as error:
                may = self._settings.on_lack_of_memory == "fewer_frames"
                if number == 0 or not may or isinstance(error, LostGpuError):
                    raise
                # The text alone: whoever keeps the log must not keep the error.
                reason = str(error)
                logger.warning(
                    "%d frames in flight instead of %d: %s", number, wanted, reason
                )
                return
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
                    channel.restore(self._restore, None)
            self._restore.synchronise()


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
        Told when every stage of a frame began and ended; None: nobody is.
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
        self._trace = trace
        self._gpu: Gpu = find_device(
            config.processing.gpu.index[0] if index is None else index
        )
        self._index = self._gpu.gpu_index
        self._session: Session | None = None
        self.name = f"GPU {self._index}"
        self.memory_bytes = 0
        """Device memory in use when the last series was ready, networks included."""

    def entered(self) -> AbstractContextManager[None]:
        """Make the GPU's context current in a thread."""
        return current_context(self._index)

    def prepare(
        self, plans: Sequence[ChannelPlan], series: SeriesStart, slots: int
    ) -> Prepared:
        """Open engines and reserve buffers for a series."""
        session = Session(self._config, plans, series, slots, self._gpu)
        self._session = session
        self.memory_bytes = session.used_bytes()
        return Prepared(
            grids={channel.plan.name: channel.grid for channel in session.channels},
            in_flight=len(session.device_slots),
            restoring=1,
            backends={
                name: f"{runtime} on {self.name} ({self._gpu.name})"
                for channel in session.channels
                for name, runtime in channel.backends.items()
            },
        )

    def enqueue(self, job: Job) -> None:
        """Enqueue a frame up to its maps; returns before any of it is done."""
        with translated(self._index, "enqueueing a frame"):
            self._open_session().enqueue(job)

    def estimate(self, job: Job) -> DefocusMap | None:
        """Wait for the maps of a frame."""
        with translated(self._index, "estimating"):
            return self._open_session().wait_maps(job)

    def begin_restoring(self, job: Job) -> None:
        """Enqueue the restoration of what is out of focus."""
        with translated(self._index, "enqueueing a restoration"):
            self._open_session().enqueue_restoration(job)

    def restore(self, job: Job) -> NDArray[Any] | None:
        """Wait for all of a frame."""
        session = self._open_session()
        with translated(self._index, "restoring"):
            restored = session.wait_restored(job)
            spans = session.spans(job)
        job.stage_ms = {stage: end - begin for stage, (begin, end) in spans.items()}
        if self._trace is not None:
            self._trace(job.slot.frame().sequence, spans)
        return restored

    def close(self) -> None:
        """Wait for the GPU and free everything; called twice does nothing."""
        if self._session is not None:
            self._session.close()
        self._session = None

    def _open_session(self) -> Session:
        assert self._session is not None
        return self._session
