"""Stack fit: optics from a z-stack of a flat specimen."""

from dataclasses import replace
from math import ceil

import numpy as np

from rtfocus.calibration.focus_report import (
    focus_figures,
    focus_warnings,
    section_panel,
    valley_panel,
)
from rtfocus.calibration.inputs import ZStack, structured_window
from rtfocus.calibration.picture import grey, residual_panel
from rtfocus.calibration.result import Calibration, refusing
from rtfocus.channel import OpticalSystem
from rtfocus.errors import InputError
from rtfocus.images.panels import Panel
from rtfocus.optics import pupil
from rtfocus.optics.focus_fit import FocusFit
from rtfocus.optics.plane_model import match_planes
from rtfocus.optics.stack_planes import StackPlanes, sharpest_plane
from rtfocus.optics.through_focus import fit_through_focus

_MOST_PLANES = 17
_MOST_SIDE_PX = 288
# PSFs may reach this part of the image's side, so that a third of it is compared.
_REACH = 1.0 / 3.0
_FEWEST_PLANES = 5
# A fitted NA this much above the nominal one needs wider windows.
_FAR_OFF = 1.2


def calibrate_from_stack(
    stack: ZStack,
    start: OpticalSystem,
    *,
    fit_aperture: bool = True,
    fit_astigmatism: bool = False,
) -> Calibration:
    """Fit NA, W and focus to a z-stack of a flat specimen.

    Planes whose blur would be too wide for the image are left out.

    Parameters
    ----------
    stack
        Planes on both sides of focus.
    start
        Nominal optics.
    fit_aperture, fit_astigmatism
        What to fit besides W and focus.

    Raises
    ------
    InputError
        If the stack cannot be fitted.
    """
    model = _model(stack, start)
    fit = fit_through_focus(model, start, fit_aperture=fit_aperture)
    if fit.best.numerical_aperture > _FAR_OFF * start.numerical_aperture:
        # The windows were made for a narrower blur than there is.
        start = replace(start, numerical_aperture=fit.best.numerical_aperture)
        model = _model(stack, start)
        fit = fit_through_focus(model, start, fit_aperture=fit_aperture)
    if fit_astigmatism:
        fit = fit_through_focus(
            model, start, fit_aperture=fit_aperture, fit_astigmatism=True
        )
    return Calibration(
        system=fit.system,
        statement=fit.statement(),
        warnings=focus_warnings(fit, model, start),
        figures={
            "kind": "stack",
            "planes": len(model.z_um) + 1,
            "sharpest_um": model.sharpest_um,
            **focus_figures(fit),
        },
        panels=_panels(fit, model, start),
    )


def _model(stack: ZStack, start: OpticalSystem) -> StackPlanes:
    """Cut the stack to its most structured window and the planes that fit into it."""
    sharpest = sharpest_plane(stack.planes)
    window = structured_window(stack.planes[sharpest], _MOST_SIDE_PX)
    planes = stack.planes[:, *window]
    reach_px = int(_REACH * min(planes.shape[1:]))
    distance = np.abs(stack.z_um - stack.z_um[sharpest])
    usable = [
        index
        for index in range(len(planes))
        if _half_px(start, float(distance[index])) <= reach_px
    ]
    if len(usable) < _FEWEST_PLANES:
        msg = (
            f"'{stack.name}': only {len(usable)} of {len(planes)} planes of "
            f"{planes.shape[1:]} px hold their own blur; need {_FEWEST_PLANES}: larger "
            "images, or planes nearer to focus"
        )
        raise InputError(msg)
    places = np.linspace(0, len(usable) - 1, min(_MOST_PLANES, len(usable)))
    # The sharpest plane is the source of all others and must be among them.
    chosen = sorted({usable[round(place)] for place in places} | {sharpest})
    widest_um = float(distance[chosen].max())
    return refusing(
        lambda: StackPlanes(
            planes[chosen], stack.z_um[chosen], half_px=_half_px(start, widest_um)
        )
    )


def _half_px(system: OpticalSystem, defocus_um: float) -> int:
    """Reach of a PSF: the geometric blur and two rings of diffraction."""
    unit_um = system.wavelength_nm * 1e-3 / system.numerical_aperture
    radius_um = pupil.blur_radius_um(system, defocus_um) + 2.0 * unit_um
    return ceil(radius_um / system.pixel_size_um)


def _panels(fit: FocusFit, model: StackPlanes, start: OpticalSystem) -> list[Panel]:
    last = len(model.z_um) - 1
    shown = sorted({0, last // 4, (3 * last) // 4, last})
    predicted = model.predict(fit.system, fit.best.focus_um, shown)
    matched = match_planes(predicted, model.measured[shown])
    span = float(np.ptp(model.sharp))
    panels = [
        grey(f"sharpest, z {model.sharpest_um:.2f} um", model.sharp),
        section_panel("PSF fitted, z down", fit, model.z_um),
        valley_panel(fit, model, start),
    ]
    for index, plane in zip(shown, matched, strict=True):
        measured = model.measured[index]
        panels += [
            grey(f"measured, z {model.z_um[index]:.2f} um", measured),
            grey("predicted", plane, measured),
            residual_panel("predicted - measured", plane - measured, span),
        ]
    return panels
