"""Belief: where focus may be, at one place and at many that drift together.

An estimate with a sign is one Gaussian in stage z, a distance two. What was known
before usually settles which side; where it does not, two planes or a probe do. Places
that drift together settle it for one another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import exp, hypot, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import FocusReading

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_MOST_MODES = 6
# Of a step between candidates, at least: the truth may lie between two.
_GRID = 0.7
_LEAST_WEIGHT = 1e-3
# An estimate may be an outlier with this probability: then nothing was learnt.
OUTLIER = 0.03
# Of `Drift`, in depths of field, and per square root of a second or of its cube.
_WANDER = 0.02  # of the drift
_RATE_WANDER = 0.0003  # of its rate
_OWN_WANDER = 0.003  # of one place alone
_FIRST_RATE = 0.1
_LOST = 0.02  # probability that a course is wrong
_LOST_SD = 0.7  # by how much then
_LOST_RATE = 0.01  # and how much its rate, a second
_LEAST_SD = 0.12  # of an estimate
_ODD = 0.05  # probability of an estimate that is an outlier
_ODD_RANGE = 6.0  # over which outliers lie
_MOST_COURSES = 12
_SURE = 0.8  # weight of the best course that is enough
_SAME_COURSE = 0.3  # distance of two courses that are one


@dataclass(frozen=True, slots=True)
class Mode:
    """One place where focus may be."""

    weight: float
    mean_um: float
    sd_um: float


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
        modes = [
            replace(mode, weight=mode.weight * outlier * _base(likelihood, mode))
            for mode in self.modes
        ]
        met = [_product(mine, theirs) for mine in self.modes for theirs in likelihood]
        return Belief.of([*modes, *met])


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


def modes_of_weights(
    candidates_um: Floats, weights: Floats, *, valley: float = 0.0
) -> list[Mode]:
    """Turn probabilities over candidates into modes, one per separate peak.

    Parameters
    ----------
    candidates_um
        Evenly spaced, shape (candidate,).
    weights
        Of each.
    valley
        Peaks that run into one another are two where the weight between them
        falls below this share of the lower one; 0: they are one mode.
    """
    floor = weights.max() * 1e-2
    inside = np.flatnonzero(weights > floor)
    step_um = float(candidates_um[1] - candidates_um[0])
    modes = []
    parts = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    for part in (piece for whole in parts for piece in _split(whole, weights, valley)):
        share = weights[part]
        mean = float(np.average(candidates_um[part], weights=share))
        spread = np.average((candidates_um[part] - mean) ** 2, weights=share)
        modes.append(
            Mode(float(share.sum()), mean, max(sqrt(float(spread)), _GRID * step_um))
        )
    return sorted(modes, key=lambda mode: -mode.weight)[:_MOST_MODES]


@dataclass(frozen=True, slots=True)
class _Course:
    """One course the drift may have taken: a Kalman filter.

    Given drift and speed, what is not known of one place's height has nothing to do
    with another's, so that many places cost little.
    """

    weight: float
    state: Floats
    """Drift and speed."""
    covariance: Floats
    heights: Floats
    """Focus of every place without the drift, shape (place,)."""
    ties: Floats
    """Covariance of every height with the state, shape (place, 2)."""
    variances: Floats
    """Of the heights, shape (place,)."""

    def ahead(self, step_s: float) -> "_Course":
        """Return the course some seconds later."""
        move = np.array([[1.0, step_s], [0.0, 1.0]])
        across = _RATE_WANDER**2 * step_s**2 / 2
        noise = np.array(
            [
                [_WANDER**2 * step_s + _RATE_WANDER**2 * step_s**3 / 3, across],
                [across, _RATE_WANDER**2 * step_s],
            ]
        )
        return replace(
            self,
            state=move @ self.state,
            covariance=move @ self.covariance @ move.T + noise,
            ties=self.ties @ move.T,
        )

    def lost(self) -> "_Course":
        """Return the course as if it had been left, to be put right by one image."""
        more = np.diag([_LOST_SD**2, _LOST_RATE**2])
        covariance = self.covariance + more
        return replace(self, weight=self.weight * _LOST, covariance=covariance)

    def begun(self, place: int, focus: float, variance: float) -> "_Course":
        """Return the course with a place whose focus was found."""
        heights, ties, variances = (
            np.concatenate([values, np.zeros_like(values[:1], shape=shape)])
            if place == len(self.heights)
            else values.copy()
            for values, shape in (
                (self.heights, (1,)),
                (self.ties, (1, 2)),
                (self.variances, (1,)),
            )
        )
        heights[place] = focus - self.state[0]
        ties[place] = -self.covariance[0]
        variances[place] = self.covariance[0, 0] + variance
        return replace(self, heights=heights, ties=ties, variances=variances)

    def wandered(self, place: int, variance: float) -> "_Course":
        """Return the course with a place that may have moved alone."""
        variances = self.variances.copy()
        variances[place] += variance
        return replace(self, variances=variances)

    def seen(self, place: int, mode: Mode) -> "_Course":
        """Return the course after one reading of a place's focus."""
        tie = self.ties[place]
        own = float(tie[0] + self.variances[place])
        shared = self.covariance[:, 0] + tie
        variance = float(shared[0]) + own + mode.sd_um**2
        away = mode.mean_um - float(self.state[0] + self.heights[place])
        likely = exp(-0.5 * away**2 / variance) / sqrt(2 * pi * variance)
        # Of other places the state alone tells.
        through = np.linalg.solve(self.covariance + 1e-9 * np.eye(2), shared)
        of_places = self.ties @ through
        of_places[place] = own
        gain = of_places / variance
        return _Course(
            self.weight * mode.weight * likely,
            self.state + shared / variance * away,
            self.covariance - np.outer(shared, shared) / variance,
            self.heights + gain * away,
            self.ties - np.outer(gain, shared),
            np.maximum(self.variances - gain**2 * variance, 1e-6),
        )

    def is_like(self, other: "_Course") -> bool:
        """Tell whether two courses are one, by what is known of the likelier."""
        away = self.state - other.state
        if abs(away[0]) > _SAME_COURSE:
            return False
        floor = np.diag([0.05**2, 1e-8])
        return float(away @ np.linalg.solve(self.covariance + floor, away)) < 4.0


