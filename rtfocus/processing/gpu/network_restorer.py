"""Network restorer: all tiles of a frame, or the pass that found the defocus.

As `rtfocus.processing.cpu.network_restorer.TileNetworkRestorer`, but for every tile,
whatever its label: its batches are recorded once, for the whole frame, which is one
tile where the network allows it and the card's memory holds it. The learned Wiener
filter, as on a CPU, is not: its tiles depend on the labels.
"""

from collections.abc import Mapping
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rtfocus.engines.card import EngineCard, input_of, output_of
from rtfocus.engines.fitted import BLOCK_PX, CELL_PX, OCTAVES, Evidence, EvidenceCard
from rtfocus.errors import EngineError
from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.optics.formation import TAPER_PX, band_weights, edge_taper
from rtfocus.processing.classify import invertible_normalisation
from rtfocus.processing.gpu.classifier import (
    FLOAT_MAPS,
    BoundNetwork,
    ClassifierSlot,
    FrameClassifier,
)
from rtfocus.processing.gpu.deconvolution import LevelTransfers
from rtfocus.processing.gpu.depth_variant import (
    Blending,
    FrameRestorer,
    InFlight,
    Piece,
)
from rtfocus.processing.gpu.preparation import Percentiles, TileConditions, Tiles
from rtfocus.processing.gpu.work import (
    BLOCK,
    DeviceArray,
    DeviceMemory,
    FrameShape,
    Work,
)
from rtfocus.processing.montage import Montage, windows_of_size
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
        Maps that an own pass fills where its labels are asked for; None: they are not.
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
        self._own = own
        self._labels = labels
        self._weighing = weighing

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        own = self._own
        return None if own is None else own.network.why_not_capturable(work)

    def enqueue(self, work: Work, frame: InFlight, piece: Piece) -> None:
        """Enqueue the blending of what the network restored."""
        maps, out = frame.maps, frame.out
        if self._own is None:
            if self._seen.plan.looks_twice:
                frame.seen.network.enqueue(work)
            self._seen.join(work, frame.seen, out)
        else:
            if self._labels is not None:
                maps = self._labels
                self._seen.enqueue(work, self._own, frame.signal, maps)
            for colour in self._seen.colours:
                self._seen.look(work, self._own, frame.signal, colour)
                self._seen.join(work, self._own, out, colour)
        self._blending.defocused(work, frame)
        if self._weighing is not None:
            error = frame.maps["expected_error"]
            self._weighing.enqueue(work, frame.signal, maps, out, error)

    def in_focus(self, work: Work, frame: InFlight) -> None:
        """Enqueue the error that is expected in a frame that stays as it is."""
        if self._weighing is not None and self._weighing.states_error:
            maps, error = frame.maps, frame.maps["expected_error"]
            self._weighing.enqueue(work, frame.signal, maps, frame.out, error)


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
        self._frame = frame
        self._grid = grid
        self._step_um = evidence.step_um
        self._sides = -(-frame.height // CELL_PX), -(-frame.width // CELL_PX)
        self._blocks = -(-frame.height // BLOCK_PX), -(-frame.width // BLOCK_PX)

        def reserve(*shape: int) -> DeviceArray:
            return memory.allocate(shape, np.float32, "evidence")

        cells = self._sides[0] * self._sides[1]
        self._sums, self._powers = reserve(_SUMS * OCTAVES, cells), reserve(cells)
        self._shares, self._errors = reserve(cells), reserve(*self._blocks)
        self._range = reserve(1, 2)
        self.states_error = evidence.error_card is not None
        """Whether it tells the error that is left, too."""
        self._functions = (
            *_uploaded(memory, evidence.card),
            self._shares,
            self._powers,
            *_uploaded(memory, evidence.error_card or evidence.card),
            int(self.states_error),
            self._errors,
        )
        self._percentiles = Percentiles(memory, evidence.normalisation, frame, 1)

    def enqueue(
        self,
        work: Work,
        signal: DeviceArray,
        maps: dict[str, DeviceArray],
        out: DeviceArray,
        error: DeviceArray,
    ) -> None:
        """Enqueue taking back of a restored frame what nothing speaks for.

        `error` is filled with what is expected to be left, where the card knows it.
        """
        grid, cells, sides = self._grid, self._shares.count, self._frame.sides
        tiles = grid.rows, grid.columns, grid.origin_px, grid.stride_px
        given = signal, out, *sides, *self._sides, self._range
        defocus = [maps[name] for name in (*FLOAT_MAPS, "level")]
        self._percentiles.enqueue(work, signal, self._range)
        work.launch("evidence_cells", cells, *given, self._sums, self._powers)
        work.launch(
            "evidence_shares",
            cells,
            self._sums,
            *self._sides,
            *defocus,
            BACKGROUND,
            *tiles,
            self._step_um,
            *self._functions,
        )
        if self.states_error:
            blocks = self._errors, *sides[:2], *self._blocks, self._range
            count, tile_px = grid.rows * grid.columns, grid.tile_px
            work.launch("expected_errors", count, *blocks, *tiles, tile_px, error)
        pixels = self._frame.height * self._frame.width
        weights = self._shares, *self._sides
        work.launch("evidence_apply", pixels, signal, *sides, *weights, out)


def _uploaded(
    memory: DeviceMemory, card: EvidenceCard
) -> tuple[DeviceArray, int, DeviceArray]:
    """Return widths, number of layers and all numbers of a small function."""
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
    flat = memory.upload(np.concatenate(numbers).astype(np.float32), "evidence")
    sizes = memory.upload(np.array(widths, np.int32), "evidence")
    return sizes, len(card.layers), flat


class TileNetworkRestorer(FrameRestorer):
    """A restorer engine.

    Buffers and context are shared by all frames in flight: their restoration is on
    one stream.

    Parameters
    ----------
    shapes
        Of all that it is given at once.
    conditions
        What the engine gets beside the pixels; None: nothing.
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

    def enqueue(self, work: Work, frame: InFlight, piece: Piece) -> None:
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


class LearnedWienerRestorer(FrameRestorer):
    """The learned Wiener filter.

    Parameters
    ----------
    transfers
        Of transforms that hold a tile.
    conditions
        What the network gets beside tiles of each level, axes (level, entry); None:
        nothing.
    shapes
        Of all that the engine is given at once.
    """

    recorded, adds = False, True

    def __init__(
        self,
        transfers: LevelTransfers,
        engine: GpuEngine,
        card: EngineCard,
        *,
        conditions: NDArray[np.float32] | None,
        montage: Montage,
        frame: FrameShape,
        shapes: Mapping[str, Shape],
    ) -> None:
        tiles, memory = input_of(card), transfers.memory
        self._transfers = transfers
        self._montage = montage
        self._frame = frame
        self._batch = batch = shapes[tiles.name][0]
        self._side, self._halo_px = tiles.tile_px, tiles.halo_px
        self._stride = (tiles.tile_px - 2 * tiles.halo_px) // 2
        shape = tiles.tile_px, tiles.tile_px
        self._blending = Blending(memory, montage, frame)
        self._percentiles = Percentiles(
            memory, invertible_normalisation(card), frame, 1
        )
        self._range = memory.allocate((1, 2), np.float32, "ranges")
        self.network = BoundNetwork(memory, engine, shapes)
        buffers = self.network.buffers
        self._seen, self._log_snr = buffers[tiles.name], buffers[output_of(card).name]
        self._told: dict[int, DeviceArray] = {}
        self._condition: DeviceArray | None = None
        if conditions is not None and card.condition is not None:
            self._condition = buffers[card.condition.name]
            for level, row in zip(transfers.psfs, conditions, strict=True):
                rows = np.repeat(row[None].astype(np.float32), batch, axis=0)
                self._told[level] = memory.upload(rows, "conditions")
        bands = self._log_snr.shape[1]
        self._bands = memory.upload(band_weights(shape, bands), "bands")
        self._taper = memory.upload(edge_taper(shape, TAPER_PX), "tiles")
        self._tapered = memory.allocate((batch, *shape), np.float32, "tiles")
        self._spectrum = transfers.spectrum(self._tapered.shape)
        self._means = memory.allocate((batch,), np.float32, "tiles")
        self._joined = memory.allocate(
            (frame.height, frame.width), np.float32, "a rectangle"
        )

    def pieces(self, labels: NDArray[np.int16] | None) -> list[Piece]:
        """Return every level with its rectangle, plane by plane."""
        if labels is None:
            regions = {next(iter(self._transfers.psfs)): self._montage.whole}
        else:
            regions = self._montage.regions(labels)
        return [
            Piece(plane, level, region.rectangle)
            for level, region in regions.items()
            for plane in range(self._frame.channels)
        ]

    def enqueue(self, work: Work, frame: InFlight, piece: Piece) -> None:
        """Enqueue a piece of the restoration of a frame."""
        *_, height, width = piece.rectangle
        colour = self._frame.images(1)[piece.plane]
        self._percentiles.enqueue(work, frame.signal, self._range, colour)
        # A tile every half of what it keeps.
        rows, columns = (
            max(1, ceil(side / self._stride) - 1) for side in (height, width)
        )
        joined = self._joined.shaped((height, width))
        work.zero(joined)
        for first in range(0, rows * columns, self._batch):
            self._restore(work, frame, piece, (rows, columns), first)
        self._blending.level(work, frame, piece, joined)

    def _restore(
        self,
        work: Work,
        frame: InFlight,
        piece: Piece,
        lattice: tuple[int, int],
        first: int,
    ) -> None:
        """Enqueue a batch of the rows and columns of tiles -> what they join to."""
        top, left, *shape = piece.rectangle
        side, batch, stride = self._side, self._batch, self._stride
        work.launch(
            "cut_lattice",
            side**2,
            frame.signal,
            *self._frame.sides,
            piece.plane,
            top,
            left,
            stride,
            self._halo_px,
            first,
            lattice[0] * lattice[1],
            lattice[1],
            side,
            self._range,
            self._seen,
            rows=batch,
        )
        self._filter(work, piece.level)
        work.launch(
            "join_lattice",
            shape[0] * shape[1],
            self._tapered,
            self._means,
            self._range,
            *shape,
            stride,
            self._halo_px,
            first,
            batch,
            *lattice,
            side,
            self._joined,
        )

    def _filter(self, work: Work, level: int) -> None:
        """Enqueue a batch of tiles -> what is left of them without their means."""
        tapered, spectrum, batch = self._tapered, self._spectrum, self._batch
        pixels, tile = self._side**2, tapered.shaped((self._side, self._side))
        transfer = self._transfers.enqueue(work, level, tile)
        if self._condition is not None:
            work.copy(self._condition, self._told[level])
        self.network.enqueue(work)
        work.launch("tile_means", batch * BLOCK, self._seen, pixels, self._means)
        work.launch(
            "taper_tiles",
            pixels,
            self._seen,
            pixels,
            self._means,
            self._taper,
            tapered,
            rows=batch,
        )
        self._transfers.transforms.forward(work, tapered, spectrum)
        work.launch(
            "wiener_bands",
            transfer.count,
            spectrum,
            transfer,
            transfer.count,
            self._log_snr,
            self._bands,
            self._bands.shape[0],
            1 / pixels,
            rows=batch,
        )
        self._transfers.transforms.inverse(work, spectrum, tapered)
