"""Focus report: figures, warnings and panels that stacks and beads share."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.calibration.picture import map_panel, psf_panel
from rtfocus.calibration.result import LARGEST_APERTURE
from rtfocus.channel import OpticalSystem
from rtfocus.images.panels import Panel
from rtfocus.optics.focus_fit import TOLERANCE_DB, FocusFit, FocusTrial
from rtfocus.optics.plane_model import PlaneModel
from rtfocus.optics.psf import psf_stack
from rtfocus.optics.through_focus import focus_valley

_APERTURES = np.linspace(0.6, 1.4, 13)
# In units of n lambda / NA^2 around the focus that was found.
_FOCUS_UNITS = np.linspace(-1.5, 1.5, 13)
_SECTION_PX = 61
_SECTION_PLANES = 41
# Less than this share of the variance predicted: the specimen is not flat, or the
# optics are far off.
_LEAST_EXPLAINED = 0.9


def focus_figures(fit: FocusFit) -> dict[str, Any]:
    """Return the fit as plain numbers."""
    names = ("numerical_aperture", "spherical_waves", "focus_um")
    return {
        "best": _numbers(fit.best),
        "explained": round(fit.explained, 5),
        "sign_margin_db": round(fit.sign_margin_db, 3),
        "equally_good": {
            "tolerance_db": TOLERANCE_DB,
            **{name: [round(v, 4) for v in fit.spread(name)] for name in names},
        },
        "profile": [_numbers(trial) for trial in fit.profile],
    }


def focus_warnings(
    fit: FocusFit, model: PlaneModel, start: OpticalSystem
) -> tuple[str, ...]:
    """Say what makes the fit doubtful."""
    warnings = []
    if fit.explained < _LEAST_EXPLAINED:
        warnings.append(
            f"only {100 * fit.explained:.0f} % of the variance is predicted: a thick "
            "specimen, wrong z steps or pixel size, or noise"
        )
    if fit.best.numerical_aperture > 0.99 * LARGEST_APERTURE * start.refractive_index:
        warnings.append(
            "NA ended at the largest that this refractive index allows: check pixel "
            "size, z steps and refractive index"
        )
    if not model.z_um.min() < fit.best.focus_um < model.z_um.max():
        warnings.append(
            f"focus at z {fit.best.focus_um:.2f} um lies outside the stack: the "
            "planes are all on one side of it, so z and W are hard to tell apart"
        )
    if fit.sign_margin_db <= TOLERANCE_DB:
        warnings.append(
            "the sign of W cannot be told: the blur looks alike on both sides of focus"
        )
    return tuple(warnings)


def section_panel(caption: str, fit: FocusFit, z_um: NDArray[np.float64]) -> Panel:
    """Show the fitted PSF through focus: x to the right, z down."""
    z = np.linspace(z_um.min(), z_um.max(), _SECTION_PLANES) - fit.best.focus_um
    psfs = psf_stack(fit.system, map(float, z), _SECTION_PX)
    return psf_panel(caption, psfs[:, _SECTION_PX // 2])


def valley_panel(fit: FocusFit, model: PlaneModel, start: OpticalSystem) -> Panel:
    """Show how well NA (down) and focus (right) predict the planes, W as fitted."""
    best = fit.best
    apertures = np.minimum(
        _APERTURES * best.numerical_aperture,
        LARGEST_APERTURE * start.refractive_index,
    )
    foci = best.focus_um + _FOCUS_UNITS * fit.system.defocus_unit_um
    quality = focus_valley(model, best, start, apertures, foci)
    caption = (
        f"NA {apertures[0]:.2f}-{apertures[-1]:.2f} down, "
        f"focus {foci[0]:.1f} to {foci[-1]:.1f} um"
    )
    return map_panel(caption, quality, (0.5, 0.5))


def _numbers(trial: FocusTrial) -> dict[str, float]:
    return {key: round(value, 5) for key, value in asdict(trial).items()}
