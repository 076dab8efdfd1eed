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
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import RestorationConfig
from rtfocus.processing.cpu.classifier import Prediction
from rtfocus.processing.montage import Montage, paired_planes
from rtfocus.processing.restore import (
    BLIND,
    CAUTION,
    CUBED_BAND,
    HIGHEST_GAIN,
    WHOLE_FRAME,
    back_projectors,
    gaussian_like,
    iterate,
    iteration_steps,
    iterations_of,
    least_divisor,
    margin_px,
    noise_variance,
    padded_shape,
    read_region,
    together,
    transfer_function,
)

Image = NDArray[np.float32]

Planes = Sequence[tuple[Image, Image]]
"""Planes (y, x) of a frame, and where each one's result goes."""


class _Network(Protocol):
    runs_on: str

    def close(self) -> None: ...


class FrameRestorer(ABC):
    """Restores the frames of one channel.

    Safe to use from several threads, each with its own `out`.

    Parameters
    ----------
    network
        Of its own, closed by `close`; None: it has none.
    """

    def __init__(self, network: _Network | None = None) -> None:
        self.runs_on = None if network is None else network.runs_on
        """Runtime and precision of its own network; None: it has none."""
        self._owned = network

    @abstractmethod
    def restore_frame(
        self, signal: Image, prediction: Prediction | None, out: Image
    ) -> Image | None:
        """Restore a frame; return `FrameResult.expected_error`.

        Parameters
        ----------
        signal
            Axes (y, x) or (y, x, colour); camera offset removed, no NaN.
        prediction
            What the classifier saw in it; None: there is none, and the restorer does
            without.
        out
            Result, shape of `signal`, float32; in focus and background exactly as
            in `signal`, except of a restorer that knows no focus.
        """

    def close(self) -> None:
        """Free the network; called twice does nothing."""
        if self._owned is not None:
            self._owned.close()


def blend(signal: Image, restored: Image, share: Image, out: Image) -> None:
    """Move `out`, a copy of `signal`, towards the restored frame by a share.

    Parameters
    ----------
    signal, restored
        Axes (y, x) or (y, x, colour); negative light becomes 0, infinite NaN.
    share
        0 to 1, axes (y, x).
    out
        Shape of `signal`.
    """
    # Of minus infinity 0 would hide that the network is damaged; 0 times it is NaN.
    change = np.maximum(restored, 0 * restored)
    change -= signal
    change *= share if signal.ndim == 2 else share[..., None]
    out += change


class LevelRestorer(FrameRestorer):
    """A restorer that needs nothing but the level of every tile."""

    def restore_frame(
        self, signal: Image, prediction: Prediction | None, out: Image
    ) -> None:
        """Restore a frame by what the classifier saw, see `FrameRestorer`."""
        assert prediction is not None
        self.restore(signal, prediction.defocus.level, out)

    def restore(self, signal: Image, labels: NDArray[np.int16], out: Image) -> Image:
        """Restore a frame by the level of every tile; return `out`."""
        np.copyto(out, signal)
        self._restore_planes(paired_planes(signal, out), labels)
        return out

    @abstractmethod
    def _restore_planes(self, pairs: Planes, labels: NDArray[np.int16]) -> None:
        """Restore planes (y, x), each into a copy of it, non-negative there."""


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


class WienerDeconvolution:
    """The linear filter, strength read from each image unless the config gives it."""

    def __init__(
        self,
        psf: Image,
        shape: tuple[int, int],
        settings: RestorationConfig,
        gain_e_per_count: float | None = None,
    ) -> None:
        transfer = transfer_function(psf, shape)
        self._shape = shape
        self._back = np.conj(transfer)
        self._power = np.asarray(np.abs(transfer) ** 2, dtype=np.float32)
        self._given = settings.noise_to_signal
        self._gain = gain_e_per_count
        self._rise = _inverse_signal(shape)
        low, high = CUBED_BAND
        self._band = np.flatnonzero((self._rise > low) & (self._rise < high))
        blurred = self._power.flat[self._band] / self._rise.flat[self._band]
        # Power in the band of a signal whose power at one cycle per pixel is 1.
        self._band_power = float(blurred.sum(dtype=np.float64))

    def restore(self, plane: Surrounded) -> Image:
        """Restore with one inverse transform, and the plane's forward one."""
        from scipy import fft

        if self._given is not None:
            gain = self._back * np.float32(1.0 + self._given)
            gain /= self._power + np.float32(self._given)
        else:
            ratio = np.float32(self._noise_ratio(plane))
            gain = _limit(self._back / (self._power + ratio * self._rise))
        restored = fft.irfft2(plane.spectrum * gain, s=self._shape, overwrite_x=True)
        return np.asarray(restored, dtype=np.float32)

    def _noise_ratio(self, plane: Surrounded) -> float:
        """Return k: noise power over the signal's power at one cycle per pixel."""
        variance = plane.variance
        if self._gain is not None:
            # A camera that smooths or compresses hides its noise from the frame.
            variance = max(variance, float(plane.signal.mean()) / self._gain)
        band = plane.spectrum.take(self._band)
        pixels = self._shape[0] * self._shape[1]
        power = (band.real**2 + band.imag**2).sum(dtype=np.float64) / pixels
        # White noise has its variance in every bin; the rest is blurred signal.
        signal = max(float(power) - variance * band.size, 1e-3 * float(power))
        if signal <= 0.0 or self._band_power <= 0.0:
            return 1.0
        return CAUTION * variance * self._band_power / signal


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


