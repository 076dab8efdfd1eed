"""Wiener: the linear restoration of one level, its strength read from each image."""

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from rtfocus.processing.restore.fourier import transfer_function
from rtfocus.processing.restore.wiener import (
    WienerFilter,
    noise_variance,
    photon_variance,
)

Image = NDArray[np.float32]


class WienerDeconvolution:
    """The linear filter, strength read from each image."""

    def __init__(
        self,
        psf: Image,
        shape: tuple[int, int],
        *,
        noise_to_signal: float | None,
        gain_e_per_count: float | None,
    ) -> None:
        transfer = transfer_function(psf, shape)
        self._filter = WienerFilter(transfer, shape, noise_to_signal)
        self._gain = gain_e_per_count

    def restore(self, padded: Image, quantum: float, workers: int) -> Image:
        """Restore with one forward and one inverse transform."""
        variance = noise_variance(padded, quantum)
        if self._gain is not None:
            # A camera that smooths or compresses hides its noise from the frame.
            variance = max(variance, photon_variance(padded, self._gain))
        spectrum = fft.rfft2(padded, workers=workers)
        return self._filter.apply(spectrum, variance, workers)
