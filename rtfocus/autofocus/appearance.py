"""Appearance: how the spectrum of one position changes with defocus, learnt there.

The optics say how every ring of a spectrum changes with defocus, roughly: aperture
and aberration are known to some per cent, the specimen is tilted and thick. Images of
the position at known defocus say what it is, at a few places. Between them the
optics' curve is bent through the images (a Gaussian process whose mean is the
optics), and how far it may be off is part of the answer. So a new image tells
distance and side within a depth of field, where optics alone take one side for
the other.
"""

from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.spectrum import FREQUENCIES, Transfer, modulation_table
from rtfocus.channel import OpticalSystem

Floats = NDArray[np.float64]

# What the optics may truly be, and what it costs as a logarithm.
_EXTRA_WAVES, _WAVES_SD = (-0.2, -0.1, 0.0, 0.1, 0.2), 0.12
_APERTURES, _APERTURE_SD = (0.95, 1.0, 1.05), 0.05
_SPREADS = (0.0, 0.2, 0.4)
"""Standard deviation of the frame's own heights, in depths of field."""
_REVERSED = 4.0
# Depths of field; beyond it nothing is told.
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
        Of the channel, as told.
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
            for aperture, kept in product(_APERTURES, (False, True)):
                transfer = Transfer(table, optics.sampling, aperture)
                power = transfer.amplitudes(defocus, kept=kept)[:, self.rings] ** 2
                price = 0.5 * (extra / _WAVES_SD) ** 2
                price += 0.5 * ((aperture - 1.0) / _APERTURE_SD) ** 2
                for spread, (turn, turned) in product(_SPREADS, turns):
                    seen = np.sqrt(_spread_out(power, spread))
                    curves.append(np.log(np.maximum(seen, _LEAST_MODULATION))[::turn])
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
class Look:
    """An image whose defocus is asked or known."""

    spectrum: Floats
    """As `rtfocus.autofocus.spectrum.amplitude_spectrum` gives."""
    noise: float

    def log_amplitude(self) -> tuple[Floats, Floats]:
        """Return log amplitude and its variance by ring."""
        noise = max(self.noise, 1e-9)
        signal = np.maximum(self.spectrum, _LEAST_SIGNAL * noise)
        return np.log(signal), _NOISE_OF_LOG * (noise / signal) ** 2


@dataclass
class Appearance:
    """One position: its images of known defocus, and what new ones tell.

    Examples
    --------
    ::

        seen = Appearance(models, [(1.2, look), (0.0, another)])
        weights, misfit = seen.weights([(0.3, newest)], np.arange(-3, 3, 0.1))
    """

    models: DefocusModels
    known: list[tuple[float, Look]]
    """Defocus in depths of field and image; one or more."""
    _likely: NDArray[np.intp] = field(init=False)

    def __post_init__(self) -> None:
        """Weigh what the optics may be by the known images."""
        self._learn()

    def add(self, defocus: float, look: Look) -> None:
        """Take in one more image of known defocus."""
        self.known.append((defocus, look))
        self._learn()

    def weights(
        self, looks: list[tuple[float, Look]], candidates: Floats
    ) -> tuple[Floats, float]:
        """Weigh where focus may be by images of one stack.

        Parameters
        ----------
        looks
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
        for place, look in looks:
            amplitude, noise = (values[self.models.rings] for values in _log(look))
            mean, variance = self._predict(candidates - place)
            total = variance + noise + _ROUGH**2
            square = (amplitude - mean) ** 2 / total
            share = _INDEPENDENT / amplitude.size
            logs += -0.5 * share * (square + np.log(total)).sum(axis=2)
            left += square.mean(axis=2)
        best = np.unravel_index(int(np.argmax(logs)), logs.shape)
        likely = np.exp(logs - logs[best]).sum(axis=0)
        misfit = float(np.sqrt(left[best] / max(len(looks), 1)))
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

    def _learn(self) -> None:
        rings = self.models.rings
        self._places = np.array([place for place, _ in self.known])
        amplitude, noise = (
            np.array(values)[:, rings]
            for values in zip(*(_log(look) for _, look in self.known), strict=True)
        )
        every = np.arange(len(self.models.prices))
        slope = self._slope_variance(self._places, every)
        own = noise + _ROUGH**2 + slope.mean(axis=0)
        covariance = _kernel(self._places, self._places)[None] + np.einsum(
            "nr,nk->rnk", own, np.eye(len(own))
        )
        self._inverse = np.linalg.inv(covariance)
        rest = amplitude[None] - self.models.at(self._places, every)
        pull = np.einsum("rnk,mkr->mnr", self._inverse, rest)
        share = _INDEPENDENT / amplitude.shape[1]
        evidence = -0.5 * share * np.einsum("mnr,mnr->m", rest, pull)
        evidence -= self.models.prices
        self._likely = np.flatnonzero(evidence > evidence.max() - _HOPELESS)
        self._evidence = evidence[self._likely]
        self._pull = pull[self._likely]


def _log(look: Look) -> tuple[Floats, Floats]:
    return look.log_amplitude()


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
