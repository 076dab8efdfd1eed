"""Device slot: the device buffers, events and recordings of one frame in flight."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.frame import DefocusMap, TileGrid
from rtfocus.processing.gpu.channel import OpenChannel
from rtfocus.processing.gpu.classifier import (
    FLOAT_MAPS,
    ClassifierSlot,
    InFlight,
    MapLayout,
    Part,
)
from rtfocus.processing.gpu.cuda.stream import Replayed, new_event
from rtfocus.processing.gpu.depth_variant import FrameRestorer
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work


def defocus_map(grid: TileGrid, found: dict[str, NDArray[Any]]) -> DefocusMap:
    """Make new arrays, axes (tile_y, tile_x), of a frame's maps on the host."""
    shaped = {
        name: found[name].reshape(grid.rows, grid.columns).copy()
        for name in (*FLOAT_MAPS, "level")
    }
    return DefocusMap(grid=grid, **shaped)


@dataclass(frozen=True, slots=True)
class SlotBuffers:
    """Device memory of one frame in flight."""

    frame: DeviceArray
    """Counts of the camera."""
    signal: DeviceArray
    restored: DeviceArray
    """Float32, unit of the signal."""
    counts: DeviceArray
    """Restored, on the camera's scale."""
    packed_maps: DeviceArray
    maps: dict[str, DeviceArray]
    """Parts of `packed_maps`."""


class DeviceSlot:
    """One frame in flight; nothing of it is shared with another.

    Parameters
    ----------
    memory
        Where the buffers lie.
    channels
        Of the series; a slot serves every one of them.
    shape, dtype
        Of the frames.
    restored_dtype
        Of the restored frames.
    layout
        Of the maps.
    graphs
        Whether work is recorded.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        channels: Sequence[OpenChannel],
        *,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        restored_dtype: DTypeLike,
        layout: MapLayout,
        graphs: bool,
    ) -> None:
        packed = memory.allocate((layout.size_bytes,), np.uint8, "maps")
        self.buffers = SlotBuffers(
            frame=memory.allocate(shape, dtype, "a frame"),
            signal=memory.allocate(shape, np.float32, "a corrected frame"),
            restored=memory.allocate(shape, np.float32, "a restored frame"),
            counts=memory.allocate(shape, restored_dtype, "a restored frame"),
            packed_maps=packed,
            maps=layout.device_arrays(packed),
        )
        # In the order in which they happen; each also tells the time.
        self.begun: Any = new_event()
        self.copied_in: Any = new_event()
        self.classify_begun: Any = new_event()
        self.classified: Any = new_event()
        self.estimated: Any = new_event()
        self.restore_begun: Any = new_event()
        self.restored: Any = new_event()
        self.copy_out_begun: Any = new_event()
        self.copied_out: Any = new_event()
        self.channels: list[ChannelSlot] = []
        try:
            for channel in channels:
                self.channels.append(
                    ChannelSlot(self.buffers, memory, channel, graphs=graphs)
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free contexts and recordings; nothing of it is in flight."""
        for channel in self.channels:
            channel.close()


class ChannelSlot:
    """The work on one frame of one channel, recorded where it can be.

    Parameters
    ----------
    buffers
        That it reads and writes.
    memory
        Where the networks' buffers lie.
    channel
        What is done.
    graphs
        Whether it is recorded.
    """

    def __init__(
        self,
        buffers: SlotBuffers,
        memory: DeviceMemory,
        channel: OpenChannel,
        *,
        graphs: bool,
    ) -> None:
        self.channel = channel
        self._buffers = buffers
        self._seen: ClassifierSlot | None = None
        if channel.classifier is not None:
            self._seen = channel.classifier.open_slot(memory)
        off = None if graphs else "processing.gpu.cuda_graphs is off"
        self.classify = Replayed(
            f"classification of channel '{channel.plan.name}'",
            self._classify,
            lambda work: off or self._why_not_classify(work),
        )
        self._off = off
        self._parts: dict[Part, Replayed] = {}

    def close(self) -> None:
        """Free contexts and recordings."""
        for replayed in (self.classify, *self._parts.values()):
            replayed.close()
        if self._seen is not None:
            self._seen.network.close()

    def _classify(self, work: Work) -> None:
        slot, channel = self._buffers, self.channel
        channel.correction.to_signal(
            work, slot.frame, slot.signal, slot.maps["saturated"]
        )
        if channel.classifier is not None and self._seen is not None:
            channel.classifier.enqueue(work, self._seen, slot.signal, slot.maps)

    def restore(self, work: Work, labels: NDArray[np.int16] | None) -> None:
        """Enqueue the restoration of the levels that tiles have; None: of all.

        Every part is recorded by itself, so that those a frame does not need are
        left out.
        """
        slot, channel = self._buffers, self.channel
        restorer, montage = channel.restorer, channel.montage
        if restorer is None or montage is None or self._seen is None:
            return
        if labels is not None and not montage.present(labels):
            work.copy(slot.restored, slot.signal)
        else:
            frame = InFlight(slot.signal, slot.maps, self._seen, slot.restored)
            for part in restorer.parts(labels):
                if restorer.recurs(part):
                    self._part(restorer, frame, part)(work)
                else:
                    restorer.enqueue(work, frame, part)
        channel.correction.to_counts(work, slot.restored, slot.counts)

    def _part(self, restorer: FrameRestorer, frame: InFlight, part: Part) -> Replayed:
        """Return a part of the restoration, recorded at its second run."""
        found = self._parts.get(part)
        if found is None:
            found = self._parts[part] = Replayed(
                f"restoration of channel '{self.channel.plan.name}' {part}",
                lambda work: restorer.enqueue(work, frame, part),
                lambda work: self._off or restorer.why_not_capturable(work),
            )
        return found

    def _why_not_classify(self, work: Work) -> str | None:
        return (
            None if self._seen is None else self._seen.network.why_not_capturable(work)
        )
