"""Pairs: sharp and defocused images of a field, read and checked, and re-blurred.

What cannot be fitted is refused here, with the file's name and the remedy, before
minutes are spent on it. The PSF that best turns the sharp images into their partners
is searched for here too, from coarse to fine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from math import ceil, log10
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.ndimage import fourier_shift, uniform_filter

from rtfocus.calibration.through_focus import Trial, follow_down, quality, spread_out
from rtfocus.channel import OpticalSystem
from rtfocus.errors import InputError
from rtfocus.images.reading import open_images
from rtfocus.images.series import ImageSeries
from rtfocus.optics.formation import transfer_function
from rtfocus.optics.psf import blur_radius_um, compute_psf

Image = NDArray[np.float32]
Floats = NDArray[np.float64]

MOST_SIDE_PX = 640
"""Larger images are cut to the part of this side with most structure."""

# Smaller shifts are undone: the border that this spoils is not compared anyway.
_LARGEST_SHIFT_PX = 4.0
_LOWEST_CORRELATION = 0.3


@dataclass(frozen=True, slots=True)
class ImagePair:
    """One field, sharp and defocused."""

    name: str
    sharp: Image
    defocused: Image
    full_scale: float
    """Range of its counts: 255 for 8 bit, else what the sharp image spans."""
    shift_px: tuple[float, float]
    """How far (y, x) the defocused image lay from the sharp one; undone."""


def read_pairs(
    sharp: Path, defocused: Path, *, most: int, only: Sequence[str] = ("*",)
) -> list[ImagePair]:
    """Read pairs from two files or from two folders with equal file names.

    Parameters
    ----------
    sharp, defocused
        Files, or folders whose images are matched by name.
    most
        Of a folder's pairs as many, evenly spread over the names.
    only
        Patterns of the names that may be taken.

    Raises
    ------
    InputError
        If names do not match, or a pair is not one registered field.
    """
    first = {series.name: series for series in open_images(sharp)}
    second = {series.name: series for series in open_images(defocused)}
    if sharp.is_file() and defocused.is_file():
        second = dict(zip(first, second.values(), strict=False))
    names = [
        name
        for name in sorted(first.keys() & second.keys())
        if any(fnmatch(name, pattern) for pattern in only)
    ]
    if not names:
        msg = (
            f"no image '{' or '.join(only)}' of '{sharp}' has a partner of the same "
            f"name in '{defocused}'; "
            "give two files, or two folders with equal file names"
        )
        raise InputError(msg)
    chosen = [names[place] for place in spread_out(len(names), most)]
    return [_read_pair(name, first[name], second[name]) for name in chosen]


def structured_window(image: Image, side_px: int) -> tuple[slice, slice]:
    """Return the window of at most `side_px` with the most variance."""
    sides = [min(side_px, length) for length in image.shape]
    mean = uniform_filter(image, sides, mode="nearest")
    variance = uniform_filter(image * image, sides, mode="nearest") - mean**2
    starts = [side // 2 for side in sides]
    inner = tuple(
        slice(start, start + length - side + 1)
        for start, length, side in zip(starts, image.shape, sides, strict=True)
    )
    row, column = np.unravel_index(np.argmax(variance[inner]), variance[inner].shape)
    return (
        slice(int(row), int(row) + sides[0]),
        slice(int(column), int(column) + sides[1]),
    )


def registration_shift(first: Image, second: Image) -> tuple[float, float]:
    """Return how far `second` lies from `first` in pixels (y, x), to a tenth.

    The peak of the cross-correlation; a symmetric blur does not move it.
    """
    spectra = [fft.rfft2(_tapered(image)) for image in (first, second)]
    product = np.conj(spectra[0]) * spectra[1]
    correlation = fft.irfft2(product, first.shape)
    peak = np.unravel_index(np.argmax(correlation), first.shape)
    return (
        _vertex(correlation[:, peak[1]], int(peak[0])),
        _vertex(correlation[peak[0], :], int(peak[1])),
    )


def _read_pair(name: str, first: ImageSeries, second: ImageSeries) -> ImagePair:
    sharp, defocused = grey_plane(first), grey_plane(second)
    where = f"pair '{name}' ('{first.path}', '{second.path}')"
    if sharp.shape != defocused.shape:
        msg = f"{where}: shapes {sharp.shape} and {defocused.shape} differ"
        raise InputError(msg)
    if np.array_equal(sharp, defocused):
        msg = (
            f"{where}: both images are the same, pixel for pixel; give the sharp field "
            "first, then the same field out of focus"
        )
        raise InputError(msg)
    for image, path in ((sharp, first.path), (defocused, second.path)):
        if float(np.ptp(image)) == 0.0:
            msg = f"'{path}' is flat, every pixel is {image.flat[0]:g}; choose another"
            raise InputError(msg)
    window = structured_window(sharp, MOST_SIDE_PX)
    sharp, defocused = sharp[window], defocused[window]
    shift = registration_shift(sharp, defocused)
    _check_registered(where, sharp, defocused, shift)
    spectrum = fourier_shift(fft.rfft2(defocused), np.negative(shift), sharp.shape[1])
    defocused = np.asarray(fft.irfft2(spectrum, sharp.shape), dtype=np.float32)
    scale = 255.0 if first.dtype.str == "|u1" else float(np.ptp(sharp))
    return ImagePair(name, sharp, defocused, scale, shift)


def _check_registered(
    where: str, sharp: Image, defocused: Image, shift: tuple[float, float]
) -> None:
    """Refuse a pair that is shifted far or does not show one field."""
    down, across = shift
    if np.hypot(down, across) > _LARGEST_SHIFT_PX:
        msg = (
            f"{where}: the defocused image seems to lie {down:+.1f} px in y and "
            f"{across:+.1f} px in x from the sharp one: other fields, or not "
            f"registered to within {_LARGEST_SHIFT_PX:g} px (smaller shifts are found)"
        )
        raise InputError(msg)
    correlation = float(np.corrcoef(sharp.ravel(), defocused.ravel())[0, 1])
    if correlation < _LOWEST_CORRELATION:
        msg = (
            f"{where}: correlation {correlation:.2f}; these do not seem to be the same "
            "field, or the defocus is too strong for a fit"
        )
        raise InputError(msg)


def grey_plane(series: ImageSeries, **place: int) -> Image:
    """Read one plane or the mean of its colours, (y, x); InputError: not finite."""
    image = series.read(**place).astype(np.float32)
    if not np.isfinite(image).all():
        msg = f"'{series.path}' has NaN or infinite pixels; cut them off or fill them"
        raise InputError(msg)
    return image if image.ndim == 2 else np.asarray(image.mean(axis=2))


def reach_px(system: OpticalSystem, defocus_um: float) -> int:
    """Return the reach of a PSF: the geometric blur and two rings of diffraction."""
    unit_um = system.wavelength_nm * 1e-3 / system.numerical_aperture
    radius_um = blur_radius_um(system, defocus_um) + 2.0 * unit_um
    return ceil(radius_um / system.pixel_size_um)


def _tapered(image: Image) -> Image:
    """Without its mean, fading out to the borders."""
    window = np.outer(*(np.hanning(length) for length in image.shape))
    return np.asarray((image - image.mean()) * window, dtype=np.float32)


def _vertex(values: Image, peak: int) -> float:
    """Place of the top of the parabola through a peak, counted from 0 both ways."""
    size = len(values)
    before, top, after = (float(values[(peak + step) % size]) for step in (-1, 0, 1))
    bend = before - 2.0 * top + after
    offset = 0.5 * (before - after) / bend if bend else 0.0
    return (peak + offset + size / 2) % size - size / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTrial(Trial):
    """A trial over pairs: how well it re-blurs the sharp images."""

    defocus_um: float
    """Total defocus z of the PSF in um."""
    gain: float
    """Defocused intensity per re-blurred intensity; 1 where it is not fitted."""
    offset: float
    """Added after the gain; 0 where it is not fitted."""


@dataclass(frozen=True, slots=True)
class _Pair:
    spectrum: NDArray[np.complex64]
    """Transform of the whole sharp image."""
    shape: tuple[int, int]
    sharp: Image
    """Inner part that no border reaches."""
    defocused: Image
    """The same part of the defocused image."""


class Reblurring:
    """Pairs prepared for many trials; remembers those over all pairs.

    Only pixels whose PSF lies wholly inside the image are compared: what lies
    beyond the border is unknown.
    """

    def __init__(
        self,
        base: OpticalSystem,
        pairs: Sequence[tuple[ArrayLike, ArrayLike]],
        *,
        widest_um: float,
        largest_aperture: float,
        fit_intensity: bool,
        data_range: float,
    ) -> None:
        """Transform the sharp images once; see `calibrate_psf` for errors."""
        self.trials: list[PairTrial] = []
        self._base = base
        self._fit_intensity = fit_intensity
        self._data_range = data_range
        # One window for all trials, or those with smaller ones would be judged
        # on other pixels.
        self._half = reach_px(base.with_pupil(largest_aperture, 0.5), widest_um)
        self._pairs = [self._prepare(first, second) for first, second in pairs]

    def attempt(
        self,
        numerical_aperture: float,
        defocus_um: float,
        spherical_waves: float,
        *,
        astigmatism: tuple[float, float] = (0.0, 0.0),
        count: int | None = None,
    ) -> PairTrial:
        """Re-blur with one PSF; `count` restricts to the first pairs."""
        system = self._base.with_pupil(numerical_aperture, spherical_waves, astigmatism)
        psf = compute_psf(system, defocus_um, size_px=2 * self._half + 1)
        pairs = self._pairs[:count]
        gain, offset, psnr_db = self._compare(
            [self._apply(pair, psf) for pair in pairs], pairs
        )
        trial = PairTrial(
            psnr_db=psnr_db,
            numerical_aperture=numerical_aperture,
            defocus_um=defocus_um,
            spherical_waves=spherical_waves,
            gain=gain,
            offset=offset,
            astigmatism_waves=astigmatism[0],
            astigmatism_oblique_waves=astigmatism[1],
        )
        if count is None:
            self.trials.append(trial)
        return trial

    def unblurred_psnr_db(self) -> float:
        """Return the PSNR of the sharp images themselves, intensity fitted alike."""
        return self._compare([pair.sharp for pair in self._pairs], self._pairs)[2]

    def _prepare(self, first: ArrayLike, second: ArrayLike) -> _Pair:
        sharp = np.asarray(first, dtype=np.float32)
        defocused = np.asarray(second, dtype=np.float32)
        if sharp.shape != defocused.shape or sharp.ndim != 2:
            msg = (
                f"a pair of shapes {sharp.shape} and {defocused.shape}; both images "
                "must show the same field, axes (y, x)"
            )
            raise ValueError(msg)
        if min(sharp.shape) < 3 * self._half:
            msg = (
                f"an image of {sharp.shape} is too small for PSFs that reach "
                f"{self._half} px; need sides of at least {3 * self._half} px"
            )
            raise ValueError(msg)
        inner = (slice(self._half, -self._half), slice(self._half, -self._half))
        if float(np.ptp(sharp[inner])) == 0.0:
            msg = (
                "a sharp image shows no structure inside its borders, so no PSF can "
                "be told from another; choose a field with cells"
            )
            raise ValueError(msg)
        rows, columns = sharp.shape
        return _Pair(
            spectrum=np.asarray(fft.rfft2(sharp)),
            shape=(rows, columns),
            sharp=sharp[inner],
            defocused=defocused[inner],
        )

    def _apply(self, pair: _Pair, psf: Image) -> Image:
        transfer = transfer_function(psf, pair.shape)
        whole = fft.irfft2(pair.spectrum * transfer, pair.shape)
        half = self._half
        return np.asarray(whole[half:-half, half:-half])

    def _compare(
        self, blurred: list[Image], pairs: Sequence[_Pair]
    ) -> tuple[float, float, float]:
        """Return gain, offset and PSNR in dB over all pixels of all pairs."""
        values = np.concatenate([image.ravel() for image in blurred])
        target = np.concatenate([pair.defocused.ravel() for pair in pairs])
        gain, offset = 1.0, 0.0
        if self._fit_intensity:
            mean = values.mean(dtype=np.float64), target.mean(dtype=np.float64)
            centred = values - np.float32(mean[0])
            gain = float(np.vdot(centred, target) / np.vdot(centred, centred))
            offset = float(mean[1] - gain * mean[0])
        error = values * np.float32(gain) + np.float32(offset) - target
        mse = float(np.mean(np.square(error), dtype=np.float64))
        return gain, offset, 10.0 * log10(self._data_range**2 / max(mse, 1e-12))


# The coarse search, from which each sign of W is refined separately.
_DEFOCUS_FACTORS = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
_SPHERICAL_WAVES = (0.1, 0.3, 0.5, 0.8)
# How far a refinement may go: z relative to the nominal defocus, W in waves.
DEFOCUS_RANGE = (0.1, 1.6)
_SPHERICAL_LIMIT = 1.0
# Trials per valley on the first pair, and in the best valley on all pairs.
_VALLEY_TRIALS = 24
_TRIALS = 60
# First step of both astigmatisms and of W beside them, in waves.
_ASTIGMATISM_STEP = 0.06


def refine(
    reblurring: Reblurring, aperture: float, sign: float, nominal_um: float
) -> PairTrial:
    """Find the best z and W of one NA and one sign of W.

    The error has several valleys (a weak aberration can stand in for a strong one
    at another z), so every coarse W is followed down on the first pair, and the
    best of these on all.
    """
    valleys = []
    for waves in _SPHERICAL_WAVES:
        coarse = [
            reblurring.attempt(aperture, factor * nominal_um, sign * waves, count=1)
            for factor in _DEFOCUS_FACTORS
        ]
        start = max(coarse, key=quality)
        valleys.append(
            _descend(reblurring, start, sign, nominal_um, count=1, limit=_VALLEY_TRIALS)
        )
    start = max(valleys, key=quality)
    return _descend(reblurring, start, sign, nominal_um, count=None, limit=_TRIALS)


def with_astigmatism(reblurring: Reblurring, start: PairTrial) -> PairTrial:
    """Follow the error down from the best round PSF, both astigmatisms set free."""

    def attempt(point: Floats) -> PairTrial:
        vertical, oblique = np.clip(point[2:] * _ASTIGMATISM_STEP, -1.0, 1.0)
        return reblurring.attempt(
            start.numerical_aperture,
            start.defocus_um * float(point[0]),
            start.spherical_waves + float(point[1]) * _ASTIGMATISM_STEP,
            astigmatism=(float(vertical), float(oblique)),
        )

    origin = np.array([1.0, 0.0, 0.0, 0.0])
    simplex = np.vstack([origin, origin + np.diag([0.03, 1.0, 1.0, 1.0])])
    best = follow_down(attempt, simplex, _TRIALS, (0.02, 2e-3))
    return max(start, best, key=quality)


def _descend(
    reblurring: Reblurring,
    start: PairTrial,
    sign: float,
    nominal_um: float,
    *,
    count: int | None,
    limit: int,
) -> PairTrial:
    """Follow the error down from one trial, within the limits of z and W."""

    def attempt(point: Floats) -> PairTrial:
        factor = float(np.clip(point[0], *DEFOCUS_RANGE))
        waves = sign * float(np.clip(point[1], 0.0, _SPHERICAL_LIMIT))
        return reblurring.attempt(
            start.numerical_aperture, factor * nominal_um, waves, count=count
        )

    point = np.array([start.defocus_um / nominal_um, abs(start.spherical_waves)])
    steps = np.array([[0.0, 0.0], [0.07, 0.0], [0.0, 0.08]])
    return follow_down(attempt, point + steps, limit, (2e-3, 2e-3))
