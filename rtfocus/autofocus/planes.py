"""Planes: where focus lies, by how images at several z differ.

What the specimen looks like cancels, so this needs no training and knows the side
of focus also where the PSF is even. It does need the optics; aperture, spherical
aberration and the stage's direction may differ from what was said, at a price. How
badly the best answer explains the images is part of the answer: images that do not
change as optics say (bright field, a stage that stands still) show.

A stack through focus, taken once per objective (``rtfocus calibrate``), tells whether
all of this, the engine's levels and the stage agree, and the backlash. Only where they
do may a search end without a check from both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.appearance import (
    FOCUS_WIDTH,
    Transfer,
    modulation_table,
    sharpness,
)
from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.frame import FocusReading

Floats = NDArray[np.float64]

# Candidates for focus lie this far apart, in depths of field, and at most so far from
# the nearest image.
_CANDIDATE_STEP, _FARTHEST_FOCUS = 0.1, 7.5
_APERTURES = (0.9, 0.95, 1.0, 1.05, 1.1)
_FINE_APERTURES = (0.9, 0.925, 0.95, 0.975, 1.0, 1.025, 1.05, 1.075, 1.1)
_FEW_APERTURES, _FEW_WAVES = (0.95, 1.0, 1.05), (-0.2, -0.1, 0.0, 0.1, 0.2)
_APERTURE_SD = 0.05
_EXTRA_WAVES = (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)
_FINE_WAVES = (-0.3, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
_WAVES_SD = 0.12
REVERSED_PRICE = 6.0
"""Of a stage that runs against what the core says, as a logarithm."""
# No model explains ring averages of a real image better than this share of their
# energy: noise, tilt and the specimen's thickness leave it.
_FLOOR = 3e-3
# An answer this good needs no other account of the stage.
_EXPLAINED = 2.5e-3
# Rings that err independently; neighbours lack the same things. So the deviations
# cover what they say (bench.autofocus).
_INDEPENDENT = 12.0
AS_TOLD, REVERSED = "as told", "reversed"


@dataclass(frozen=True, slots=True)
class Course:
    """Another account of a stage than that it goes where it is sent."""

    name: str
    gain: float
    """True way per commanded way."""
    price: float
    """Minus the logarithm of how likely it is beforehand."""


@dataclass(frozen=True, slots=True)
class PlaneFit:
    """What several planes together say of where focus is."""

    candidates_um: Floats
    """Focus positions that were tried, in stage z."""
    weights: Floats
    """Probability of each by the images alone; sums to 1."""
    unexplained: float
    """Share of the spectra's energy that the best leaves; 0 is a perfect fit."""
    answers: dict[str, float]
    """Probability of each account of the stage: as sent, reversed, those given."""
    at_the_edge: bool
    """The best answer needs an aperture or aberration as far off as was allowed."""
    by_direction: dict[int, float]
    """Share left by the best answer of each direction of the stage that was tried."""

    @property
    def best_um(self) -> float:
        """The likeliest candidate."""
        return float(self.candidates_um[int(np.argmax(self.weights))])

    def probability(self, z_um: float, reach_um: float) -> float:
        """Return how likely focus lies within reach of a place."""
        return float(self.weights[abs(self.candidates_um - z_um) <= reach_um].sum())

    @property
    def course(self) -> str:
        """How the stage seems to answer."""
        return max(self.answers, key=lambda name: self.answers[name])


Model = tuple[Transfer, float, bool]
"""Transfer, price, and whether it lies at the edge of what is allowed."""


