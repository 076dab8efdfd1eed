"""Through focus: the PSF fitted to planes of one specimen at known z.

Every plane is compared with what one set of optics predicts for it; gain and
offset are free in each plane, so bleaching and a light sheet do no harm. Known
distances between the planes tell what a single pair cannot: NA and focus. What
remains open is the sign: a stage that runs the other way turns W into -W.

Parameters are tried on a grid first, then followed downhill.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import log10
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from rtfocus.channel import OpticalSystem

TOLERANCE_DB = 0.1
"""Sets of parameters that are worse by at most this count as equally good."""
LARGEST_APERTURE = 0.97
"""Largest NA tried, relative to the refractive index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One set of parameters and how well it predicts the images."""

    psnr_db: float
    """Of predicted against measured images."""
    numerical_aperture: float
    """NA of the PSF."""
    spherical_waves: float
    """Zernike spherical W in waves."""
    astigmatism_waves: float = 0.0
    """Vertical astigmatism in waves."""
    astigmatism_oblique_waves: float = 0.0
    """Oblique astigmatism in waves."""

    def optics(self, start: OpticalSystem) -> OpticalSystem:
        """Return `start` with the parameters of this trial."""
        astigmatism = (self.astigmatism_waves, self.astigmatism_oblique_waves)
        tried = start.with_pupil(
            self.numerical_aperture, self.spherical_waves, astigmatism
        )
        return replace(tried, psf_model="pupil", defocus_offset_um=0.0)

    def numbers(self) -> dict[str, float]:
        """Return the parameters by name, rounded for a report."""
        return {key: round(value, 5) for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FocusTrial(Trial):
    """A trial over planes of one specimen."""

    focus_um: float
    """z of the stack at which the defocus is 0."""


T = TypeVar("T", bound=Trial)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit(Generic[T]):
    """The best PSF, and how far others are from being as good."""

    system: OpticalSystem
    """The fitted optics."""
    best: T
    """Parameters of the fit that was chosen."""
    near: tuple[T, ...]
    """All trials over all images within `tolerance_db` of the best."""
    tolerance_db: float = TOLERANCE_DB
    """What counts as equally good."""

    def spread(self, name: str) -> tuple[float, float]:
        """Return the smallest and largest value of a parameter among `near`."""
        values = [getattr(trial, name) for trial in self.near]
        return min(values), max(values)

    def equally_good(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the spread of some parameters as plain numbers."""
        spreads = {name: [round(v, 4) for v in self.spread(name)] for name in names}
        return {"tolerance_db": self.tolerance_db, **spreads}

    def ranges(self, labels: Mapping[str, str]) -> str:
        """Say which values are equally good; `labels` are parameters by label."""
        text = ", ".join(
            "{} {:.3g} to {:.3g}".format(label, *self.spread(name))
            for label, name in labels.items()
        )
        return f"Equally good within {self.tolerance_db:g} dB: {text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FocusFit(Fit[FocusTrial]):
    """The fit of a stack; defocus is ``z - best.focus_um``."""

    explained: float
    """Share of the planes' variance that the fit predicts, 0 to 1."""
    profile: tuple[FocusTrial, ...]
    """The best fit of every NA tried, by NA."""
    sign_margin_db: float
    """PSNR that the best round fit with the other sign of W loses."""

    def statement(self) -> str:
        """Say in one paragraph what was found and what the stack cannot tell."""
        best = self.best
        ranges = self.ranges(
            {"NA": "numerical_aperture", "W": "spherical_waves", "focus": "focus_um"}
        )
        astigmatism = np.hypot(best.astigmatism_waves, best.astigmatism_oblique_waves)
        extra = f", astigmatism {astigmatism:.3f} waves" if astigmatism else ""
        sign = (
            f"The other sign of W is {self.sign_margin_db:.2f} dB worse"
            if self.sign_margin_db > TOLERANCE_DB
            else "The sign of W cannot be told"
        )
        return (
            f"focus at z {best.focus_um:.2f} um, NA {best.numerical_aperture:.3f}, "
            f"W {best.spherical_waves:.3f} waves{extra}; the fit predicts "
            f"{100 * self.explained:.1f} % of the variance (PSNR {best.psnr_db:.2f} "
            f"dB). {ranges}. {sign}; a stage whose z runs the other way turns W into "
            "-W."
        )


Image = NDArray[np.float32]
Floats = NDArray[np.float64]


class PlaneModel(Protocol):
    """Planes as they were measured, and as any optics would show them."""

    @property
    def measured(self) -> Image:
        """The planes, axes (plane, y, x), cut to the pixels that are compared."""
        ...

    @property
    def z_um(self) -> Floats:
        """Their z; larger = specimen farther from the objective."""
        ...

    @property
    def sharpest_um(self) -> float:
        """Where they look sharpest; the focus is searched around it."""
        ...

    def predict(
        self, system: OpticalSystem, focus_um: float, planes: Sequence[int]
    ) -> Image:
        """Return some planes as seen by optics focused at `focus_um`.

        Their gains and offsets are arbitrary.
        """
        ...


