"""Montage: where a frame's tiles lie and how their results blend into one frame.

The blending weights of all tiles add up to 1 in every pixel (a partition of
unity), also at the borders and in frames smaller than one tile. They are
products of one weight per axis, so no tile is ever cut out to be blended.

**Labels** lie half a tile apart, and each has its share of every pixel between them
(`Montage`). **Pixels** that a network makes come in windows that overlap by two halos
(`AxisWindows`, `FrameTiles`): in the middle of the overlap one fades into the other, so
that no seam is left where they differ, and the outer half of each halo is context only.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rtfocus.engines.card import InputCard
from rtfocus.frame import BACKGROUND, DefocusMap, TileGrid

Image = NDArray[np.float32]


def pad(image: Image, shape: tuple[int, int], halo_px: int, mode: str) -> Image:
    """Pad to `shape` with `halo_px` before and the rest behind each axis.

    Parameters
    ----------
    image
        Axes (..., y, x).
    shape
        Height and width of the result.
    halo_px
        Pixels before the image.
    mode
        As `numpy.pad`: ``symmetric`` mirrors (any size), ``constant`` adds zeros.
    """
    behind = [
        side - halo_px - size
        for side, size in zip(shape, image.shape[-2:], strict=True)
    ]
    width = [(0, 0)] * (image.ndim - 2) + [(halo_px, after) for after in behind]
    return np.pad(image, width, mode=mode)  # type: ignore[call-overload, no-any-return]


def to_planes(signal: Image, channels: int) -> Image:
    """Arrange a frame as the images of a batch.

    Parameters
    ----------
    signal
        Axes (y, x) or (y, x, colour).
    channels
        Of the network. 1: colours are images of their own; 3: a grey frame is
        shown three times.

    Returns
    -------
    Image
        Axes (image, channel, y, x); a view where it can be.
    """
    if signal.ndim == 2:
        return np.broadcast_to(signal, (1, channels, *signal.shape))
    colours = np.moveaxis(signal, -1, 0)
    return colours[:, None] if channels == 1 else colours[None]


def from_planes(planes: Image, shape: tuple[int, ...]) -> Image:
    """Undo `to_planes`; a grey frame is the mean of what its channels became."""
    if len(shape) == 2:
        grey = planes[0, 0] if planes.shape[1] == 1 else planes[0].mean(axis=0)
        return np.asarray(grey)
    colours = planes[:, 0] if planes.shape[1] == 1 else planes[0]
    return np.moveaxis(colours, 0, -1)


def paired_planes(signal: Image, out: Image) -> list[tuple[Image, Image]]:
    """Pair up the 2-D planes of input and output: one, or one per colour."""
    if signal.ndim == 2:
        return [(signal, out)]
    return [(signal[..., c], out[..., c]) for c in range(signal.shape[-1])]


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of the frame."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (
            self.rows.stop - self.rows.start,
            self.columns.stop - self.columns.start,
        )

    @property
    def rectangle(self) -> tuple[int, int, int, int]:
        """Top, left, height and width in pixels."""
        return self.rows.start, self.columns.start, *self.shape


Window = Literal["triangular", "rectangular"]


def defocused(labels: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Return True for tiles to restore: neither in focus nor background."""
    return np.asarray((labels != 0) & (labels != BACKGROUND))


def axis_weights(
    length: int, centres: NDArray[np.float64], window: Window = "triangular"
) -> Image:
    """Compute the blending weight of every tile along one axis.

    Parameters
    ----------
    length
        Pixels of the axis.
    centres
        Tile centres in pixel coordinates (pixel i covers i - 0.5 to i + 0.5),
        ascending.
    window
        ``triangular``: falls from 1 at a tile's centre to 0 at its neighbours'
        centres (He 2020: base 84 at stride 42), constant beyond the outermost
        centres. ``rectangular``: 1 where the tile's centre is the nearest.

    Returns
    -------
    Image
        Axes (tile, pixel); every column sums to 1.
    """
    pixels = np.arange(length, dtype=np.float64)
    if centres.size == 1:
        return np.ones((1, length), dtype=np.float32)
    # Position counted in tiles: 2.25 = a quarter of the way from tile 2 to tile 3.
    place = np.interp(pixels, centres, np.arange(centres.size, dtype=np.float64))
    if window == "rectangular":
        place = np.floor(place + 0.5)
    distance = np.abs(place[None, :] - np.arange(centres.size)[:, None])
    return np.asarray(np.maximum(0.0, 1.0 - distance), dtype=np.float32)


