"""Wiener: the linear restoration of one blur, as strong as the noise allows.

Signal power falls with frequency as ``A / f^3`` (edges and texture of cells), so
that the filter is ``H* / (|H|^2 + k f^3)`` with one number ``k = noise / A``,
which is read from the frame's own spectrum. The gain is limited, and exactly 1
at f = 0: brightness is kept whatever the noise.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Image = NDArray[np.float32]

# Band in cycles per pixel in which the signal's power is read: above the slow
# background, below where a strong blur leaves nothing but noise.
BAND = (0.02, 0.1)
# The power in the band overrates that at high frequencies; chosen on the real
# pairs and on blurred nuclei, see bench/deconvolution.py.
CAUTION = 4.0
# No PSF is exact: where its OTF is nearly zero, a slightly wrong one is amplified
# into rings. This limit costs 0.7 dB on average where the PSF is exact and gains
# 6 dB on real fields restored with the nominal PSF (which then beat the raw frame).
HIGHEST_GAIN = np.float32(3.0)


class WienerFilter:
    """Wiener filter of one PSF and one transform size.

    Parameters
    ----------
    transfer
        OTF over the half spectrum, real or complex.
    shape
        Height and width of the transformed (padded) image.
    noise_to_signal
        Constant ratio of noise to signal power; None: estimated per image.
    """

    def __init__(
        self,
        transfer: NDArray[Any],
        shape: tuple[int, int],
        noise_to_signal: float | None = None,
    ) -> None:
        self._shape = shape
        self._back = np.conj(transfer)
        self._power = np.asarray(np.abs(transfer) ** 2, dtype=np.float32)
        self._given = noise_to_signal
        self._rise = _inverse_signal(shape)
        frequency = np.cbrt(self._rise)
        self._band = np.nonzero((frequency > BAND[0]) & (frequency < BAND[1]))
        blurred = self._power[self._band] / self._rise[self._band]
        self.band_bins = int(blurred.size)
        """Frequencies in the band whose power tells the signal's."""
        self.band_power = float(blurred.sum(dtype=np.float64))
        """Power there of a signal whose power at one cycle per pixel is 1."""

    def apply(self, spectrum: NDArray[Any], variance: float, workers: int) -> Image:
        """Restore the image of a half spectrum; `variance` is that of its noise.

        Returns
        -------
        Image
            Float32 of the padded shape; may be slightly negative.
        """
        if self._given is not None:
            gain = self._back * np.float32(1.0 + self._given)
            gain /= self._power + np.float32(self._given)
        else:
            ratio = np.float32(self.noise_ratio(spectrum, variance))
            gain = _limit(self._back / (self._power + ratio * self._rise))
        restored = fft.irfft2(
            spectrum * gain, s=self._shape, workers=workers, overwrite_x=True
        )
        return np.asarray(restored, dtype=np.float32)

    def noise_ratio(self, spectrum: NDArray[Any], variance: float) -> float:
        """Return k: noise power over the signal's power at one cycle per pixel."""
        found = spectrum[self._band]
        pixels = self._shape[0] * self._shape[1]
        power = (found.real**2 + found.imag**2).sum(dtype=np.float64) / pixels
        # White noise has its variance in every bin; the rest is blurred signal.
        signal = max(float(power) - variance * found.size, 1e-3 * float(power))
        if signal <= 0.0 or self.band_power <= 0.0:
            return 1.0
        return CAUTION * variance * self.band_power / signal


def _limit(gain: NDArray[Any]) -> NDArray[Any]:
    """Keep the gain within `HIGHEST_GAIN`, phases as they are."""
    if np.isrealobj(gain):
        return np.clip(gain, -HIGHEST_GAIN, HIGHEST_GAIN, out=gain)
    size = np.maximum(np.abs(gain), HIGHEST_GAIN)
    gain *= HIGHEST_GAIN / size
    return gain


@lru_cache(maxsize=32)
def _inverse_signal(shape: tuple[int, int]) -> Image:
    """f^3 over the half spectrum, f in cycles per pixel."""
    rows = np.fft.fftfreq(shape[0])[:, None]
    columns = np.fft.rfftfreq(shape[1])[None, :]
    return np.asarray((rows**2 + columns**2) ** 1.5, dtype=np.float32)


# Share of the finest details that are taken for edges and left out.
_EDGES = 0.01
# Below this share of the brightest power nothing is noise but round-off.
ROUND_OFF = 1e-9


def diagonal_detail(image: Image) -> Image:
    """Return the finest diagonal Haar detail: unit gain on white noise.

    A defocused image has almost nothing there, so what is seen is noise.
    """
    height, width = (side // 2 * 2 for side in image.shape)
    a, b = image[:height:2, :width:2], image[:height:2, 1:width:2]
    c, d = image[1:height:2, :width:2], image[1:height:2, 1:width:2]
    return np.asarray((a - b - c + d) * np.float32(0.5))


def noise_variance(image: Image, quantum: float = 0.0) -> float:
    """Estimate the mean variance of the noise, in squared units of the image.

    The mean rather than the median over pixels, because photon noise sits in the
    bright parts.

    Parameters
    ----------
    image
        Axes (y, x).
    quantum
        Step between representable values: 1 for integer cameras, whose noise is
        never below that of rounding; 0 for float frames.
    """
    floor = quantum**2 / 12.0 + ROUND_OFF * float(np.max(image, initial=0.0)) ** 2
    if min(image.shape) < 2:
        return floor
    power = np.square(diagonal_detail(image)).ravel()
    kept = max(1, int((1.0 - _EDGES) * power.size))
    return max(float(np.partition(power, kept - 1)[:kept].mean()), floor)


def photon_variance(image: Image, gain_e_per_count: float) -> float:
    """Return the mean variance of photon noise, in counts squared.

    Parameters
    ----------
    image
        Counts above the camera's offset.
    gain_e_per_count
        Photo-electrons per count.
    """
    return float(np.maximum(image, 0).mean()) / gain_e_per_count
