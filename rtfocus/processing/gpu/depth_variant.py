"""Depth variant: a whole frame, each pixel by the PSFs of the tiles around it.

As `rtfocus.processing.cpu.depth_variant`. Along an axis a pixel lies between two tiles,
so three numbers tell its weights. And Richardson-Lucy patch by patch as published (He
2020): which patches there are depends on a frame's labels, so that none is recorded.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND
from rtfocus.processing.gpu.classifier import ClassifierSlot
from rtfocus.processing.gpu.deconvolution import Deconvolution, LevelTransfers
from rtfocus.processing.gpu.work import (
    SPAN,
    DeviceArray,
    DeviceMemory,
    FrameShape,
    Light,
    Work,
    neighbours,
)
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import padded_shape, together


@dataclass(frozen=True, slots=True)
class InFlight:
    """What the restoration of one frame reads and writes on the device."""

    signal: DeviceArray
    maps: dict[str, DeviceArray]
    """Of `MapLayout`."""
    seen: ClassifierSlot
    """Buffers of the network that saw the frame."""
    out: DeviceArray
    """Result, float32, shape of the signal."""


class Piece(NamedTuple):
    """A piece of a restoration that is enqueued, or left out, as a whole.

    Of restorers that take a frame in one piece nothing is said.
    """

    plane: int = 0
    """Colour."""
    level: int = 0
    """Whose tiles are restored; 0, which is in focus: the plane is looked at."""
    rectangle: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, left, height and width of what is restored, in pixels."""
    padded: tuple[int, int] = (0, 0)
    """Height and width of its transform."""
    tiles: int = 0
    """Number of the level's tiles."""


class FrameRestorer(ABC):
    """Restores the frames of one channel, one after the other on one stream.

    Unless it says otherwise: all of a frame in one piece, which is recorded. Networks
    and transforms that it uses are closed by who opened them.
    """

    recorded = True
    adds = False
    """Whether it adds to a copy of the signal; else it writes all of the frame."""

    def pieces(self, labels: NDArray[np.int16] | None) -> list[Piece]:
        """Return what is enqueued for a frame, in order.

        Parameters
        ----------
        labels
            Level per tile, axes (tile_y, tile_x), at least one out of focus; None:
            everything that can be recorded.
        """
        return [Piece()]

    def recurs(self, piece: Piece) -> bool:
        """Return whether other frames will ask for it: only then it is recorded."""
        return self.recorded

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        return None

    @abstractmethod
    def enqueue(self, work: Work, frame: InFlight, piece: Piece) -> None:
        """Enqueue a piece of the restoration of a frame."""

    def in_focus(self, work: Work, frame: InFlight) -> None:  # noqa: B027
        """Enqueue what is said of a frame that stays as it is; nothing."""


class Blending:
    """Lays what was restored over a frame, where its tiles are to be."""

    def __init__(
        self, memory: DeviceMemory, montage: Montage, shape: FrameShape
    ) -> None:
        self._shape = shape
        self._tile_columns = montage.grid.columns
        self.tables = [
            memory.upload(neighbours(weights, montage.step), "blending weights")
            for weights in montage.axes
        ]
        """`neighbours` of every row and of every column of pixels."""

    def defocused(self, work: Work, frame: InFlight) -> None:
        """Enqueue ``out = signal + share * (out - signal)``, of tiles out of focus."""
        work.launch(
            "blend_share",
            self._shape.height * self._shape.width,
            frame.signal,
            *self._shape.sides,
            frame.maps["level"],
            self._tile_columns,
            BACKGROUND,
            *self.tables,
            frame.out,
        )

    def level(
        self, work: Work, frame: InFlight, piece: Piece, restored: DeviceArray
    ) -> None:
        """Enqueue ``out += weight * (restored - signal)``, negative values as 0.

        `restored` is the rectangle of a piece, with any margin behind it.
        """
        *_, height, width = piece.rectangle
        work.launch(
            "blend_level",
            height * width,
            frame.signal,
            self._shape.width,
            self._shape.channels,
            piece.plane,
            *piece.rectangle,
            restored,
            restored.shape[1],
            frame.maps["level"],
            self._tile_columns,
            piece.level,
            *self.tables,
            frame.out,
        )


