"""Normalisation: what a network sees of a frame, and which tiles hold nothing.

Focus does not depend on gain or offset, so neither may the input of a network.
Both parts work on cells of 12 px: statistics of a few thousand cells replace
window filters over a quarter of a million pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Image = NDArray[np.float32]

CELL_PX = 12
"""Side of a cell; sides of a frame must be multiples of it (`pad_frame`)."""
# Luminance of linear RGB (ITU-R BT.709).
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


def luminance(signal: Image) -> Image:
    """Return the grey image (y, x) of a frame; grey frames as they are."""
    return signal if signal.ndim == 2 else np.asarray(signal @ _LUMINANCE)


def pad_frame(frame: ArrayLike, multiple_px: int, least_px: int = 0) -> Image:
    """Extend a frame downwards and to the right by reflection.

    Parameters
    ----------
    frame
        Axes (y, x), any number type.
    multiple_px
        Both sides become multiples of it.
    least_px
        Smallest side of the result.

    Returns
    -------
    Image
        The frame itself lies at the upper left, unchanged.
    """
    pixels = np.asarray(frame, dtype=np.float32)
    sides = [
        -(-max(side, least_px) // multiple_px) * multiple_px for side in pixels.shape
    ]
    pads = [(0, new - old) for new, old in zip(sides, pixels.shape, strict=True)]
    # "symmetric" repeats the border pixel: it also works on a side of one pixel.
    return np.pad(pixels, pads, mode="symmetric") if np.any(pads) else pixels


BELOW_OFFSET = "below_offset"
"""Marks a frame whose counts lie below what the camera is said to give in the dark."""
# Of the offset: noise in the dark leaves the median of no frame below it.
_DARKEST_MEDIAN = 0.8
# Along each axis that are looked at: a median needs no more.
_ENOUGH_PX = 256


def told_below(pixels: NDArray[np.generic], offset_counts: float) -> str | None:
    """Say what is wrong where most of a frame lies below the camera's offset.

    Parameters
    ----------
    pixels
        As the camera or a file gives them, axes (y, x) or (y, x, colour).
    offset_counts
        Counts in the dark.

    Returns
    -------
    str or None
        What it means, with the remedy. None: it does not, or there are values below
        0, as no camera gives; such a frame is lifted to light as a whole.
    """
    if offset_counts == 0:
        return None
    rows, columns = (-(-side // _ENOUGH_PX) for side in pixels.shape[:2])
    some: NDArray[Any] = pixels[::rows, ::columns]
    finite = np.isfinite(some)
    # Every frame of a run is asked: to count takes a quarter of the time of a median.
    dark = finite & (some < _DARKEST_MEDIAN * offset_counts)
    if 2 * np.count_nonzero(dark) <= np.count_nonzero(finite):
        return None
    median = float(np.median(some[finite]))
    if pixels.min(where=np.isfinite(pixels), initial=0) < 0:
        return None
    return (
        f"most pixels lie below camera.offset_counts ({offset_counts:g}; their median "
        f"is {median:g}) and are taken for dark: give the counts of an image taken in "
        "the dark, 0 where they are subtracted already"
    )


@dataclass(frozen=True, slots=True)
class LocalStandardisation:
    """Subtract the frame's median, divide by the local deviation from it.

    The median is one number, so that an empty background stays flat: a local mean
    would lay ramps around every bright object that hide the halo of a defocused
    one. The deviation is a root mean square over a window of cells around every
    cell (cut at the frame's edge), with weights that fall linearly from the
    window's centre to its edge, interpolated linearly between the cells' centres.
    The result does not change when the frame is multiplied by a positive number
    or shifted by any number.
    """

    window_px: int = 132
    """Side of the window: an odd number of cells."""
    floor: float = 0.05
    """Least local deviation, as a share of the whole frame's: keeps what is flat
    flat instead of blowing up noise."""

    def __post_init__(self) -> None:
        if self.window_px % CELL_PX or self.window_px // CELL_PX % 2 == 0:
            msg = (
                f"window_px={self.window_px} is no odd number of {CELL_PX} px cells; "
                "choose 12, 36, 60, 84 ..."
            )
            raise ValueError(msg)
        if not 0 < self.floor < 1:
            msg = f"floor={self.floor} is no share; need 0 < floor < 1"
            raise ValueError(msg)

    def apply(self, frame: Image) -> Image:
        """Standardise a frame, axes (y, x); a new array of the same shape.

        Raises
        ------
        ValueError
            If a side is no multiple of 12 px.
        """
        rows, columns = _cell_counts(frame)
        # Of the cells' means: the median of all pixels costs twenty times as much.
        middle = np.median(_cell_means(frame))
        centred: Image = frame - np.float32(middle)
        by_row = centred.reshape(rows, CELL_PX, columns * CELL_PX)
        squares = np.einsum("rpx,rpx->rx", by_row, by_row)
        power = squares.reshape(rows, columns, CELL_PX).mean(axis=2, dtype=np.float64)
        power /= CELL_PX
        deviation = np.sqrt(_window_mean(power, self.window_px // CELL_PX))
        least = self.floor * float(np.sqrt(power.mean()))
        # A constant frame has no deviation at all: any divisor leaves its zeros.
        centred *= _to_pixels(1 / np.maximum(deviation, least or 1.0))
        return centred


@dataclass(frozen=True, slots=True)
class ContrastToNoise:
    """Decide which tiles are background: nothing in them stands out of the noise.

    He 2020 calls a patch background where its maximum is below 230 and its range
    below 30 counts; that holds for one camera. Here both are counted in standard
    deviations of the frame's own noise, which is read off differences between
    neighbouring pixels in the quietest tenth of the cells.
    """

    contrast: float = 3.0
    """Least range of the cell means within a tile, in noise deviations."""
    peak: float = 8.0
    """Least height of one pixel over the tile's darkest cell mean, likewise."""
    quantum: float = 1.0
    """Step between neighbouring values (1 for counts, 0 for real numbers): the
    noise is never taken to be less than the rounding error of that step."""

    def noise(self, frame: Image) -> float:
        """Return the standard deviation of the noise in the frame's dark parts."""
        rows, columns = _cell_counts(frame)
        steps = np.zeros_like(frame, order="C")
        np.subtract(frame[:, 1:], frame[:, :-1], out=steps[:, :-1])
        by_row = steps.reshape(rows, CELL_PX, columns * CELL_PX)
        squares = np.einsum("rpx,rpx->rx", by_row, by_row)
        power = squares.reshape(rows, columns, CELL_PX).sum(axis=2)
        # A difference of two pixels has twice the variance of one.
        variance = float(np.quantile(power, 0.1)) / (2 * CELL_PX**2)
        return float(np.sqrt(max(variance, self.quantum**2 / 12)))

    def tiles(
        self,
        frame: Image,
        *,
        tile_px: int,
        stride_px: int,
        start_px: int = 0,
        noise: float | None = None,
    ) -> NDArray[np.bool_]:
        """Return True for background, axes (tile row, tile column).

        Parameters
        ----------
        frame
            Axes (y, x), not normalised; mirrored up to whole cells of 12 px, which the
            tiles of a network need not be.
        tile_px, stride_px, start_px
            The tiles' side, distance and first edge, in multiples of 12 px; parts
            of a tile that lie outside the frame are not looked at.
        noise
            Standard deviation of the noise; None: measured on this frame.

        Raises
        ------
        ValueError
            If a length is no multiple of 12 px.
        """
        frame = pad_frame(frame, CELL_PX)
        rows, columns = _cell_counts(frame)
        if any(length % CELL_PX for length in (tile_px, stride_px, start_px)):
            msg = (
                f"tile_px={tile_px}, stride_px={stride_px}, start_px={start_px} "
                f"must be multiples of {CELL_PX}"
            )
            raise ValueError(msg)
        sigma = self.noise(frame) if noise is None else noise
        size, step, first = (n // CELL_PX for n in (tile_px, stride_px, start_px))
        down = _spans(rows, size, step, first)
        return self.empty(frame, sigma, down, _spans(columns, size, step, first))

    def empty(
        self, frame: Image, noise: float, down: Sequence[slice], across: Sequence[slice]
    ) -> NDArray[np.bool_]:
        """Return True for tiles in which nothing stands out, axes (row, column).

        Parameters
        ----------
        frame
            Axes (y, x), whole cells.
        noise
            Its standard deviation.
        down, across
            Cells that each row and each column of tiles covers.
        """
        rows, columns = _cell_counts(frame)
        means = _cell_means(frame).astype(np.float32)
        # Rows first: along whole rows of pixels a maximum is six times as fast.
        peaks = frame.reshape(rows, CELL_PX, -1).max(axis=1)
        peaks = peaks.reshape(rows, columns, CELL_PX).max(axis=2)
        darkest = _over_windows(np.minimum, means, down, across)
        contrast = _over_windows(np.maximum, means, down, across) - darkest
        height = _over_windows(np.maximum, peaks, down, across) - darkest
        empty: NDArray[np.bool_] = contrast < self.contrast * noise
        empty &= height < self.peak * noise
        return empty


def _over_windows(
    extreme: np.ufunc, cells: Image, down: Sequence[slice], across: Sequence[slice]
) -> Image:
    """Return the least or largest cell of every window, axes (row, column).

    Rows first, then columns: neighbouring windows share most of their cells.
    """
    rows = [extreme.reduce(cells[span], axis=0) for span in down]
    by_column = np.ascontiguousarray(np.transpose(rows))
    columns = [extreme.reduce(by_column[span], axis=0) for span in across]
    return np.transpose(columns)


def _cell_counts(frame: Image) -> tuple[int, int]:
    height, width = frame.shape
    if height % CELL_PX or width % CELL_PX or not frame.size:
        msg = (
            f"frame of shape {frame.shape} is not made of {CELL_PX} px cells; "
            "pad the frame first (pad_frame)"
        )
        raise ValueError(msg)
    return height // CELL_PX, width // CELL_PX


def _cell_means(frame: Image) -> NDArray[np.float64]:
    """Return the mean of every cell, axes (row, column)."""
    rows, columns = _cell_counts(frame)
    # Rows first, in float32: over both axes at once it takes six times as long.
    sums = frame.reshape(rows, CELL_PX, -1).sum(axis=1)
    cells = sums.reshape(rows, columns, CELL_PX).mean(axis=2, dtype=np.float64)
    return np.asarray(cells / CELL_PX)


def _spans(cells: int, size: int, step: int, first: int) -> list[slice]:
    """Windows of cells along one axis; the last one may reach past the edge."""
    count = max((cells - first - size) // step + 1, 1)
    return [
        slice(max(first + i * step, 0), first + i * step + size) for i in range(count)
    ]


def _window_mean(cells: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Mean over windows of size x size cells, cut at the edges."""
    down, across = (_window_matrix(n, size) for n in cells.shape)
    return np.asarray(down @ cells @ across.T)


def _to_pixels(cells: NDArray[np.float64]) -> Image:
    """Interpolate from the cells' centres to the pixels, constant at the edges.

    Written out rather than as a matrix product: BLAS threads that spin beside
    the loop's own made it a hundred times slower on a busy machine.
    """
    edged = np.pad(cells.astype(np.float32), 1, mode="edge")
    part = ((np.arange(CELL_PX) + 0.5) / CELL_PX).astype(np.float32)
    half = CELL_PX // 2
    low, high = edged[:-1, np.newaxis], edged[1:, np.newaxis]
    down = low + (high - low) * part[:, np.newaxis]
    down = down.reshape(-1, edged.shape[1])[half:-half]
    left, right = down[:, :-1, np.newaxis], down[:, 1:, np.newaxis]
    across = (right - left) * part
    across += left
    return np.asarray(across.reshape(len(down), -1)[:, half:-half])


@lru_cache(maxsize=32)
def _window_matrix(cells: int, size: int) -> NDArray[np.float64]:
    """Weights (cell, cell) of a mean over a window, triangular."""
    place = np.arange(cells)
    distance = np.abs(place[:, None] - place[None, :])
    weights = np.maximum(1 - distance / (size // 2 + 1), 0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@dataclass(frozen=True, slots=True)
class PercentileRange:
    """Map a frame's dark and bright percentile to 0 and 1; invertible.

    What restorers see: linear, one pair of numbers per frame, so that the image
    formation ``B = I * K`` still holds and the result goes back to counts.
    """

    low_percent: float = 0.5
    """Percentile that becomes 0."""
    high_percent: float = 99.8
    """Percentile that becomes 1."""
    sample_px: int = 1 << 16
    """Pixels the percentiles are read from, on a regular grid: a whole frame of
    four million costs as much time as the network."""

    def __post_init__(self) -> None:
        if not 0 <= self.low_percent < self.high_percent <= 100 or self.sample_px < 1:
            msg = (
                f"low_percent={self.low_percent}, high_percent={self.high_percent}, "
                f"sample_px={self.sample_px}: need 0 <= low < high <= 100 and pixels"
            )
            raise ValueError(msg)

    def step(self, pixels: int) -> int:
        """Return every how many pixels, along both axes, a frame of so many is read."""
        return max(1, int(np.sqrt(pixels / self.sample_px)))

    def fit(self, frame: Image) -> tuple[float, float]:
        """Return (offset, scale) of a frame (y, x); the scale is never 0."""
        step = self.step(frame.size)
        low, high = np.percentile(
            frame[::step, ::step], (self.low_percent, self.high_percent)
        )
        return float(low), float(high - low) or 1.0

    def apply(self, frame: Image) -> Image:
        """Normalise a frame by its own percentiles; a new array."""
        offset, scale = self.fit(frame)
        return (frame - np.float32(offset)) / np.float32(scale)


def normalised(frame: Image, offset: float, scale: float) -> Image:
    """Return ``(frame - offset) / scale``, a new float32 array."""
    result = np.subtract(frame, np.float32(offset), dtype=np.float32)
    result *= np.float32(1.0 / scale)
    return result


def halved(image: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return an image (y, x) or (y, x, 3) of half the size, by means of 2 x 2 pixels.

    Eight bits become sums, in 16 bits: no step between two counts is lost.
    """
    height, width = (side // 2 for side in image.shape[:2])
    cut = image[: 2 * height, : 2 * width]
    blocks = cut.reshape(height, 2, width, 2, *image.shape[2:])
    if image.dtype == np.uint8:
        return np.asarray(blocks.sum(axis=(1, 3), dtype=np.uint16))
    means = blocks.mean(axis=(1, 3), dtype=np.float32)
    if image.dtype.kind == "f":
        return np.asarray(means)
    return np.asarray(np.rint(means).astype(image.dtype))


def haar(image: Image) -> tuple[Image, Image]:
    """Return means of 2 x 2 pixels, and Haar details: down, across and diagonal."""
    a, b = image[::2, ::2], image[::2, 1::2]
    c, d = image[1::2, ::2], image[1::2, 1::2]
    top, bottom, left, right = a + b, c + d, a - b, c - d
    details = np.stack([top - bottom, left + right, left - right])
    details *= np.float32(0.25)
    return (top + bottom) * np.float32(0.25), details


def mean_product(one: Image, other: Image, cells: int) -> Image:
    """Return means of the products of details (detail, y, x) in squares of `cells`."""
    product = np.einsum("kyx,kyx->yx", one, other)
    rows, columns = (side // cells for side in product.shape)
    return np.asarray(product.reshape(rows, cells, columns, cells).mean(axis=(1, 3)))


_AROUND = 5
"""Cells that are looked at together, per side."""


def around(cells: Image) -> Image:
    """Return the mean over the 5 x 5 cells around each, cut at the frame's edge.

    Axes (..., row, column).
    """
    summed = cells
    for axis in (-2, -1):
        weights = _neighbours(cells.shape[axis])
        summed = np.moveaxis(np.moveaxis(summed, axis, -1) @ weights, -1, axis)
    return np.asarray(summed, dtype=np.float32)


def _neighbours(count: int) -> Image:
    places = np.arange(count)
    near = np.abs(places[:, None] - places) <= _AROUND // 2
    return np.asarray(near / near.sum(axis=0), dtype=np.float32)
