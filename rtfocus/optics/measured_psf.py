"""Measured PSF: the kernel between sharp and defocused images, without a model."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

Image = NDArray[np.float32]

# Power of the sharp image below which a frequency says nothing, relative to the
# mean power over all frequencies but the constant one.
_REGULARISATION = 1e-2


def measure_psf(pairs: Sequence[tuple[ArrayLike, ArrayLike]], *, half_px: int) -> Image:
    """Return the least-squares kernel that turns sharp images into defocused ones.

    For the eye, beside a fitted PSF: noise and borders make it rough, so negative
    values may occur.

    Parameters
    ----------
    pairs
        (sharp, defocused), registered, axes (y, x), all of one shape.
    half_px
        Half side of the kernel; sides of 2 * half_px + 1.

    Returns
    -------
    Image
        Axes (y, x), sums to 1.
    """
    shape = np.shape(pairs[0][0])
    window = np.outer(*(np.hanning(length) for length in shape))
    shared = np.zeros((shape[0], shape[1] // 2 + 1), dtype=np.complex128)
    power = np.zeros(shared.shape)
    for pair in pairs:
        images = (np.asarray(image, dtype=np.float64) for image in pair)
        sharp, defocused = (fft.rfft2((i - i.mean()) * window) for i in images)
        shared += np.conj(sharp) * defocused
        power += np.abs(sharp) ** 2
    kernel = fft.irfft2(shared / (power + _REGULARISATION * power.mean()), shape)
    rolled = np.roll(kernel, (half_px, half_px), axis=(0, 1))
    cut = rolled[: 2 * half_px + 1, : 2 * half_px + 1]
    return np.asarray(cut / cut.sum(), dtype=np.float32)