class PlaneComparison:
    """Compares planes of one channel.

    Parameters
    ----------
    optics
        Of the channel.
    direction
        +1: larger z brings the plane of focus towards the specimen; -1: away;
        0: not known.
    fine
        Try optics in finer steps. Right where they are known well; where they are
        not, a specimen that drifts is explained by other optics, and the image in
        focus may be sharper than they say.
    """

    def __init__(
        self, optics: OpticalSystem, direction: int = 1, *, fine: bool = False
    ) -> None:
        self.unit_um = optics.defocus_unit_um
        self._direction = direction
        self.turns = (direction,) if direction else (1, -1)
        self._fine = fine
        self.models: list[Model] = []
        few: list[Model] = []
        waves = _FINE_WAVES if fine else _EXTRA_WAVES
        apertures = _FINE_APERTURES if fine else _APERTURES
        for extra in waves if optics.psf_model == "pupil" else (0.0,):
            table = modulation_table(optics, extra_waves=extra)
            for aperture in apertures:
                price = 0.5 * (extra / _WAVES_SD) ** 2
                price += 0.5 * ((aperture - 1.0) / _APERTURE_SD) ** 2
                at_edge = aperture in (apertures[0], apertures[-1])
                at_edge |= abs(extra) == waves[-1]
                transfer = Transfer(table, optics.sampling, aperture)
                self.models.append((transfer, price, at_edge))
                if aperture in _FEW_APERTURES and extra in _FEW_WAVES:
                    few.append(self.models[-1])
        self._plain = [model for model in self.models if model[1] == 0.0]
        # A few that weigh together what all do.
        weights = [sum(exp(-price) for _, price, _ in m) for m in (self.models, few)]
        more = log(weights[0] / weights[1])
        self.few_models = [(model, price - more, edge) for model, price, edge in few]

    def fit(
        self,
        z_um: Floats,
        spectra: Floats,
        noise: Floats,
        known: Floats | None = None,
        reach_um: float | None = None,
        courses: Sequence[Course] = (),
    ) -> PlaneFit:
        """Find the focus position that explains several planes.

        Parameters
        ----------
        z_um
            Stage z of the planes, shape (plane,), two or more.
        spectra, noise
            As `rtfocus.autofocus.appearance.amplitude_spectrum` gives, axes (plane,
            ring), and noise of shape (plane,).
        known
            Focus positions, in um, that are known of some planes already: at another
            time they were elsewhere. NaN: to be found. None: of all to be found.
        reach_um
            How far from the planes focus is looked for; None: as far as one can see.
        courses
            Other accounts of the stage, tried where it does not seem to go as sent.
        """
        candidates = self.candidates(z_um, known, reach_um)
        focus = np.broadcast_to(candidates[:, None], (len(candidates), len(z_um)))
        if known is not None:
            focus = np.where(np.isnan(known), focus, known)
        tried = Tried(Scores(spectra, noise), allows_sharper=not self._fine)
        away = (focus - z_um) / self.unit_um
        for turn in self.turns:
            tried.add(AS_TOLD, turn, turn * away, self.models, 0.0)
        if self._direction and tried.least > _EXPLAINED:
            turn = -self._direction
            tried.add(REVERSED, turn, turn * away, self.models, REVERSED_PRICE)
        for course in courses if tried.least > _EXPLAINED else ():
            # The optics as they were stated: an odd stage and odd optics are too much.
            for turn in self.turns:
                way = turn * course.gain * away
                tried.add(course.name, turn, way, self._plain, course.price)
        return tried.fit(candidates)

    def candidates(
        self, z_um: Floats, known: Floats | None, reach_um: float | None
    ) -> Floats:
        """Return where focus is looked for, in um; arguments as of `fit`."""
        margin = _FARTHEST_FOCUS * self.unit_um
        if reach_um is not None:
            margin = min(margin, reach_um)
        step = _CANDIDATE_STEP * self.unit_um
        open_um = z_um if known is None else z_um[np.isnan(known)]
        return np.arange(open_um.min() - margin, open_um.max() + margin + step, step)


