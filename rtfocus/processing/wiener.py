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
