"""Belief: where focus may be at one place, as a few Gaussians in stage z.

An estimate with a sign is one Gaussian, a distance two. What was known before
usually settles which side; where it does not, two planes or a probe do.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import exp, hypot, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import FocusReading

Floats = NDArray[np.float64]

_MOST_MODES = 6
_LEAST_WEIGHT = 1e-3
# An estimate may be an outlier with this probability: then nothing was learnt.
OUTLIER = 0.03


@dataclass(frozen=True, slots=True)
class Mode:
    """One place where focus may be."""

    weight: float
    mean_um: float
    sd_um: float

    def density(self, z_um: float) -> float:
        """Return its share of the density at a z."""
        away = (z_um - self.mean_um) / self.sd_um
        return self.weight * exp(-0.5 * away**2) / (self.sd_um * sqrt(2 * pi))


@dataclass(frozen=True, slots=True)
class Belief:
    """A mixture of at most six Gaussians; weights sum to 1, heaviest first.

    Examples
    --------
    >>> belief = Belief.of([Mode(1.0, 0.0, 2.0)]).seen([Mode(0.5, 6.0, 1.0),
    ...                                                 Mode(0.5, 1.0, 1.0)])
    >>> round(belief.best.mean_um, 1)
    0.8
    """

    modes: tuple[Mode, ...]
    """Empty: nothing is known."""

    @classmethod
    def of(cls, modes: Iterable[Mode]) -> "Belief":
        """Make one from modes of any weights."""
        return cls(_pruned(list(modes)))

    @property
    def is_empty(self) -> bool:
        """Nothing is known."""
        return not self.modes

    @property
    def best(self) -> Mode:
        """The likeliest place."""
        return self.modes[0]

    def rival(self, apart_um: float) -> Mode | None:
        """Return the likeliest mode at least so far from the best one."""
        far = [
            mode
            for mode in self.modes[1:]
            if abs(mode.mean_um - self.best.mean_um) >= apart_um
        ]
        return far[0] if far else None

    def seen(self, likelihood: Sequence[Mode], *, outlier: float = OUTLIER) -> "Belief":
        """Return the belief after an independent observation.

        Parameters
        ----------
        likelihood
            What the observation says alone, as modes over focus z.
        outlier
            Probability that it says nothing.
        """
        if not likelihood:
            return self
        if self.is_empty:
            return Belief.of(likelihood)
        kept = [
            replace(mode, weight=mode.weight * outlier * _base(likelihood, mode))
            for mode in self.modes
        ]
        met = [_product(mine, theirs) for mine in self.modes for theirs in likelihood]
        return Belief.of([*kept, *met])

    def drifted(self, by_um: float, sd_um: float) -> "Belief":
        """Return the belief after a drift with its uncertainty."""
        return Belief(
            tuple(
                Mode(m.weight, m.mean_um + by_um, hypot(m.sd_um, sd_um))
                for m in self.modes
            )
        )


def modes_of_reading(
    reading: FocusReading, z_um: float, *, direction: int, trust_sign: bool
) -> list[Mode]:
    """Turn a frame's estimate into modes over focus z; empty where it was refused.

    Parameters
    ----------
    reading
        Of the frame.
    z_um
        Stage z at which it was exposed.
    direction
        +1: larger z brings the plane of focus towards the specimen; -1; 0: unknown.
    trust_sign
        The optics are calibrated: a signed estimate is believed.
    """
    if reading.defocus_um is None or reading.sd_um is None:
        return []
    away, sd = reading.defocus_um, max(reading.sd_um, 1e-6)
    if reading.signed and trust_sign and direction:
        return [Mode(1.0, z_um + direction * away, sd)]
    if abs(away) < 0.5 * sd:
        return [Mode(1.0, z_um, hypot(sd, away))]
    return [Mode(0.5, z_um + abs(away), sd), Mode(0.5, z_um - abs(away), sd)]


def modes_of_weights(candidates_um: Floats, weights: Floats) -> list[Mode]:
    """Turn probabilities over candidates into modes, one per separate peak."""
    floor = weights.max() * 1e-2
    inside = np.flatnonzero(weights > floor)
    step_um = float(candidates_um[1] - candidates_um[0])
    modes = []
    for part in np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1):
        share = weights[part]
        mean = float(np.average(candidates_um[part], weights=share))
        spread = np.average((candidates_um[part] - mean) ** 2, weights=share)
        modes.append(Mode(float(share.sum()), mean, max(sqrt(float(spread)), step_um)))
    return sorted(modes, key=lambda mode: -mode.weight)[:_MOST_MODES]


def _product(mine: Mode, theirs: Mode) -> Mode:
    variance = mine.sd_um**2 + theirs.sd_um**2
    share = exp(-0.5 * (mine.mean_um - theirs.mean_um) ** 2 / variance)
    weight = mine.weight * theirs.weight * share / sqrt(variance)
    part = mine.sd_um**2 / variance
    mean = mine.mean_um + part * (theirs.mean_um - mine.mean_um)
    return Mode(weight, mean, mine.sd_um * theirs.sd_um / sqrt(variance))


def _base(likelihood: Sequence[Mode], mode: Mode) -> float:
    """Return the density an observation has anywhere within reach of a mode."""
    places = [m.mean_um for m in likelihood] + [mode.mean_um]
    reach = max(places) - min(places) + 6 * max(m.sd_um for m in likelihood)
    return 1.0 / reach


def _pruned(modes: list[Mode]) -> tuple[Mode, ...]:
    """Join modes that overlap, drop weak ones, sort and normalise."""
    left = sorted((m for m in modes if m.weight > 0), key=lambda m: -m.weight)
    joined: list[Mode] = []
    for mode in left:
        for number, other in enumerate(joined):
            if abs(mode.mean_um - other.mean_um) < 0.5 * min(mode.sd_um, other.sd_um):
                joined[number] = _joined(other, mode)
                break
        else:
            joined.append(mode)
    total = sum(mode.weight for mode in joined)
    if total <= 0:
        return ()
    kept = [m for m in joined if m.weight > _LEAST_WEIGHT * total]
    kept = sorted(kept, key=lambda m: -m.weight)[:_MOST_MODES]
    total = sum(mode.weight for mode in kept)
    return tuple(replace(mode, weight=mode.weight / total) for mode in kept)


def _joined(one: Mode, two: Mode) -> Mode:
    total = one.weight + two.weight
    mean = (one.weight * one.mean_um + two.weight * two.mean_um) / total
    variance = (
        one.weight * (one.sd_um**2 + (one.mean_um - mean) ** 2)
        + two.weight * (two.sd_um**2 + (two.mean_um - mean) ** 2)
    ) / total
    return Mode(total, mean, sqrt(variance))
