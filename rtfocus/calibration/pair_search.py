"""Pair search: the PSF of a real microscope, fitted to sharp and defocused pairs.

A sharp image and a defocused one of the same field are tied by
``defocused = gain * (sharp * PSF(z, W, NA)) + offset``. The sharp image already
went through the microscope, so what is fitted is the PSF that turns focus into
defocus, which is the one that simulation and deconvolution need.

Pairs cannot tell (z, W) from (-z, -W): they give the same PSF. The sign of z is
therefore taken from the nominal defocus, and what the fit finds is the sign of
the spherical aberration W against it. BBBC006, nominal +10 um: z +6.5 um and W
-0.49 waves at NA 0.5 (46.5 dB over 22 fields); its far end, nominal -32 um: z -37
um and W +0.3, so both lie on the same side of the aberration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from rtfocus.calibration.reblur import Reblurring, Trial, with_parameters
from rtfocus.channel import OpticalSystem

# The coarse search, from which each sign of W is refined by itself.
_DEFOCUS_FACTORS = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
_SPHERICAL_WAVES = (0.1, 0.3, 0.5, 0.8)
# How far a refinement may go: z relative to the nominal defocus, W in waves.
_DEFOCUS_RANGE = (0.1, 1.6)
_SPHERICAL_LIMIT = 1.0
# Trials per valley on the first pair, and in the best valley on all pairs.
_VALLEY_TRIALS = 24
_TRIALS = 60
# First step of both astigmatisms and of W beside them, in waves.
_ASTIGMATISM_STEP = 0.06


@dataclass(frozen=True, slots=True)
class PsfFit:
    """The best PSF, and how far others are from being as good."""

    system: OpticalSystem
    """The fitted optics; ``defocus_offset_um`` maps the nominal defocus to z."""
    nominal_defocus_um: float
    """The defocus the pairs were labelled with."""
    best: Trial
    """Parameters of the fit that was chosen."""
    unblurred_psnr_db: float
    """Sharp against defocused images without any PSF: where the fit started."""
    local_optima: tuple[Trial, ...]
    """One per NA and sign of W, best first."""
    near: tuple[Trial, ...]
    """All sets tried whose PSNR lies within `tolerance_db` of the best."""
    tolerance_db: float
    """What counts as equally good."""

    @property
    def sign_margin_db(self) -> float:
        """PSNR that the best fit with the other sign of W loses."""
        others = [
            optimum.psnr_db
            for optimum in self.local_optima
            if optimum.spherical_waves * self.best.spherical_waves <= 0
        ]
        return self.local_optima[0].psnr_db - max(others)

    def spread(self, name: str) -> tuple[float, float]:
        """Return the smallest and largest value of a parameter among `near`."""
        values = [getattr(optimum, name) for optimum in self.near]
        return min(values), max(values)

    def statement(self) -> str:
        """Say in one paragraph what was found and what the pairs cannot tell."""
        best = self.best
        ranges = ", ".join(
            "{} {:.3g} to {:.3g}".format(label, *self.spread(name))
            for label, name in (
                ("NA", "numerical_aperture"),
                ("z", "defocus_um"),
                ("W", "spherical_waves"),
            )
        )
        return (
            f"nominal {self.nominal_defocus_um:g} um: z {best.defocus_um:.2f} um, "
            f"W {best.spherical_waves:.3f} waves at NA "
            f"{best.numerical_aperture:.3g}; re-blur PSNR {best.psnr_db:.2f} dB "
            f"(without PSF {self.unblurred_psnr_db:.2f} dB). Equally good within "
            f"{self.tolerance_db:g} dB: {ranges}. The other sign of W is "
            f"{self.sign_margin_db:.2f} dB worse."
        )


def calibrate_psf(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]],
    start: OpticalSystem,
    *,
    nominal_defocus_um: float,
    apertures: Sequence[float] | None = None,
    fit_intensity: bool = True,
    fit_astigmatism: bool = False,
    data_range: float = 255.0,
    tolerance_db: float = 0.1,
) -> PsfFit:
    """Fit defocus and spherical aberration, optionally NA and intensity, to pairs.

    Parameters
    ----------
    pairs
        (sharp, defocused) images of the same field, registered, axes (y, x); all
        at the same defocus, any number type.
    start
        Pixel size, wavelength, index and the NA where `apertures` is None; its
        spherical aberration and defocus offset are replaced.
    nominal_defocus_um
        The defocus the pairs are labelled with; its sign is kept, z is searched
        between 0.1 and 1.6 times of it.
    apertures
        NAs to try, each with its own best z and W; that of `start` is kept where
        it is as good as the best. None: that of `start`.
    fit_intensity
        Fit one gain and one offset for all pairs; else 1 and 0.
    fit_astigmatism
        Let both components of astigmatism free in the end: slower.
    data_range
        Of every PSNR.
    tolerance_db
        Sets that re-blur at most this much worse count as equally good.

    Returns
    -------
    PsfFit
        The fitted optics with what the pairs leave open.

    Raises
    ------
    ValueError
        If there is no pair, a pair's shapes differ, an image is flat or too small
        for the widest PSF, or the nominal defocus is 0.
    """
    if nominal_defocus_um == 0.0 or not pairs:
        msg = (
            f"{len(pairs)} pairs at nominal_defocus_um={nominal_defocus_um}: a fit "
            "needs at least one pair away from focus"
        )
        raise ValueError(msg)
    base = replace(start, psf_model="pupil", defocus_offset_um=0.0)
    reblurring = Reblurring(
        base,
        pairs,
        widest_um=_DEFOCUS_RANGE[1] * nominal_defocus_um,
        largest_aperture=max(apertures or (start.numerical_aperture,)),
        fit_intensity=fit_intensity,
        data_range=data_range,
    )
    optima = [
        _refine(reblurring, aperture, sign, nominal_defocus_um)
        for aperture in apertures or (start.numerical_aperture,)
        for sign in (-1.0, 1.0)
    ]
    optima.sort(key=lambda trial: -trial.psnr_db)
    best = _chosen(optima, start.numerical_aperture, tolerance_db)
    if fit_astigmatism:
        best = _fit_astigmatism(reblurring, best)
    fitted = with_parameters(
        base,
        best.numerical_aperture,
        best.spherical_waves,
        (best.astigmatism_waves, best.astigmatism_oblique_waves),
    )
    return PsfFit(
        system=replace(fitted, defocus_offset_um=best.defocus_um - nominal_defocus_um),
        nominal_defocus_um=nominal_defocus_um,
        best=best,
        unblurred_psnr_db=reblurring.unblurred_psnr_db(),
        local_optima=tuple(optima),
        near=tuple(
            trial
            for trial in reblurring.trials
            if trial.psnr_db >= best.psnr_db - tolerance_db
        ),
        tolerance_db=tolerance_db,
    )


def _chosen(optima: Sequence[Trial], nominal: float, tolerance_db: float) -> Trial:
    """Take the best optimum, or one at the nominal NA that is as good."""
    best = optima[0]
    return next(
        (
            optimum
            for optimum in optima
            if optimum.numerical_aperture == nominal
            and optimum.psnr_db >= best.psnr_db - tolerance_db
        ),
        best,
    )


def _refine(
    reblurring: Reblurring, aperture: float, sign: float, nominal_um: float
) -> Trial:
    """Find the best z and W of one NA and one sign of W.

    The error has several valleys (a weak aberration can stand in for a strong one
    at another z), so every coarse W is followed down on the first pair, and the
    best of these on all.
    """
    valleys = []
    for waves in _SPHERICAL_WAVES:
        coarse = [
            reblurring.attempt(aperture, factor * nominal_um, sign * waves, count=1)
            for factor in _DEFOCUS_FACTORS
        ]
        start = max(coarse, key=_quality)
        valleys.append(
            _descend(reblurring, start, sign, nominal_um, count=1, limit=_VALLEY_TRIALS)
        )
    start = max(valleys, key=_quality)
    return _descend(reblurring, start, sign, nominal_um, count=None, limit=_TRIALS)


def _fit_astigmatism(reblurring: Reblurring, start: Trial) -> Trial:
    """Follow the error down from the best round PSF, both astigmatisms set free."""
    trials: list[Trial] = []

    def loss(point: NDArray[np.float64]) -> float:
        vertical, oblique = np.clip(point[2:] * _ASTIGMATISM_STEP, -1.0, 1.0)
        trials.append(
            reblurring.attempt(
                start.numerical_aperture,
                start.defocus_um * float(point[0]),
                start.spherical_waves + float(point[1]) * _ASTIGMATISM_STEP,
                astigmatism=(float(vertical), float(oblique)),
            )
        )
        return -trials[-1].psnr_db

    origin = np.array([1.0, 0.0, 0.0, 0.0])
    corners = np.diag([0.03, 1.0, 1.0, 1.0])
    optimize.minimize(
        loss,
        origin,
        method="Nelder-Mead",
        options={
            "initial_simplex": np.vstack([origin, origin + corners]),
            "maxfev": _TRIALS,
            "xatol": 0.02,
            "fatol": 2e-3,
        },
    )
    return max([start, *trials], key=_quality)


def _quality(trial: Trial) -> float:
    return trial.psnr_db


def _descend(
    reblurring: Reblurring,
    start: Trial,
    sign: float,
    nominal_um: float,
    *,
    count: int | None,
    limit: int,
) -> Trial:
    """Follow the error down from one trial, within the limits of z and W."""
    trials: list[Trial] = []

    def loss(point: NDArray[np.float64]) -> float:
        factor = float(np.clip(point[0], *_DEFOCUS_RANGE))
        waves = sign * float(np.clip(point[1], 0.0, _SPHERICAL_LIMIT))
        trials.append(
            reblurring.attempt(
                start.numerical_aperture, factor * nominal_um, waves, count=count
            )
        )
        return -trials[-1].psnr_db

    point = np.array([start.defocus_um / nominal_um, abs(start.spherical_waves)])
    steps = np.array([[0.0, 0.0], [0.07, 0.0], [0.0, 0.08]])
    optimize.minimize(
        loss,
        point,
        method="Nelder-Mead",
        options={
            "initial_simplex": point + steps,
            "maxfev": limit,
            "xatol": 2e-3,
            "fatol": 2e-3,
        },
    )
    return max(trials, key=_quality)
