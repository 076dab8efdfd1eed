"""Pair fit: optics from sharp and defocused images of the same fields.

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
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

from rtfocus.calibration.pairs import (
    DEFOCUS_RANGE,
    ImagePair,
    PairTrial,
    Reblurring,
    refine,
    with_astigmatism,
)
from rtfocus.calibration.report import (
    Calibration,
    grey,
    map_panel,
    psf_panel,
    refusing,
    residual_panel,
)
from rtfocus.calibration.through_focus import LARGEST_APERTURE, TOLERANCE_DB, Fit
from rtfocus.channel import OpticalSystem
from rtfocus.drawing.figures import Axis, Panel
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf, psf_radius_px


@dataclass(frozen=True, slots=True, kw_only=True)
class PsfFit(Fit[PairTrial]):
    """The fit of pairs; ``system.defocus_offset_um`` maps the nominal defocus to z."""

    nominal_defocus_um: float
    """The defocus the pairs were labelled with."""
    unblurred_psnr_db: float
    """Sharp against defocused images without any PSF: where the fit started."""
    local_optima: tuple[PairTrial, ...]
    """One per NA and sign of W, best first."""

    @property
    def sign_margin_db(self) -> float:
        """PSNR that the best fit with the other sign of W loses."""
        others = [
            optimum.psnr_db
            for optimum in self.local_optima
            if optimum.spherical_waves * self.best.spherical_waves <= 0
        ]
        return self.local_optima[0].psnr_db - max(others)

    def statement(self) -> str:
        """Say in one paragraph what was found and what the pairs cannot tell."""
        best = self.best
        ranges = self.ranges(
            {"NA": "numerical_aperture", "z": "defocus_um", "W": "spherical_waves"}
        )
        return (
            f"nominal {self.nominal_defocus_um:g} um: z {best.defocus_um:.2f} um, "
            f"W {best.spherical_waves:.3f} waves at NA "
            f"{best.numerical_aperture:.3g}; re-blur PSNR {best.psnr_db:.2f} dB "
            f"(without PSF {self.unblurred_psnr_db:.2f} dB). {ranges}. "
            f"The other sign of W is {self.sign_margin_db:.2f} dB worse."
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
    tolerance_db: float = TOLERANCE_DB,
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
        widest_um=DEFOCUS_RANGE[1] * nominal_defocus_um,
        largest_aperture=max(apertures or (start.numerical_aperture,)),
        fit_intensity=fit_intensity,
        data_range=data_range,
    )
    optima = [
        refine(reblurring, aperture, sign, nominal_defocus_um)
        for aperture in apertures or (start.numerical_aperture,)
        for sign in (-1.0, 1.0)
    ]
    optima.sort(key=lambda trial: -trial.psnr_db)
    best = _choose_optimum(optima, start.numerical_aperture, tolerance_db)
    if fit_astigmatism:
        best = with_astigmatism(reblurring, best)
    offset_um = best.defocus_um - nominal_defocus_um
    return PsfFit(
        system=replace(best.optics(base), defocus_offset_um=offset_um),
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


def _choose_optimum(
    optima: Sequence[PairTrial], nominal: float, tolerance_db: float
) -> PairTrial:
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


Floats = NDArray[np.float64]
Image = NDArray[np.float32]

# NA tried, relative to the nominal one.
_APERTURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
# NA and z of the valley's picture, relative to the chosen ones.
_VALLEY_APERTURES = np.linspace(0.6, 1.4, 13)
_VALLEY_DEFOCI = np.linspace(0.4, 1.8, 15)
# A fit that gains less than this over no blur at all found nothing, in dB.
_LEAST_GAIN_DB = 1.0
_LEAST_MARGIN_DB = 0.3


def calibrate_from_pairs(
    pairs: Sequence[ImagePair],
    start: OpticalSystem,
    *,
    nominal_defocus_um: float,
    defocus_is_exact: bool = False,
    fit_aperture: bool = True,
    fit_astigmatism: bool = False,
) -> Calibration:
    """Fit z, W and, as far as it can be seen, NA to pairs of one defocus.

    Parameters
    ----------
    pairs
        At least one.
    start
        Nominal optics.
    nominal_defocus_um
        The defocus the pairs were taken at, with its sign.
    defocus_is_exact
        Pairs hardly tell NA from z. True: take the NA at which the fitted z is the
        nominal one. False: keep the nominal NA where it fits as well as any.
    fit_aperture, fit_astigmatism
        What else to fit.

    Raises
    ------
    InputError
        If the pairs cannot be fitted.
    """

    def fit(near: OpticalSystem, apertures: Sequence[float]) -> PsfFit:
        return refusing(
            lambda: calibrate_psf(
                [(pair.sharp, pair.defocused) for pair in pairs],
                near,
                nominal_defocus_um=nominal_defocus_um,
                apertures=apertures,
                fit_astigmatism=fit_astigmatism,
                data_range=pairs[0].full_scale,
            )
        )

    nominal = start.numerical_aperture
    limit = LARGEST_APERTURE * start.refractive_index
    factors = _APERTURES if fit_aperture else (1.0,)
    best_fit = fit(start, sorted({min(factor * nominal, limit) for factor in factors}))
    figures = _figures(best_fit, pairs)
    statement = best_fit.statement()
    if defocus_is_exact and fit_aperture:
        aperture = _aperture_at(best_fit, nominal_defocus_um)
        best_fit = fit(replace(start, numerical_aperture=aperture), [aperture])
        statement += f" With the nominal defocus taken as exact, {best_fit.statement()}"
        figures["exact_defocus"] = asdict(best_fit.best)
    return Calibration(
        # An engine's level is a defocus from focus already: no offset for it.
        system=replace(best_fit.system, defocus_offset_um=0.0),
        statement=statement,
        warnings=tuple(_warnings(best_fit)),
        figures=figures,
        panels=_panels(best_fit, pairs),
    )


def _aperture_at(fit: PsfFit, defocus_um: float) -> float:
    """Interpolate the NA at which z is the given one, among equal signs of W.

    W = 0 has both signs: of two optima of one NA the better one counts.
    """
    by_aperture: dict[float, PairTrial] = {}
    for optimum in fit.local_optima:
        if optimum.spherical_waves * fit.best.spherical_waves >= 0:
            by_aperture.setdefault(optimum.numerical_aperture, optimum)
    branch = sorted(by_aperture.values(), key=lambda one: abs(one.defocus_um))
    # The same blur needs z in proportion to 1 / NA^2: even steps in the logarithm.
    logs = np.log([[abs(o.defocus_um), o.numerical_aperture] for o in branch])
    return float(np.exp(np.interp(np.log(abs(defocus_um)), logs[:, 0], logs[:, 1])))


def _warnings(fit: PsfFit) -> list[str]:
    gain_db = fit.best.psnr_db - fit.unblurred_psnr_db
    warnings = []
    if gain_db < _LEAST_GAIN_DB:
        warnings.append(
            f"the best PSF re-blurs only {gain_db:.2f} dB better than none: the "
            "defocused images are hardly blurred, or not the same fields"
        )
    if fit.sign_margin_db < _LEAST_MARGIN_DB:
        warnings.append(
            f"the sign of W cannot be told ({fit.sign_margin_db:.2f} dB): take W as "
            "0 or give pairs farther from focus"
        )
    low, high = fit.spread("numerical_aperture")
    if low < high:
        warnings.append(
            f"NA {low:.3g} to {high:.3g} fit equally well, each with its own z: a "
            "z-stack, beads, or an exactly known defocus would tell"
        )
    return warnings


def _figures(fit: PsfFit, pairs: Sequence[ImagePair]) -> dict[str, Any]:
    names = ("numerical_aperture", "defocus_um", "spherical_waves")
    return {
        "kind": "pairs",
        "pairs": [
            {"name": pair.name, "shift_px": [round(s, 2) for s in pair.shift_px]}
            for pair in pairs
        ],
        "data_range": pairs[0].full_scale,
        "nominal_defocus_um": fit.nominal_defocus_um,
        "offset_of_nominal_um": round(fit.system.defocus_offset_um, 4),
        "best": fit.best.numbers(),
        "unblurred_psnr_db": round(fit.unblurred_psnr_db, 3),
        "sign_margin_db": round(fit.sign_margin_db, 3),
        "equally_good": fit.equally_good(names),
        "optima": [trial.numbers() for trial in fit.local_optima],
    }


def _panels(fit: PsfFit, pairs: Sequence[ImagePair]) -> list[Panel]:
    best, pair = fit.best, pairs[0]
    psf = compute_psf(fit.system, fit.nominal_defocus_um)
    half_px = psf_radius_px(psf, 0.98)
    fitted = compute_psf(fit.system, fit.nominal_defocus_um, size_px=2 * half_px + 1)
    same = [one for one in pairs if one.sharp.shape == pair.sharp.shape]
    measured = measure_psf([(p.sharp, p.defocused) for p in same], half_px=half_px)
    reblurred = best.gain * blur(pair.sharp, psf) + best.offset
    peak, pixel_um = float(fitted.max()), fit.system.pixel_size_um
    return [
        grey("sharp", pair.sharp, pixel_um),
        grey("defocused", pair.defocused, pixel_um),
        grey("sharp, re-blurred", reblurred, pixel_um, pair.defocused),
        residual_panel(
            "re-blurred - defocused",
            reblurred - pair.defocused,
            pair.full_scale,
            pixel_um,
        ),
        psf_panel("PSF measured", measured, pixel_um, peak),
        psf_panel(f"PSF fitted, z {best.defocus_um:.1f} um", fitted, pixel_um, peak),
        _valley(fit, pair),
    ]


def _valley(fit: PsfFit, pair: ImagePair) -> Panel:
    """Show how well NA (down) and z (right) re-blur one pair, W as fitted."""
    best = fit.best
    base = replace(fit.system, defocus_offset_um=0.0)
    limit = LARGEST_APERTURE * base.refractive_index
    apertures = np.minimum(_VALLEY_APERTURES * best.numerical_aperture, limit)
    reblurring = refusing(
        lambda: Reblurring(
            base,
            [(pair.sharp, pair.defocused)],
            widest_um=_VALLEY_DEFOCI[-1] * best.defocus_um,
            largest_aperture=best.numerical_aperture,
            fit_intensity=True,
            data_range=pair.full_scale,
        )
    )
    quality = np.array(
        [
            [
                reblurring.attempt(
                    float(aperture), float(z), best.spherical_waves, count=1
                ).psnr_db
                for z in _VALLEY_DEFOCI * best.defocus_um
            ]
            for aperture in apertures
        ]
    )
    z_um = _VALLEY_DEFOCI * best.defocus_um
    return map_panel(
        "how well NA and z re-blur",
        quality,
        (0.5, _place(1.0, _VALLEY_DEFOCI)),
        Axis("z (um)", float(z_um[0]), float(z_um[-1])),
        Axis("NA", float(apertures[-1]), float(apertures[0])),
    )


def _place(value: float, axis: Floats) -> float:
    return float((value - axis[0]) / (axis[-1] - axis[0]))


# Power of the sharp image below which a frequency says nothing, relative to the
# mean power over all frequencies but the constant one.
_REGULARISATION = 1e-2


def measure_psf(pairs: Sequence[tuple[ArrayLike, ArrayLike]], *, half_px: int) -> Image:
    """Return the least-squares kernel that turns sharp images into defocused ones.

    For the eye, beside a fitted PSF: noise and borders make it rough, so negative
    values may occur.

    Parameters
    ----------
    pairs
        (sharp, defocused), registered, axes (y, x), all of one shape.
    half_px
        Half side of the kernel; sides of 2 * half_px + 1.

    Returns
    -------
    Image
        Axes (y, x), sums to 1.
    """
    shape = np.shape(pairs[0][0])
    window = np.outer(*(np.hanning(length) for length in shape))
    shared = np.zeros((shape[0], shape[1] // 2 + 1), dtype=np.complex128)
    power = np.zeros(shared.shape)
    for pair in pairs:
        images = (np.asarray(image, dtype=np.float64) for image in pair)
        sharp, defocused = (fft.rfft2((i - i.mean()) * window) for i in images)
        shared += np.conj(sharp) * defocused
        power += np.abs(sharp) ** 2
    kernel = fft.irfft2(shared / (power + _REGULARISATION * power.mean()), shape)
    rolled = np.roll(kernel, (half_px, half_px), axis=(0, 1))
    cut = rolled[: 2 * half_px + 1, : 2 * half_px + 1]
    return np.asarray(cut / cut.sum(), dtype=np.float32)
