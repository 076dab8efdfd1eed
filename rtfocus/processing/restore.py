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

**Margins.** Fourier transforms join the right edge of their input to the left one, so a
level's rectangle is read with a margin that leads smoothly from what lies behind it to
what lies before it. Where they do not meet, the jump rings through all of it once a
filter amplifies it.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import RestorationConfig
from rtfocus.optics.psf import psf_radius_px
from rtfocus.processing.montage import Region

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


def margin_px(psf: Image, halo_px: int | None) -> int:
    """Return the context that a level is restored in, on every side.

    Parameters
    ----------
    halo_px
        Of the config; None: half the side of the PSF, which holds 99 % of its energy.
    """
    return psf_radius_px(psf, 1.0) if halo_px is None else halo_px


def patch_halo_px(settings: RestorationConfig) -> int:
    """Return the context per side of patches."""
    # Those of 84 px are padded to 110 (He 2020, section 2.3).
    return 13 if settings.halo_px is None else settings.halo_px


def padded_shape(shape: tuple[int, int], halo_px: int) -> tuple[int, int]:
    """Return the next sizes with small prime factors that hold frame and halo."""
    return _fast_side(shape[0] + 2 * halo_px), _fast_side(shape[1] + 2 * halo_px)


def patch_shape(shape: tuple[int, int], psf_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the transform's size for a patch with zeros beyond its borders.

    Half a PSF of zeros on one side is enough: what wraps around stays in it.
    """
    height, width = (
        _fast_side(side + psf_side // 2)
        for side, psf_side in zip(shape, psf_shape, strict=True)
    )
    return height, width


def _fast_side(least_px: int) -> int:
    # Where it is used: a processor answers before it has loaded SciPy.
    from scipy import fft

    return int(fft.next_fast_len(least_px, real=True))


def read_region(plane: Image, region: Region, shape: tuple[int, int]) -> Image:
    """Cut a rectangle out of a frame, before a margin without a jump.

    Parameters
    ----------
    plane
        Axes (y, x).
    region
        What is wanted; lies at the origin of the result.
    shape
        Height and width of the result, which is periodic: its margin leads from what
        lies behind the region to what lies before it.
    """
    height, width = region.shape
    result = np.empty(shape, plane.dtype)
    below = _margin(plane, region.rows, shape[0])
    for rows, into in ((plane[region.rows], result[:height]), (below, result[height:])):
        into[:, :width] = rows[:, region.columns]
        into[:, width:] = _margin(rows.T, region.columns, shape[1]).T
    return result


def _margin(plane: Image, span: slice, length: int) -> Image:
    """Return rows from behind a span that fade to those before it, up to `length`."""
    steps = np.arange(length - (span.stop - span.start))
    behind, before = (
        plane[_mirror(at + steps, len(plane))]
        for at in (span.stop, span.start - len(steps))
    )
    behind += (before - behind) * _fade(len(steps))[:, None]
    return behind


def _mirror(index: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Fold indices back into 0..length - 1; the border pixel is repeated."""
    folded = index % (2 * length)
    return np.minimum(folded, 2 * length - 1 - folded)


@lru_cache(maxsize=64)
def _fade(margin: int) -> Image:
    """Weights from 0 to 1, flat at both ends."""
    place = (np.arange(margin) + 0.5) / margin
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * place), dtype=np.float32)


def together(
    regions: Mapping[int, Region], shapes: Mapping[int, tuple[int, int]]
) -> list[tuple[Region, tuple[int, int], list[int]]]:
    """Return what is looked at once: a region, its transform's size, and levels.

    Of the margin of a level only the size of its transform is left: levels whose
    regions and sizes are the same see the same pixels.

    Parameters
    ----------
    regions
        Per level.
    shapes
        Height and width of the transforms, per level.
    """
    groups: dict[tuple[int, ...], tuple[Region, tuple[int, int], list[int]]] = {}
    for level, region in regions.items():
        shape = shapes[level]
        key = (*region.rectangle, *shape)
        groups.setdefault(key, (region, shape, []))[2].append(level)
    return list(groups.values())


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
# Its limits as f^3, narrowed so that frequencies that lie on a limit are outside
# whatever a device's rounding.
CUBED_BAND = (BAND[0] ** 3 * (1 + 1e-5), BAND[1] ** 3 * (1 - 1e-5))
# The power in the band overrates that at high frequencies; chosen on the real
# pairs and on blurred nuclei, see bench/deconvolution.py.
CAUTION = 4.0
# No PSF is exact: where its OTF is nearly zero, a slightly wrong one is amplified
# into rings. This limit costs 0.7 dB on average where the PSF is exact and gains
# 6 dB on real fields restored with the nominal PSF (which then beat the raw frame).
HIGHEST_GAIN = np.float32(3.0)


