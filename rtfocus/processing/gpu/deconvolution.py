"""Deconvolution: of padded images by one PSF, as its like on the CPU.

Images of any size are restored; what is kept for one size is the transfer function of
every level over whole frames.

**Richardson-Lucy** goes through Fourier transforms rather than low-rank separable
convolutions: an iteration costs four transforms, some 220 operations per pixel whatever
the PSF. The farthest PSF of the reference optics (level 10, 63 px) is of rank 7 to one
per cent and 12 to one per mille, which two separable convolutions pay with 1,800 and
3,000 multiply-adds per pixel, and they stay an approximation. One level at a time keeps
the work space in the second-level cache of a large GPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import RestorationConfig
from rtfocus.processing.gpu.work import (
    BLOCK,
    PARTS,
    DeviceArray,
    DeviceMemory,
    Light,
    Noise,
    Transforms,
    Work,
    spectrum_shape,
)
from rtfocus.processing.restore import (
    CAUTION,
    CUBED_BAND,
    HIGHEST_GAIN,
    ROUND_OFF,
    iteration_steps,
    iterations_of,
)

Image = NDArray[np.float32]


class LevelTransfers:
    """Transfer functions of the levels: of whole frames kept, of others made anew.

    Parameters
    ----------
    psfs
        Per level.
    whole
        Height and width, per level, of the transforms of a whole frame.
    kept
        False: they are placed only, and no room is kept for them.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        transforms: Transforms,
        psfs: Mapping[int, Image],
        whole: Mapping[int, tuple[int, int]],
        *,
        kept: bool = True,
    ) -> None:
        self.memory = memory
        self.transforms = transforms
        self.psfs = psfs
        heights, widths = zip(*whole.values(), strict=True)
        self.largest = max(heights), max(widths)
        """Sides that hold the transforms of every level."""
        self._psfs = {
            level: memory.upload(psf, f"the PSF of level {level}")
            for level, psf in psfs.items()
        }
        self._whole = {
            level: memory.allocate(
                spectrum_shape(shape), np.complex64, f"the PSF of level {level}"
            )
            for level, shape in (whole if kept else {}).items()
        }
        self._made: set[int] = set()
        self._other = self.spectrum(self.largest)

    def spectrum(self, shape: tuple[int, ...]) -> DeviceArray:
        """Reserve the half spectrum of images of a shape."""
        return self.memory.allocate(spectrum_shape(shape), np.complex64, "spectra")

    def enqueue(self, work: Work, level: int, image: DeviceArray) -> DeviceArray:
        """Return the transfer function of a level; `image`, of its shape, is spoilt."""
        shape = spectrum_shape(image.shape)
        whole = self._whole[level]
        if whole.shape != shape:
            return self._make(work, level, image, self._other.shaped(shape))
        if level not in self._made:
            self._make(work, level, image, whole)
            self._made.add(level)
        return whole

    def place(self, work: Work, level: int, image: DeviceArray) -> None:
        """Enqueue writing the PSF of a level into an image, its centre the origin."""
        psf = self._psfs[level]
        work.launch("place_psf", image.count, psf, *psf.shape, *image.shape, image)

    def iterate(
        self,
        work: Work,
        transfer: DeviceArray,
        steps: Sequence[float],
        *,
        seen: DeviceArray,
        estimate: DeviceArray,
        blurred: DeviceArray,
        spectrum: DeviceArray,
        highest: DeviceArray,
    ) -> None:
        """Enqueue Richardson-Lucy: what is `seen`, one image or several -> `estimate`.

        Each iteration stands for so many matched `steps`; `blurred` and `spectrum` are
        work space, `highest` the brightest pixel.
        """
        before = seen
        for step in steps:
            self.project(work, transfer, before, spectrum, blurred)
            positive_ratio(work, seen, blurred, highest)
            self.project(work, transfer, blurred, spectrum, blurred, step)
            positive_update(work, before, blurred, estimate)
            before = estimate

    def project(
        self,
        work: Work,
        transfer: DeviceArray,
        images: DeviceArray | None,
        spectrum: DeviceArray,
        out: DeviceArray,
        steps: float = 0.0,
    ) -> None:
        """Enqueue images -> blurred, or projected back by so many matched steps.

        `images` None: `spectrum` is theirs already.
        """
        if images is not None:
            self.transforms.forward(work, images, spectrum)
        bins = transfer.count
        rows = spectrum.count // bins
        scale = rows / out.count
        work.launch("project", bins, spectrum, transfer, bins, steps, scale, rows=rows)
        self.transforms.inverse(work, spectrum, out)

    def _make(
        self, work: Work, level: int, image: DeviceArray, transfer: DeviceArray
    ) -> DeviceArray:
        self.place(work, level, image)
        self.transforms.forward(work, image, transfer)
        return transfer