class Tried:
    """The models that were tried on some planes, and how badly each explains them."""

    def __init__(self, scores: "Scores", *, allows_sharper: bool) -> None:
        self._scores = scores
        self._allows_sharper = allows_sharper
        self._costs: list[Floats] = []
        self._prices: list[float] = []
        self._names: list[str] = []
        self._edges: list[bool] = []
        self._by_direction: dict[int, float] = {}

    @property
    def least(self) -> float:
        """Share that the best so far leaves unexplained."""
        return min(float(cost.min()) for cost in self._costs)

    def add(
        self, name: str, turn: int, away: Floats, models: list[Model], price: float
    ) -> None:
        """Try models on planes that lie `away` from focus, axes (candidate, plane)."""
        near = (np.abs(away) < FOCUS_WIDTH).any(axis=1)
        for transfer, own_price, at_edge in models:
            costs = [self._scores.unexplained(transfer.amplitudes(away))]
            if self._allows_sharper:
                sharper = costs[0].copy()
                sharper[near] = self._scores.unexplained(
                    transfer.amplitudes(away[near], kept=True)
                )
                costs.append(sharper)
            for cost in costs:
                self._costs.append(cost)
                self._prices.append(own_price + price)
                self._names.append(name)
                self._edges.append(at_edge)
                least = min(float(cost.min()), self._by_direction.get(turn, 1.0))
                self._by_direction[turn] = least

    def fit(self, candidates: Floats) -> PlaneFit:
        """Weigh them: every model counts with its probability."""
        cost, price = np.array(self._costs), np.array(self._prices)[:, None]
        loss = 0.5 * _INDEPENDENT * cost / max(float(cost.min()), _FLOOR) + price
        best = np.unravel_index(int(np.argmin(loss)), loss.shape)
        likely = np.exp(float(loss.min()) - loss)
        by_model = likely.sum(axis=1) / likely.sum()
        answers: dict[str, float] = {}
        for name, share in zip(self._names, by_model, strict=True):
            answers[name] = answers.get(name, 0.0) + float(share)
        return PlaneFit(
            candidates_um=candidates,
            weights=likely.sum(axis=0) / likely.sum(),
            unexplained=float(cost[best]),
            answers=answers,
            at_the_edge=self._edges[int(best[0])],
            by_direction=self._by_direction,
        )


class Scores:
    """The unexplained share of spectra under one model after the other."""

    def __init__(self, spectra: Floats, noise: Floats) -> None:
        energy = (spectra**2).sum(axis=0)
        certain = energy / (energy + float((noise**2).sum()) + 1e-12)
        self._spectra = spectra
        self._energy = energy
        self._weight = certain / np.maximum(energy * certain.sum(), 1e-12)

    def unexplained(self, model: Floats) -> Floats:
        """Return the share by candidate; `model` has axes (candidate, plane, ring).

        In every ring the specimen's own amplitude is free: the best one is taken.
        """
        strength = np.maximum((model**2).sum(axis=1), 1e-6)
        projected = np.einsum("cpr,pr->cr", model, self._spectra)
        left = self._energy - projected**2 / strength
        return np.asarray(np.clip(left, 0.0, None) @ self._weight)


# Of the spectra's energy, and in depths of field.
_MOST_UNEXPLAINED, _MOST_APART = 0.02, 0.35
# The better direction must explain so much more to be the one.
_CLEAR = 1.5
FEWEST_PLANES = 5


@dataclass(frozen=True, slots=True)
class ZPlane:
    """One image of a calibration stack."""

    z_um: float
    reading: FocusReading

    @property
    def sharpness(self) -> float:
        """How sharp it is, as `appearance.sharpness` says."""
        return sharpness(np.asarray(self.reading.spectrum))


@dataclass(frozen=True, slots=True)
class FocusCalibration:
    """What was found; lengths in um of stage z."""

    channel: str
    focus_um: float
    """Where the optics put focus."""
    sharpest_um: float
    """Where the image is sharpest."""
    unexplained: float
    """Share of the images' change with z that the optics leave unexplained."""
    direction: int
    """By the images: +1 larger z brings the plane of focus to the specimen, -1, or 0
    where they do not tell (an even PSF)."""
    direction_of_core: int
    """As Micro-Manager was told."""
    backlash_um: float
    """Focus from above minus focus from below."""
    level_offset_um: float
    """Reading of the engine in focus."""
    level_scale: float
    """Reading of the engine per true distance."""
    level_range_um: float
    """Distance up to which the reading grows."""
    unit_um: float
    """Depth of field n lambda / NA^2."""
    problems: list[str]
    """Why answers are still to be checked; empty: the optics can be trusted."""

    @property
    def trusted(self) -> bool:
        """Tell whether a search may end without a check from both sides."""
        return not self.problems