class Montage:
    """Weights that turn one label per tile into one weight map per level.

    Parameters
    ----------
    shape
        Height and width of the frame in pixels.
    window
        ``rectangular`` keeps only every second tile of a half-overlapping grid,
        so that each tile owns its full side (He 2020: stride 84).
    """

    def __init__(
        self, grid: TileGrid, shape: tuple[int, int], window: Window = "triangular"
    ) -> None:
        self.grid = grid
        self.shape = shape
        self.step = 1
        """Every how many tiles take part: 1, or 2 for rectangular windows."""
        if window == "rectangular":
            self.step = max(1, round(grid.tile_px / grid.stride_px))
        self.axes = (
            self._axis(shape[0], grid.rows, window),
            self._axis(shape[1], grid.columns, window),
        )
        """Weights along rows and columns, axes (tile that takes part, pixel)."""
        self._rows, self._columns = self.axes

    @cached_property
    def spans(self) -> tuple[list[slice], ...]:
        """What the tiles that take part cover, per row and per column."""
        return tuple([_extent(weights[None]) for weights in axis] for axis in self.axes)

    @property
    def whole(self) -> Region:
        """All of the frame."""
        return Region(slice(0, self.shape[0]), slice(0, self.shape[1]))

    def _axis(self, length: int, count: int, window: Window) -> Image:
        tiles = np.arange(count)[:: self.step]
        centres = self.grid.origin_px + self.grid.stride_px * tiles
        return axis_weights(length, centres.astype(np.float64), window)

    def tiles(self, labels: NDArray[np.int16]) -> NDArray[np.int16]:
        """Return the labels that take part: all, or every second one."""
        return labels[:: self.step, :: self.step]

    def present(self, labels: NDArray[np.int16]) -> list[int]:
        """Return the levels out of focus that any tile has, ascending."""
        levels = np.unique(self.tiles(labels))
        return [int(level) for level in levels[defocused(levels)]]

    def region(self, labels: NDArray[np.int16], level: int) -> Region:
        """Return the smallest rectangle that holds every weight of a level."""
        mask = self.tiles(labels) == level
        return Region(
            rows=_extent(self._rows[mask.any(axis=1)]),
            columns=_extent(self._columns[mask.any(axis=0)]),
        )

    def regions(self, labels: NDArray[np.int16]) -> dict[int, Region]:
        """Return the region of every level out of focus that any tile has."""
        return {level: self.region(labels, level) for level in self.present(labels)}

    def weights(self, labels: NDArray[np.int16], level: int, region: Region) -> Image:
        """Return the weight of a level in every pixel of a region, axes (y, x)."""
        mask = (self.tiles(labels) == level).astype(np.float32)
        columns = mask @ self._columns[:, region.columns]
        return np.asarray(self._rows[:, region.rows].T @ columns)

    def restored_share(self, labels: NDArray[np.int16]) -> Image:
        """Return how much of every pixel is to be restored, axes (y, x).

        Exactly 0 where only tiles in focus and background reach.
        """
        return self.weights(defocused(labels).astype(np.int16), 1, self.whole)

    def tile_region(self, row: int, column: int) -> Region:
        """Return the rectangle that the weight of one tile covers."""
        rows, columns = self.spans
        return Region(rows[row], columns[column])

    def tile_weights(self, row: int, column: int, region: Region) -> Image:
        """Return the weight of one tile in every pixel of a region, axes (y, x)."""
        down = self._rows[row, region.rows]
        return down[:, None] * self._columns[column, region.columns][None, :]


def _extent(weights: Image) -> slice:
    """Span of the pixels in which any of the tiles has a weight."""
    touched = np.flatnonzero(weights.any(axis=0))
    return slice(int(touched[0]), int(touched[-1]) + 1)


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

    def defocus_um(self, defocus: DefocusMap, places: list[Place]) -> Image:
        """Return the mean defocus of every tile by what the classifier says.

        Its tiles out of focus count by their confidence, those around the
        restorer's own pixels; NaN where there is none.
        """
        grid = defocus.grid
        weights = np.where(defocused(defocus.level), defocus.confidence, 0)
        weights = weights.astype(np.float32)
        values = np.nan_to_num(defocus.defocus_um)
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
