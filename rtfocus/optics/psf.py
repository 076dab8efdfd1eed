"""PSF: the image of a point at a known defocus, as the camera's pixels see it.

The sign convention of the project enters with the wavefront in the pupil and nowhere
else: phase counts optical path. A specimen that is too far from the objective
(``defocus_um > 0``) sends its light over a longer path, phase ``+ 2 pi n z cos(theta) /
lambda``, and an aberration coefficient is a longer path too, phase ``+ 2 pi W Z(r,
t)``. Changing the sign of every term at once leaves the PSF as it is; what has a
meaning is the sign of a defocus relative to the spherical aberration.

Lateral lengths inside are in units of lambda / NA, where every PSF of a given
defocus phase is the same function. Round pupils are integrated along a radius
(Gauss-Legendre nodes, a J0 matrix that many defoci share); the others by a
direct separable Fourier transform onto exactly the points that are wanted.
Both give the energy in the whole plane by Parseval, so "99 % of the energy"
means of all light, not of the window.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from itertools import pairwise
from math import ceil
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Aberrations, OpticalSystem

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]


def is_round(system: OpticalSystem) -> bool:
    """Tell whether the PSF depends on the radius alone."""
    given = system.aberrations
    return system.psf_model == "born_wolf" or not any(
        (
            given.astigmatism_waves,
            given.astigmatism_oblique_waves,
            given.coma_x_waves,
            given.coma_y_waves,
        )
    )


def defocus_phase(system: OpticalSystem, defocus_um: float, radius: Floats) -> Floats:
    """Return the phase of a defocus in the pupil, without its constant part.

    Parameters
    ----------
    system
        The optics; ``born_wolf`` takes the paraxial phase of He 2020 eq. 2,
        ``pupil`` the exact one.
    defocus_um
        Total defocus in um, offset included; positive = specimen too far.
    radius
        Pupil radius, 1 at the edge of the aperture; any shape.

    Returns
    -------
    Floats
        Phase in radians, shape of `radius`.
    """
    index = system.refractive_index
    sine = system.numerical_aperture / index * radius
    waves_per_um = 2.0 * np.pi * index / (system.wavelength_nm * 1e-3)
    if system.psf_model == "born_wolf":
        return -0.5 * waves_per_um * defocus_um * sine**2
    # cos(theta) - 1 without cancellation at small angles.
    return -waves_per_um * defocus_um * sine**2 / (1.0 + np.sqrt(1.0 - sine**2))


def round_pupil(system: OpticalSystem, defocus_um: float, radius: Floats) -> Complexes:
    """Return the complex pupil along a radius; terms that depend on angle left out."""
    phase = defocus_phase(system, defocus_um, radius)
    if system.psf_model == "born_wolf":
        return np.asarray(np.exp(1j * phase))
    spherical = 6.0 * radius**4 - 6.0 * radius**2 + 1.0
    phase = phase + 2.0 * np.pi * system.aberrations.spherical_waves * spherical
    return np.asarray(np.exp(1j * phase - system.apodisation * radius**2))


def full_pupil(
    system: OpticalSystem, defocus_um: float, x: Floats, y: Floats
) -> Complexes:
    """Return the complex pupil at points (x, y) inside the unit circle."""
    radius = np.hypot(x, y)
    given = system.aberrations
    # r cos(t) = x and r sin(t) = y turn every term into a polynomial.
    waves = (
        given.astigmatism_waves * (x**2 - y**2)
        + given.astigmatism_oblique_waves * (2.0 * x * y)
        + (given.coma_x_waves * x + given.coma_y_waves * y) * (3.0 * radius**2 - 2.0)
    )
    wave = round_pupil(system, defocus_um, radius) * np.exp(2j * np.pi * waves)
    return np.asarray(wave)


def blur_radius_um(system: OpticalSystem, defocus_um: float) -> float:
    """Return the radius of the geometric blur: the farthest ray of the aperture.

    A wavefront slope of one wave per pupil radius moves a ray by lambda / NA.
    """
    sine = system.numerical_aperture / system.refractive_index
    if system.psf_model == "born_wolf":
        return abs(defocus_um) * sine
    radius_um = abs(defocus_um) * sine / np.sqrt(1.0 - sine**2)
    slope = _steepest_slope(system.aberrations)
    unit_um = system.wavelength_nm * 1e-3 / system.numerical_aperture
    return float(radius_um + slope * unit_um)


def _steepest_slope(given: Aberrations) -> float:
    """Bound on d(waves)/d(radius) at the edge of the pupil, summed over terms."""
    return float(
        12.0 * abs(given.spherical_waves)
        + 2.0 * np.hypot(given.astigmatism_waves, given.astigmatism_oblique_waves)
        + 7.0 * np.hypot(given.coma_x_waves, given.coma_y_waves)
    )


Image = NDArray[np.float32]

MAX_SIZE_PX = 511
"""Largest window chosen without being asked for; a wider PSF is cut there."""

# Diffraction puts 2 / (pi v) of the light beyond a radius v = 2 pi NA r / lambda:
# 1 % lies more than ten units of lambda / NA outside the geometric blur.
_TAIL_UNITS = 11.0
# Sub-pixels no wider than this many lambda / NA: half the intensity's Nyquist step.
_SUBPIXEL_UNITS = 0.125
# And at least so many per pixel and axis: fewer do not integrate over it.
_LEAST_SUBPIXELS = 3
# Amplitude knots per lambda / NA (cubic between: error below 1e-4), and the finer
# steps at which the intensity is tabulated (linear between).
_KNOTS_PER_UNIT = 16
_FINE_PER_UNIT = 64
_ENERGY = 0.99


def compute_psf(
    system: OpticalSystem,
    defocus_um: float,
    *,
    size_px: int | None = None,
) -> Image:
    """Compute the scalar widefield PSF of one defocus, integrated over pixels.

    ``born_wolf`` is even in z. ``pupil`` uses the exact defocus phase, Zernike
    aberrations and a Gaussian apodisation; it is even only without aberrations.
    Polarisation is ignored.

    Parameters
    ----------
    system
        Objective, light and sampling; its ``defocus_offset_um`` is added.
    defocus_um
        Nominal defocus in um; positive = specimen too far from the objective.
    size_px
        Side of the result in pixels, odd. None: the smallest odd side that holds
        99 % of the light of the whole plane, at most `MAX_SIZE_PX`.

    Returns
    -------
    Image
        Shape (side, side), axes (y, x), non-negative, sums to 1; the caller's
        own copy.

    Raises
    ------
    ValueError
        If `size_px` is even or not positive.

    References
    ----------
    .. [1] L. He et al., 2020, eq. 2 (Born and Wolf), with refractive index.
    .. [2] J. W. Goodman, *Introduction to Fourier Optics*, 3rd ed., ch. 6.

    Examples
    --------
    >>> optics = OpticalSystem(0.5, 451.0, 0.65)
    >>> psf = compute_psf(optics, 10.0, size_px=41)
    >>> psf.shape, round(float(psf.sum()), 5)
    ((41, 41), 1.0)
    """
    if size_px is not None and (size_px < 1 or size_px % 2 == 0):
        msg = f"size_px={size_px} has no centre pixel; choose an odd side >= 1"
        raise ValueError(msg)
    return KEPT.get(_make_psf, system, float(defocus_um), size_px).copy()


def psf_stack(
    system: OpticalSystem, defocus_um_values: Iterable[float], size_px: int
) -> Image:
    """Compute the PSFs of several defoci; axes (defocus, y, x)."""
    return np.stack(
        [compute_psf(system, z, size_px=size_px) for z in defocus_um_values]
    )


def psf_radius_px(psf: Image, energy: float = _ENERGY) -> int:
    """Return the half side of the smallest centred square holding `energy`.

    Relative to the sum of the given window; 0 means the centre pixel alone.
    """
    return _half_side(np.asarray(psf, dtype=np.float64), energy * float(psf.sum()))


def _half_side(psf: Floats, wanted: float) -> int:
    """Half side of the smallest centred square whose sum reaches `wanted`."""
    half = psf.shape[0] // 2
    distance = np.abs(np.arange(psf.shape[0]) - half)
    ring = np.maximum(distance[:, None], distance[None, :])
    held = np.cumsum(np.bincount(ring.ravel(), weights=psf.ravel()))
    return int(min(np.searchsorted(held, wanted), half))


Made = TypeVar("Made", Image, tuple[Floats, ...])


class Kept:
    """Newest results of functions, the least recently used first out.

    Bounded by their bytes, not their number: a PSF far from focus, and what it is
    computed by, takes a thousand times the memory of one in focus.

    Parameters
    ----------
    most_bytes
        Of all results together; the newest one is kept whatever its size.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self.held_bytes = 0

    def get(self, make: Callable[..., Made], *key: Hashable) -> Made:
        """Return ``make(*key)``, made now or before; any thread."""
        place = (make, *key)
        with self._lock:
            if place in self._results:
                self._results.move_to_end(place)
                result: Made = self._results[place]
                return result
        made = make(*key)
        with self._lock:
            if place not in self._results:
                self._results[place] = made
                self.held_bytes += _bytes_of(made)
            while self.held_bytes > self._most_bytes and len(self._results) > 1:
                self.held_bytes -= _bytes_of(self._results.popitem(last=False)[1])
        return made


