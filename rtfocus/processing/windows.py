"""Windows: a frame in a size its network takes, and equal pieces of it.

Neighbouring windows overlap by two halos. In the middle of the overlap one fades
into the other, so that no seam is left where they differ, and the outer half of
each halo is context only. All channels of a series share one grid of tiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rtfocus.engines.card import InputCard
from rtfocus.engines.registry import FrameFit
from rtfocus.errors import EngineError
from rtfocus.frame import DefocusMap, TileGrid
from rtfocus.processing.montage import Montage, Region, defocused, pad

Image = NDArray[np.float32]


def tile_grid(
    card: InputCard, fit: FrameFit, rows: int, columns: int, *, signed: bool
) -> TileGrid:
    """Grid of the tiles whose centre lies in the frame; at least one per axis."""
    counts = [
        min(found, max(1, ceil((side - card.origin_px) / card.stride_px)))
        for found, side in zip((rows, columns), fit.shape, strict=True)
    ]
    return TileGrid(
        rows=counts[0],
        columns=counts[1],
        tile_px=card.tile_px,
        stride_px=card.stride_px,
        origin_px=card.origin_px,
        signed=signed,
    )


def common_grid(grids: Mapping[str, TileGrid | None]) -> TileGrid | None:
    """Return the grid of all classified channels; None: none is classified.

    Parameters
    ----------
    grids
        By channel; None: not classified.

    Raises
    ------
    EngineError
        If two channels have different grids: one map cannot hold both.
    """
    found = {name: grid for name, grid in grids.items() if grid is not None}
    if len(set(found.values())) > 1:
        msg = (
            f"classifiers of channels {', '.join(found)} divide a frame into different "
            "tiles; use engines with the same tile_px and stride_px"
        )
        raise EngineError(msg)
    return next(iter(found.values()), None)


@dataclass(frozen=True, slots=True)
class AxisWindows:
    """Windows along one axis; window i starts at ``i * own_px``."""

    count: int
    own_px: int
    """Distance between neighbouring windows."""
    halo_px: int
    """Context on either side of the own pixels."""

    @property
    def size_px(self) -> int:
        """Length of a window."""
        return self.own_px + 2 * self.halo_px

    @property
    def length_px(self) -> int:
        """Length that all windows together cover."""
        return self.count * self.own_px + 2 * self.halo_px

    def span(self, index: int) -> slice:
        """Return the pixels of a window."""
        start = index * self.own_px
        return slice(start, start + self.size_px)

    def weights(self) -> Image:
        """Compute how much every window counts in its own pixels.

        Returns
        -------
        Image
            Axes (window, pixel of the window); over all windows that cover a pixel
            they sum to 1.
        """
        pixels = np.arange(self.size_px)
        # Fades over one halo around the border between two windows' own pixels, but
        # never so wide that three windows would meet.
        width = max(min(self.halo_px, self.own_px), 1)
        rise = (pixels + 0.5 - self.halo_px) / width + 0.5
        rising = np.clip(rise, 0, 1).astype(np.float32)
        result = np.ones((self.count, self.size_px), np.float32)
        result[1:] *= rising
        result[:-1] *= rising[::-1]
        return result


def windows_of_size(length_px: int, size_px: int, halo_px: int) -> AxisWindows:
    """Cover an axis with windows of a given size; it gains a halo on both sides."""
    own_px = size_px - 2 * halo_px
    return AxisWindows(max(1, ceil(length_px / own_px)), own_px, halo_px)


def fewest_windows(
    length_px: int, largest_px: int, halo_px: int, multiple_px: int
) -> AxisWindows:
    """Cover an axis with as few equal windows as a largest size allows.

    Parameters
    ----------
    length_px
        Of the axis; one window holds it where it may be so large.
    largest_px
        Longest window.
    halo_px
        Context where two windows meet, rounded up to the multiple.
    multiple_px
        Windows start, and are long, in multiples of it.
    """
    if length_px <= largest_px:
        return AxisWindows(1, length_px, 0)
    halo_px = ceil(halo_px / multiple_px) * multiple_px
    inner = length_px - 2 * halo_px
    count = ceil(inner / (largest_px - 2 * halo_px))
    own_px = ceil(inner / count / multiple_px) * multiple_px
    return AxisWindows(count, own_px, halo_px)


Place = tuple[int, int]
"""Row and column of a tile."""


def restored_share(montage: Montage, labels: NDArray[np.int16]) -> Image:
    """Return how much of every pixel is to be restored, axes (y, x).

    Exactly 0 where only tiles in focus and background reach.
    """
    whole = Region(slice(0, montage.shape[0]), slice(0, montage.shape[1]))
    return montage.weights(defocused(labels).astype(np.int16), 1, whole)


class FrameTiles:
    """A restorer's tiles on frames of one height and width."""

    def __init__(self, card: InputCard, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._halo_px = card.halo_px
        self._down = windows_of_size(shape[0], card.tile_px, card.halo_px)
        self._across = windows_of_size(shape[1], card.tile_px, card.halo_px)
        self.windows = self._down, self._across
        """Tiles along y and x."""
        self._row_weights = self._down.weights()
        self._column_weights = self._across.weights()

    @property
    def places(self) -> list[Place]:
        """All tiles, row by row."""
        return list(np.ndindex(self._down.count, self._across.count))

    def needed(self, share: Image) -> list[Place]:
        """Return the tiles that weigh in any pixel to be restored."""
        padded = np.pad(share > 0, self._halo_px)
        return [place for place in self.places if padded[self._spans(place)].any()]

    def cut(self, planes: Image, places: list[Place]) -> Image:
        """Cut tiles out of planes (channel, y, x), mirrored beyond the frame.

        Returns
        -------
        Image
            New array, axes (tile, channel, y, x).
        """
        size = self._down.length_px, self._across.length_px
        padded = pad(planes, size, self._halo_px, "symmetric")
        return np.stack([padded[:, *self._spans(place)] for place in places])

    def join(self, tiles: Image, places: list[Place]) -> Image:
        """Blend tiles (tile, channel, y, x) into planes (channel, y, x).

        Pixels that no tile reaches are 0.
        """
        size = self._down.length_px, self._across.length_px
        result = np.zeros((tiles.shape[1], *size), np.float32)
        for tile, (row, column) in zip(tiles, places, strict=True):
            weights = self._row_weights[row][:, None] * self._column_weights[column]
            result[:, *self._spans((row, column))] += weights * tile
        halo = self._halo_px
        height, width = self.shape
        return result[:, halo : halo + height, halo : halo + width]

    def defocus_um(self, found: DefocusMap, places: list[Place]) -> Image:
        """Return the mean defocus of every tile by what the classifier says.

        Its tiles out of focus count by their confidence, those around the
        restorer's own pixels; NaN where there is none.
        """
        grid = found.grid
        weights = np.where(defocused(found.level), found.confidence, 0)
        weights = weights.astype(np.float32)
        values = np.nan_to_num(found.defocus_um)
        result = np.full(len(places), np.nan, np.float32)
        down, across = self.near(grid)
        for index, (row, column) in enumerate(places):
            near = np.ix_(down[row], across[column])
            total = weights[near].sum()
            if total > 0:
                result[index] = (weights[near] * values[near]).sum() / total
        return result

    def near(self, grid: TileGrid) -> tuple[list[NDArray[np.bool_]], ...]:
        """Return which rows and columns of labels `defocus_um` looks at.

        Returns
        -------
        tuple
            For every row of tiles the rows of labels, for every column the columns.
        """
        axes = (self._down, grid.rows), (self._across, grid.columns)
        return tuple(
            [_near(axis, index, grid, count) for index in range(axis.count)]
            for axis, count in axes
        )

    def _spans(self, place: Place) -> tuple[slice, slice]:
        return self._down.span(place[0]), self._across.span(place[1])


def _near(
    axis: AxisWindows, index: int, grid: TileGrid, count: int
) -> NDArray[np.bool_]:
    """Return which of the classifier's tiles reach the own pixels of a tile."""
    centres = grid.origin_px + grid.stride_px * np.arange(count)
    middle = (index + 0.5) * axis.own_px
    reach = axis.own_px / 2 + max(axis.halo_px / 2, grid.stride_px)
    return np.asarray(np.abs(centres - middle) <= reach)
