"""Richardson-Lucy: matched or accelerated, one level after the other.

Through Fourier transforms rather than low-rank separable convolutions: an
iteration costs four transforms, some 220 operations per pixel whatever the PSF. The
farthest PSF of the reference optics (level 10, 63 px) is of rank 7 to one per cent
and 12 to one per mille, which two separable convolutions pay with 1,800 and 3,000
multiply-adds per pixel, and they stay an approximation.
One level at a time keeps the work space in the second-level cache of a large GPU.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.gpu.statistics import Light
from rtfocus.processing.gpu.work import (
    DeviceArray,
    DeviceMemory,
    Transforms,
    Work,
    spectrum_shape,
)
from rtfocus.processing.restore.fourier import transfer_function
from rtfocus.processing.restore.richardson_lucy import (
    ACCELERATED_ITERATIONS,
    DEFAULT_ITERATIONS,
    mean_power,
    schedule,
)

Image = NDArray[np.float32]


class RichardsonLucyDeconvolution:
    """Richardson-Lucy of all levels for one transform size.

    Parameters
    ----------
    memory
        Where transfer functions and work space lie.
    transforms
        Of the padded frame.
    psfs
        PSF per level.
    iterations
        None: 15, accelerated 4.
    accelerated
        Each iteration does the work of several.
    """

    positive = True

    def __init__(
        self,
        memory: DeviceMemory,
        transforms: Transforms,
        psfs: Mapping[int, Image],
        *,
        iterations: int | None,
        accelerated: bool,
    ) -> None:
        shape = transforms.shape
        self._transforms = transforms
        self._transfers: dict[int, DeviceArray] = {}
        self._steps: dict[int, list[float]] = {}
        for level, psf in psfs.items():
            transfer = transfer_function(psf, shape)
            self._steps[level] = [1.0] * (iterations or DEFAULT_ITERATIONS)
            if accelerated:
                count = iterations or ACCELERATED_ITERATIONS
                self._steps[level] = schedule(mean_power(transfer), count)
            self._transfers[level] = memory.upload(
                np.asarray(transfer, np.complex64), f"the PSF of level {level}"
            )
        self._spectrum = memory.allocate(spectrum_shape(shape), np.complex64, "spectra")
        self._blurred = memory.allocate(shape, np.float32, "spectra")
        self._light = Light(memory)

    def begin(self, work: Work, padded: DeviceArray) -> None:
        """Measure a padded plane."""
        self._light.enqueue(work, padded)

    def restore(
        self, work: Work, level: int, padded: DeviceArray, out: DeviceArray
    ) -> None:
        """Restore the plane given to `begin` with the PSF of a level.

        Starts from the blurred image (He 2020).
        """
        transfer = self._transfers[level]
        spectrum, blurred = self._spectrum, self._blurred
        scale = 1 / padded.count
        bins = spectrum.count
        work.copy(out, padded)
        for steps in self._steps[level]:
            self._transforms.forward(work, out, spectrum)
            work.launch("project", bins, spectrum, transfer, bins, scale)
            self._transforms.inverse(work, spectrum, blurred)
            work.launch(
                "richardson_lucy_ratio",
                padded.count,
                padded,
                blurred,
                padded.count,
                self._light.highest,
            )
            self._transforms.forward(work, blurred, spectrum)
            work.launch("back_project", bins, spectrum, transfer, bins, steps, scale)
            self._transforms.inverse(work, spectrum, blurred)
            work.launch(
                "richardson_lucy_update", padded.count, out, blurred, padded.count
            )
