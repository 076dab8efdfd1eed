"""Report: a calibration as a folder with config, figures and pictures of its fit.

All panels have one size, so that they stand side by side.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from rtfocus.calibration.through_focus import (
    LARGEST_APERTURE,
    TOLERANCE_DB,
    FocusFit,
    PlaneModel,
    focus_valley,
)
from rtfocus.channel import OpticalSystem
from rtfocus.config import parse_config
from rtfocus.drawing.canvas import enlarge
from rtfocus.drawing.figures import Axis, Panel, save_panels
from rtfocus.errors import InputError, OutputError, writing
from rtfocus.optics.psf import psf_stack

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted optics, and what shows how far they can be trusted."""

    system: OpticalSystem
    """The optics as a config states them: their defocus counts from focus."""
    statement: str
    """What was found and what the data cannot tell, in words."""
    warnings: tuple[str, ...]
    """What makes the fit doubtful; empty: nothing."""
    figures: dict[str, Any]
    """Plain numbers for a report file."""
    panels: list[Panel] = field(repr=False)
    """For a picture, of equal size."""


def refusing(fit: Callable[[], T]) -> T:
    """Return what `fit` returns; what it refuses is the fault of the input."""
    try:
        return fit()
    except ValueError as error:
        msg = f"this cannot be fitted: {error}"
        raise InputError(msg) from error


Image = NDArray[np.float32]

SHOWN_PX = 256
"""Side of every panel."""

# Intensity of a PSF spans decades: shown as a root, so that its halo is seen.
_GAMMA = 0.5


