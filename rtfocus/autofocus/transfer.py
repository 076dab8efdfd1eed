"""Transfer: how much detail of each size the optics let through, by defocus.

Counted in units that all objectives share: defocus in depths of field
(n lambda / NA^2), spatial frequency in NA / lambda. So one table serves all
apertures near the nominal one.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.spectrum import FREQUENCIES
from rtfocus.channel import OpticalSystem
from rtfocus.optics.psf import round_pupil

Floats = NDArray[np.float64]

FARTHEST = 9.0
"""Defocus at the ends of the table, in depths of field."""
_STEP = 0.125
_RADII, _LIGHT, _PLACES = 320, 360, 101
_HIGHEST = 2.0
_BLUR_MARGIN = 5.0
# The PSFs of rtfocus turn an image in focus into a defocused one, so the image in
# focus itself may be sharper than the PSF at zero; this far out the two meet.
_FOCUS_WIDTH = 0.125


class Transfer:
    """Modulation of every ring of a spectrum over defocus.

    Parameters
    ----------
    table
        Axes (defocus, frequency): defocus in steps of an eighth of a depth of field,
        frequency from 0 to 2 NA / lambda.
    sampling
        Pixel size in lambda / NA.
    aperture
        True NA over the nominal one.
    """

    def __init__(self, table: Floats, sampling: float, aperture: float = 1.0) -> None:
        columns = np.linspace(0.0, _HIGHEST, _PLACES)
        wanted = FREQUENCIES / sampling / aperture
        self._rings = np.stack([np.interp(wanted, columns, line) for line in table])
        self._rows_per_unit = aperture**2 / _STEP

    def amplitudes(self, defocus: Floats, *, kept: bool = False) -> Floats:
        """Return the modulation of every ring.

        Parameters
        ----------
        defocus
            In depths of field; any shape.
        kept
            The image in focus is not blurred at all, see the module.

        Returns
        -------
        Floats
            Axes of `defocus`, then ring.
        """
        last = len(self._rings) - 1
        row = np.clip(defocus * self._rows_per_unit + last / 2, 0, last - 1e-3)
        low = row.astype(np.int64)
        share = (row - low)[..., None]
        found = self._rings[low] * (1 - share) + self._rings[low + 1] * share
        if kept:
            near = np.clip(1.0 - np.abs(defocus) / _FOCUS_WIDTH, 0.0, 1.0)[..., None]
            found = found * (1 - near) + near
        return np.asarray(found)


def modulation_table(optics: OpticalSystem, *, extra_waves: float = 0.0) -> Floats:
    """Compute the table of `Transfer` for one channel's optics.

    Aberrations that are not round are left out.

    Parameters
    ----------
    optics
        Of the channel.
    extra_waves
        Added to its spherical aberration.
    """
    from scipy.special import j0

    given = optics.aberrations
    system = replace(
        optics,
        aberrations=replace(given, spherical_waves=given.spherical_waves + extra_waves),
    )
    unit_um = system.defocus_unit_um
    count = round(FARTHEST / _STEP)
    defocus_um = np.arange(-count, count + 1) * _STEP * unit_um
    radius = (np.arange(_RADII) + 0.5) / _RADII
    pupil = np.stack([round_pupil(system, float(z), radius) for z in defocus_um], 1)
    # Places in the image in lambda / NA, as far as the widest blur reaches.
    reach = FARTHEST + _BLUR_MARGIN
    place = (np.arange(_LIGHT) + 0.5) / _LIGHT * reach
    field = j0(2 * np.pi * np.outer(place, radius)) @ (pupil * radius[:, None])
    light = np.abs(field) ** 2 * place[:, None]
    frequency = np.linspace(0.0, _HIGHEST, _PLACES)
    table = np.abs(j0(2 * np.pi * np.outer(frequency, place)) @ light).T
    table /= np.maximum(table[:, :1], 1e-30)
    return np.asarray(table)
