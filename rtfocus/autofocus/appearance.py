"""Appearance: how an image's spectrum changes with defocus, by optics and learnt there.

A spectrum is the amplitude of an image's Fourier transform, averaged over rings:
what the specimen has times what the optics let through at its defocus. Two images of
one specimen at two z have the same first factor, so their ratio tells of the optics
alone (Pentland's depth from defocus). Amplitudes do not change when the specimen
shifts sideways, and a ring average is small enough to travel with an estimate. All is
counted in units that objectives share: defocus in depths of field (n lambda / NA^2),
spatial frequency in NA / lambda, so one table serves all apertures near the nominal.

The optics say how every ring changes with defocus, roughly: aperture and aberration
are known to some per cent, the specimen is tilted and thick. Images of the position
at known defocus say what it is, at a few places. Between them the optics' curve is
bent through the images (a Gaussian process whose mean is the optics), with how far it
may be off. So a new image tells distance and side, which optics alone cannot.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.optics.psf import round_pupil

Floats = NDArray[np.float64]
Places = NDArray[np.intp]

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
    if min(plane.shape) < _LEAST_SIDE_PX:
        return np.zeros(RINGS), 0.0
    # Here, because it takes long to import and a run without autofocus needs none.
    from scipy import fft

    window, energy, runs, rings, sizes = _rings(*plane.shape)
    middle = plane.mean()
    # A slope from edge to edge (vignetting, a neighbour's glow) is no detail.
    detail = plane - middle
    detail *= window
    power = np.abs(fft.rfft2(detail)) ** 2
    of_runs = np.add.reduceat(power.ravel(), runs, dtype=np.float64)
    total = np.bincount(rings, weights=of_runs, minlength=RINGS + 1)
    mean = total[:RINGS] / sizes / energy
    noise = float(np.median(mean[-_NOISE_RINGS:]))
    light = max(float(middle) - dark_counts, _LEAST_LIGHT)
    amplitudes = np.sqrt(np.clip(mean - noise, 0.0, None)) / light
    return amplitudes, float(np.sqrt(noise) / light)


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
    above_noise = np.maximum(*bands) > of_noise
    if not above_noise.any():
        return 0.0
    away = np.abs(np.sqrt(bands[0]) - np.sqrt(bands[1]))
    share = away / np.sqrt((bands[0] + bands[1]) / 2 + of_noise)
    return float(share[above_noise].max())


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
) -> tuple[NDArray[np.float32], float, Places, Places, Places]:
    """Return the window, its energy, and how a spectrum parts into rings.

    Along a row most neighbours are of one ring: where each such run begins, its ring,
    and the size of every ring (1 if empty).
    """
    window = np.outer(np.hanning(side_y), np.hanning(side_x)).astype(np.float32)
    radius = np.hypot(np.fft.fftfreq(side_y)[:, None], np.fft.rfftfreq(side_x)[None, :])
    rings = np.digitize(radius, EDGES).ravel() - 1
    rings[(rings < 0) | (rings >= RINGS)] = RINGS
    sizes = np.maximum(np.bincount(rings, minlength=RINGS + 1)[:RINGS], 1)
    runs = np.flatnonzero(np.diff(rings, prepend=-1))
    return window, float((window**2).sum()), runs, rings[runs], sizes


# In depths of field. At the end of the table nothing changes with z, so it reaches
# beyond all images: a focus out there would explain any that look alike.
_TABLE_END, _TABLE_STEP = 16.0, 0.125
_RADII, _LIGHT, _PLACES = 320, 360, 101
_TABLE_HIGHEST = 2.0
_BLUR_MARGIN = 5.0
# The PSFs of rtfocus turn an image in focus into a defocused one, so the image in
# focus itself may be sharper than the PSF at zero; this far out the two meet.
FOCUS_WIDTH = 0.125


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
        columns = np.linspace(0.0, _TABLE_HIGHEST, _PLACES)
        scaled = FREQUENCIES / sampling / aperture
        self._rings = np.stack([np.interp(scaled, columns, line) for line in table])
        self._rows_per_unit = aperture**2 / _TABLE_STEP

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
        amplitudes = self._rings[low] * (1 - share) + self._rings[low + 1] * share
        if kept:
            near = np.clip(1.0 - np.abs(defocus) / FOCUS_WIDTH, 0.0, 1.0)[..., None]
            amplitudes = amplitudes * (1 - near) + near
        return np.asarray(amplitudes)


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
    count = round(_TABLE_END / _TABLE_STEP)
    defocus_um = np.arange(-count, count + 1) * _TABLE_STEP * unit_um
    radius = (np.arange(_RADII) + 0.5) / _RADII
    pupil = np.stack([round_pupil(system, float(z), radius) for z in defocus_um], 1)
    # Places in the image in lambda / NA, as far as the widest blur reaches.
    reach = _TABLE_END + _BLUR_MARGIN
    place = (np.arange(_LIGHT) + 0.5) / _LIGHT * reach
    field = j0(2 * np.pi * np.outer(place, radius)) @ (pupil * radius[:, None])
    light = np.abs(field) ** 2 * place[:, None]
    frequency = np.linspace(0.0, _TABLE_HIGHEST, _PLACES)
    table = np.abs(j0(2 * np.pi * np.outer(frequency, place)) @ light).T
    table /= np.maximum(table[:, :1], 1e-30)
    return np.asarray(table)


# What the optics may truly be, and what it costs as a logarithm.
_EXTRA_WAVES, _WAVES_SD = (-0.2, -0.1, 0.0, 0.1, 0.2), 0.12
_APERTURES, _APERTURE_SD = (0.95, 1.0, 1.05), 0.05
_SPREADS = (0.0, 0.2, 0.4)
"""Standard deviation of the frame's own heights, in depths of field."""
_REVERSED = 4.0
# Depths of field; beyond it images say nothing.
_FARTHEST, _STEP = 8.0, 0.05
_LEAST_MODULATION = 0.05
# How far log amplitudes are from the optics' curve, over how many depths of field,
# and what no curve explains.
_BENT, _BEND_LENGTH, _ROUGH = 0.05, 0.8, 0.02
_PLACED = 0.1
_UNKNOWN = 25.0
"""Variance of the specimen's own log amplitude: nothing is known of it."""
# Rings that err independently; neighbours lack the same things.
_INDEPENDENT = 10.0
_LEAST_SIGNAL, _NOISE_OF_LOG = 0.3, 0.05
_HOPELESS = 12.0
"""Models less likely by this logarithm are dropped at a position."""


