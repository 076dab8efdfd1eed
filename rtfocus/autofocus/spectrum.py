"""Spectrum: how much detail of each size an image shows, in forty-eight numbers.

The amplitude of an image's Fourier transform, averaged over rings, is what the
specimen has times what the optics let through at its defocus. Two images of one
specimen at two z have the same first factor, so their ratio tells of the optics
alone (Pentland's depth from defocus). Amplitudes do not change when the specimen
shifts sideways between the images, and a ring average is small enough to travel
with an estimate.

What the optics let through is counted in units that all objectives share: defocus in
depths of field (n lambda / NA^2), spatial frequency in NA / lambda. So one table serves
all apertures near the nominal one.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.optics.psf import round_pupil

Floats = NDArray[np.float64]

RINGS = 48
_LOWEST, _HIGHEST = 0.012, 0.48
EDGES = np.geomspace(_LOWEST, _HIGHEST, RINGS + 1)
"""Limits of the rings in cycles per pixel."""
FREQUENCIES = np.sqrt(EDGES[:-1] * EDGES[1:])
"""Middle of each ring in cycles per pixel."""
_MOST_SIDE_PX = 1024
_NOISE_RINGS = 3
_LEAST_SIDE_PX = 16
_LEAST_LIGHT = 1e-3


def amplitude_spectrum(
    pixels: NDArray[np.generic],
    region: tuple[int, int, int, int] | None = None,
    *,
    dark_counts: float = 0.0,
) -> tuple[Floats, float]:
    """Return the ring amplitudes of an image and their noise.

    Parameters
    ----------
    pixels
        Axes (y, x) or (y, x, rgb), counts or signal.
    region
        x, y, width, height in pixels; None: the middle of the frame, at most 1,024
        pixels a side.
    dark_counts
        Camera offset: amplitudes are divided by the mean above it, so that lamps may
        flicker and dyes bleach.

    Returns
    -------
    tuple
        Root mean square amplitude per ring with the noise taken out, shape (48,), and
        the amplitude of the noise; zeros where the image is too small.
    """
    plane = _cut(np.asarray(pixels), region)
    side_y, side_x = plane.shape
    if min(plane.shape) < _LEAST_SIDE_PX:
        return np.zeros(RINGS), 0.0
    # Here, because it takes long to import and a run without autofocus needs none.
    from scipy import fft

    window, rings, counts = _rings(side_y, side_x)
    # A slope from edge to edge (vignetting, a neighbour's glow) is no detail.
    power = np.abs(fft.rfft2((plane - plane.mean()) * window)) ** 2
    total = np.bincount(rings.ravel(), weights=power.ravel(), minlength=RINGS + 1)
    mean = total[:RINGS] / np.maximum(counts, 1) / float((window**2).sum())
    mean[counts == 0] = 0.0
    noise = float(np.median(mean[-_NOISE_RINGS:]))
    light = max(float(plane.mean()) - dark_counts, _LEAST_LIGHT)
    return np.sqrt(np.clip(mean - noise, 0.0, None)) / light, float(
        np.sqrt(noise) / light
    )


def sharpness(spectrum: Floats, noise: float = 0.0) -> float:
    """Return the root of the gradient energy of a spectrum, per light.

    Parameters
    ----------
    spectrum
        Ring amplitudes, shape (48,); empty: 0.
    noise
        Amplitude of the noise: rings that do not stand out of it hardly count.
    """
    if spectrum.size == 0:
        return 0.0
    power = spectrum**2
    power = power * power / np.maximum(power + noise**2, 1e-30)
    # Rings grow with the frequency: each counts with its area.
    return float(np.sqrt(np.sum(power * FREQUENCIES**4)))


def change(one: Floats, two: Floats, noise: float) -> float:
    """Return by how much two images of one field differ in detail, relatively.

    Compared in bands of eight rings, so that noise averages out: photographed twice
    at one z an image changes by 0.02, at most 0.07; a depth of field apart by 0.4,
    hardly ever by less than 0.14.

    Parameters
    ----------
    one, two
        Ring amplitudes; of different lengths: all has changed.
    noise
        Amplitude of the noise of a ring; bands below it do not count.
    """
    if one.shape != two.shape or one.size == 0:
        return 1.0
    weight = FREQUENCIES**2
    bands = [(each**2 * weight).reshape(-1, 8).sum(axis=1) for each in (one, two)]
    of_noise = noise**2 * weight.reshape(-1, 8).sum(axis=1)
    seen = np.maximum(*bands) > of_noise
    if not seen.any():
        return 0.0
    away = np.abs(np.sqrt(bands[0]) - np.sqrt(bands[1]))
    share = away / np.sqrt((bands[0] + bands[1]) / 2 + of_noise)
    return float(share[seen].max())


def _cut(
    pixels: NDArray[np.generic], region: tuple[int, int, int, int] | None
) -> NDArray[np.float32]:
    grey = pixels.mean(axis=2) if pixels.ndim == 3 else pixels
    if region is None:
        starts = [max(0, (side - _MOST_SIDE_PX) // 2) for side in grey.shape]
        rows, columns = (slice(start, start + _MOST_SIDE_PX) for start in starts)
    else:
        x, y, width, height = region
        rows, columns = slice(y, y + height), slice(x, x + width)
    return np.asarray(grey[rows, columns], dtype=np.float32)


@lru_cache(maxsize=8)
def _rings(
    side_y: int, side_x: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Return the window, the ring of every frequency and the size of the rings."""
    window = np.outer(np.hanning(side_y), np.hanning(side_x)).astype(np.float32)
    radius = np.hypot(np.fft.fftfreq(side_y)[:, None], np.fft.rfftfreq(side_x)[None, :])
    rings = np.digitize(radius, EDGES) - 1
    rings[(rings < 0) | (rings >= RINGS)] = RINGS
    counts = np.bincount(rings.ravel(), minlength=RINGS + 1)[:RINGS]
    return window, rings, counts


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
