"""Through focus: the PSF fitted to planes of one specimen at known z.

Every plane is compared with what one set of optics predicts for it; gain and
offset are free in each plane, so bleaching and a light sheet do no harm. Known
distances between the planes tell what a single pair cannot: NA and focus. What
remains open is the sign: a stage that runs the other way turns W into -W.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.optics.focus_fit import TOLERANCE_DB, FocusFit, FocusTrial
from rtfocus.optics.focus_search import FocusSearch, quality
from rtfocus.optics.plane_model import PlaneModel

Floats = NDArray[np.float64]

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
    search = FocusSearch(model, start, fit_aperture=fit_aperture)
    count = len(model.z_um)
    every, few = tuple(range(count)), _spread_out(count, _SEARCH_PLANES)
    coarse = sorted(search.grid(few), key=quality, reverse=True)
    valleys = {
        sign: max(
            (
                search.descend(trial, few, _SEARCH_TRIALS, sign=sign)
                for trial in _of_sign(coarse, sign)[:_SEARCH_STARTS]
            ),
            key=quality,
        )
        for sign in (-1.0, 1.0)
    }
    found = [
        search.descend(trial, every, _TRIALS, sign=sign)
        for sign, trial in valleys.items()
    ]
    best, mirrored = sorted(found, key=quality, reverse=True)
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
    search = FocusSearch(model, start, fit_aperture=True)
    few = _spread_out(len(model.z_um), _SEARCH_PLANES)
    psnr_db = [
        search.attempt(
            replace(best, numerical_aperture=float(a), focus_um=float(z)), few
        ).psnr_db
        for a, z in product(apertures, focus_um)
    ]
    return np.array(psnr_db).reshape(len(apertures), len(focus_um))


def _of_sign(trials: Sequence[FocusTrial], sign: float) -> list[FocusTrial]:
    """Select the trials whose W has a sign; W = 0 belongs to both."""
    return [trial for trial in trials if trial.spherical_waves * sign >= 0.0]


def _spread_out(count: int, wanted: int) -> tuple[int, ...]:
    """Choose evenly spaced indices, first and last included."""
    places = np.linspace(0, count - 1, min(count, wanted))
    return tuple(sorted({round(place) for place in places}))