class DefocusModels:
    """Log amplitude of every ring over defocus, for all that the optics may be.

    Parameters
    ----------
    optics
        Of the channel, as stated.
    direction
        +1: larger z brings the plane of focus towards the specimen; -1: away;
        0: not known. The other one is thought of too, at a price.
    """

    def __init__(self, optics: OpticalSystem, direction: int = 1) -> None:
        self.unit_um = optics.defocus_unit_um
        # Beyond the optics' limit a ring holds noise alone.
        self.rings = FREQUENCIES < 2.0 / optics.sampling
        defocus = np.arange(-_FARTHEST, _FARTHEST + _STEP / 2, _STEP)
        turns = [(turn, _REVERSED * (turn == -direction)) for turn in (1, -1)]
        curves, prices = [], []
        for extra in _EXTRA_WAVES if optics.psf_model == "pupil" else (0.0,):
            table = modulation_table(optics, extra_waves=extra)
            for aperture in _APERTURES:
                transfer = Transfer(table, optics.sampling, aperture)
                power = transfer.amplitudes(defocus)[:, self.rings] ** 2
                price = 0.5 * (extra / _WAVES_SD) ** 2
                price += 0.5 * ((aperture - 1.0) / _APERTURE_SD) ** 2
                for spread, (turn, turned) in product(_SPREADS, turns):
                    curve = np.sqrt(_spread_out(power, spread))
                    curves.append(np.log(np.maximum(curve, _LEAST_MODULATION))[::turn])
                    prices.append(price + turned)
        self.curves = np.array(curves)
        """Axes (model, defocus, ring)."""
        self.prices = np.array(prices)

    def at(self, defocus: Floats, models: NDArray[np.intp]) -> Floats:
        """Return log amplitudes, axes (model, defocus, ring)."""
        last = self.curves.shape[1] - 1
        row = np.clip((defocus + _FARTHEST) / _STEP, 0, last - 1e-6)
        low = row.astype(np.int64)
        share = (row - low)[:, None]
        curves = self.curves[models]
        return np.asarray(curves[:, low] * (1 - share) + curves[:, low + 1] * share)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """An image as `amplitude_spectrum` gives it."""

    amplitude: Floats
    """By ring."""
    noise: float
    """Amplitude of a ring."""

    def log_amplitude(self) -> tuple[Floats, Floats]:
        """Return log amplitude and its variance by ring."""
        noise = max(self.noise, 1e-9)
        signal = np.maximum(self.amplitude, _LEAST_SIGNAL * noise)
        return np.log(signal), _NOISE_OF_LOG * (noise / signal) ** 2