# Share of the finest details that are taken for edges and left out.
EDGES = 0.01
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
    count = max(1, int((1.0 - EDGES) * power.size))
    return max(float(np.partition(power, count - 1)[:count].mean()), floor)


_ACCELERATED = "richardson_lucy_accelerated"
# Fifteen: He 2020, section 2.3. Rounds of kernel and image of the blind one: chosen on
# nuclei out of focus, more fit the noise.
_ITERATIONS = {_ACCELERATED: 4, BLIND: 8}
_USUAL_ITERATIONS = 15


def iterations_of(settings: RestorationConfig) -> int:
    """Return the iterations asked for, or the default of the method."""
    own = _ITERATIONS.get(settings.method, _USUAL_ITERATIONS)
    return settings.iterations or own


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


def iteration_steps(psf: Image, settings: RestorationConfig) -> list[float]:
    """Return how many matched iterations each iteration of a method stands for."""
    iterations = iterations_of(settings)
    if settings.method != _ACCELERATED:
        return [1.0] * iterations
    # By Parseval the mean of |H|^2 over all frequencies, whatever the transform's size.
    passes = float(np.square(psf, dtype=np.float64).sum())
    place = np.log(passes / _STRONG_PASSES) / np.log(_MILD_PASSES / _STRONG_PASSES)
    mild = float(np.clip(place, 0.0, 1.0))
    four = mild * np.array(_MILD) + (1.0 - mild) * np.array(_STRONG)
    # The same course in more or fewer pieces.
    done = np.concatenate([[0.0], np.cumsum(four)])
    times = np.linspace(0.0, 4.0, iterations + 1)
    return [float(steps) for steps in np.diff(np.interp(times, np.arange(5.0), done))]


def back_projectors(
    transfer: NDArray[Any], steps: Sequence[float]
) -> list[NDArray[Any]]:
    """Build the back projector of every iteration for one transfer function.

    Parameters
    ----------
    transfer
        OTF over the half spectrum.
    steps
        Matched iterations that each iteration stands for, see `iteration_steps`.

    Returns
    -------
    list
        Half spectra in the order of use; gain 1 at f = 0.

    References
    ----------
    .. [1] M. Guo et al., "Rapid image deconvolution and multiview fusion for
       optical microscopy", Nature Biotechnology 38, 2020.
    """
    power = np.clip(np.abs(transfer) ** 2, _SMALLEST, 1.0)
    back = np.conj(transfer)
    return [
        back
        if count == 1.0
        else np.asarray(back * ((1.0 - (1.0 - power) ** count) / power), transfer.dtype)
        for count in steps
    ]


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
    floor = least_divisor(signal)
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


def least_divisor(signal: NDArray[Any]) -> float:
    """Return the least that an image is divided by."""
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


def richardson_lucy(
    image: NDArray[Any],
    psf: NDArray[Any],
    iterations: int,
    start: NDArray[Any] | None = None,
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
        Shape of `image`; None: the blurred image (He 2020, LB-DVD).

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
    back = [np.conj(transfer)] * iterations
    first = signal if start is None else start
    return iterate(signal, transfer, back, shape=(height, width), start=first)


_LEAST_SIGMA_PX = 0.5


def gaussian_like(psf: Image) -> Image:
    """Return a Gaussian as wide as a PSF, in its window: where `BLIND` starts."""
    rows, columns = (np.arange(side) - side // 2 for side in psf.shape)
    squares = (rows**2)[:, None] + columns**2
    variance = float((psf * squares).sum() / (2 * psf.sum()))
    gaussian = np.exp(-0.5 * squares / max(variance, _LEAST_SIGMA_PX**2))
    return np.asarray(gaussian / gaussian.sum(), dtype=np.float32)
