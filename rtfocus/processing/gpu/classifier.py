"""Classifier: the defocus of every tile of a frame, on the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.engines.card import input_of, output_of
from rtfocus.engines.registry import parts
from rtfocus.frame import BACKGROUND, DefocusMap, TileGrid
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.processing.channel_plan import ClassifierPlan
from rtfocus.processing.classify import (
    LabelDecoder,
    background_of,
    check_labels,
    normalisation_of,
    tile_grid,
)
from rtfocus.processing.gpu.preparation import (
    Background,
    Percentiles,
    Standardisation,
    Tiles,
    whole_frame_tile,
)
from rtfocus.processing.gpu.work import (
    BLOCK,
    CellStatistics,
    DeviceArray,
    DeviceMemory,
    FrameShape,
    Work,
)
from rtfocus.runtimes.gpu import GpuContext, GpuEngine, Shape

FLOAT_MAPS = ("defocus_um", "confidence", "uncertainty_um")


class MapLayout:
    """Where the maps of a frame lie within their memory: wide elements first."""

    def __init__(self, tiles: int) -> None:
        floats = [(name, "<f4", (tiles,)) for name in (*FLOAT_MAPS, "expected_error")]
        # Whether a pixel is saturated; whether a restored one is no number.
        whole = [*floats, ("flags", "<i4", (2,)), ("level", "<i2", (tiles,))]
        self._whole = np.dtype(whole)
        self.size_bytes = self._whole.itemsize
        """Bytes of all maps of a frame."""

    def device_arrays(self, memory: DeviceArray) -> dict[str, DeviceArray]:
        """Return the maps by name, ``flags`` and ``level`` included."""
        return {
            name: DeviceArray(memory.address + start, kind.shape, kind.base)
            for name, (kind, start, *_) in (self._whole.fields or {}).items()
        }

    def host_arrays(self, memory: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return views of a host copy by name."""
        (whole,) = memory.view(self._whole)
        return {name: whole[name] for name in self._whole.names or ()}


def defocus_map(grid: TileGrid, maps: dict[str, NDArray[Any]]) -> DefocusMap:
    """Make new arrays, axes (tile_y, tile_x), of a frame's maps on the host."""
    shaped = {
        name: maps[name].reshape(grid.rows, grid.columns).copy()
        for name in (*FLOAT_MAPS, "level")
    }
    return DefocusMap(grid=grid, **shaped)


