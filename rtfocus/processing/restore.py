"""Restore: the classical restorations as every device knows them.

**Wiener** is linear, as strong as the noise allows. Signal power falls with frequency
as ``A / f^3`` (edges and texture of cells), so that the filter is ``H* / (|H|^2 + k
f^3)`` with one number ``k = noise / A``, which is read from the frame's own spectrum.
The gain is limited, and exactly 1 at f = 0: brightness is kept whatever the noise.

**Richardson-Lucy** takes several steps in each iteration. To first order m matched
iterations multiply what is still missing at a frequency by ``(1 - |H|^2)^m``. One
iteration with the unmatched back projector ``B_m = H* (1 - (1 - |H|^2)^m) / |H|^2``
does the same. The idea of an unmatched back projector is that of Guo et al. 2020; this
form follows the matched algorithm in signal and noise alike, where their
Wiener-Butterworth form, at the best parameters found, misses it by up to 1 dB at some
levels.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

WHOLE_FRAME = ("wiener", "richardson_lucy", "richardson_lucy_accelerated")
"""Deconvolutions of whole frames, level by level."""

PATCH_BY_PATCH = "richardson_lucy_tiles"
"""LB-DVD as published (He 2020)."""

BLIND = "richardson_lucy_blind"
"""Kernel and image in turn (Fish et al. 1995): the reference for what knows no PSF."""

NEEDS_OPTICS = (*WHOLE_FRAME, PATCH_BY_PATCH)
"""Those that compute PSFs and trust them."""

METHODS = (*NEEDS_OPTICS, BLIND)
"""Restorations built in; any other name but ``none`` is an engine's."""

LEARNED_WIENER = "builtin:learned_wiener"
"""Implementation of engines that predict the strength of a Wiener filter."""


Image = NDArray[np.float32]
Spectrum = NDArray[Any]
"""Half spectrum of a real image (`rfft2`), complex, or real for an even PSF."""

# An OTF whose imaginary part stays below this is that of an even PSF.
_EVEN = 1e-6


def padded_shape(shape: tuple[int, int], halo_px: int) -> tuple[int, int]:
    """Return the next sizes with small prime factors that hold frame and halo."""
    # Where it is used: a processor answers before it has loaded SciPy.
    from scipy import fft

    height, width = (
        int(fft.next_fast_len(side + 2 * halo_px, real=True)) for side in shape
    )
    return height, width


def transfer_function(psf: Image, shape: tuple[int, int]) -> Spectrum:
    """Transform a PSF, its centre at the origin, to the half spectrum of `shape`.

    A PSF larger than `shape` wraps around, as periodic convolution does. An even
    PSF gives a real array: half the memory and a third of the multiplications.
    """
    from scipy import fft

    kernel = np.zeros(shape, dtype=psf.dtype)
    half = [side // 2 for side in psf.shape]
    rows = (np.arange(psf.shape[0]) - half[0]) % shape[0]
    columns = (np.arange(psf.shape[1]) - half[1]) % shape[1]
    np.add.at(kernel, np.ix_(rows, columns), psf)
    spectrum = fft.rfft2(kernel)
    if np.abs(spectrum.imag).max() < _EVEN:
        return np.ascontiguousarray(spectrum.real)
    return np.asarray(spectrum)


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
        from scipy import fft

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


DEFAULT_ITERATIONS = 15
"""He 2020, section 2.3."""
ACCELERATED_ITERATIONS = 4
BLIND_ITERATIONS = 8
"""Rounds of kernel and image, chosen on nuclei out of focus; more fit the noise."""

# Matched iterations that each of four iterations stands for, falling, so that the
# last ones settle the noise. Chosen on nuclei and real fields at two photon
# levels (bench/deconvolution.py): a mild blur ends earlier than a strong one.
_MILD = (6.5, 4.5, 2.5, 1.5)
_STRONG = (6.0, 5.0, 4.0, 2.0)
# Mean of |H|^2 over all frequencies: the share of white light that passes a blur.
_STRONG_PASSES = 0.003
_MILD_PASSES = 0.012
# Below this |H|^2 the quotient takes its limit, m.
_SMALLEST = 1e-6


def back_projectors(
    transfer: NDArray[Any], iterations: int = ACCELERATED_ITERATIONS
) -> list[NDArray[Any]]:
    """Build the back projector of every iteration for one transfer function.

    Parameters
    ----------
    transfer
        OTF over the half spectrum.
    iterations
        How many iterations the work of fifteen matched ones is spread over.

    Returns
    -------
    list
        Half spectra in the order of use; gain 1 at f = 0.

    References
    ----------
    .. [1] M. Guo et al., "Rapid image deconvolution and multiview fusion for
       optical microscopy", Nature Biotechnology 38, 2020.
    """
    power = _power(transfer)
    back = np.conj(transfer)
    return [
        np.asarray(back * ((1.0 - (1.0 - power) ** steps) / power), transfer.dtype)
        for steps in schedule(float(power.mean()), iterations)
    ]


def mean_power(transfer: NDArray[Any]) -> float:
    """Return the mean of |H|^2 over all frequencies, what `schedule` asks for."""
    return float(_power(transfer).mean())


def _power(transfer: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.clip(np.abs(transfer) ** 2, _SMALLEST, 1.0))


def schedule(passes: float, iterations: int = ACCELERATED_ITERATIONS) -> list[float]:
    """Return how many matched iterations each iteration stands for.

    Parameters
    ----------
    passes
        Mean of |H|^2 over all frequencies.
    iterations
        Number of iterations.
    """
    place = np.log(passes / _STRONG_PASSES) / np.log(_MILD_PASSES / _STRONG_PASSES)
    mild = float(np.clip(place, 0.0, 1.0))
    four = mild * np.array(_MILD) + (1.0 - mild) * np.array(_STRONG)
    # The same course in more or fewer pieces.
    done = np.concatenate([[0.0], np.cumsum(four)])
    times = np.linspace(0.0, 4.0, iterations + 1)
    return [float(steps) for steps in np.diff(np.interp(times, np.arange(5.0), done))]
