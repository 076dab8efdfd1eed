"""Depth variant: a whole frame, each pixel by the PSFs of the tiles around it.

``out = signal + sum over levels of w_level * (R_level(signal) - signal)``: one
deconvolution per level that is present, over the smallest rectangle its tiles
touch, blended with the montage weights. Background and level 0 have no term, so
their pixels come back exactly as they went in.

Deconvolutions, Wiener's or Richardson-Lucy's, run on half spectra of real images. A
transform larger than the image gives zero borders, one of equal size periodic ones
(the image is then padded by its margin).
"""

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.cpu.classifier import Seen
from rtfocus.processing.montage import (
    Montage,
    crop,
    paired_planes,
    read_region,
    together,
)
from rtfocus.processing.restore import (
    BLIND,
    BLIND_ITERATIONS,
    WHOLE_FRAME,
    WienerFilter,
    back_projectors,
    gaussian_like,
    iteration_steps,
    margin_px,
    noise_variance,
    padded_shape,
    photon_variance,
    transfer_function,
)

Image = NDArray[np.float32]


Planes = Sequence[tuple[Image, Image]]
"""Planes (y, x) of a frame, and where each one's result goes."""


class LevelRestorer(ABC):
    """A `FrameRestorer` that needs nothing but the level of every tile.

    Safe to use from several threads, each with its own `out`.
    """

    runs_on: str | None = None

    def restore_frame(self, signal: Image, seen: Seen | None, out: Image) -> None:
        """Restore a frame by what the classifier saw, see `FrameRestorer`."""
        assert seen is not None
        self.restore(signal, seen.defocus.level, out)

    def restore(
        self,
        signal: Image,
        labels: NDArray[np.int16],
        out: Image,
    ) -> Image:
        """Restore a frame.

        Parameters
        ----------
        signal
            Axes (y, x) or (y, x, colour); camera offset removed, no NaN.
        labels
            Level per tile, axes (tile_y, tile_x), as `DefocusMap.level`.
        out
            Result, shape of `signal`, float32; non-negative where restored.

        Returns
        -------
        Image
            `out`.
        """
        np.copyto(out, signal)
        self._restore_planes(paired_planes(signal, out), labels)
        return out

    @abstractmethod
    def _restore_planes(self, pairs: Planes, labels: NDArray[np.int16]) -> None:
        """Restore planes (y, x), each into a copy of it."""

    def close(self) -> None:  # noqa: B027 - most have nothing to free
        """Free what it runs; called twice does nothing."""


class Surrounded:
    """A plane in its margin, and what is found of it once, whatever the levels.

    Parameters
    ----------
    image
        Axes (y, x), periodic, as of `read_region`.
    quantum
        Step between the camera's values; 0 for float frames.
    """

    def __init__(self, image: Image, quantum: float = 0.0) -> None:
        self.image = image
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
        # Where it is used: a processor takes frames before SciPy is loaded.
        from scipy import fft

        return np.asarray(fft.rfft2(self.image))


class Deconvolution(Protocol):
    """One PSF and one transform size, ready to restore images of that size."""

    def restore(self, seen: Surrounded) -> Image:
        """Restore a plane in its margin; a new array of the same shape."""
        ...


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
        return self._filter.apply(seen.spectrum, variance)


# Blurred estimates below this share of the brightest pixel are round-off of the
# transforms, and nothing may be divided by them.
_FLOOR = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-12}


