"""Margins: what surrounds a frame or a rectangle of it.

Mirrored pixels for networks; for Fourier transforms, which join the right edge of their
input to the left one, a margin that leads smoothly from what lies behind a rectangle to
what lies before it: where they do not meet, the jump rings through the whole rectangle
once a filter amplifies it.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.tiles.montage import Region

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


def read_region(
    plane: Image, region: Region, shape: tuple[int, int], halo_px: int
) -> Image:
    """Cut a rectangle out of a frame, in a margin without a jump.

    Parameters
    ----------
    plane
        Axes (y, x).
    region
        What is wanted; lies at (halo_px, halo_px) in the result.
    shape
        Height and width of the result.
    halo_px
        Pixels of the margin before the region; the rest is behind it.
    """
    down = _extend(plane, region.rows, shape[0], halo_px)
    across = _extend(down.T, region.columns, shape[1], halo_px)
    return np.ascontiguousarray(across.T)


def axis_mix(
    count: int, length: int, halo_px: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Image]:
    """Return which pixels of an axis each pixel of its surrounded form mixes.

    What `read_region` does to a whole frame, one axis at a time, as tables.

    Parameters
    ----------
    count
        Pixels of the axis.
    length
        Pixels of the result.
    halo_px
        Pixels of the margin before the axis.

    Returns
    -------
    tuple
        First pixel, second pixel, share of the second; each of shape (length,).
    """
    margin = length - count
    first = np.arange(length) - halo_px
    second = first.copy()
    share = np.zeros(length, dtype=np.float32)
    if margin:
        # In the result the margin begins behind the region and ends before it.
        behind = (np.arange(length) - halo_px - count) % length
        outside = behind < margin
        steps = behind[outside]
        first[outside] = _mirror(count + steps, count)
        second[outside] = _mirror(steps - margin, count)
        share[outside] = _fade(margin)[steps]
    return first, second, share


def _extend(plane: Image, span: slice, length: int, halo_px: int) -> Image:
    """Take rows ``span`` and surround them to `length` rows."""
    count = span.stop - span.start
    result = np.empty((length, plane.shape[1]), dtype=np.float32)
    result[halo_px : halo_px + count] = plane[span]
    margin = length - count
    if margin == 0:
        return result
    steps = np.arange(margin)
    behind = plane[_mirror(span.stop + steps, plane.shape[0])]
    before = plane[_mirror(span.start - margin + steps, plane.shape[0])]
    behind += (before - behind) * _fade(margin)[:, None]
    # In the result the margin begins behind the region and ends before it.
    tail = margin - halo_px
    result[halo_px + count :] = behind[:tail]
    result[:halo_px] = behind[tail:]
    return result


def _mirror(index: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Fold indices back into 0..length - 1; the border pixel is repeated."""
    folded = index % (2 * length)
    return np.minimum(folded, 2 * length - 1 - folded)


@lru_cache(maxsize=64)
def _fade(margin: int) -> Image:
    """Weights from 0 to 1, flat at both ends."""
    place = (np.arange(margin) + 0.5) / margin
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * place), dtype=np.float32)