def calibrate_focus(
    comparison: PlaneComparison,
    up: Sequence[ZPlane],
    down: Sequence[ZPlane],
    *,
    channel: str,
    direction_of_core: int,
    not_found: str | None,
) -> FocusCalibration:
    """Evaluate a stack taken on the way up and again on the way down.

    Parameters
    ----------
    comparison
        Of the channel's optics, made for direction 0.
    up, down
        The same planes, five or more.
    channel
        Its name.
    direction_of_core
        `core.getFocusDirection` of the focus stage.
    not_found
        Why the search before the stack failed; None: it found focus.

    Raises
    ------
    ConfigError
        If there are too few planes.
    """
    if (fewer := min(len(up), len(down))) < FEWEST_PLANES:
        msg = f"{fewer} planes are too few; take {FEWEST_PLANES} or more"
        raise ConfigError(msg)
    fits = [_fit_near_focus(comparison, planes) for planes in (up, down)]
    focus, sharp = fits[0].best_um, _sharpest_um(up)
    direction = _direction_by_images(fits[0].by_direction)
    offset, scale, reach = _levels(up, focus)
    unexplained = max(fit.unexplained for fit in fits)
    searched = f"the search before the stack did not find focus: {not_found}"
    problems = [] if not_found is None else [searched]
    if unexplained > _MOST_UNEXPLAINED:
        problems.append(
            f"the optics leave {100 * unexplained:.0f} % of the change with z "
            "unexplained; rtfocus psf fit finds better ones"
        )
    if any(fit.at_the_edge for fit in fits):
        problems.append(
            "NA or spherical aberration seem to differ by more than 10 % or 0.3 waves "
            "from the channel's optics; rtfocus psf fit finds them"
        )
    if abs(focus - sharp) > _MOST_APART * comparison.unit_um:
        problems.append(
            f"the image is sharpest {abs(focus - sharp):.2f} um from where the optics "
            "put focus"
        )
    if direction and direction_of_core and direction != direction_of_core:
        problems.append(
            "the stage runs against what Micro-Manager was told (focus direction in "
            "its hardware wizard), or the spherical aberration has the wrong sign"
        )
    return FocusCalibration(
        channel=channel,
        focus_um=focus,
        sharpest_um=sharp,
        unexplained=unexplained,
        direction=direction,
        direction_of_core=direction_of_core,
        backlash_um=fits[1].best_um - focus,
        level_offset_um=offset,
        level_scale=scale,
        level_range_um=reach,
        unit_um=comparison.unit_um,
        problems=problems,
    )


def _fit_near_focus(comparison: PlaneComparison, planes: Sequence[ZPlane]) -> PlaneFit:
    # Far planes say little and show the specimen's thickness.
    sharpest = _sharpest_um(planes)
    near = [p for p in planes if abs(p.z_um - sharpest) < 3 * comparison.unit_um]
    columns = ((p.z_um, p.reading.spectrum, p.reading.noise) for p in near)
    z_um, spectra, noise = map(np.array, zip(*columns, strict=True))
    return comparison.fit(z_um, spectra, noise)


def _direction_by_images(by_direction: dict[int, float]) -> int:
    if len(by_direction) < 2:
        return next(iter(by_direction), 0)
    better, worse = sorted(by_direction, key=by_direction.__getitem__)
    clear = by_direction[worse] > _CLEAR * max(by_direction[better], 1e-4)
    return better if clear else 0


def _sharpest_um(planes: Sequence[ZPlane]) -> float:
    """Return the top of the parabola through the sharpest plane's neighbours."""
    ordered = sorted(planes, key=lambda plane: plane.z_um)
    values = np.array([plane.sharpness for plane in ordered])
    top = int(values.argmax())
    if top in (0, len(ordered) - 1):
        return ordered[top].z_um
    z = np.array([plane.z_um for plane in ordered[top - 1 : top + 2]])
    curve = np.polyfit(z - z[1], values[top - 1 : top + 2], 2)
    return float(z[1] - curve[1] / (2 * curve[0])) if curve[0] < 0 else float(z[1])


def _levels(planes: Sequence[ZPlane], focus_um: float) -> tuple[float, float, float]:
    """Return offset, scale and range of the engine's reading."""
    readings = ((plane.z_um, plane.reading.defocus_um) for plane in planes)
    pairs = [(abs(z - focus_um), abs(um)) for z, um in readings if um is not None]
    if len(pairs) < FEWEST_PLANES:
        return 0.0, 0.0, 0.0
    true, read = np.array(pairs).T
    scale, offset = np.polyfit(true, read, 1)
    return float(offset), float(scale), float(true.max())