def _bytes_of(made: Image | tuple[Floats, ...]) -> int:
    return sum(part.nbytes for part in (made if isinstance(made, tuple) else (made,)))


KEPT = Kept(64 << 20)
"""PSFs, and the arrays that neighbouring defoci share."""


def _make_psf(system: OpticalSystem, defocus_um: float, size_px: int | None) -> Image:
    total_um = defocus_um + system.defocus_offset_um
    oversample = max(_LEAST_SUBPIXELS, ceil(system.sampling / _SUBPIXEL_UNITS))
    if size_px is None:
        half = _window_half_px(system, total_um)
    else:
        half = size_px // 2
    # Fractions of all light per pixel, so the sum is the energy in the window.
    if is_round(system):
        psf = _round_psf(system, total_um, half, oversample)
    else:
        psf = _general_psf(system, total_um, half, oversample)
    if size_px is None:
        cut = half - _half_side(psf, _ENERGY)
        psf = psf[cut : psf.shape[0] - cut, cut : psf.shape[1] - cut]
    result: Image = np.asarray(psf / psf.sum(), dtype=np.float32)
    result.flags.writeable = False
    return result


def _window_half_px(system: OpticalSystem, total_um: float) -> int:
    """Half side that surely holds 99 % of the light, within the bound."""
    unit_um = system.wavelength_nm * 1e-3 / system.numerical_aperture
    radius_um = blur_radius_um(system, total_um) + _TAIL_UNITS * unit_um
    return min(ceil(radius_um / system.pixel_size_um), MAX_SIZE_PX // 2)


def _round_psf(
    system: OpticalSystem, total_um: float, half: int, oversample: int
) -> Floats:
    """Sample a round PSF on one quadrant of the fine grid, bin it and mirror it."""
    step = system.sampling / oversample
    # Sub-pixel centres of the pixels 0..half; pixel 0 reaches from -0.5 to 0.5 px.
    centre = (np.arange((half + 1) * oversample) + 0.5) * step - system.sampling / 2
    radius = np.hypot(centre[:, None], centre[None, :])
    profile = _radial_profile(system, total_um, float(radius.max()))
    knots = np.arange(profile.size) / _FINE_PER_UNIT
    fine = np.interp(radius.ravel(), knots, profile).reshape(radius.shape)
    quadrant = _bin(fine, oversample) * step**2
    right = np.concatenate([quadrant[:, :0:-1], quadrant], axis=1)
    return np.concatenate([right[:0:-1], right], axis=0)


def _radial_profile(
    system: OpticalSystem, total_um: float, largest: float
) -> NDArray[np.float64]:
    """Intensity at radii in steps of 1/64 lambda / NA; the plane's integral is 1."""
    # Cycles of the integrand over the pupil: of J0 and of the pupil's own phase.
    unit_um = system.wavelength_nm * 1e-3 / system.numerical_aperture
    cycles = largest + blur_radius_um(system, total_um) / unit_um
    # Rounded up so that neighbouring defoci and apertures share one J0 matrix.
    node_count = 128 * ceil((4.0 * cycles + 32.0) / 128.0)
    knot_count = 256 * ceil((largest * _KNOTS_PER_UNIT + 2.0) / 256.0)
    nodes, weights, bessel = KEPT.get(_bessel_matrix, knot_count, node_count)
    wave = round_pupil(system, total_um, nodes) * weights * nodes
    parts = bessel @ np.stack([wave.real, wave.imag], axis=1)
    fine = _refine(parts, ceil(largest * _FINE_PER_UNIT) + 2)
    energy = np.sum(np.abs(wave) ** 2 / (weights * nodes)) / (2.0 * np.pi)
    return np.asarray(np.sum(fine**2, axis=1) / energy)


def _refine(parts: Floats, count: int) -> Floats:
    """Return the first `count` fine values of two even functions given at the knots.

    The cubic spline with slope 0 at radius 0 and no knot at the last but one, as
    `scipy.interpolate.CubicSpline` has it; importing that takes longer than all PSFs
    of a channel, and every processor would do it.
    """
    values = (parts[:, 0] + 1j * parts[:, 1]).tolist()
    rises = [after - before for before, after in pairwise(values)]
    # Slopes d times the knots' distance: d[i-1] + 4 d[i] + d[i+1] = 3 (r[i-1] + r[i]),
    # by elimination forwards and substitution backwards.
    pivots, sums = [0.0], [0j]
    for before, after in pairwise(rises):
        pivots.append(1.0 / (4.0 - pivots[-1]))
        sums.append((3.0 * (before + after) - sums[-1]) * pivots[-1])
    end = (rises[-2] + 5.0 * rises[-1]) / 2.0 - 2.0 * sums[-1]
    slopes = [end / (1.0 - 2.0 * pivots[-1])]
    for pivot, held in zip(reversed(pivots), reversed(sums), strict=True):
        slopes.append(held - pivot * slopes[-1])
    place = np.arange(count) * (_KNOTS_PER_UNIT / _FINE_PER_UNIT)
    knot = np.minimum(place.astype(int), len(rises) - 1)
    x = place - knot
    value, rise = np.array(values)[knot], np.array(rises)[knot]
    slope = np.array(slopes[::-1])
    left, right = slope[knot] - rise, rise - slope[knot + 1]
    fine = value + x * rise + x * (1 - x) * ((1 - x) * left + x * right)
    return np.stack([fine.real, fine.imag], axis=1)


def _bessel_matrix(knot_count: int, node_count: int) -> tuple[Floats, ...]:
    """Nodes and weights on [0, 1] and J0(2 pi v rho), axes (knot, node)."""
    from scipy.special import j0

    points, weights = np.polynomial.legendre.leggauss(node_count)
    nodes = (points + 1.0) / 2.0
    knots = np.arange(knot_count) / _KNOTS_PER_UNIT
    return nodes, weights / 2.0, j0(2.0 * np.pi * np.outer(knots, nodes))


def _general_psf(
    system: OpticalSystem, total_um: float, half: int, oversample: int
) -> Floats:
    """Transform a sampled pupil onto the fine grid and bin it."""
    count = (2 * half + 1) * oversample
    step = system.sampling / oversample
    centre = (np.arange(count) - (count - 1) / 2.0) * step
    unit_um = system.wavelength_nm * 1e-3 / system.numerical_aperture
    # A pupil sampled in steps d repeats the field every 1 / d: the replica's own
    # blur and most of its tail must stay clear of the window.
    reach = blur_radius_um(system, total_um) / unit_um + centre[-1]
    samples = max(128, 4 * ceil(reach + _TAIL_UNITS))
    pitch = 2.0 / samples
    axis = (np.arange(samples) + 0.5) * pitch - 1.0
    (edge,) = KEPT.get(_edge_weight, samples)
    wave = edge * _inside(system, total_um, axis)
    kernel = np.exp(2j * np.pi * np.outer(centre, axis))
    field = kernel @ wave @ kernel.T * pitch**2
    energy = np.sum(np.abs(wave) ** 2) * pitch**2
    return np.asarray(_bin(np.abs(field) ** 2, oversample) * step**2 / energy)


def _inside(
    system: OpticalSystem, total_um: float, axis: Floats
) -> NDArray[np.complex128]:
    """Complex pupil on the grid (y, x); points outside take the edge's value."""
    x, y = np.meshgrid(axis, axis)
    shrink = 1.0 / np.maximum(np.hypot(x, y), 1.0)
    return full_pupil(system, total_um, x * shrink, y * shrink)


def _edge_weight(samples: int) -> tuple[Floats, ...]:
    """Share of each pupil cell inside the aperture; 5 x 5 points per cell."""
    pitch = 2.0 / samples
    axis = (np.arange(samples) + 0.5) * pitch - 1.0
    fine = (axis[:, None] + (np.arange(5) - 2.0) / 5.0 * pitch).ravel()
    inside = (fine[:, None] ** 2 + fine[None, :] ** 2 <= 1.0).astype(np.float64)
    share = _bin(inside, 5) / 25.0
    # The next caller gets the same array.
    share.flags.writeable = False
    return (share,)


def _bin(fine: Floats, factor: int) -> Floats:
    """Sum blocks of factor x factor."""
    rows, columns = fine.shape
    blocks = fine.reshape(rows // factor, factor, columns // factor, factor)
    return np.asarray(blocks.sum(axis=(1, 3)))