class Deconvolution(ABC):
    """Restores padded planes of any size, level by level.

    Parameters
    ----------
    spectra, images
        How many of each it works on beside what it is handed.
    """

    positive = True
    """Whether it is handed the signal without negative values."""

    def __init__(
        self, transfers: LevelTransfers, *, spectra: int = 1, images: int = 1
    ) -> None:
        memory, largest = transfers.memory, transfers.largest
        self._transforms = transfers.transforms
        self._transfers = transfers
        self._light = Light(memory)
        self._spectra = [transfers.spectrum(largest) for _ in range(spectra)]
        self._images = [
            memory.allocate(largest, np.float32, "spectra") for _ in range(images)
        ]

    def look(self, work: Work, padded: DeviceArray) -> None:
        """Enqueue what is found of a plane once, whatever the levels: the light."""
        self._light.enqueue(work, padded)

    @abstractmethod
    def restore(
        self, work: Work, level: int, padded: DeviceArray, out: DeviceArray
    ) -> None:
        """Enqueue the restoration of the plane looked at last, by one level's PSF."""


class WienerDeconvolution(Deconvolution):
    """Wiener filters of all levels, strength read from each image.

    Parameters
    ----------
    quantum
        Step between the camera's values; 0 for float frames.
    gain_e_per_count
        Of the camera, for the noise that is estimated; None: from the image alone.
    """

    positive = False

    def __init__(
        self,
        transfers: LevelTransfers,
        settings: RestorationConfig,
        *,
        quantum: float,
        gain_e_per_count: float | None,
    ) -> None:
        super().__init__(transfers, spectra=2, images=0)
        memory = transfers.memory
        self._given = settings.noise_to_signal or 0.0
        self._quantum = quantum
        self._inverse_gain = 0.0 if gain_e_per_count is None else 1 / gain_e_per_count
        self._ratio = memory.allocate((1,), np.float32, "Wiener filters")
        self._band_sums = memory.allocate((3, PARTS), np.float64, "Wiener filters")
        self._noise = Noise(memory, transfers.largest)

    def look(self, work: Work, padded: DeviceArray) -> None:
        """Transform an image, and find how strong its noise is."""
        spectrum = self._spectra[0].shaped(spectrum_shape(padded.shape))
        self._transforms.forward(work, padded, spectrum)
        if not self._given:
            super().look(work, padded)
            self._noise.enqueue(work, padded)

    def restore(
        self, work: Work, level: int, padded: DeviceArray, out: DeviceArray
    ) -> None:
        """Restore with one inverse transform."""
        transfer = self._transfers.enqueue(work, level, out)
        spectrum, filtered = (half.shaped(transfer.shape) for half in self._spectra)
        if not self._given:
            self._find_ratio(work, padded, spectrum, transfer)
        work.launch(
            "wiener_apply",
            spectrum.count,
            spectrum,
            transfer,
            *padded.shape,
            self._ratio,
            self._given,
            float(HIGHEST_GAIN),
            1 / padded.count,
            filtered,
        )
        self._transforms.inverse(work, filtered, out)

    def _find_ratio(
        self,
        work: Work,
        padded: DeviceArray,
        spectrum: DeviceArray,
        transfer: DeviceArray,
    ) -> None:
        """Enqueue weighing the noise against what a level leaves of the signal."""
        work.launch(
            "band_parts",
            PARTS * BLOCK,
            spectrum,
            transfer,
            *padded.shape,
            *CUBED_BAND,
            self._band_sums,
        )
        work.launch(
            "wiener_ratio",
            BLOCK,
            self._noise.sums,
            self._noise.counts,
            PARTS,
            self._noise.kept(padded.shape),
            self._noise.limit,
            self._quantum**2 / 12,
            ROUND_OFF,
            self._light.highest,
            self._light.sum,
            self._inverse_gain,
            self._band_sums,
            padded.count,
            CAUTION,
            self._ratio,
        )


