"""Deconvolution: of images by one PSF, with Wiener's filter or Richardson-Lucy's.

Everything runs on half spectra of real images; leading axes are batches. A
transform larger than the image gives zero borders, one of equal size periodic
ones (the caller has then padded the image by mirroring).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from rtfocus.processing.restore import (
    DEFAULT_ITERATIONS,
    WienerFilter,
    back_projectors,
    gaussian_like,
    noise_variance,
    patch_shape,
    photon_variance,
    transfer_function,
)

Image = NDArray[np.float32]


class Surrounded:
    """A plane in its margin, and what is found of it once, whatever the levels.

    Parameters
    ----------
    image
        Axes (y, x), periodic, as of `read_region`.
    quantum
        Step between the camera's values; 0 for float frames.
    workers
        Threads of the Fourier transforms.
    """

    def __init__(self, image: Image, quantum: float = 0.0, workers: int = 1) -> None:
        self.image = image
        self.workers = workers
        self._quantum = quantum

    @cached_property
    def signal(self) -> Image:
        """The image without negative values."""
        return np.maximum(self.image, 0)

    @cached_property
    def variance(self) -> float:
        """Mean variance of the noise, from the image alone."""
        return noise_variance(self.image, self._quantum)

    @cached_property
    def spectrum(self) -> NDArray[Any]:
        """Half spectrum of the image."""
        return np.asarray(fft.rfft2(self.image, workers=self.workers))


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
        self._given = noise_to_signal is not None

    def restore(self, seen: Surrounded) -> Image:
        """Restore with one inverse transform, and the plane's forward one."""
        variance = 0.0 if self._given else seen.variance
        if self._gain is not None and not self._given:
            # A camera that smooths or compresses hides its noise from the frame.
            variance = max(variance, photon_variance(seen.image, self._gain))
        return self._filter.apply(seen.spectrum, variance, seen.workers)


Start = Literal["image", "flat"]

# Blurred estimates below this share of the brightest pixel are round-off of the
# transforms, and nothing may be divided by them.
_FLOOR = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-12}
_FLAT = 0.5
"""The constant scikit-image starts from, for images scaled to [0, 1]."""


def richardson_lucy(
    image: NDArray[Any],
    psf: NDArray[Any],
    iterations: int = DEFAULT_ITERATIONS,
    *,
    start: Start = "image",
    workers: int = 1,
) -> NDArray[Any]:
    """Deconvolve an image with zeros beyond its borders.

    Parameters
    ----------
    image
        Axes (..., y, x), non-negative; float64 is kept, all else becomes float32.
    psf
        Axes (y, x), odd sides, sums to 1.
    iterations
        Each costs four Fourier transforms.
    start
        ``image``: the blurred image (He 2020, LB-DVD). ``flat``: 0.5 everywhere,
        as ``skimage.restoration.richardson_lucy``, for images in [0, 1].
    workers
        Threads of the transforms.

    Returns
    -------
    NDArray
        Shape of `image`; not clipped.

    References
    ----------
    .. [1] L. He et al., 2020, eq. 3.
    """
    dtype = np.float64 if image.dtype == np.float64 else np.float32
    signal = np.asarray(image, dtype=dtype)
    height, width = patch_shape((signal.shape[-2], signal.shape[-1]), psf.shape)
    transfer = transfer_function(psf.astype(dtype), (height, width))
    estimate = signal if start == "image" else np.full_like(signal, _FLAT)
    return iterate(
        signal,
        transfer,
        [np.conj(transfer)] * iterations,
        shape=(height, width),
        start=estimate,
        workers=workers,
    )


def iterate(
    signal: NDArray[Any],
    transfer: NDArray[Any],
    back: Sequence[NDArray[Any]],
    *,
    shape: tuple[int, int],
    start: NDArray[Any],
    workers: int = 1,
) -> NDArray[Any]:
    """Run the Richardson-Lucy iteration with any back projectors.

    Parameters
    ----------
    signal
        Blurred images, axes (..., y, x), float, non-negative.
    transfer
        Forward projector: OTF over the half spectrum of `shape`.
    back
        Back projector of every iteration; the matched one is ``conj(transfer)``.
    shape
        Height and width of the transforms, at least those of `signal`.
    start
        First estimate, left as it is.
    workers
        Threads of the transforms.
    """
    floor = _FLOOR[signal.dtype] * float(np.max(signal, initial=0.0))
    floor = max(floor, float(np.finfo(signal.dtype).tiny))
    estimate = start.copy()
    # The matched update keeps the estimate non-negative up to round-off; an
    # unmatched back projector has negative lobes.
    for projector in back:
        blurred = _project(estimate, transfer, shape, workers)
        np.maximum(blurred, floor, out=blurred)
        np.divide(signal, blurred, out=blurred)
        estimate *= _project(blurred, projector, shape, workers)
        np.maximum(estimate, 0, out=estimate)
    return estimate