def unexplained(predicted: Image, measured: Image) -> tuple[float, float]:
    """Return the mean squared error after gain and offset, and the variance."""
    first = predicted - predicted.mean()
    second = measured - measured.mean()
    power = max(float(np.vdot(first, first)), 1e-30)
    total = float(np.vdot(second, second))
    # A negative gain would turn contrast round, which no defocus blur does here.
    shared = max(float(np.vdot(first, second)), 0.0) ** 2 / power
    return (total - shared) / measured.size, total / measured.size


# The coarse search: NA relative to the start, W in waves, focus in units of
# n lambda / NA^2 from where the stack looks sharpest, which may well be wrong.
_APERTURE_FACTORS = (0.65, 0.8, 1.0, 1.25, 1.6)
_SPHERICAL_WAVES = (-0.4, -0.15, 0.15, 0.4)
_FOCUS_UNITS = (-1.5, -0.75, 0.0, 0.75, 1.5)
_APERTURE_RANGE = (0.4, 2.2)
_LIMITS = {
    "spherical_waves": (-1.0, 1.0),
    "astigmatism_waves": (-0.6, 0.6),
    "astigmatism_oblique_waves": (-0.6, 0.6),
    "focus_um": (-np.inf, np.inf),
}
# Trials of a descent at a given NA.
_PROFILE_TRIALS = 20


class _Trials:
    """Trials over a stack; remembers those over all planes.

    Parameters
    ----------
    model
        The planes with what predicts them.
    start
        Pixel size, wavelength, index and nominal NA.
    fit_aperture
        False keeps the NA of `start`.
    """

    def __init__(
        self,
        model: PlaneModel,
        start: OpticalSystem,
        *,
        fit_aperture: bool,
    ) -> None:
        self.trials: list[FocusTrial] = []
        """Those over all planes."""
        self._model = model
        self._start = start
        self._fit_aperture = fit_aperture
        self._range = float(np.ptp(model.measured))
        lowest, highest = (x * start.numerical_aperture for x in _APERTURE_RANGE)
        self._largest = min(highest, LARGEST_APERTURE * start.refractive_index)
        self._limits = {**_LIMITS, "numerical_aperture": (lowest, self._largest)}

    def grid(self, planes: Sequence[int]) -> list[FocusTrial]:
        """Try every combination of the coarse search."""
        nominal = self._start.numerical_aperture
        factors = _APERTURE_FACTORS if self._fit_aperture else (1.0,)
        unit_um = self._start.defocus_unit_um
        return [
            self.attempt(
                FocusTrial(
                    psnr_db=0.0,
                    numerical_aperture=min(factor * nominal, self._largest),
                    spherical_waves=waves,
                    focus_um=self._model.sharpest_um + units * unit_um,
                ),
                planes,
            )
            for factor, waves, units in product(factors, _SPHERICAL_WAVES, _FOCUS_UNITS)
        ]

    def attempt(self, wanted: FocusTrial, planes: Sequence[int]) -> FocusTrial:
        """Return the trial with its PSNR over some planes."""
        error, _ = self._errors(wanted, planes)
        trial = replace(
            wanted, psnr_db=10.0 * log10(self._range**2 / max(error, 1e-12))
        )
        if len(planes) == len(self._model.z_um):
            self.trials.append(trial)
        return trial

    def explained(self, trial: FocusTrial, planes: Sequence[int]) -> float:
        """Return the share of the variance within the planes that is predicted."""
        error, variance = self._errors(trial, planes)
        return 1.0 - error / variance

    def descend(
        self,
        start: FocusTrial,
        planes: Sequence[int],
        limit: int,
        *,
        astigmatism: bool = False,
        fixed_aperture: bool = False,
        sign: float = 0.0,
    ) -> FocusTrial:
        """Follow the error down from one trial; `sign` holds that of W."""
        names = ["spherical_waves", "focus_um"]
        steps = [0.06, 0.2 * self._start.defocus_unit_um]
        if self._fit_aperture and not fixed_aperture:
            names.append("numerical_aperture")
            steps.append(-0.05 * self._start.numerical_aperture)
        if astigmatism:
            names += ["astigmatism_waves", "astigmatism_oblique_waves"]
            steps += [0.06, 0.06]
        scale = np.abs(steps)

        def attempt(point: Floats) -> FocusTrial:
            values = {
                name: float(np.clip(value, *self._limits[name]))
                for name, value in zip(names, point * scale, strict=True)
            }
            if sign:
                values["spherical_waves"] = sign * abs(values["spherical_waves"])
            return self.attempt(replace(start, **values), planes)

        origin = np.array([getattr(start, name) for name in names]) / scale
        corners = np.vstack([np.zeros(len(names)), np.diag(np.sign(steps))])
        tolerances = 0.02, 1e-3
        return follow_down(attempt, origin + corners, limit, tolerances)

    def at_aperture(
        self, best: FocusTrial, factor: float, planes: Sequence[int]
    ) -> FocusTrial:
        """Return the best fit at another NA, from the same W and focus."""
        limits = self._limits["numerical_aperture"]
        aperture = float(np.clip(factor * best.numerical_aperture, *limits))
        moved = replace(best, numerical_aperture=aperture)
        return self.descend(moved, planes, _PROFILE_TRIALS, fixed_aperture=True)

    def _errors(self, trial: FocusTrial, planes: Sequence[int]) -> tuple[float, float]:
        """Return the mean squared error, and the mean variance of the planes."""
        system = trial.optics(self._start)
        predicted = self._model.predict(system, trial.focus_um, planes)
        pairs = zip(predicted, self._model.measured[list(planes)], strict=True)
        errors = np.array([unexplained(*pair) for pair in pairs])
        return float(errors[:, 0].mean()), float(errors[:, 1].mean())


