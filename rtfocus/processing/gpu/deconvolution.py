"""Deconvolution: Fourier transforms on a CUDA stream, and what restores with them.

cuFFT, called through ctypes, is the named dependency of the classical restorations on
a GPU (package ``nvidia-cufft``).

**Wiener** restores every level from one forward transform. Its strength is read from
the whole frame, where the CPU reads it from the rectangle around a level's tiles: the
same where a level fills the frame.

**Richardson-Lucy** goes through Fourier transforms rather than low-rank separable
convolutions: an iteration costs four transforms, some 220 operations per pixel whatever
the PSF. The farthest PSF of the reference optics (level 10, 63 px) is of rank 7 to one
per cent and 12 to one per mille, which two separable convolutions pay with 1,800 and
3,000 multiply-adds per pixel, and they stay an approximation. One level at a time keeps
the work space in the second-level cache of a large GPU.
"""

import ctypes
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.cuda.driver import CUFFT, OutOfGpuMemoryError, load_library
from rtfocus.processing.gpu.statistics import PARTS, Light, Noise
from rtfocus.processing.gpu.work import (
    BLOCK,
    DeviceArray,
    DeviceMemory,
    Transforms,
    Work,
    spectrum_shape,
)
from rtfocus.processing.restore import (
    ACCELERATED_ITERATIONS,
    BAND,
    CAUTION,
    DEFAULT_ITERATIONS,
    HIGHEST_GAIN,
    ROUND_OFF,
    WienerFilter,
    mean_power,
    schedule,
    transfer_function,
)

_REAL_TO_COMPLEX = 0x2A
_COMPLEX_TO_REAL = 0x2C
_OUT_OF_MEMORY = 2
_NAMES = {
    1: "invalid plan",
    2: "no memory",
    3: "invalid type",
    4: "invalid value",
    5: "internal error",
    6: "execution failed",
    7: "set-up failed",
    8: "invalid size",
}


class CudaTransforms:
    """Implements `rtfocus.processing.gpu.work.Transforms` with cuFFT.

    Parameters
    ----------
    shape
        Height and width of the images.

    Raises
    ------
    EngineError
        If cuFFT is missing or cannot plan this shape.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._library = load_library(CUFFT)
        self._plans: list[ctypes.c_int] = []
        try:
            for kind in (_REAL_TO_COMPLEX, _COMPLEX_TO_REAL):
                self._plans.append(self._plan(kind))
        except EngineError:
            self.close()
            raise

    def forward(self, work: Work, image: DeviceArray, spectrum: DeviceArray) -> None:
        """Enqueue image -> half spectrum."""
        self._execute("cufftExecR2C", self._plans[0], work, image, spectrum)

    def inverse(self, work: Work, spectrum: DeviceArray, image: DeviceArray) -> None:
        """Enqueue half spectrum -> image, times height * width; spoils `spectrum`."""
        self._execute("cufftExecC2R", self._plans[1], work, spectrum, image)

    def close(self) -> None:
        """Free plans and their work space."""
        for plan in self._plans:
            self._library.cufftDestroy(plan)
        self._plans = []

    def _plan(self, kind: int) -> ctypes.c_int:
        plan = ctypes.c_int()
        status = self._library.cufftPlan2d(ctypes.byref(plan), *self.shape, kind)
        self._check(status, "planning")
        return plan

    def _execute(
        self,
        function: str,
        plan: ctypes.c_int,
        work: Work,
        source: DeviceArray,
        target: DeviceArray,
    ) -> None:
        self._check(
            self._library.cufftSetStream(plan, ctypes.c_void_p(work.handle)), "set-up"
        )
        status = self._library[function](
            plan, ctypes.c_void_p(source.address), ctypes.c_void_p(target.address)
        )
        self._check(status, function)

    def _check(self, status: int, what: str) -> None:
        if not status:
            return
        reason = _NAMES.get(status, f"error {status}")
        height, width = self.shape
        msg = f"cuFFT {what} for {height} x {width} px: {reason}"
        if status == _OUT_OF_MEMORY:
            msg += "; lower processing.gpu.frames_in_flight"
            raise OutOfGpuMemoryError(msg)
        raise EngineError(msg)


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