class Drift:
    """One drift of all places and its speed, in depths of field.

    An even PSF does not tell up from down, so several courses are followed at once;
    the stage goes with the likeliest, and the next image shows whether it was right.

    Examples
    --------
    >>> drift = Drift(0.0)
    >>> drift.begin(0, 0.0, 5.0)
    >>> for second in range(1, 60):
    ...     drift.see(0, float(second), [Mode(1.0, 5.0 + 0.1 * second, 0.05)])
    >>> round(drift.focus(0, 70.0), 1)
    12.0
    """

    def __init__(self, time_s: float) -> None:
        self._time_s = time_s
        still = np.diag([0.0, _FIRST_RATE**2])
        none = np.zeros(0)
        self._courses = [_Course(1.0, np.zeros(2), still, none, np.zeros((0, 2)), none)]
        self._seen_s: list[float] = []

    def at(self, time_s: float) -> float:
        """Return the likeliest drift at a time."""
        return float(self._best.ahead(time_s - self._time_s).state[0])

    def focus(self, place: int, time_s: float) -> float:
        """Return where the focus of a place most likely is at a time."""
        return self.at(time_s) + float(self._best.heights[place])

    def is_sure(self) -> bool:
        """Tell whether one course is far likelier than all others."""
        return self._best.weight >= _SURE

    def begin(self, place: int, time_s: float, focus: float, sd: float = 0.1) -> None:
        """Take in a place whose focus was found.

        Parameters
        ----------
        place
            Its number: one of those known, found anew, or the next.
        time_s
            Of the search.
        focus
            In depths of field.
        sd
            How well it was found.
        """
        self._go_to(time_s)
        self._courses = [course.begun(place, focus, sd**2) for course in self._courses]
        self._seen_s[place : place + 1] = [self._time_s]

    def see(self, place: int, time_s: float, modes: Sequence[Mode]) -> None:
        """Take in what an image says of where a place's focus is, as modes."""
        self._go_to(time_s)
        own = _OWN_WANDER**2 * (self._time_s - self._seen_s[place])
        self._seen_s[place] = self._time_s
        before = [course.wandered(place, own) for course in self._courses]
        odd = _ODD / _ODD_RANGE
        after = [replace(course, weight=course.weight * odd) for course in before]
        before += [course.lost() for course in before]
        wide = [replace(mode, sd_um=max(mode.sd_um, _LEAST_SD)) for mode in modes]
        after += [course.seen(place, mode) for course in before for mode in wide]
        self._courses = _likeliest(after)

    def _go_to(self, time_s: float) -> None:
        # An image that comes late is taken as if it were of now.
        step_s = max(time_s - self._time_s, 0.0)
        self._time_s += step_s
        self._courses = [course.ahead(step_s) for course in self._courses]

    @property
    def _best(self) -> _Course:
        return self._courses[0]


def _likeliest(courses: list[_Course]) -> list[_Course]:
    """Join courses that are alike and keep the likeliest; weights sum to 1."""
    joined: list[_Course] = []
    for course in sorted(courses, key=lambda one: -one.weight):
        for number, other in enumerate(joined):
            if other.is_like(course):
                joined[number] = replace(other, weight=other.weight + course.weight)
                break
        else:
            joined.append(course)
    joined = sorted(joined, key=lambda one: -one.weight)[:_MOST_COURSES]
    total = sum(course.weight for course in joined)
    return [replace(course, weight=course.weight / total) for course in joined]


def _split(part: Indices, weights: Floats, valley: float) -> list[Indices]:
    """Cut a run of candidates at the lowest place between two of its peaks."""
    if valley <= 0.0 or len(part) < 3:
        return [part]
    share = weights[part]
    left, right = np.maximum.accumulate(share), np.maximum.accumulate(share[::-1])[::-1]
    depth = share / np.minimum(left, right)
    lowest = int(np.argmin(depth))
    if depth[lowest] >= valley:
        return [part]
    cut = [part[:lowest], part[lowest:]]
    return [piece for half in cut for piece in _split(half, weights, valley)]


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
                joined[number] = _join(other, mode)
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


def _join(one: Mode, two: Mode) -> Mode:
    total = one.weight + two.weight
    mean = (one.weight * one.mean_um + two.weight * two.mean_um) / total
    variance = (
        one.weight * (one.sd_um**2 + (one.mean_um - mean) ** 2)
        + two.weight * (two.sd_um**2 + (two.mean_um - mean) ** 2)
    ) / total
    return Mode(total, mean, sqrt(variance))
