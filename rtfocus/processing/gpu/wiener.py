"""Wiener: the linear restoration of every level from one forward transform.

Strength is read from the whole frame, where the CPU reads it from the rectangle
around a level's tiles: the same where a level fills the frame.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.gpu.statistics import PARTS, Light, Noise
from rtfocus.processing.gpu.work import (
    BLOCK,
    DeviceArray,
    DeviceMemory,
    Transforms,
    Work,
    spectrum_shape,
)
from rtfocus.processing.restore.fourier import transfer_function
from rtfocus.processing.restore.wiener import (
    BAND,
    CAUTION,
    HIGHEST_GAIN,
    ROUND_OFF,
    WienerFilter,
)

Image = NDArray[np.float32]


class WienerDeconvolution:
    """Wiener filters of all levels for one transform size.

    Parameters
    ----------
    memory
        Where transfer functions and work space lie.
    transforms
        Of the padded frame.
    psfs
        PSF per level.
    quantum
        Step between the camera's values; 0 for float frames.
    noise_to_signal
        Constant ratio of noise to signal power; None: estimated per frame.
    gain_e_per_count
        Of the camera, for that estimate; None: from the frame alone.
    """

    positive = False
    """Whether it is handed the signal without negative values."""

    def __init__(
        self,
        memory: DeviceMemory,
        transforms: Transforms,
        psfs: Mapping[int, Image],
        *,
        quantum: float,
        noise_to_signal: float | None,
        gain_e_per_count: float | None,
    ) -> None:
        shape = transforms.shape
        self._transforms = transforms
        self._given = noise_to_signal or 0.0
        self._quantum = quantum
        self._inverse_gain = 0.0 if gain_e_per_count is None else 1 / gain_e_per_count
        self._transfers: dict[int, DeviceArray] = {}
        powers = []
        for level, psf in psfs.items():
            transfer = transfer_function(psf, shape)
            known = WienerFilter(transfer, shape)
            powers.append(known.band_power)
            self._band_bins = known.band_bins
            self._transfers[level] = memory.upload(
                np.asarray(transfer, np.complex64), f"the PSF of level {level}"
            )
        self._band_powers = memory.upload(np.array(powers), "Wiener filters")
        self._ratios = memory.allocate((len(powers),), np.float32, "Wiener filters")
        half = spectrum_shape(shape)
        self._spectrum = memory.allocate(half, np.complex64, "spectra")
        self._filtered = memory.allocate(half, np.complex64, "spectra")
        self._band_sums = memory.allocate((PARTS,), np.float64, "Wiener filters")
        self._light = Light(memory)
        self._noise = Noise(memory, shape)

    def begin(self, work: Work, padded: DeviceArray) -> None:
        """Transform a padded plane and find how strong the noise is."""
        self._transforms.forward(work, padded, self._spectrum)
        if self._given:
            return
        height, width = self._transforms.shape
        self._light.enqueue(work, padded)
        self._noise.enqueue(work, padded)
        work.launch(
            "band_parts",
            PARTS * BLOCK,
            self._spectrum,
            height,
            width,
            *BAND,
            self._band_sums,
        )
        work.launch(
            "wiener_ratios",
            BLOCK,
            self._noise.sums,
            self._noise.counts,
            PARTS,
            self._noise.kept,
            self._noise.limit,
            self._quantum**2 / 12,
            ROUND_OFF,
            self._light.highest,
            self._light.sum,
            self._inverse_gain,
            self._band_sums,
            height * width,
            self._band_bins,
            CAUTION,
            self._ratios.count,
            self._band_powers,
            self._ratios,
        )

    def restore(
        self, work: Work, level: int, padded: DeviceArray, out: DeviceArray
    ) -> None:
        """Restore the plane given to `begin` with the PSF of a level."""
        del padded
        height, width = self._transforms.shape
        work.launch(
            "wiener_apply",
            self._spectrum.count,
            self._spectrum,
            self._transfers[level],
            height,
            width,
            self._ratios.from_element(list(self._transfers).index(level)),
            self._given,
            float(HIGHEST_GAIN),
            1 / (height * width),
            self._filtered,
        )
        self._transforms.inverse(work, self._filtered, out)
