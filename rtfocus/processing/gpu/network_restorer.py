"""Network restorer: all tiles of a frame, or the pass that found the defocus.

As `rtfocus.processing.cpu.network_restorer.TileNetworkRestorer`, but for every tile,
whatever its label: its batches are recorded once, for the whole frame, which is one
tile where the network allows it and the card's memory holds it.
"""

from collections.abc import Mapping
from math import ceil

import numpy as np

from rtfocus.engines.card import EngineCard, input_of, output_of
from rtfocus.engines.fitted import CELL_PX, OCTAVES, Evidence
from rtfocus.errors import EngineError
from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.processing.classify import invertible_normalisation
from rtfocus.processing.gpu.classifier import (
    BoundNetwork,
    ClassifierSlot,
    FrameClassifier,
    InFlight,
    Part,
)
from rtfocus.processing.gpu.depth_variant import Blending, FrameRestorer
from rtfocus.processing.gpu.preparation import Percentiles
from rtfocus.processing.gpu.tiles import TileConditions, Tiles
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, FrameShape, Work
from rtfocus.processing.windows import windows_of_size
from rtfocus.runtimes.gpu import GpuEngine, Shape

# As in kernels/evidence.cu.
_SUMS = 5
_WIDEST_LAYER = 64


class JointRestorer(FrameRestorer):
    """The restored frame of a joint engine, from whichever pass made it.

    Parameters
    ----------
    blending
        Montage weights of the tiles whose labels decide what is restored.
    own
        What `seen` needs for a pass of its own: it is not the classifier, or sees the
        colours of a frame one after the other. None: the pass that found the defocus
        has restored the frame too.
    labels
        Maps that an own pass fills where its labels are asked for; None: nobody does.
    weighing
        Weighs what the engine corrected; None: all of it is taken.
    """

    def __init__(
        self,
        seen: FrameClassifier,
        blending: Blending,
        *,
        own: ClassifierSlot | None = None,
        labels: dict[str, DeviceArray] | None = None,
        weighing: "Weighing | None" = None,
    ) -> None:
        self._seen = seen
        self._blending = blending
        restored = seen.card.restored
        self._output = "" if restored is None else restored.name
        self._own = own
        self._labels = labels
        self._weighing = weighing

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        own = self._own
        return None if own is None else own.network.why_not_capturable(work)

    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue the blending of what the network restored."""
        maps, out = frame.maps, frame.out
        if self._own is None:
            if self._seen.plan.looks_twice:
                frame.seen.network.enqueue(work)
            self._seen.join(work, frame.seen, self._output, out)
        else:
            if self._labels is not None:
                maps = self._labels
                self._seen.enqueue(work, self._own, frame.signal, maps)
            for colour in self._seen.colours:
                self._seen.look(work, self._own, frame.signal, colour)
                self._seen.join(work, self._own, self._output, out, colour)
        self._blending.defocused(work, frame)
        if self._weighing is not None:
            self._weighing.enqueue(work, frame.signal, maps, out)


class Weighing:
    """`rtfocus.engines.fitted.Evidence` on the device.

    Raises
    ------
    EngineError
        If a layer is wider than the kernel's.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        evidence: Evidence,
        *,
        frame: FrameShape,
        grid: TileGrid,
    ) -> None:
        card = evidence.card
        self._frame = frame
        self._grid = grid
        self._step_um = evidence.step_um
        self._sides = -(-frame.height // CELL_PX), -(-frame.width // CELL_PX)
        widths = [len(card.middle), *(len(layer.bias) for layer in card.layers)]
        if max(widths) > _WIDEST_LAYER:
            msg = (
                f"evidence with a layer of {max(widths)} does not run on a GPU, which "
                f"takes up to {_WIDEST_LAYER}; set processing.device: cpu"
            )
            raise EngineError(msg)
        numbers = [np.ravel(card.middle), np.ravel(card.spread)]
        for layer in card.layers:
            numbers += [np.ravel(layer.weights), np.ravel(layer.bias)]
        self._layers = len(card.layers)
        self._widths = memory.upload(np.array(widths, np.int32), "evidence")
        flat = np.concatenate(numbers).astype(np.float32)
        self._numbers = memory.upload(flat, "evidence")
        cells = self._sides[0] * self._sides[1]
        self._sums = memory.allocate((_SUMS * OCTAVES, cells), np.float32, "evidence")
        self._shares = memory.allocate((cells,), np.float32, "evidence")
        self._range = memory.allocate((1, 2), np.float32, "evidence")
        self._percentiles = Percentiles(memory, evidence.normalisation, frame, 1)

    def enqueue(
        self,
        work: Work,
        signal: DeviceArray,
        maps: dict[str, DeviceArray],
        out: DeviceArray,
    ) -> None:
        """Enqueue taking back of a restored frame what nothing speaks for."""
        cells = self._shares.count
        grid = self._grid
        self._percentiles.enqueue(work, signal, self._range)
        work.launch(
            "evidence_cells",
            cells,
            signal,
            out,
            *self._frame.sides,
            *self._sides,
            self._range,
            self._sums,
        )
        work.launch(
            "evidence_shares",
            cells,
            self._sums,
            *self._sides,
            maps["defocus_um"],
            maps["confidence"],
            maps["uncertainty_um"],
            maps["level"],
            BACKGROUND,
            grid.rows,
            grid.columns,
            grid.origin_px,
            grid.stride_px,
            self._step_um,
            self._widths,
            self._layers,
            self._numbers,
            self._shares,
        )
        work.launch(
            "evidence_apply",
            self._frame.height * self._frame.width,
            signal,
            *self._frame.sides,
            self._shares,
            *self._sides,
            out,
        )


class TileNetworkRestorer(FrameRestorer):
    """A restorer engine.

    Buffers and context are shared by all frames in flight: their restoration is on
    one stream.

    Parameters
    ----------
    shapes
        Of all that it is given at once.
    conditions
        What the engine is told; None: nothing.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        engine: GpuEngine,
        card: EngineCard,
        *,
        shapes: Mapping[str, Shape],
        frame: FrameShape,
        blending: Blending,
        conditions: TileConditions | None,
    ) -> None:
        self._card = card
        self._blending = blending
        self._conditions = conditions
        planes = input_of(card).channels
        self._colours = frame.images(planes)
        batch, _, *sides = shapes[input_of(card).name]
        down, across = (
            windows_of_size(length, side, input_of(card).halo_px)
            for length, side in zip(frame.sides, sides, strict=False)
        )
        self._tiles = Tiles(memory, frame, planes, (down, across))
        rule = invertible_normalisation(card)
        self._percentiles = Percentiles(memory, rule, frame, planes)
        self._ranges = memory.allocate((planes, 2), np.float32, "ranges")
        self.network = BoundNetwork(
            memory,
            engine,
            shapes,
            batches=ceil(self._tiles.count / batch),
        )

    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue the restoration of a frame, colours one after the other."""
        for colour in self._colours:
            self._restore(work, frame, colour)
        self._blending.defocused(work, frame)

    def _restore(self, work: Work, frame: InFlight, colour: int) -> None:
        """Enqueue signal -> restored frame, or one colour of it."""
        buffers, signal = self.network.buffers, frame.signal
        tiles = buffers[input_of(self._card).name]
        self._percentiles.enqueue(work, signal, self._ranges, colour)
        self._tiles.cut(work, signal, self._ranges, tiles, colour)
        if self._conditions is not None and self._card.condition is not None:
            condition = buffers[self._card.condition.name]
            self._conditions.enqueue(work, frame.maps, condition)
        self.network.enqueue(work)
        restored = buffers[output_of(self._card).name]
        self._tiles.join(work, restored, self._ranges, frame.out, colour)

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        return self.network.why_not_capturable(work)
