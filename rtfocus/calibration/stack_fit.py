"""Stack fit: z-stacks read, and optics from one of any flat specimen.

The planes are predicted from the sharpest one. All show the same unknown object,
each through its own transfer function H. The ratio of two of them turns the sharpest
plane into any other one, with the sharpest plane's own blur accounted for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.ndimage import gaussian_laplace

from rtfocus.calibration.pairs import grey_plane, reach_px, structured_window
from rtfocus.calibration.report import (
    Calibration,
    focus_figures,
    focus_warnings,
    grey,
    match_planes,
    refusing,
    residual_panel,
    section_panel,
    valley_panel,
)
from rtfocus.calibration.through_focus import FocusFit, fit_through_focus, spread_out
from rtfocus.channel import OpticalSystem
from rtfocus.drawing.figures import Panel
from rtfocus.errors import InputError
from rtfocus.images.reading import open_images
from rtfocus.images.series import ImageSeries
from rtfocus.optics.formation import transfer_function
from rtfocus.optics.psf import compute_psf

Image = NDArray[np.float32]
Floats = NDArray[np.float64]

# Power of H of the sharpest plane below which its frequencies are not divided
# by: they hold noise, and every other plane transfers even less of them.
_REGULARISATION = 3e-3
_FEWEST = 4
# Scale of the detail that tells the sharpest plane: above the noise of one pixel.
_DETAIL_PX = 1.5


@dataclass(frozen=True, slots=True)
class ZStack:
    """One stack with the z of its planes."""

    name: str
    planes: Image
    """Axes (z, y, x)."""
    z_um: Floats
    pixel_size_um: float | None
    """What the file says; None: nothing."""


def read_stack(
    path: Path,
    *,
    z_csv: Path | None = None,
    step_um: float | None,
    channel: int = 0,
    descending: bool = False,
) -> ZStack:
    """Read a z-stack: one image with a z axis, or a folder of planes in name order.

    Parameters
    ----------
    path
        File or folder; the only stack axis counts as z whatever it is called.
    z_csv
        One z in um per line and plane; text lines are skipped.
    step_um
        Distance of the planes where there is no CSV; None: what the file says.
    channel
        Which channel.
    descending
        A larger z is nearer to the objective: every z changes its sign.

    Raises
    ------
    InputError
        If this is no stack or nothing tells its z.
    """
    series = open_images(path)
    stacked = _planes(path, series, channel)
    if z_csv is not None:
        z_um = _read_z(z_csv, len(stacked))
    else:
        step = step_um or series[0].z_step_um
        if not step:
            msg = (
                f"'{path}' does not say how far its planes lie apart; give --step-um "
                "or --z-csv"
            )
            raise InputError(msg)
        z_um = np.arange(len(stacked), dtype=np.float64) * step
    if descending:
        z_um = -z_um
    return ZStack(path.name, stacked, z_um, series[0].pixel_size_um)


def _planes(path: Path, series: Sequence[ImageSeries], channel: int) -> Image:
    """Stack the planes of one image, or the single planes of several."""
    first = series[0]
    if channel >= first.sizes["c"]:
        msg = f"'{path}' has {first.sizes['c']} channels; channel {channel} is none"
        raise InputError(msg)
    if len(series) > 1:
        shapes = {one.shape for one in series}
        if len(shapes) > 1 or any(len(one) != one.sizes["c"] for one in series):
            msg = (
                f"'{path}' holds several images that are no planes of one stack; give "
                "a file of one stack, or a folder with its planes alone"
            )
            raise InputError(msg)
        return np.stack([grey_plane(one, c=channel) for one in series])
    # Writers that know no z axis call it time.
    axis = "z" if first.sizes["z"] > 1 else "t"
    if first.sizes[axis] < 2:
        msg = f"'{path}' is a single plane; a stack through focus is needed"
        raise InputError(msg)
    if axis == "z" and first.sizes["t"] > 1:
        msg = (
            f"'{path}' has {first.sizes['t']} time points of {first.sizes['z']} planes "
            "each; save the stack of one of them, and give that"
        )
        raise InputError(msg)
    indices = range(first.sizes[axis])
    return np.stack([grey_plane(first, c=channel, **{axis: i}) for i in indices])


def _read_z(path: Path, count: int) -> Floats:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"'{path}' cannot be read: {error}"
        raise InputError(msg) from error
    values = [value for value in map(_number, lines) if value is not None]
    if len(values) != count:
        msg = f"'{path}' lists {len(values)} z positions for {count} planes"
        raise InputError(msg)
    z_um = np.array(values)
    if not np.isfinite(z_um).all() or len(set(values)) < count:
        msg = f"'{path}' must list another z for every plane, each a finite number"
        raise InputError(msg)
    return z_um


def _number(line: str) -> float | None:
    try:
        return float(line.split(",")[-1])
    except ValueError:
        return None


class StackPlanes:
    """A z-stack prepared for many trials; a `PlaneModel`.

    Parameters
    ----------
    stack
        Axes (z, y, x), any number type.
    z_um
        z of every plane; larger = specimen farther from the objective.
    half_px
        Reach of the widest PSF: so much of every border is not compared.

    Raises
    ------
    ValueError
        If there are fewer than four planes, they are too small for the PSF or
        show no structure.
    """

    def __init__(self, stack: ArrayLike, z_um: ArrayLike, *, half_px: int) -> None:
        planes = np.asarray(stack, dtype=np.float32)
        z = np.asarray(z_um, dtype=np.float64)
        if planes.ndim != 3 or len(planes) < _FEWEST or z.shape != (len(planes),):
            msg = (
                f"a stack of shape {planes.shape} with {z.size} z positions; need axes "
                f"(z, y, x), at least {_FEWEST} planes and one z for each"
            )
            raise ValueError(msg)
        if min(planes.shape[1:]) < 3 * half_px:
            msg = (
                f"planes of {planes.shape[1:]} are too small for PSFs that reach "
                f"{half_px} px; need sides of at least {3 * half_px} px, or planes "
                "nearer to focus"
            )
            raise ValueError(msg)
        self._inner = (slice(half_px, -half_px), slice(half_px, -half_px))
        compared = planes[:, *self._inner]
        if not float(np.ptp(compared, axis=(1, 2)).min()) > 0.0:
            msg = (
                "a plane shows no structure inside its borders; choose a part of the "
                "stack with cells"
            )
            raise ValueError(msg)
        sharpest = sharpest_plane(compared)
        others = np.delete(np.arange(len(planes)), sharpest)
        self.sharp = compared[sharpest]
        """The plane from which the others are predicted."""
        self.measured = compared[others]
        """The other planes without their borders, axes (z, y, x)."""
        self.z_um = z[others]
        """Their z."""
        self.sharpest_um = float(z[sharpest])
        """z of the sharpest plane."""
        self._shape = (planes.shape[1], planes.shape[2])
        self._side_px = 2 * half_px + 1
        self._spectrum = np.asarray(fft.rfft2(planes[sharpest]))

    def predict(
        self, system: OpticalSystem, focus_um: float, planes: Sequence[int]
    ) -> Image:
        """Turn the sharpest plane into others, by ratios of transfer functions."""
        own = self._transfer(system, self.sharpest_um - focus_um)
        power = np.square(own.real) + np.square(own.imag)
        undone = self._spectrum * np.conj(own) / (power + np.float32(_REGULARISATION))
        result = np.empty((len(planes), *self.sharp.shape), dtype=np.float32)
        for place, plane in enumerate(planes):
            transfer = self._transfer(system, float(self.z_um[plane]) - focus_um)
            whole = fft.irfft2(undone * transfer, self._shape)
            result[place] = whole[self._inner]
        return result

    def _transfer(
        self, system: OpticalSystem, defocus_um: float
    ) -> NDArray[np.complex64]:
        psf = compute_psf(system, defocus_um, size_px=self._side_px)
        return transfer_function(psf, self._shape)


def sharpest_plane(planes: Image) -> int:
    """Return the index of the plane with most fine detail for its brightness."""
    detail = [
        float(np.std(gaussian_laplace(plane, _DETAIL_PX)) / max(plane.mean(), 1e-12))
        for plane in planes
    ]
    return int(np.argmax(detail))


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
    room_px = int(_REACH * min(planes.shape[1:]))
    distance = np.abs(stack.z_um - stack.z_um[sharpest])
    usable = [
        index
        for index in range(len(planes))
        if reach_px(start, float(distance[index])) <= room_px
    ]
    if len(usable) < _FEWEST_PLANES:
        msg = (
            f"'{stack.name}': only {len(usable)} of {len(planes)} planes of "
            f"{planes.shape[1:]} px hold their own blur; need {_FEWEST_PLANES}: larger "
            "images, or planes nearer to focus"
        )
        raise InputError(msg)
    places = spread_out(len(usable), _MOST_PLANES)
    # The sharpest plane is the source of all others and must be among them.
    chosen = sorted({usable[place] for place in places} | {sharpest})
    widest_um = float(distance[chosen].max())
    return refusing(
        lambda: StackPlanes(
            planes[chosen], stack.z_um[chosen], half_px=reach_px(start, widest_um)
        )
    )


def _panels(fit: FocusFit, model: StackPlanes, start: OpticalSystem) -> list[Panel]:
    last = len(model.z_um) - 1
    shown = sorted({0, last // 4, (3 * last) // 4, last})
    predicted = model.predict(fit.system, fit.best.focus_um, shown)
    matched = match_planes(predicted, model.measured[shown])
    span, pixel_um = float(np.ptp(model.sharp)), fit.system.pixel_size_um
    panels = [
        grey(f"sharpest, z {model.sharpest_um:.2f} um", model.sharp, pixel_um),
        section_panel(fit, model.z_um),
        valley_panel(fit, model, start),
    ]
    for index, plane in zip(shown, matched, strict=True):
        measured = model.measured[index]
        panels += [
            grey(f"measured, z {model.z_um[index]:.2f} um", measured, pixel_um),
            grey("predicted", plane, pixel_um, measured),
            residual_panel("predicted - measured", plane - measured, span, pixel_um),
        ]
    return panels