def iterate(
    signal: NDArray[Any],
    transfer: NDArray[Any],
    back: Sequence[NDArray[Any]],
    *,
    shape: tuple[int, int],
    start: NDArray[Any],
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
    """
    floor = _floor(signal)
    estimate = start.copy()
    # The matched update keeps the estimate non-negative up to round-off; an
    # unmatched back projector has negative lobes.
    for projector in back:
        blurred = _project(estimate, transfer, shape)
        np.maximum(blurred, floor, out=blurred)
        np.divide(signal, blurred, out=blurred)
        estimate *= _project(blurred, projector, shape)
        np.maximum(estimate, 0, out=estimate)
    return estimate


def _floor(signal: NDArray[Any]) -> float:
    """Return the least that is divided by."""
    floor = _FLOOR[signal.dtype] * float(np.max(signal, initial=0.0))
    return max(floor, float(np.finfo(signal.dtype).tiny))


def _project(
    image: NDArray[Any], transfer: NDArray[Any], shape: tuple[int, int]
) -> NDArray[Any]:
    """Convolve by one multiplication of the spectrum; cut to the image's size."""
    from scipy import fft

    spectrum = fft.rfft2(image, s=shape)
    spectrum *= transfer
    result = fft.irfft2(spectrum, s=shape, overwrite_x=True)
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
        signal = image = seen.signal
        kernel = self._start
        for _ in range(self._rounds):
            kernel = self._better_kernel(kernel, signal, image)
            transfer = transfer_function(kernel, self._shape)
            image = iterate(
                signal,
                transfer,
                [np.conj(transfer)],
                shape=self._shape,
                start=image,
            )
        return image, kernel

    def _better_kernel(self, kernel: Image, signal: Image, image: Image) -> Image:
        """Take one step with the roles of image and kernel exchanged."""
        from scipy import fft

        spectrum = fft.rfft2(image)
        product = spectrum * transfer_function(kernel, self._shape)
        blurred = fft.irfft2(product, s=self._shape)
        ratio = signal / np.maximum(blurred, _floor(signal))
        spectrum = np.conj(spectrum) * fft.rfft2(ratio)
        factor = fft.irfft2(spectrum, s=self._shape)
        rows, columns = (
            np.arange(-(side // 2), side // 2 + 1) % length
            for side, length in zip(kernel.shape, self._shape, strict=True)
        )
        better = kernel * np.maximum(factor[np.ix_(rows, columns)], 0)
        total = float(better.sum())
        # A black frame tells nothing of the kernel.
        return np.asarray(better / total, np.float32) if total > 0 else kernel


# Filters kept, in elements of their half spectra: 200 MB for Wiener. Regions of
# changing size share good transform sizes; one per level always fits.
_CACHED_ELEMENTS = 1 << 24


class DepthVariantRestorer(LevelRestorer):
    """Restores frames of one channel; filters are computed once and kept.

    Parameters
    ----------
    psfs
        PSF per level, for every level but 0; negative levels where they are signed.
    method
        One of `WHOLE_FRAME`, or `BLIND`.
    iterations
        Of Richardson-Lucy; None: 15, accelerated 4, rounds of the blind one 8.
    noise_to_signal
        Of Wiener; None: estimated per frame and level.
    quantum
        Step between the camera's values; 0 for float frames.
    gain_e_per_count
        Of the camera, for that estimate; None: from the frame alone.
    halo_px
        Context around a region; None: half the side of the PSF, which holds 99 %
        of its energy.
    """

    def __init__(
        self,
        montage: Montage,
        psfs: Mapping[int, Image],
        *,
        method: str = "wiener",
        iterations: int | None = None,
        noise_to_signal: float | None = None,
        quantum: float = 0.0,
        gain_e_per_count: float | None = None,
        halo_px: int | None = None,
    ) -> None:
        if method not in (*WHOLE_FRAME, BLIND):
            msg = f"method '{method}' is not one of {', '.join((*WHOLE_FRAME, BLIND))}"
            raise ValueError(msg)
        self.method = method
        self._montage = montage
        self._psfs = dict(psfs)
        self._iterations = iterations
        self._noise_to_signal = noise_to_signal
        self._quantum = quantum
        self._gain = gain_e_per_count
        self._halos = {
            level: margin_px(psf, halo_px) for level, psf in self._psfs.items()
        }
        self._lock = threading.Lock()
        self._filters: OrderedDict[Any, Deconvolution] = OrderedDict()

    def _restore_planes(self, pairs: Planes, labels: NDArray[np.int16]) -> None:
        regions = self._montage.regions(labels)
        shapes = {
            level: padded_shape(region.shape, self._halos[level])
            for level, region in regions.items()
        }
        for region, shape, levels in together(regions, shapes):
            place = region.rows, region.columns
            weights = {
                level: self._montage.weights(labels, level, region) for level in levels
            }
            for plane, into in pairs:
                padded = read_region(plane, region, shape)
                seen = Surrounded(padded, self._quantum)
                for level in levels:
                    restored = self._filter(level, shape).restore(seen)
                    change = crop(restored, region.shape, 0)
                    np.maximum(change, 0, out=change)
                    change -= plane[place]
                    change *= weights[level]
                    into[place] += change

    def _filter(self, level: int, shape: tuple[int, int]) -> Deconvolution:
        """Build a filter or take it from the cache, oldest out first."""
        key = (level, shape)
        with self._lock:
            if key in self._filters:
                self._filters.move_to_end(key)
            else:
                self._filters[key] = self._build(self._psfs[level], shape)
                self._forget_oldest()
            return self._filters[key]

    def _forget_oldest(self) -> None:
        """Drop filters beyond the bound, but never those of one whole frame."""
        sizes = [shape[0] * (shape[1] // 2 + 1) for _, shape in self._filters]
        bound = max(_CACHED_ELEMENTS, len(self._psfs) * max(sizes))
        while sum(sizes) > bound:
            self._filters.popitem(last=False)
            sizes.pop(0)

    def _build(self, psf: Image, shape: tuple[int, int]) -> Deconvolution:
        if self.method == "wiener":
            return WienerDeconvolution(
                psf,
                shape,
                noise_to_signal=self._noise_to_signal,
                gain_e_per_count=self._gain,
            )
        if self.method == BLIND:
            rounds = self._iterations or BLIND_ITERATIONS
            return BlindRichardsonLucyDeconvolution(psf, shape, rounds)
        steps = iteration_steps(psf, self.method, self._iterations)
        return RichardsonLucyDeconvolution(psf, shape, steps)