class DepthVariantRestorer(FrameRestorer):
    """Restores frames by the PSF of each level, in so much context on every side."""

    adds = True

    def __init__(
        self,
        memory: DeviceMemory,
        deconvolution: Deconvolution,
        montage: Montage,
        *,
        frame: FrameShape,
        margins_px: Mapping[int, int],
    ) -> None:
        self._deconvolution = deconvolution
        self._montage = montage
        self._frame = frame
        self._margins = dict(margins_px)
        self._blending = Blending(memory, montage, frame)
        shape = padded_shape((frame.height, frame.width), max(self._margins.values()))
        self._padded = memory.allocate(shape, np.float32, "the padded frame")
        self._restored = memory.allocate(shape, np.float32, "the padded frame")

    def pieces(self, labels: NDArray[np.int16] | None) -> list[Piece]:
        """Return each rectangle that is looked at, then restored by its levels.

        As on the CPU a level is restored over the smallest rectangle that holds its
        tiles. None: every level over whole frames.
        """
        if labels is None:
            regions = dict.fromkeys(self._margins, self._montage.whole)
        else:
            regions = self._montage.regions(labels)
        shapes = {
            level: padded_shape(region.shape, self._margins[level])
            for level, region in regions.items()
        }
        return [
            Piece(plane, level, region.rectangle, shape)
            for plane in range(self._frame.channels)
            for region, shape, levels in together(regions, shapes)
            for level in (0, *levels)
        ]

    def recurs(self, piece: Piece) -> bool:
        """Return whether it is of a whole frame; other rectangles hardly come back."""
        return piece.rectangle == self._montage.whole.rectangle

    def enqueue(self, work: Work, frame: InFlight, piece: Piece) -> None:
        """Enqueue a piece of the restoration of a frame."""
        padded = self._padded.shaped(piece.padded)
        if piece.level:
            restored = self._restored.shaped(piece.padded)
            self._deconvolution.restore(work, piece.level, padded, restored)
            self._blending.level(work, frame, piece, restored)
            return
        work.launch(
            "surround",
            padded.count,
            frame.signal,
            *self._frame.sides,
            piece.plane,
            *piece.rectangle,
            *piece.padded,
            int(self._deconvolution.positive),
            padded,
        )
        self._deconvolution.look(work, padded)


class PatchRestorer(FrameRestorer):
    """Richardson-Lucy on each tile alone.

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

    def pieces(self, labels: NDArray[np.int16] | None) -> list[Piece]:
        """Return every level with the number of its tiles, plane by plane."""
        if labels is None:
            counts = {next(iter(self._transfers.psfs)): 1}
        else:
            own = self._montage.tiles(labels)
            present = self._montage.present(labels)
            counts = {level: int((own == level).sum()) for level in present}
        return [
            Piece(plane, level, tiles=count)
            for level, count in counts.items()
            for plane in range(self._frame.channels)
        ]

    def enqueue(self, work: Work, frame: InFlight, piece: Piece) -> None:
        """Enqueue a piece of the restoration of a frame."""
        grid = self._montage.grid
        work.launch(
            "tiles_of_level",
            grid.rows * grid.columns,
            frame.maps["level"],
            grid.rows,
            grid.columns,
            self._montage.step,
            piece.level,
            self._found,
            self._rank,
        )
        for first in range(0, piece.tiles, self._batch):
            self._restore(work, frame, piece, first)

    def _restore(self, work: Work, frame: InFlight, piece: Piece, first: int) -> None:
        """Enqueue a batch of tiles of one level."""
        pixels = self._shape[0] * self._shape[1]
        columns = self._montage.grid.columns
        one = self._blurred.shaped(self._shape)
        transfer = self._transfers.enqueue(work, piece.level, one)
        work.launch(
            "cut_patches",
            pixels,
            frame.signal,
            *self._frame.sides,
            piece.plane,
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
            piece.plane,
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
    grid = np.zeros(step * len(axis), SPAN)
    grid["first"][::step] = [span.start for span in axis]
    grid["last"][::step] = [span.stop - 1 for span in axis]
    return grid
