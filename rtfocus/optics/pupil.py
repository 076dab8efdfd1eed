"""Pupil: the wavefront of a point source in the objective's aperture.

The sign convention of the project enters here and nowhere else: phase counts
optical path. A specimen that is too far from the objective (``defocus_um > 0``)
sends its light over a longer path, phase ``+ 2 pi n z cos(theta) / lambda``, and
an aberration coefficient is a longer path too, phase ``+ 2 pi W Z(r, t)``.
Changing the sign of every term at once leaves the PSF as it is; what has a
meaning is the sign of a defocus relative to the spherical aberration.
"""

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
