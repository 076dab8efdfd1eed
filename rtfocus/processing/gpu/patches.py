"""Patches: pieces of a frame that are restored one by one, in batches.

Richardson-Lucy patch by patch as published (He 2020), and the learned Wiener filter, as
`rtfocus.processing.cpu.patches`. Which pieces there are depends on a frame's labels, so
that nothing of it is recorded.
"""

from collections.abc import Mapping
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rtfocus.engines.card import EngineCard, input_of, output_of
from rtfocus.optics.formation import band_weights, edge_taper
from rtfocus.processing.classify import invertible_normalisation
from rtfocus.processing.gpu.classifier import (
    BoundNetwork,
    InFlight,
    Part,
)
from rtfocus.processing.gpu.deconvolution import LevelTransfers
from rtfocus.processing.gpu.depth_variant import Blending, FrameRestorer
from rtfocus.processing.gpu.preparation import Percentiles
from rtfocus.processing.gpu.tiles import Light
from rtfocus.processing.gpu.work import BLOCK, SPAN, DeviceArray, FrameShape, Work
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import TAPER_PX
from rtfocus.runtimes.gpu import GpuEngine, Shape

Image = NDArray[np.float32]


class PatchRestorer(FrameRestorer):
    """Richardson-Lucy on each tile by itself.

    Parameters
    ----------
    transfers
        Of transforms that hold the largest patch and PSF.
    montage
        Blending weights of the tiles; a tile is what its weight covers.
    halo_px
        Context per side: neighbouring pixels, 0 beyond the frame.
    """

    recorded, adds = False, True

    def __init__(
        self,
        transfers: LevelTransfers,
        montage: Montage,
        *,
        frame: FrameShape,
        halo_px: int,
        iterations: int,
    ) -> None:
        memory, shape = transfers.memory, transfers.largest
        self._transfers = transfers
        self._montage = montage
        self._frame = frame
        self._shape = shape
        self._halo_px = halo_px
        self._iterations = iterations
        self._blending = Blending(memory, montage, frame)
        tiles = montage.grid.rows * montage.grid.columns
        # As many as a frame has pixels, so that memory stays that of a frame.
        pixels = shape[0] * shape[1]
        self._batch = max(1, min(tiles, frame.height * frame.width // pixels))
        self._spans = [
            memory.upload(_on_grid(axis, montage.step), "patches")
            for axis in montage.spans
        ]
        self._found = memory.allocate((1 + tiles,), np.int32, "patches")
        self._rank = memory.allocate((tiles,), np.int32, "patches")
        images = self._batch, *shape
        self._patches = memory.allocate(images, np.float32, "patches")
        self._estimate = memory.allocate(images, np.float32, "patches")
        self._blurred = memory.allocate(images, np.float32, "patches")
        self._spectrum = transfers.spectrum(images)
        self._light = Light(memory)

    def parts(self, labels: NDArray[np.int16] | None) -> list[Part]:
        """Return (plane, level, number of its tiles)."""
        if labels is None:
            found = [(level, 1) for level in list(self._transfers.psfs)[:1]]
        else:
            own = self._montage.tiles(labels)
            present = self._montage.present(labels)
            found = [(level, int((own == level).sum())) for level in present]
        planes = range(self._frame.channels)
        return [(plane, *part) for part in found for plane in planes]

    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue a part of the restoration of a frame."""
        plane, level, count = part
        grid = self._montage.grid
        work.launch(
            "tiles_of_level",
            grid.rows * grid.columns,
            frame.maps["level"],
            grid.rows,
            grid.columns,
            self._montage.step,
            level,
            self._found,
            self._rank,
        )
        for first in range(0, count, self._batch):
            self._restore(work, frame, plane, level, first)

    def _restore(
        self, work: Work, frame: InFlight, plane: int, level: int, first: int
    ) -> None:
        """Enqueue a batch of tiles of one level."""
        pixels = self._shape[0] * self._shape[1]
        columns = self._montage.grid.columns
        one = DeviceArray(self._blurred.address, self._shape, self._blurred.dtype)
        transfer = self._transfers.enqueue(work, level, one)
        work.launch(
            "cut_patches",
            pixels,
            frame.signal,
            *self._frame.sides,
            plane,
            self._found,
            first,
            columns,
            *self._spans,
            self._halo_px,
            *self._shape,
            self._patches,
            rows=self._batch,
        )
        self._light.enqueue(work, self._patches)
        self._transfers.iterate(
            work,
            transfer,
            [1.0] * self._iterations,
            seen=self._patches,
            estimate=self._estimate,
            blurred=self._blurred,
            spectrum=self._spectrum,
            highest=self._light.highest,
        )
        work.launch(
            "join_patches",
            self._frame.height * self._frame.width,
            frame.signal,
            *self._frame.sides,
            plane,
            self._estimate,
            self._rank,
            first,
            self._batch,
            *self._spans,
            self._halo_px,
            *self._shape,
            columns,
            *self._blending.tables,
            frame.out,
        )


def _on_grid(axis: list[slice], step: int) -> NDArray[np.void]:
    """Return the pixels of every row or column of tiles, of which some are left out."""
    found = np.zeros(step * len(axis), SPAN)
    found["first"][::step] = [span.start for span in axis]
    found["last"][::step] = [span.stop - 1 for span in axis]
    return found


class LearnedWienerRestorer(FrameRestorer):
    """The learned Wiener filter.

    Parameters
    ----------
    transfers
        Of transforms that hold a tile.
    told
        What the network is told of tiles of each level, axes (level, entry); None:
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
        told: Image | None,
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
        self._told: dict[int, DeviceArray] = {}
        if told is not None and card.condition is not None:
            for level, row in zip(transfers.psfs, told, strict=True):
                rows = np.repeat(row[None].astype(np.float32), batch, axis=0)
                self._told[level] = memory.upload(rows, "conditions")
        self.network = BoundNetwork(memory, engine, shapes)
        buffers = self.network.buffers
        self._seen, self._log_snr = buffers[tiles.name], buffers[output_of(card).name]
        self._condition = None
        if self._told and card.condition is not None:
            self._condition = buffers[card.condition.name]
        bands = self._log_snr.shape[1]
        self._bands = memory.upload(band_weights(shape, bands), "bands")
        self._taper = memory.upload(edge_taper(shape, TAPER_PX), "tiles")
        self._tapered = memory.allocate((batch, *shape), np.float32, "tiles")
        self._spectrum = transfers.spectrum(self._tapered.shape)
        self._means = memory.allocate((batch,), np.float32, "tiles")
        self._joined = memory.allocate(
            (frame.height, frame.width), np.float32, "a rectangle"
        )

    def parts(self, labels: NDArray[np.int16] | None) -> list[Part]:
        """Return (plane, level, *rectangle)."""
        if labels is None:
            whole = 0, 0, self._frame.height, self._frame.width
            levels = list(self._transfers.psfs)[:1]
            found: list[Part] = [(level, *whole) for level in levels]
        else:
            found = [
                (level, region.rows.start, region.columns.start, *region.shape)
                for level, region in self._montage.regions(labels).items()
            ]
        planes = range(self._frame.channels)
        return [(plane, *part) for part in found for plane in planes]

    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue a part of the restoration of a frame."""
        plane, level, top, left, height, width = part
        colour = self._frame.images(1)[plane]
        self._percentiles.enqueue(work, frame.signal, self._range, colour)
        # A tile every half of what it keeps.
        rows, columns = (
            max(1, ceil(side / self._stride) - 1) for side in (height, width)
        )
        joined = self._joined.shaped((height, width))
        work.zero(joined)
        for first in range(0, rows * columns, self._batch):
            self._restore(work, frame, part, (rows, columns), first)
        rectangle = top, left, height, width
        self._blending.level(
            work, frame, level, plane=plane, rectangle=rectangle, restored=joined
        )

    def _restore(
        self,
        work: Work,
        frame: InFlight,
        part: Part,
        lattice: tuple[int, int],
        first: int,
    ) -> None:
        """Enqueue a batch of the rows and columns of tiles -> what they join to."""
        plane, level, top, left, *shape = part
        side, batch, stride = self._side, self._batch, self._stride
        pixels, tapered, spectrum = side**2, self._tapered, self._spectrum
        one = DeviceArray(tapered.address, (side, side), tapered.dtype)
        transfer = self._transfers.enqueue(work, level, one)
        work.launch(
            "cut_lattice",
            pixels,
            frame.signal,
            *self._frame.sides,
            plane,
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
        work.launch(
            "join_lattice",
            shape[0] * shape[1],
            tapered,
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
