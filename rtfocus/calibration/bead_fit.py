"""Bead fit: optics from a z-stack of small beads.

A bead is a known object: a ball no wider than the PSF, at a place between the
pixels that the fit finds; its planes follow from the optics alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter, maximum_filter

from rtfocus.calibration.report import (
    Calibration,
    focus_figures,
    focus_warnings,
    match_planes,
    psf_panel,
    refusing,
    residual_panel,
    section_panel,
    valley_panel,
)
from rtfocus.calibration.stack_fit import ZStack
from rtfocus.calibration.through_focus import FocusFit, fit_through_focus
from rtfocus.channel import OpticalSystem
from rtfocus.drawing.figures import Panel
from rtfocus.errors import InputError
from rtfocus.optics.psf import compute_psf

Image = NDArray[np.float32]
Floats = NDArray[np.float64]

_FEWEST = 5
_SMALLEST_PX = 9
# A bead stands out of the noise of the projection by this many deviations.
_CLEAR = 12.0
# Blur before beads are looked for, so that one bright pixel is no bead.
_SEARCH_BLUR_PX = 1.0


class BeadPlanes:
    """One bead prepared for many trials; a `PlaneModel`.

    Parameters
    ----------
    stack
        One bead near the centre, axes (z, y, x), sides odd.
    z_um
        z of every plane; larger = specimen farther from the objective.
    pixel_size_um
        Of the stack.
    diameter_um
        Of the bead; 0: a point.

    Raises
    ------
    ValueError
        If there are too few planes or pixels or there is no bead.
    """

    def __init__(
        self,
        stack: ArrayLike,
        z_um: ArrayLike,
        *,
        pixel_size_um: float,
        diameter_um: float = 0.0,
    ) -> None:
        planes = np.asarray(stack, dtype=np.float32)
        z = np.asarray(z_um, dtype=np.float64)
        if planes.ndim != 3 or len(planes) < _FEWEST or z.shape != (len(planes),):
            msg = (
                f"a bead stack of shape {planes.shape} with {z.size} z positions; need "
                f"axes (z, y, x), at least {_FEWEST} planes and one z for each"
            )
            raise ValueError(msg)
        side = min(planes.shape[1:])
        if side < _SMALLEST_PX:
            msg = (
                f"a bead in {planes.shape[1:]} pixels is cut off; need sides of at "
                f"least {_SMALLEST_PX} px: beads farther apart and from the border"
            )
            raise ValueError(msg)
        self.measured = planes
        """The planes, axes (z, y, x)."""
        self.z_um = z
        """Their z."""
        brightest = int(np.argmax(planes.max(axis=(1, 2))))
        self.sharpest_um = float(z[brightest])
        """z of the plane with the brightest pixel."""
        self._centre = _centroid(planes[brightest])
        # Twice the window: what the PSF has beyond it must not come in again.
        self._sides = [fft.next_fast_len(2 * n, real=True) for n in planes.shape[1:]]
        self._psf_px = 2 * (max(planes.shape[1:]) // 2) + 1
        self._pixel_size_um = pixel_size_um
        self._diameter_um = diameter_um

    def predict(
        self, system: OpticalSystem, focus_um: float, planes: Sequence[int]
    ) -> Image:
        """Return some planes of the bead as these optics show them."""
        ramp = self._object_spectrum()
        rows, columns = self.measured.shape[1:]
        result = np.empty((len(planes), rows, columns), dtype=np.float32)
        for place, plane in enumerate(planes):
            psf = compute_psf(
                system, float(self.z_um[plane]) - focus_um, size_px=self._psf_px
            )
            canvas = fft.rfft2(psf, self._sides)
            result[place] = fft.irfft2(canvas * ramp, self._sides)[:rows, :columns]
        return result

    def centre_on(self, system: OpticalSystem, focus_um: float) -> Self:
        """Move the assumed place of the bead to where these optics fit it best.

        One Gauss-Newton step: a small shift adds the image's slopes to it.
        """
        every = range(len(self.z_um))
        predicted = self.predict(system, focus_um, every)
        normal, slope = np.zeros((2, 2)), np.zeros(2)
        for model, plane in zip(predicted, self.measured, strict=True):
            down, across = np.gradient(model.astype(np.float64))
            columns = np.stack(
                [np.ones(model.size), model.ravel(), -down.ravel(), -across.ravel()], 1
            )
            solved, *_ = np.linalg.lstsq(columns, plane.ravel(), rcond=None)
            gain = max(float(solved[1]), 0.0)
            weight = gain**2 * columns[:, 2:].T @ columns[:, 2:]
            normal += weight
            slope += gain * columns[:, 2:].T @ columns[:, 2:] @ solved[2:]
        step = np.linalg.solve(normal + 1e-12 * np.eye(2), slope)
        moved = np.asarray(self._centre) + np.clip(step, -2.0, 2.0)
        self._centre = (float(moved[0]), float(moved[1]))
        return self

    def _object_spectrum(self) -> NDArray[np.complex64]:
        """Transform of the bead at its place, relative to the PSF's centre pixel."""
        down = fft.fftfreq(self._sides[0])[:, None]
        across = fft.rfftfreq(self._sides[1])[None, :]
        shift = (c - self._psf_px // 2 for c in self._centre)
        phase = sum(f * s for f, s in zip((down, across), shift, strict=True))
        spectrum = np.exp(-2j * np.pi * phase)
        if self._diameter_um:
            radius_px = self._diameter_um / self._pixel_size_um / 2.0
            argument = 2.0 * np.pi * radius_px * np.hypot(down, across)
            spectrum = spectrum * _ball(argument)
        return np.asarray(spectrum, dtype=np.complex64)


def find_beads(
    stack: ArrayLike, *, half_px: int, most: int = 3
) -> list[tuple[int, int]]:
    """Find bright beads with nothing else as bright in their window.

    Parameters
    ----------
    stack
        Axes (z, y, x).
    half_px
        Half side of the window of each bead, which must lie inside the image.
    most
        Beads returned at most, brightest first.

    Returns
    -------
    list[tuple[int, int]]
        Rows and columns of their centres; empty where there is none.
    """
    projection = np.asarray(stack, dtype=np.float32).max(axis=0)
    smooth = gaussian_filter(projection, _SEARCH_BLUR_PX)
    level = float(np.median(smooth))
    noise = 1.4826 * float(np.median(np.abs(smooth - level)))
    peaks = smooth == maximum_filter(smooth, size=2 * half_px + 1)
    peaks &= smooth > level + _CLEAR * max(noise, 1e-12)
    inside = np.zeros_like(peaks)
    inside[half_px : -half_px or None, half_px : -half_px or None] = True
    places = np.argwhere(peaks & inside)
    order = np.argsort(-smooth[places[:, 0], places[:, 1]])[:most]
    return [(int(places[i, 0]), int(places[i, 1])) for i in order]


def _centroid(plane: Image) -> tuple[float, float]:
    """Centre of what is brighter than half the peak."""
    weight = np.maximum(plane - (plane.max() + np.median(plane)) / 2.0, 0.0)
    total = float(weight.sum())
    rows, columns = np.indices(plane.shape)
    return (
        float((weight * rows).sum()) / total,
        float((weight * columns).sum()) / total,
    )


def _ball(argument: Floats) -> Floats:
    """Transform of a ball's projection: 3 (sin u - u cos u) / u^3."""
    safe = np.maximum(argument, 1e-3)
    value = 3.0 * (np.sin(safe) - safe * np.cos(safe)) / safe**3
    return np.where(argument < 1e-3, 1.0, value)


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
    """Fit NA, W and focus to the brightest single beads, one by one.

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
    half_px = ceil(6.0 * unit_um / start.pixel_size_um)
    room = (int(min(stack.planes.shape[1:])) - 1) // 2
    return min(max(half_px, _LEAST_HALF_PX), _MOST_HALF_PX, max(room, 1))


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
    is_visible = rise > ground + _FAINTEST * (rise.max() - ground)
    first = last = int(np.argmax(rise))
    while first > 0 and is_visible[first - 1]:
        first -= 1
    while last < len(is_visible) - 1 and is_visible[last + 1]:
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
    middle, pixel_um = model.measured.shape[1] // 2, fit.system.pixel_size_um
    best = int(np.argmin(np.abs(model.z_um - fit.best.focus_um)))
    panels = [
        psf_panel("plane in focus", model.measured[best] - ground, pixel_um, peak),
        section_panel(fit, model.z_um),
        valley_panel(fit, model, start),
    ]
    z_um = model.z_um - fit.best.focus_um
    views: list[tuple[str, Image, Image, NDArray[np.float64] | None]]
    views = [("section", model.measured[:, middle], matched[:, middle], z_um)]
    for index in sorted({0, best, count - 1}):
        planes = model.measured[index], matched[index]
        views.append((f"z {z_um[index]:+.2f} um", *planes, None))
    for caption, measured, predicted_view, rows in views:
        highest = float(measured.max()) - ground
        error = predicted_view - measured
        panels += [
            psf_panel(
                f"measured, {caption}", measured - ground, pixel_um, highest, z_um=rows
            ),
            psf_panel(
                "predicted", predicted_view - ground, pixel_um, highest, z_um=rows
            ),
            residual_panel("predicted - measured", error, peak, pixel_um, z_um=rows),
        ]
    return panels