class RichardsonLucyDeconvolution:
    """Richardson-Lucy as LB-DVD: starts from the blurred image (He 2020)."""

    def __init__(
        self, psf: Image, shape: tuple[int, int], settings: RestorationConfig
    ) -> None:
        self._shape = shape
        self._transfer = transfer_function(psf, shape)
        self._back = back_projectors(self._transfer, iteration_steps(psf, settings))

    def restore(self, plane: Surrounded) -> Image:
        """Iterate; negative counts (below the camera's offset) become 0."""
        return iterate(
            plane.signal,
            self._transfer,
            self._back,
            shape=self._shape,
            start=plane.signal,
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

    References
    ----------
    .. [1] D. A. Fish, A. M. Brinicombe, E. R. Pike, J. G. Walker, "Blind deconvolution
       by means of the Richardson-Lucy algorithm", J. Opt. Soc. Am. A 12, 1995.
    """

    def __init__(
        self, psf: Image, shape: tuple[int, int], settings: RestorationConfig
    ) -> None:
        self._shape = shape
        self._rounds = iterations_of(settings)
        self._start = gaussian_like(psf)

    def restore(self, plane: Surrounded) -> Image:
        """Iterate; negative counts (below the camera's offset) become 0."""
        return self.find(plane)[0]

    def find(self, plane: Surrounded) -> tuple[Image, Image]:
        """Return the restored image and the kernel, whose centre is its origin."""
        signal = image = plane.signal
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
        ratio = signal / np.maximum(blurred, least_divisor(signal))
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


Deconvolution = (
    WienerDeconvolution | RichardsonLucyDeconvolution | BlindRichardsonLucyDeconvolution
)
"""One PSF and one transform size, ready to restore images of that size."""
# Filters kept, in elements of their half spectra: 200 MB for Wiener. Regions of
# changing size share good transform sizes; one per level always fits.
_CACHED_ELEMENTS = 1 << 24


class DepthVariantRestorer(LevelRestorer):
    """Restores frames of one channel; filters are computed once and kept.

    Parameters
    ----------
    psfs
        PSF per level, for every level but 0; negative levels where they are signed.
    settings
        Method, one of `WHOLE_FRAME` or `BLIND`, and its numbers.
    quantum
        Step between the camera's values; 0 for float frames.
    gain_e_per_count
        Of the camera, for the noise that Wiener estimates; None: from the frame alone.
    """

    def __init__(
        self,
        montage: Montage,
        psfs: Mapping[int, Image],
        settings: RestorationConfig,
        *,
        quantum: float = 0.0,
        gain_e_per_count: float | None = None,
    ) -> None:
        super().__init__()
        if settings.method not in (known := (*WHOLE_FRAME, BLIND)):
            msg = f"method '{settings.method}' is not one of {', '.join(known)}"
            raise ValueError(msg)
        self._settings = settings
        self._montage = montage
        self._psfs = dict(psfs)
        self._quantum = quantum
        self._gain = gain_e_per_count
        self._halos = {
            level: margin_px(psf, settings.halo_px) for level, psf in psfs.items()
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
            place, (height, width) = (region.rows, region.columns), region.shape
            weights = {
                level: self._montage.weights(labels, level, region) for level in levels
            }
            for plane, into in pairs:
                padded = read_region(plane, region, shape)
                surrounded = Surrounded(padded, self._quantum)
                for level in levels:
                    restored = self._filter(level, shape).restore(surrounded)
                    change = restored[:height, :width]
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
        settings = self._settings
        if settings.method == "wiener":
            return WienerDeconvolution(psf, shape, settings, self._gain)
        if settings.method == BLIND:
            return BlindRichardsonLucyDeconvolution(psf, shape, settings)
        return RichardsonLucyDeconvolution(psf, shape, settings)
