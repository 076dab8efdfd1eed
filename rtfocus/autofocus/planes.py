"""Planes: where focus lies, by how images at several z differ.

What the specimen looks like cancels, so this needs no training and knows the side
of focus also where the PSF is even. It does need the optics; aperture, spherical
aberration and the stage's direction may differ from what was said, at a price. How
badly the best answer explains the images is part of the answer: images that do not
change as optics say (bright field, a stage that stands still) show.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.appearance import FARTHEST, Transfer, modulation_table
from rtfocus.channel import OpticalSystem

Floats = NDArray[np.float64]

# Candidates for focus lie this far apart, in depths of field.
_CANDIDATE_STEP = 0.1
_APERTURES = (0.9, 0.95, 1.0, 1.05, 1.1)
_FINE_APERTURES = (0.9, 0.925, 0.95, 0.975, 1.0, 1.025, 1.05, 1.075, 1.1)
_APERTURE_SD = 0.05
_EXTRA_WAVES = (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)
_FINE_WAVES = (-0.3, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
_WAVES_SD = 0.12
# Price of a stage that runs against what the core says, as a logarithm.
_REVERSED = 6.0
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
    """Another account of a stage than that it goes where it is told."""

    name: str
    gain: float
    """True way per way told."""
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
    """Probability of each account of the stage: as told, reversed, those given."""
    at_the_edge: bool
    """The best answer needs an aperture or aberration as far off as was allowed."""
    by_direction: dict[int, float]
    """Share left by the best answer of each direction of the stage that was tried."""

    @property
    def best_um(self) -> float:
        """The likeliest candidate."""
        return float(self.candidates_um[int(np.argmax(self.weights))])

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
        not, a specimen that drifts is explained by other optics.
    """

    def __init__(
        self, optics: OpticalSystem, direction: int = 1, *, fine: bool = False
    ) -> None:
        self.unit_um = optics.defocus_unit_um
        self._direction = direction
        self._models: list[Model] = []
        waves, apertures = (
            (_FINE_WAVES, _FINE_APERTURES) if fine else (_EXTRA_WAVES, _APERTURES)
        )
        for extra in waves if optics.psf_model == "pupil" else (0.0,):
            table = modulation_table(optics, extra_waves=extra)
            for aperture in apertures:
                price = 0.5 * (extra / _WAVES_SD) ** 2
                price += 0.5 * ((aperture - 1.0) / _APERTURE_SD) ** 2
                at_edge = aperture in (apertures[0], apertures[-1])
                at_edge |= abs(extra) == waves[-1]
                transfer = Transfer(table, optics.sampling, aperture)
                self._models.append((transfer, price, at_edge))
        self._plain = [model for model in self._models if model[1] == 0.0]

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
            Other accounts of the stage, tried where it does not seem to do as told.
        """
        candidates = self._candidates(z_um, known, reach_um)
        focus = np.broadcast_to(candidates[:, None], (len(candidates), len(z_um)))
        if known is not None:
            focus = np.where(np.isnan(known)[None, :], focus, known[None, :])
        tried = _Tried(_Scores(spectra, noise))
        away = (focus - z_um[None, :]) / self.unit_um
        for turn in (self._direction,) if self._direction else (1, -1):
            tried.add(AS_TOLD, turn, turn * away, self._models, 0.0)
        if self._direction and tried.least > _EXPLAINED:
            turn = -self._direction
            tried.add(REVERSED, turn, turn * away, self._models, _REVERSED)
        for course in courses if tried.least > _EXPLAINED else ():
            # The optics as they were told: an odd stage and odd optics are too much.
            away = course.gain * (focus - z_um[None, :]) / self.unit_um
            for turn in (self._direction,) if self._direction else (1, -1):
                tried.add(course.name, turn, turn * away, self._plain, course.price)
        return tried.fit(candidates)

    def _candidates(
        self, z_um: Floats, known: Floats | None, reach_um: float | None
    ) -> Floats:
        margin = (FARTHEST - 0.5) * self.unit_um
        if reach_um is not None:
            margin = min(margin, reach_um)
        step = _CANDIDATE_STEP * self.unit_um
        open_um = z_um if known is None else z_um[np.isnan(known)]
        return np.arange(open_um.min() - margin, open_um.max() + margin + step, step)


class _Tried:
    """The models that were tried on some planes, and how badly each explains them."""

    def __init__(self, scores: "_Scores") -> None:
        self._scores = scores
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
        for transfer, own_price, at_edge in models:
            for kept in (False, True):
                cost = self._scores.unexplained(transfer.amplitudes(away, kept=kept))
                self._costs.append(cost)
                self._prices.append(own_price + price)
                self._names.append(name)
                self._edges.append(at_edge)
                least = min(float(cost.min()), self._by_direction.get(turn, 1.0))
                self._by_direction[turn] = least

    def fit(self, candidates: Floats) -> PlaneFit:
        """Weigh them: every model counts with its probability."""
        cost, price = np.array(self._costs), np.array(self._prices)[:, None]
        spread = max(float(cost.min()), _FLOOR)
        loss = 0.5 * _INDEPENDENT * cost / spread + price
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


class _Scores:
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
