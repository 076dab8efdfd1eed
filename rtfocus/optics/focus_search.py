"""Focus search: parameters of the PSF tried on planes, on a grid and downhill."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import log10

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from rtfocus.channel import OpticalSystem
from rtfocus.optics.focus_fit import FocusTrial
from rtfocus.optics.plane_model import PlaneModel, unexplained

Floats = NDArray[np.float64]

# The coarse search: NA relative to the start, W in waves, focus in units of
# n lambda / NA^2 from where the stack looks sharpest, which may well be wrong.
_APERTURE_FACTORS = (0.65, 0.8, 1.0, 1.25, 1.6)
_SPHERICAL_WAVES = (-0.4, -0.15, 0.15, 0.4)
_FOCUS_UNITS = (-1.5, -0.75, 0.0, 0.75, 1.5)
_APERTURE_RANGE = (0.4, 2.2)
_SPHERICAL_LIMIT = 1.0
_ASTIGMATISM_LIMIT = 0.6
# NA that no medium's refractive index allows is cut here, relative to the index.
_STEEPEST = 0.97
# Trials of a descent at a given NA.
_PROFILE_TRIALS = 20


class FocusSearch:
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
        self._largest = min(
            _APERTURE_RANGE[1] * start.numerical_aperture,
            _STEEPEST * start.refractive_index,
        )

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
        tried: list[FocusTrial] = []

        def loss(point: Floats) -> float:
            values = dict(zip(names, map(float, point * scale), strict=True))
            tried.append(
                self.attempt(self._limited(replace(start, **values), sign), planes)
            )
            return -tried[-1].psnr_db

        scale = np.abs(steps)
        origin = np.array([getattr(start, name) for name in names]) / scale
        corners = np.vstack([np.zeros(len(names)), np.diag(np.sign(steps))])
        optimize.minimize(
            loss,
            origin,
            method="Nelder-Mead",
            options={
                "initial_simplex": origin + corners,
                "maxfev": limit,
                "xatol": 0.02,
                "fatol": 1e-3,
            },
        )
        return max(tried, key=quality)

    def at_aperture(
        self, best: FocusTrial, factor: float, planes: Sequence[int]
    ) -> FocusTrial:
        """Return the best fit at another NA, from the same W and focus."""
        aperture = min(factor * best.numerical_aperture, self._largest)
        moved = replace(best, numerical_aperture=aperture)
        return self.descend(moved, planes, _PROFILE_TRIALS, fixed_aperture=True)

    def _limited(self, trial: FocusTrial, sign: float) -> FocusTrial:
        lowest = _APERTURE_RANGE[0] * self._start.numerical_aperture
        waves = float(
            np.clip(trial.spherical_waves, -_SPHERICAL_LIMIT, _SPHERICAL_LIMIT)
        )
        limit = _ASTIGMATISM_LIMIT
        return replace(
            trial,
            numerical_aperture=float(
                np.clip(trial.numerical_aperture, lowest, self._largest)
            ),
            spherical_waves=sign * abs(waves) if sign else waves,
            astigmatism_waves=float(np.clip(trial.astigmatism_waves, -limit, limit)),
            astigmatism_oblique_waves=float(
                np.clip(trial.astigmatism_oblique_waves, -limit, limit)
            ),
        )

    def _errors(self, trial: FocusTrial, planes: Sequence[int]) -> tuple[float, float]:
        """Return the mean squared error, and the mean variance of the planes."""
        system = trial.optics(self._start)
        predicted = self._model.predict(system, trial.focus_um, planes)
        pairs = zip(predicted, self._model.measured[list(planes)], strict=True)
        errors = np.array([unexplained(*pair) for pair in pairs])
        return float(errors[:, 0].mean()), float(errors[:, 1].mean())


def quality(trial: FocusTrial) -> float:
    """Return what makes one trial better than another."""
    return trial.psnr_db