def _project(
    image: NDArray[Any], transfer: NDArray[Any], shape: tuple[int, int], workers: int
) -> NDArray[Any]:
    """Convolve by one multiplication of the spectrum; cut to the image's size."""
    spectrum = fft.rfft2(image, s=shape, workers=workers)
    spectrum *= transfer
    result = fft.irfft2(spectrum, s=shape, workers=workers, overwrite_x=True)
    height, width = image.shape[-2:]
    return np.asarray(result[..., :height, :width])


class RichardsonLucyDeconvolution:
    """Richardson-Lucy as LB-DVD: starts from the blurred image (He 2020)."""

    def __init__(
        self, psf: Image, shape: tuple[int, int], steps: Sequence[float]
    ) -> None:
        self._shape = shape
        self._transfer = transfer_function(psf, shape)
        self._back = back_projectors(self._transfer, steps)

    def restore(self, seen: Surrounded) -> Image:
        """Iterate; negative counts (below the camera's offset) become 0."""
        return iterate(
            seen.signal,
            self._transfer,
            self._back,
            shape=self._shape,
            start=seen.signal,
            workers=seen.workers,
        )


class BlindRichardsonLucyDeconvolution:
    """Richardson-Lucy that finds the kernel too (Fish et al. 1995).

    Each round improves the kernel with the image held, then the image with the kernel
    held, both by the same multiplicative step. Without knowledge the kernel drifts
    towards a point or towards the image itself; what holds it is where it starts, a
    Gaussian as wide as the PSF of the level, and the window it stays in.

    Parameters
    ----------
    psf
        Of the level; only its width and the size of its window are used.
    shape
        Height and width of the transforms, those of the images.
    rounds
        Of kernel and image.

    References
    ----------
    .. [1] D. A. Fish, A. M. Brinicombe, E. R. Pike, J. G. Walker, "Blind deconvolution
       by means of the Richardson-Lucy algorithm", J. Opt. Soc. Am. A 12, 1995.
    """

    def __init__(self, psf: Image, shape: tuple[int, int], rounds: int) -> None:
        self._shape = shape
        self._rounds = rounds
        self._start = gaussian_like(psf)

    def restore(self, seen: Surrounded) -> Image:
        """Iterate; negative counts (below the camera's offset) become 0."""
        return self.find(seen)[0]

    def find(self, seen: Surrounded) -> tuple[Image, Image]:
        """Return the restored image and the kernel, whose centre is its origin."""
        signal, workers = seen.signal, seen.workers
        image, kernel = signal, self._start
        for _ in range(self._rounds):
            kernel = self._better_kernel(kernel, signal, image, workers)
            transfer = transfer_function(kernel, self._shape)
            image = iterate(
                signal,
                transfer,
                [np.conj(transfer)],
                shape=self._shape,
                start=image,
                workers=workers,
            )
        return image, kernel

    def _better_kernel(
        self, kernel: Image, signal: Image, image: Image, workers: int
    ) -> Image:
        """Take one step with the roles of image and kernel exchanged."""
        spectrum = fft.rfft2(image, workers=workers)
        product = spectrum * transfer_function(kernel, self._shape)
        blurred = fft.irfft2(product, s=self._shape, workers=workers)
        floor = max(
            _FLOOR[signal.dtype] * float(signal.max(initial=0.0)),
            float(np.finfo(signal.dtype).tiny),
        )
        ratio = signal / np.maximum(blurred, floor)
        spectrum = np.conj(spectrum) * fft.rfft2(ratio, workers=workers)
        factor = fft.irfft2(spectrum, s=self._shape, workers=workers)
        rows, columns = (
            np.arange(-(side // 2), side // 2 + 1) % length
            for side, length in zip(kernel.shape, self._shape, strict=True)
        )
        better = kernel * np.maximum(factor[np.ix_(rows, columns)], 0)
        total = float(better.sum())
        # A black frame tells nothing of the kernel.
        return np.asarray(better / total, np.float32) if total > 0 else kernel
