"""Montage: where a frame's tiles lie and how their results blend into one frame.

The blending weights of all tiles add up to 1 in every pixel (a partition of
unity), also at the borders and in frames smaller than one tile. They are
products of one weight per axis, so no tile is ever cut out to be blended.

A level's rectangle is read with a margin: mirrored pixels for networks; for Fourier
transforms, which join the right edge of their input to the left one, a margin that
leads smoothly from what lies behind the rectangle to what lies before it. Where they
do not meet, the jump rings through all of it once a filter amplifies it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND, TileGrid

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


def crop(image: NDArray[Any], shape: tuple[int, int], halo_px: int) -> NDArray[Any]:
    """Return the view that undoes `pad`; axes (..., y, x)."""
    rows = slice(halo_px, halo_px + shape[0])
    return image[..., rows, halo_px : halo_px + shape[1]]


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


def read_region(plane: Image, region: Region, shape: tuple[int, int]) -> Image:
    """Cut a rectangle out of a frame, before a margin without a jump.

    Parameters
    ----------
    plane
        Axes (y, x).
    region
        What is wanted; lies at the origin of the result.
    shape
        Height and width of the result, which is periodic: its margin leads from what
        lies behind the region to what lies before it.
    """
    down = _extend(plane, region.rows, shape[0])
    across = _extend(down.T, region.columns, shape[1])
    return np.ascontiguousarray(across.T)


def _extend(plane: Image, span: slice, length: int) -> Image:
    """Take rows ``span`` and add a margin up to `length` rows."""
    count = span.stop - span.start
    result = np.empty((length, plane.shape[1]), dtype=np.float32)
    result[:count] = plane[span]
    margin = length - count
    if margin == 0:
        return result
    steps = np.arange(margin)
    behind = plane[_mirror(span.stop + steps, plane.shape[0])]
    before = plane[_mirror(span.start - margin + steps, plane.shape[0])]
    behind += (before - behind) * _fade(margin)[:, None]
    result[count:] = behind
    return result


def together(
    regions: Mapping[int, Region], shapes: Mapping[int, tuple[int, int]]
) -> list[tuple[Region, tuple[int, int], list[int]]]:
    """Return what is looked at once: a region, its transform's size, and levels.

    Of the margin of a level only the size of its transform is left: levels whose
    regions and sizes are the same see the same pixels.

    Parameters
    ----------
    regions
        Per level.
    shapes
        Height and width of the transforms, per level.
    """
    found: dict[tuple[int, ...], tuple[Region, tuple[int, int], list[int]]] = {}
    for level, region in regions.items():
        shape = shapes[level]
        key = (region.rows.start, region.columns.start, *region.shape, *shape)
        found.setdefault(key, (region, shape, []))[2].append(level)
    return list(found.values())


def _mirror(index: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Fold indices back into 0..length - 1; the border pixel is repeated."""
    folded = index % (2 * length)
    return np.minimum(folded, 2 * length - 1 - folded)


@lru_cache(maxsize=64)
def _fade(margin: int) -> Image:
    """Weights from 0 to 1, flat at both ends."""
    place = (np.arange(margin) + 0.5) / margin
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * place), dtype=np.float32)


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
        return tuple([_extent(one[None]) for one in axis] for axis in self.axes)

    def _axis(self, length: int, count: int, window: Window) -> Image:
        tiles = np.arange(count)[:: self.step]
        centres = self.grid.origin_px + self.grid.stride_px * tiles
        return axis_weights(length, centres.astype(np.float64), window)

    def tiles(self, labels: NDArray[np.int16]) -> NDArray[np.int16]:
        """Return the labels that take part: all, or every second one."""
        return labels[:: self.step, :: self.step]

    def present(self, labels: NDArray[np.int16]) -> list[int]:
        """Return the levels out of focus that any tile has, ascending."""
        found = np.unique(self.tiles(labels))
        return [int(level) for level in found[defocused(found)]]

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