def centre(image: NDArray[np.generic]) -> NDArray[np.generic]:
    """Cut the middle out of an image and enlarge it to the side of a panel."""
    sides = [min(SHOWN_PX, length) for length in image.shape]
    starts = [(n - side) // 2 for n, side in zip(image.shape, sides, strict=True)]
    window = tuple(slice(a, a + side) for a, side in zip(starts, sides, strict=True))
    return enlarge(image[window], (SHOWN_PX, SHOWN_PX))


def match_planes(predicted: Image, measured: Image) -> Image:
    """Return the predicted planes with the gain and offset of the measured ones."""
    result = np.empty_like(measured)
    for index, (first, second) in enumerate(zip(predicted, measured, strict=True)):
        centred = first - first.mean()
        gain = np.vdot(centred, second) / max(float(np.vdot(centred, centred)), 1e-30)
        result[index] = gain * centred + second.mean()
    return result


def grey(
    caption: str, image: Image, pixel_um: float, like: Image | None = None
) -> Panel:
    """Show an image between the percentiles of another, or of itself."""
    low, high = np.percentile(image if like is None else like, (1.0, 99.8))
    shown_um = pixel_um * min(SHOWN_PX, image.shape[1]) / SHOWN_PX
    return Panel(caption, centre(image), float(low), float(high), pixel_um=shown_um)


def residual_panel(
    caption: str,
    error: Image,
    span: float,
    pixel_um: float,
    *,
    z_um: NDArray[np.float64] | None = None,
) -> Panel:
    """Show errors around white; the strongest colours are a tenth of the range.

    With `z_um` the rows are planes, at these distances from focus.
    """
    limit = 0.1 * span
    if z_um is not None:
        x, y = _section_axes(error.shape[1], pixel_um, z_um)
        pixels = enlarge(error, (SHOWN_PX, SHOWN_PX))
        return Panel(caption, pixels, -limit, limit, colours="around", x=x, y=y)
    shown_um = pixel_um * min(SHOWN_PX, error.shape[1]) / SHOWN_PX
    pixels = centre(error)
    return Panel(caption, pixels, -limit, limit, colours="around", pixel_um=shown_um)


def psf_panel(
    caption: str,
    psf: Image,
    pixel_um: float,
    peak: float | None = None,
    *,
    z_um: NDArray[np.float64] | None = None,
) -> Panel:
    """Show a PSF as the root of its intensity, so that its halo is seen.

    With `z_um` it is a section: the rows are planes, at these distances from focus.
    """
    highest = float(psf.max() if peak is None else peak)
    brightness = (np.maximum(psf, 0.0) / max(highest, 1e-30)) ** _GAMMA
    pixels = enlarge(brightness, (SHOWN_PX, SHOWN_PX))
    unit = "root of peak"
    if z_um is not None:
        x, y = _section_axes(psf.shape[1], pixel_um, z_um)
        return Panel(caption, pixels, 0.0, 1.0, unit, x=x, y=y)
    shown_um = pixel_um * psf.shape[1] / SHOWN_PX
    return Panel(caption, pixels, 0.0, 1.0, unit, pixel_um=shown_um)


def _section_axes(
    width_px: int, pixel_um: float, z_um: NDArray[np.float64]
) -> tuple[Axis, Axis]:
    half_um = width_px * pixel_um / 2
    return Axis("x (um)", -half_um, half_um), Axis(
        "z from focus (um)", float(z_um[-1]), float(z_um[0])
    )


def map_panel(
    caption: str,
    quality_db: NDArray[np.float64],
    place: tuple[float, float],
    x: Axis,
    y: Axis,
) -> Panel:
    """Show PSNR over two parameters, best 6 dB, with a cross at `place`.

    Parameters
    ----------
    caption
        What is varied.
    quality_db
        Axes (y, x).
    place
        Shares of height and width, 0 to 1, from the upper left.
    x, y
        What columns and rows stand for; `y` from the lowest row up.
    """
    highest = float(quality_db.max())
    pixels = enlarge(quality_db, (SHOWN_PX, SHOWN_PX))
    mark = place[1], place[0]
    return Panel(
        caption, pixels, highest - 6.0, highest, "dB", "even", x=x, y=y, mark=mark
    )


_APERTURES = np.linspace(0.6, 1.4, 13)
# In units of n lambda / NA^2 around the focus that was found.
_FOCUS_UNITS = np.linspace(-1.5, 1.5, 13)
_SECTION_PX = 61
_SECTION_PLANES = 41
# Less than this share of the variance predicted: the specimen is not flat, or the
# optics are far off; even less: no optics show.
_LEAST_EXPLAINED = 0.9
_NOTHING_EXPLAINED = 0.1


def focus_figures(fit: FocusFit) -> dict[str, Any]:
    """Return the fit as plain numbers."""
    names = ("numerical_aperture", "spherical_waves", "focus_um")
    return {
        "best": fit.best.numbers(),
        "explained": round(fit.explained, 5),
        "sign_margin_db": round(fit.sign_margin_db, 3),
        "equally_good": fit.equally_good(names),
        "profile": [trial.numbers() for trial in fit.profile],
    }


def focus_warnings(
    fit: FocusFit, model: PlaneModel, start: OpticalSystem
) -> tuple[str, ...]:
    """Say what makes the fit doubtful; InputError: it says nothing of the optics."""
    if fit.explained < _NOTHING_EXPLAINED:
        msg = (
            f"no optics predict more than {100 * fit.explained:.1f} % of how these "
            f"planes differ ({100 * _NOTHING_EXPLAINED:.0f} are needed): noise, or no "
            "stack through focus of one still specimen; give brighter images, or the "
            "right z steps and pixel size"
        )
        raise InputError(msg)
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


def section_panel(fit: FocusFit, z_um: NDArray[np.float64]) -> Panel:
    """Show the fitted PSF through focus: x to the right, z down."""
    z = np.linspace(z_um.min(), z_um.max(), _SECTION_PLANES) - fit.best.focus_um
    psfs = psf_stack(fit.system, map(float, z), _SECTION_PX)
    section = psfs[:, _SECTION_PX // 2]
    caption, pixel_um = "PSF fitted, section", fit.system.pixel_size_um
    return psf_panel(caption, section, pixel_um, z_um=z)


def valley_panel(fit: FocusFit, model: PlaneModel, start: OpticalSystem) -> Panel:
    """Show how well NA (down) and focus (right) predict the planes, W as fitted."""
    best = fit.best
    apertures = np.minimum(
        _APERTURES * best.numerical_aperture,
        LARGEST_APERTURE * start.refractive_index,
    )
    foci = best.focus_um + _FOCUS_UNITS * fit.system.defocus_unit_um
    quality = focus_valley(model, best, start, apertures, foci)
    return map_panel(
        "how well NA and focus predict the planes",
        quality,
        (0.5, 0.5),
        Axis("focus (um)", float(foci[0]), float(foci[-1])),
        Axis("NA", float(apertures[-1]), float(apertures[0])),
    )


CONFIG_NAME = "optics.yaml"
FIGURES_NAME = "fit.json"
PICTURE_NAME = "fit.png"
REPORT_NAMES = (CONFIG_NAME, FIGURES_NAME, PICTURE_NAME)
"""The files of a calibration."""
_COLUMNS = 3


def write_calibration(
    folder: Path, calibration: Calibration, *, channel: str
) -> list[Path]:
    """Write a calibration and return the paths written.

    Parameters
    ----------
    folder
        Made if needed; files of an earlier calibration are replaced.
    calibration
        What to write.
    channel
        Name of the channel in the config: ``channels`` of ``optics.yaml`` is one
        entry with the fitted optics.

    Raises
    ------
    InputError
        If the disk refuses it.
    """
    figures = {
        "statement": calibration.statement,
        "warnings": list(calibration.warnings),
        "optics": asdict(calibration.system),
        **calibration.figures,
    }
    paths = [folder / name for name in REPORT_NAMES]
    with writing(folder, OutputError):
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(config_text(calibration, channel=channel), encoding="utf-8")
        paths[1].write_text(
            json.dumps(figures, indent=1, allow_nan=False), encoding="utf-8"
        )
        save_panels(paths[2], calibration.panels, columns=_COLUMNS)
    return paths


def config_text(calibration: Calibration, *, channel: str) -> str:
    """Return the YAML of one channel, its comment saying how it was found."""
    entry = {"name": channel, "optics": optics_block(calibration.system)}
    data = {"channels": [entry]}
    # What is written must load: the same check as for a config by hand.
    parse_config(data, origin="fitted optics")
    comments = [
        calibration.statement,
        *(f"Doubtful: {w}." for w in calibration.warnings),
    ]
    comment = "\n".join(
        fill(text, 78, initial_indent="# ", subsequent_indent="# ") for text in comments
    )
    return f"{comment}\n{yaml.safe_dump(data, sort_keys=False)}"


def optics_block(system: OpticalSystem) -> dict[str, Any]:
    """Return the optics as a config writes them: rounded, without the defaults."""
    needed = ("numerical_aperture", "wavelength_nm", "pixel_size_um")
    # Any in air: of an immersion's NA there are none.
    plain = asdict(OpticalSystem(0.5, 500.0, 1.0))
    given = {
        name: value
        for name, value in _rounded(asdict(system)).items()
        if name in needed or value != plain[name]
    }
    aberrations = given.get("aberrations")
    if aberrations is not None:
        given["aberrations"] = {k: v for k, v in aberrations.items() if v}
    return given


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Round to a thousandth, a pixel size to a tenth of it: no fit can tell finer."""
    rounded = dict(values)
    for name, value in values.items():
        if isinstance(value, dict):
            rounded[name] = _rounded(value)
        elif isinstance(value, float):
            rounded[name] = round(value, 4 if name == "pixel_size_um" else 3)
    return rounded
