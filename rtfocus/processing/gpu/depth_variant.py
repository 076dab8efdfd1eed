"""Depth variant: a whole frame, each pixel by the PSFs of the tiles around it.

As `rtfocus.processing.cpu.depth_variant`. Along an axis a pixel lies between two tiles,
so three numbers tell its weights. And Richardson-Lucy patch by patch as published (He
2020): which patches there are depends on a frame's labels, so that none is recorded.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND
from rtfocus.processing.gpu.classifier import InFlight, Part
from rtfocus.processing.gpu.deconvolution import Deconvolution, LevelTransfers
from rtfocus.processing.gpu.tiles import Light
from rtfocus.processing.gpu.work import (
    SPAN,
    DeviceArray,
    DeviceMemory,
    FrameShape,
    Work,
    neighbours,
)
from rtfocus.processing.montage import Montage, Region
from rtfocus.processing.restore import padded_shape, together

_LOOK = len(("plane", "height", "width"))
_RECTANGLE = len(("top", "left", "rows", "columns"))


class FrameRestorer(ABC):
    """Restores the frames of one channel, one after the other on one stream.

    Unless it says otherwise: all of a frame in one part, which is recorded. Networks
    and transforms that it uses are closed by who opened them.
    """

    recorded = True
    adds = False
    """Whether it adds to a copy of the signal; else it writes all of the frame."""

    def parts(self, labels: NDArray[np.int16] | None) -> list[Part]:
        """Return what is enqueued for a frame, in order.

        Parameters
        ----------
        labels
            Level per tile, axes (tile_y, tile_x), at least one out of focus; None:
            everything that can be recorded.
        """
        return [()]

    def recurs(self, part: Part) -> bool:
        """Return whether other frames will ask for a part: only then it is recorded."""
        return self.recorded

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        return None

    @abstractmethod
    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue a part of the restoration of a frame."""


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
        self,
        work: Work,
        frame: InFlight,
        level: int,
        *,
        plane: int,
        rectangle: Sequence[int],
        restored: DeviceArray,
    ) -> None:
        """Enqueue ``out += weight * (restored - signal)``, negative values as 0.

        Parameters
        ----------
        level
            Whose tiles are meant.
        plane
            Colour that was restored.
        rectangle
            Top, left, height and width of what was restored.
        restored
            It, with any margin behind.
        """
        work.launch(
            "blend_level",
            rectangle[2] * rectangle[3],
            frame.signal,
            self._shape.width,
            self._shape.channels,
            plane,
            *rectangle,
            restored,
            restored.shape[1],
            frame.maps["level"],
            self._tile_columns,
            level,
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

    def parts(self, labels: NDArray[np.int16] | None) -> list[Part]:
        """Return parts of two kinds.

        (plane, height, width, *rectangle) surrounds a rectangle for a transform of that
        size; (plane, level, *rectangle) restores it then. As on the CPU a level is
        restored over the smallest rectangle that holds its tiles: (top, left, rows,
        columns), left out where it is the whole frame. None: every level over whole
        frames.
        """
        height, width = self._frame.height, self._frame.width
        if labels is None:
            whole = Region(slice(0, height), slice(0, width))
            regions = dict.fromkeys(self._margins, whole)
        else:
            regions = self._montage.regions(labels)
        shapes = {
            level: padded_shape(region.shape, self._margins[level])
            for level, region in regions.items()
        }
        found: list[Part] = []
        for plane in range(self._frame.channels):
            for region, shape, levels in together(regions, shapes):
                place = self._place(region)
                found.append((plane, *shape, *place))
                found += [(plane, level, *place) for level in levels]
        return found

    def recurs(self, part: Part) -> bool:
        """Return whether it is of a whole frame; other rectangles hardly come back."""
        return len(part) <= _LOOK

    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue a part of the restoration of a frame."""
        if len(part) in (_LOOK, _LOOK + _RECTANGLE):
            self._look(work, frame, part)
            return
        plane, level, *place = part
        rectangle = self._rectangle(place)
        shape = padded_shape(rectangle[2:], self._margins[level])
        padded, restored = self._padded.shaped(shape), self._restored.shaped(shape)
        self._deconvolution.restore(work, level, padded, restored)
        self._blending.level(
            work, frame, level, plane=plane, rectangle=rectangle, restored=restored
        )

    def _look(self, work: Work, frame: InFlight, part: Part) -> None:
        plane, *numbers = part
        padded = self._padded.shaped((numbers[0], numbers[1]))
        work.launch(
            "surround",
            padded.count,
            frame.signal,
            *self._frame.sides,
            plane,
            *self._rectangle(numbers[2:]),
            *padded.shape,
            int(self._deconvolution.positive),
            padded,
        )
        self._deconvolution.look(work, padded)

    def _place(self, region: Region) -> Part:
        if region.shape == (self._frame.height, self._frame.width):
            return ()
        return region.rows.start, region.columns.start, *region.shape

    def _rectangle(self, place: Sequence[int]) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a part's place."""
        if not place:
            return 0, 0, self._frame.height, self._frame.width
        top, left, height, width = place
        return top, left, height, width


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
