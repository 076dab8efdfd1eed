"""Fourier: padded transforms, and PSFs as transfer functions of that padding."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Image = NDArray[np.float32]
Spectrum = NDArray[Any]
"""Half spectrum of a real image (`rfft2`), complex, or real for an even PSF."""

# An OTF whose imaginary part stays below this is that of an even PSF.
_EVEN = 1e-6


def padded_shape(shape: tuple[int, int], halo_px: int) -> tuple[int, int]:
    """Return the next sizes with small prime factors that hold frame and halo."""
    height, width = (
        int(fft.next_fast_len(side + 2 * halo_px, real=True)) for side in shape
    )
    return height, width


def transfer_function(psf: Image, shape: tuple[int, int]) -> Spectrum:
    """Transform a PSF, its centre at the origin, to the half spectrum of `shape`.

    A PSF larger than `shape` wraps around, as periodic convolution does. An even
    PSF gives a real array: half the memory and a third of the multiplications.
    """
    kernel = np.zeros(shape, dtype=psf.dtype)
    half = [side // 2 for side in psf.shape]
    rows = (np.arange(psf.shape[0]) - half[0]) % shape[0]
    columns = (np.arange(psf.shape[1]) - half[1]) % shape[1]
    np.add.at(kernel, np.ix_(rows, columns), psf)
    spectrum = fft.rfft2(kernel)
    if np.abs(spectrum.imag).max() < _EVEN:
        return np.ascontiguousarray(spectrum.real)
    return np.asarray(spectrum)
