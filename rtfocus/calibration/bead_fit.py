"""Bead fit: optics from a z-stack of small beads."""

from dataclasses import replace
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rtfocus.calibration.focus_report import (
    focus_figures,
    focus_warnings,
    section_panel,
    valley_panel,
)
from rtfocus.calibration.inputs import ZStack
from rtfocus.calibration.picture import psf_panel, residual_panel
from rtfocus.calibration.result import Calibration, refusing
from rtfocus.channel import OpticalSystem
from rtfocus.errors import InputError
from rtfocus.images.panels import Panel
from rtfocus.optics.bead_planes import BeadPlanes, find_beads
from rtfocus.optics.focus_fit import FocusFit
from rtfocus.optics.plane_model import match_planes
from rtfocus.optics.through_focus import fit_through_focus

Image = NDArray[np.float32]

_MOST_HALF_PX = 32
_LEAST_HALF_PX = 6
_MOST_BEADS = 3
_MOST_PLANES = 31
# A plane whose brightest pixel rises less than this above those without a bead,
# relative to the brightest plane, holds nothing to fit.
_FAINTEST = 0.02
_CENTRING_STEPS = 2


def calibrate_from_beads(
    stack: ZStack,
    start: OpticalSystem,
    *,
    bead_diameter_um: float = 0.0,
    fit_aperture: bool = True,
    fit_astigmatism: bool = False,
) -> Calibration:
    """Fit NA, W and focus to the brightest single beads, each by itself.

    The result is that of the bead predicted best; the others show how far it holds
    across the field.

    Parameters
    ----------
    stack
        One or more beads.
    start
        Nominal optics.
    bead_diameter_um
        Of the beads; 0: points.
    fit_aperture, fit_astigmatism
        What to fit besides W and focus.

    Raises
    ------
    InputError
        If no bead stands alone or the stack cannot be fitted.
    """
    half_px = _window_half_px(stack, start)
    places = find_beads(stack.planes, half_px=half_px, most=_MOST_BEADS)
    if not places:
        msg = (
            f"'{stack.name}' shows no bright bead {half_px} px away from the border "
            "and from brighter ones; give a stack with single beads, or planes nearer "
            "to focus"
        )
        raise InputError(msg)
    fits = []
    for place in places:
        model = _model(stack, place, half_px, start, bead_diameter_um)
        fit = fit_through_focus(
            model, start, fit_aperture=fit_aperture, fit_astigmatism=fit_astigmatism
        )
        fits.append((fit, model))
    fit, model = max(fits, key=lambda one: one[0].explained)
    return Calibration(
        system=fit.system,
        statement=fit.statement() + _spread([one for one, _ in fits]),
        warnings=focus_warnings(fit, model, start),
        figures={
            "kind": "beads",
            "planes": len(model.z_um),
            "bead_diameter_um": bead_diameter_um,
            **focus_figures(fit),
            "beads": [
                {"row": row, "column": column, **focus_figures(one)}
                for (row, column), (one, _) in zip(places, fits, strict=True)
            ],
        },
        panels=_panels(fit, model, start),
    )


def _window_half_px(stack: ZStack, start: OpticalSystem) -> int:
    """Half side of a bead's window: six rings of diffraction, within the image."""
    unit_um = start.wavelength_nm * 1e-3 / start.numerical_aperture
    wanted = ceil(6.0 * unit_um / start.pixel_size_um)
    room = (int(min(stack.planes.shape[1:])) - 1) // 2
    return min(max(wanted, _LEAST_HALF_PX), _MOST_HALF_PX, max(room, 1))


def _model(
    stack: ZStack,
    place: tuple[int, int],
    half_px: int,
    start: OpticalSystem,
    diameter_um: float,
) -> BeadPlanes:
    """Cut one bead and the planes that show it, and find its place in the window."""
    rows, columns = (slice(at - half_px, at + half_px + 1) for at in place)
    window = stack.planes[:, rows, columns]
    span = _visible(window)
    chosen = span[:: ceil(len(span) / _MOST_PLANES)]
    model = refusing(
        lambda: BeadPlanes(
            window[chosen],
            stack.z_um[chosen],
            pixel_size_um=start.pixel_size_um,
            diameter_um=diameter_um,
        )
    )
    nominal = replace(start, psf_model="pupil", defocus_offset_um=0.0)
    for _ in range(_CENTRING_STEPS):
        model.centre_on(nominal, model.sharpest_um)
    return model


def _visible(window: Image) -> NDArray[np.intp]:
    """Return the planes around the brightest one in which the bead can be seen."""
    rise = window.max(axis=(1, 2)) - np.median(window, axis=(1, 2))
    ground = float(np.percentile(rise, 10))
    seen = rise > ground + _FAINTEST * (rise.max() - ground)
    first = last = int(np.argmax(rise))
    while first > 0 and seen[first - 1]:
        first -= 1
    while last < len(seen) - 1 and seen[last + 1]:
        last += 1
    return np.arange(first, last + 1)


def _spread(fits: list[FocusFit]) -> str:
    if len(fits) == 1:
        return " One bead."
    each = ", ".join(
        f"NA {fit.best.numerical_aperture:.3f} W {fit.best.spherical_waves:.3f}"
        for fit in fits
    )
    return f" The {len(fits)} beads: {each}."


def _panels(fit: FocusFit, model: BeadPlanes, start: OpticalSystem) -> list[Panel]:
    count = len(model.z_um)
    predicted = model.predict(fit.system, fit.best.focus_um, range(count))
    matched = match_planes(predicted, model.measured)
    ground = float(np.median(model.measured))
    peak = float(model.measured.max()) - ground
    middle = model.measured.shape[1] // 2
    best = int(np.argmin(np.abs(model.z_um - fit.best.focus_um)))
    panels = [
        psf_panel("brightest plane", model.measured[best] - ground, peak),
        section_panel("PSF fitted, z down", fit, model.z_um),
        valley_panel(fit, model, start),
    ]
    views = [("x z", model.measured[:, middle], matched[:, middle])]
    for index in sorted({0, best, count - 1}):
        z_um = model.z_um[index] - fit.best.focus_um
        views.append((f"{z_um:+.2f} um", model.measured[index], matched[index]))
    for caption, measured, predicted_view in views:
        highest = float(measured.max()) - ground
        panels += [
            psf_panel(f"measured, {caption}", measured - ground, highest),
            psf_panel("predicted", predicted_view - ground, highest),
            residual_panel("predicted - measured", predicted_view - measured, peak),
        ]
    return panels