def quality(trial: Trial) -> float:
    """Return what makes one trial better than another."""
    return trial.psnr_db


def follow_down(
    attempt: Callable[[Floats], T],
    simplex: Floats,
    limit: int,
    tolerances: tuple[float, float],
) -> T:
    """Return the best trial on the way down the error (Nelder-Mead).

    Parameters
    ----------
    attempt
        Makes a trial of a point.
    simplex
        Points to begin with, axes (point, parameter), one more than parameters.
    limit
        Trials at most.
    tolerances
        Of the parameters, and of the PSNR in dB.
    """
    tried: list[T] = []

    def loss(point: Floats) -> float:
        tried.append(attempt(point))
        return -tried[-1].psnr_db

    at, decibels = tolerances
    options = {"initial_simplex": simplex, "maxfev": limit}
    options |= {"xatol": at, "fatol": decibels}
    optimize.minimize(loss, simplex[0], method="Nelder-Mead", options=options)
    return max(tried, key=quality)


_PROFILE_FACTORS = (0.65, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25)
# Planes of the search, and trials per descent in the search and at its end.
_SEARCH_PLANES = 7
_SEARCH_STARTS = 3
_SEARCH_TRIALS = 30
_TRIALS = 90


def fit_through_focus(
    model: PlaneModel,
    start: OpticalSystem,
    *,
    fit_aperture: bool = True,
    fit_astigmatism: bool = False,
) -> FocusFit:
    """Fit NA, spherical aberration and focus to planes at known z.

    Parameters
    ----------
    model
        The planes with what predicts them.
    start
        Pixel size, wavelength, index and nominal NA; NA is searched between 0.4
        and 2.2 times of it.
    fit_aperture
        False keeps the NA of `start`.
    fit_astigmatism
        Fit both components of astigmatism too: slower.

    Returns
    -------
    FocusFit
        The fitted optics with what the stack leaves open.
    """
    search = _Trials(model, start, fit_aperture=fit_aperture)
    count = len(model.z_um)
    every, few = tuple(range(count)), spread_out(count, _SEARCH_PLANES)
    coarse = sorted(search.grid(few), key=quality, reverse=True)
    fits = []
    for sign in (-1.0, 1.0):
        # W = 0 has both signs.
        starts = [trial for trial in coarse if trial.spherical_waves * sign >= 0.0]
        valleys = [
            search.descend(trial, few, _SEARCH_TRIALS, sign=sign)
            for trial in starts[:_SEARCH_STARTS]
        ]
        lowest = max(valleys, key=quality)
        fits.append(search.descend(lowest, every, _TRIALS, sign=sign))
    best, mirrored = sorted(fits, key=quality, reverse=True)
    profile = [best]
    if fit_aperture:
        profile += [
            search.at_aperture(best, factor, every) for factor in _PROFILE_FACTORS
        ]
        best = max(profile, key=quality)
    margin_db = best.psnr_db - mirrored.psnr_db
    if fit_astigmatism:
        best = search.descend(best, every, _TRIALS, astigmatism=True)
    return FocusFit(
        system=best.optics(start),
        best=best,
        explained=search.explained(best, every),
        sign_margin_db=margin_db,
        profile=tuple(sorted(profile, key=lambda trial: trial.numerical_aperture)),
        near=tuple(
            trial
            for trial in search.trials
            if trial.psnr_db >= best.psnr_db - TOLERANCE_DB
        ),
    )


def focus_valley(
    model: PlaneModel,
    best: FocusTrial,
    start: OpticalSystem,
    apertures: Floats,
    focus_um: Floats,
) -> Floats:
    """Return the PSNR over NA (rows) and focus (columns), W and the rest as best."""
    search = _Trials(model, start, fit_aperture=True)
    few = spread_out(len(model.z_um), _SEARCH_PLANES)
    psnr_db = [
        search.attempt(
            replace(best, numerical_aperture=float(a), focus_um=float(z)), few
        ).psnr_db
        for a, z in product(apertures, focus_um)
    ]
    return np.array(psnr_db).reshape(len(apertures), len(focus_um))


def spread_out(count: int, most: int) -> tuple[int, ...]:
    """Choose at most so many of some numbered things, evenly, first and last too."""
    places = np.linspace(0, count - 1, min(count, most))
    return tuple(round(place) for place in places)
