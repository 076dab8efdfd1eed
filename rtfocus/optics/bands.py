"""Bands: radial frequencies in overlapping bands, and the taper of a tile's edge.

What a learned filter says of a spectrum, it says per band. Both sides use this
module, the training and the filter of the live loop, so they mean the same.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]

_NYQUIST = 0.5
# Power that crowds the centres at low frequencies, where images have their detail.
_CROWDING = 1.5


def band_centres(count: int) -> NDArray[np.float64]:
    """Return the centres of the bands in cycles per pixel, 0 to 0.5, ascending.

    Examples
    --------
    >>> band_centres(3).round(3).tolist()
    [0.0, 0.177, 0.5]
    """
    return np.asarray(_NYQUIST * np.linspace(0, 1, count) ** _CROWDING)


@lru_cache(maxsize=8)
def band_weights(shape: tuple[int, int], count: int) -> Image:
    """Compute how much every frequency belongs to every band.

    A frequency between two centres belongs to both, linearly; beyond the last
    centre (the corners of the spectrum) to the last. So a value per band becomes
    a continuous function of frequency.

    Parameters
    ----------
    shape
        Height and width of the image.
    count
        Bands, at least 2.

    Returns
    -------
    Image
        Axes (band, y frequency, x frequency) over the half spectrum of `rfft2`;
        sums to 1 over the bands; read-only.

    Raises
    ------
    ValueError
        If there are fewer than two bands.
    """
    if count < 2:
        msg = f"count={count} bands cover no range of frequencies; need >= 2"
        raise ValueError(msg)
    rows = np.fft.fftfreq(shape[0])[:, None]
    columns = np.fft.rfftfreq(shape[1])[None, :]
    place = np.interp(np.hypot(rows, columns), band_centres(count), np.arange(count))
    distance = np.abs(place - np.arange(count)[:, None, None])
    weights: Image = np.maximum(1 - distance, 0).astype(np.float32)
    weights.flags.writeable = False
    return weights


@lru_cache(maxsize=8)
def edge_taper(shape: tuple[int, int], width_px: int) -> Image:
    """Return a window that is 1 inside and falls to 0 over the outer `width_px`.

    A tile's opposite edges meet in its Fourier transform; faded towards the tile's
    mean there is no step between them that a restoration would sharpen.

    Returns
    -------
    Image
        Axes (y, x), half a cosine along each axis; read-only.
    """
    down, across = (_axis_taper(side, width_px) for side in shape)
    window: Image = np.outer(down, across).astype(np.float32)
    window.flags.writeable = False
    return window


def _axis_taper(side: int, width_px: int) -> NDArray[np.float64]:
    inward = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
    rise = np.clip(inward / max(width_px, 1), 0, 1)
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * rise))