class RichardsonLucyDeconvolution(Deconvolution):
    """Richardson-Lucy of all levels."""

    def __init__(self, transfers: LevelTransfers, settings: RestorationConfig) -> None:
        super().__init__(transfers)
        self._steps = {
            level: iteration_steps(psf, settings)
            for level, psf in transfers.psfs.items()
        }

    def restore(
        self, work: Work, level: int, padded: DeviceArray, out: DeviceArray
    ) -> None:
        """Iterate, starting from the blurred image (He 2020)."""
        transfer = self._transfers.enqueue(work, level, out)
        spectrum = self._spectra[0].shaped(transfer.shape)
        blurred = self._images[0].shaped(padded.shape)
        self._transfers.iterate(
            work,
            transfer,
            self._steps[level],
            seen=padded,
            estimate=out,
            blurred=blurred,
            spectrum=spectrum,
            highest=self._light.highest,
        )


def positive_ratio(
    work: Work, signal: DeviceArray, blurred: DeviceArray, highest: DeviceArray
) -> None:
    """Enqueue ``blurred = signal / blurred``, nothing divided by round-off."""
    work.launch(
        "richardson_lucy_ratio", signal.count, signal, blurred, signal.count, highest
    )


def positive_update(
    work: Work, before: DeviceArray, factor: DeviceArray, out: DeviceArray
) -> None:
    """Enqueue ``out = before * factor``, negative values as 0."""
    work.launch("richardson_lucy_update", out.count, before, factor, out.count, out)


class BlindRichardsonLucyDeconvolution(Deconvolution):
    """Richardson-Lucy that finds the kernel too, as its like on the CPU.

    The kernel is an image of the padded size, 0 outside its window: multiplicative
    steps leave it so.

    Parameters
    ----------
    transfers
        Only placed: of the kernels it begins with.
    """

    def __init__(self, transfers: LevelTransfers, settings: RestorationConfig) -> None:
        super().__init__(transfers, spectra=3, images=2)
        self._rounds = iterations_of(settings)
        self._kernel_light = Light(transfers.memory)

    def restore(
        self, work: Work, level: int, padded: DeviceArray, out: DeviceArray
    ) -> None:
        """Improve the kernel with the image held, then the image, round by round."""
        half = spectrum_shape(padded.shape)
        spectra = seen, transfer, _ = [array.shaped(half) for array in self._spectra]
        kernel, blurred = (image.shaped(padded.shape) for image in self._images)
        self._transfers.place(work, level, kernel)
        self._transforms.forward(work, kernel, transfer)
        before = padded
        for _ in range(self._rounds):
            self._transforms.forward(work, before, seen)
            self._correct(work, padded, blurred, spectra, back=seen)
            positive_update(work, kernel, blurred, blurred)
            self._kernel_light.enqueue(work, blurred)
            count, total = kernel.count, self._kernel_light.sum
            work.launch("kernel_settle", count, kernel, blurred, count, total)
            self._transforms.forward(work, kernel, transfer)
            self._correct(work, padded, blurred, spectra, back=transfer)
            positive_update(work, before, blurred, out)
            before = out

    def _correct(
        self,
        work: Work,
        padded: DeviceArray,
        blurred: DeviceArray,
        spectra: Sequence[DeviceArray],
        *,
        back: DeviceArray,
    ) -> None:
        """Write to `blurred` what image or kernel is to be multiplied by."""
        seen, transfer, product = spectra
        work.copy(product, seen)
        self._transfers.project(work, transfer, None, product, blurred)
        positive_ratio(work, padded, blurred, self._light.highest)
        self._transfers.project(work, back, blurred, product, blurred, 1.0)