@dataclass
class Appearance:
    """One position: its images of known defocus, and what new ones tell.

    Examples
    --------
    ::

        seen = Appearance(models, [(1.2, spectrum), (0.0, another)])
        weights, misfit = seen.weights([(0.3, newest)], np.arange(-3, 3, 0.1))
    """

    models: DefocusModels
    known: list[tuple[float, Spectrum]]
    """Defocus in depths of field and image; one or more."""
    _likely: NDArray[np.intp] = field(init=False)

    def __post_init__(self) -> None:
        """Weigh what the optics may be by the known images."""
        rings = self.models.rings
        self._places = np.array([place for place, _ in self.known])
        amplitude, noise = (
            np.array(values)[:, rings]
            for values in zip(*(s.log_amplitude() for _, s in self.known), strict=True)
        )
        every = np.arange(len(self.models.prices))
        slope = self._slope_variance(self._places, every)
        own = noise + _ROUGH**2 + slope.mean(axis=0)
        covariance = _kernel(self._places, self._places)[None] + np.einsum(
            "nr,nk->rnk", own, np.eye(len(own))
        )
        self._inverse = np.linalg.inv(covariance)
        residual = amplitude[None] - self.models.at(self._places, every)
        pull = np.einsum("rnk,mkr->mnr", self._inverse, residual)
        share = _INDEPENDENT / amplitude.shape[1]
        evidence = -0.5 * share * np.einsum("mnr,mnr->m", residual, pull)
        evidence -= self.models.prices
        self._likely = np.flatnonzero(evidence > evidence.max() - _HOPELESS)
        self._evidence = evidence[self._likely]
        self._pull = pull[self._likely]

    def weights(
        self, images: list[tuple[float, Spectrum]], candidates: Floats
    ) -> tuple[Floats, float]:
        """Weigh where focus may be by images of one stack.

        Parameters
        ----------
        images
            Where each was exposed, in depths of field from one common place, and the
            image; larger is farther along z.
        candidates
            Places of focus, counted in the same way.

        Returns
        -------
        tuple
            Probability of each candidate, and how many standard deviations the best
            one leaves per ring: about 1; 3 and more is another specimen or none.
        """
        logs = np.repeat(self._evidence[:, None], len(candidates), axis=1)
        left = np.zeros_like(logs)
        for place, image in images:
            amplitude, noise = (
                values[self.models.rings] for values in image.log_amplitude()
            )
            mean, variance = self._predict(candidates - place)
            total = variance + noise + _ROUGH**2
            square = (amplitude - mean) ** 2 / total
            share = _INDEPENDENT / amplitude.size
            logs += -0.5 * share * (square + np.log(total)).sum(axis=2)
            left += square.mean(axis=2)
        best = np.unravel_index(int(np.argmax(logs)), logs.shape)
        likely = np.exp(logs - logs[best]).sum(axis=0)
        misfit = float(np.sqrt(left[best] / max(len(images), 1)))
        return likely / likely.sum(), misfit

    def _predict(self, defocus: Floats) -> tuple[Floats, Floats]:
        """Return log amplitudes, axes (model, defocus, ring), and their variance."""
        toward = _kernel(defocus, self._places)
        mean = self.models.at(defocus, self._likely)
        mean = mean + np.einsum("cn,mnr->mcr", toward, self._pull)
        known = np.einsum("cn,rnk,ck->cr", toward, self._inverse, toward)
        slope = self._slope_variance(defocus, self._likely)
        return mean, _BENT**2 + _UNKNOWN - known + slope

    def _slope_variance(self, defocus: Floats, models: NDArray[np.intp]) -> Floats:
        """Return what an image's place, known to some hundredths, leaves open.

        It matters where detail changes fast: at focus. Axes (model, defocus, ring).
        """
        ahead, behind = (
            self.models.at(defocus + off, models) for off in (_PLACED, -_PLACED)
        )
        return np.asarray((ahead - behind) ** 2 / 4)


def _kernel(one: Floats, two: Floats) -> Floats:
    """Return the covariance between places: the bend, and the specimen's amplitude."""
    away = (one[:, None] - two[None, :]) / _BEND_LENGTH
    return np.asarray(_BENT**2 * np.exp(-0.5 * away**2) + _UNKNOWN)


def _spread_out(power: Floats, spread: float) -> Floats:
    """Average over a frame whose heights differ by a standard deviation."""
    half = round(spread * np.sqrt(3.0) / _STEP)
    if half == 0:
        return power
    sums = np.cumsum(np.pad(power, ((half + 1, half), (0, 0)), mode="edge"), axis=0)
    return np.asarray((sums[2 * half + 1 :] - sums[: -2 * half - 1]) / (2 * half + 1))