class BoundNetwork:
    """An inference, or one batch after the other, and the buffers it alone has.

    Parameters
    ----------
    given
        Buffers the caller has already, by tensor.
    batches
        Inferences one after the other; their buffers lie behind each other.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        engine: GpuEngine,
        shapes: Mapping[str, Shape],
        given: Mapping[str, DeviceArray] | None = None,
        batches: int = 1,
    ) -> None:
        self._shapes = shapes
        every = {**shapes, **engine.output_shapes(shapes)}
        known = given or {}
        self.buffers: dict[str, DeviceArray] = {
            name: known.get(name)
            or memory.upload(
                # Zeros: the last batch may be longer than what it is given.
                np.zeros((batches * shape[0], *shape[1:]), engine.tensors[name].dtype),
                f"tensor '{name}' of {engine.name}",
            )
            for name, shape in every.items()
        }
        """By tensor, inputs and outputs."""
        self._addresses = [
            {
                name: buffer.from_element(number * buffer.count // batches).address
                for name, buffer in self.buffers.items()
            }
            for number in range(batches)
        ]
        self._context: GpuContext = engine.open_context()
        # What is made after this one may fail while it is open.
        memory.at_free(self._context.close)
        self._context.bind(self._addresses[0], shapes)

    def enqueue(self, work: Work) -> None:
        """Enqueue the inference of every batch."""
        for addresses in self._addresses:
            if len(self._addresses) > 1:
                self._context.bind(addresses, self._shapes)
            self._context.enqueue(work.handle)

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        return self._context.why_not_capturable(work.handle)

    def close(self) -> None:
        """Free the context."""
        self._context.close()


@dataclass(frozen=True, slots=True)
class ClassifierSlot:
    """What one frame in flight needs of a classifier for itself."""

    network: BoundNetwork
    ranges: DeviceArray
    """Offset and scale of every plane, axes (plane, 2)."""


class FrameClassifier:
    """A classifier or joint engine applied to whole frames of one size.

    Work space is shared by all frames in flight: their work is on one stream.

    Parameters
    ----------
    engine
        Opened for `FrameFit.padded`.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        engine: GpuEngine,
        shapes: Mapping[str, Shape],
        plan: ClassifierPlan,
        frame: FrameShape,
    ) -> None:
        card = plan.card
        levels, _ = parts(card)
        self.engine = engine
        self.card = card
        self.plan = plan
        self._frame = frame
        self._shapes = shapes
        self._input = input_of(card)
        self._output = output_of(card)
        self.colours = frame.images(self._input.channels)
        self._turn = -1 if plan.mirrored else 1
        logits = engine.output_shapes(shapes)[self._output.name]
        check_labels(card, logits)
        self._network_tiles = (logits[2], logits[3])
        self.grid: TileGrid = tile_grid(
            self._input, plan.fit, *self._network_tiles, signed=levels.signed
        )
        self._levels = memory.upload(LabelDecoder(self._output).levels, "labels")
        self._empty = memory.allocate(
            (self.grid.rows * self.grid.columns,), np.uint8, "the background rule"
        )
        self._told = "" if card.condition is None else card.condition.name
        conditions = plan.conditions
        condition = None if conditions is None else conditions.unknown(1)
        self._condition = (
            None if condition is None else memory.upload(condition, "the condition")
        )
        self._prepare(memory)

    def _prepare(self, memory: DeviceMemory) -> None:
        """Set up normalisation and background rule."""
        rule, background = normalisation_of(self.card), background_of(self.card)
        plan, frame, planes = self.plan, self._frame, self._input.channels
        self._cells: CellStatistics | None = None
        self._background: Background | None = None
        self._standardisation: Standardisation | None = None
        self._percentiles: Percentiles | None = None
        if isinstance(rule, PercentileRange):
            self._percentiles = Percentiles(memory, rule, frame, planes)
        else:
            self._cells = CellStatistics(memory, frame, plan.fit.padded)
            self._standardisation = Standardisation(memory, rule, self._cells)
        if background is not None:
            self._cells = self._cells or CellStatistics(memory, frame, plan.fit.padded)
            self._background = Background(
                memory, background, self._cells, self.grid, plan.quantum
            )
        # The frame as the network's input, and back.
        self._tile = Tiles(memory, frame, planes, whole_frame_tile(plan.fit.padded))

    def allocate_maps(self, memory: DeviceMemory) -> dict[str, DeviceArray]:
        """Reserve the maps of one frame, as `enqueue` fills them."""
        layout = MapLayout(self._empty.count)
        packed = memory.allocate((layout.size_bytes,), np.uint8, "maps")
        return layout.device_arrays(packed)

    def open_slot(self, memory: DeviceMemory) -> ClassifierSlot:
        """Reserve what one more frame in flight needs."""
        given = {}
        # Every frame has a condition of its own in a second pass.
        if self._condition is not None and not self.plan.looks_twice:
            given = {self._told: self._condition}
        network = BoundNetwork(memory, self.engine, self._shapes, given)
        ranges = memory.allocate((self._input.channels, 2), np.float32, "ranges")
        return ClassifierSlot(network, ranges)

    def enqueue(
        self,
        work: Work,
        slot: ClassifierSlot,
        signal: DeviceArray,
        maps: dict[str, DeviceArray],
    ) -> None:
        """Enqueue signal -> maps of `MapLayout`, and the condition of a second pass."""
        if self.plan.looks_twice and self._condition is not None:
            work.copy(slot.network.buffers[self._told], self._condition)
        if self._cells is not None:
            self._cells.enqueue(work, signal)
        if self._background is None:
            work.zero(self._empty)
        else:
            self._background.enqueue(work, self._empty)
        if self._standardisation is not None:
            tiles = slot.network.buffers[self._input.name]
            self._standardisation.enqueue(work, signal, tiles)
            slot.network.enqueue(work)
        else:
            self.look(work, slot, signal)
        self._decode(work, slot, maps)
        if self.plan.looks_twice:
            self._tell(work, slot)

    def look(
        self, work: Work, slot: ClassifierSlot, signal: DeviceArray, colour: int = -1
    ) -> None:
        """Enqueue the network on a frame, or on one of its colours, by percentiles."""
        assert self._percentiles is not None
        tiles = slot.network.buffers[self._input.name]
        self._percentiles.enqueue(work, signal, slot.ranges, colour)
        self._tile.cut(work, signal, slot.ranges, tiles, colour)
        slot.network.enqueue(work)

    def _tell(self, work: Work, slot: ClassifierSlot) -> None:
        """Enqueue the level that the network found -> its condition."""
        assert self.card.condition is not None
        work.launch(
            "tell_level",
            BLOCK,
            slot.network.buffers[self._output.name],
            self._levels.count,
            prod(self._network_tiles),
            self._levels,
            BACKGROUND,
            self.card.condition.entries.index("defocus_levels"),
            self.card.condition.entries.index("defocus_known"),
            slot.network.buffers[self._told],
        )

    def join(
        self,
        work: Work,
        slot: ClassifierSlot,
        out: DeviceArray,
        colour: int = -1,
    ) -> None:
        """Enqueue what a joint engine restored -> frame, or one of its colours."""
        assert self.card.restored is not None
        restored = slot.network.buffers[self.card.restored.name]
        self._tile.join(work, restored, slot.ranges, out, colour)

    def _decode(
        self, work: Work, slot: ClassifierSlot, maps: dict[str, DeviceArray]
    ) -> None:
        work.launch(
            "decode_labels",
            self._empty.count,
            slot.network.buffers[self._output.name],
            self._levels.count,
            *self._network_tiles,
            self.grid.rows,
            self.grid.columns,
            self._levels,
            BACKGROUND,
            self._turn,
            self.plan.step_um,
            self._empty,
            maps["defocus_um"],
            maps["confidence"],
            maps["uncertainty_um"],
            maps["level"],
        )
