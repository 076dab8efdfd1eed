"""Calibration: what a z-stack through focus says of this microscope's autofocus.

Made once per objective by ``rtfocus calibrate``. It tells whether images change with
z as the optics say, in which direction the stage runs, how an engine's levels follow
the true distance, and the backlash. Only where all of it agrees may a search end
without a check from both sides.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from rtfocus.autofocus.appearance import sharpness
from rtfocus.autofocus.planes import PlaneComparison, PlaneFit
from rtfocus.drawing.canvas import BLUE, FAINT, ORANGE, PixelCanvas
from rtfocus.drawing.figures import Chart, axis_of
from rtfocus.errors import ConfigError
from rtfocus.frame import FocusReading

Floats = NDArray[np.float64]

# Of the spectra's energy, and in depths of field.
_MOST_UNEXPLAINED, _MOST_APART = 0.02, 0.35
# The better direction must explain so much more to be the told one.
_CLEAR = 1.5
_FEWEST = 5
_WIDTH, _HEIGHT, _LEFT = 560.0, 260.0, 72.0


@dataclass(frozen=True, slots=True)
class Plane:
    """One image of a calibration stack."""

    z_um: float
    reading: FocusReading


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found; lengths in um of stage z."""

    channel: str
    focus_um: float
    """Where the optics put focus."""
    sharpest_um: float
    """Where the image is sharpest."""
    unexplained: float
    """Share of the images' change with z that the optics leave unexplained."""
    direction: int
    """By the images: +1 larger z brings the plane of focus to the specimen, -1, or 0
    where they do not tell (an even PSF)."""
    direction_of_core: int
    """As Micro-Manager was told."""
    backlash_um: float
    """Focus from above minus focus from below."""
    level_offset_um: float
    """Reading of the engine in focus."""
    level_scale: float
    """Reading of the engine per true distance."""
    level_range_um: float
    """Distance up to which the reading grows."""
    unit_um: float
    """Depth of field n lambda / NA^2."""
    problems: list[str]
    """Why answers are still to be checked; empty: the optics can be trusted."""

    @property
    def trusted(self) -> bool:
        """Tell whether a search may end without a check from both sides."""
        return not self.problems


def calibrate(
    comparison: PlaneComparison,
    up: Sequence[Plane],
    down: Sequence[Plane],
    *,
    channel: str,
    direction_of_core: int,
    not_found: str | None = None,
) -> Calibration:
    """Evaluate a stack taken on the way up and again on the way down.

    Parameters
    ----------
    comparison
        Of the channel's optics, made for direction 0.
    up, down
        The same planes, five or more.
    channel
        Its name.
    direction_of_core
        `core.getFocusDirection` of the focus stage.
    not_found
        Why the search before the stack failed; None: it found focus.

    Raises
    ------
    ConfigError
        If there are too few planes.
    """
    if min(len(up), len(down)) < _FEWEST:
        msg = f"{min(len(up), len(down))} planes are too few; take {_FEWEST} or more"
        raise ConfigError(msg)
    unit = comparison.unit_um
    fits = [_fit(comparison, planes) for planes in (up, down)]
    focus = fits[0].best_um
    sharp = _sharpest_um(up)
    by_direction = fits[0].by_direction
    told = _told_direction(by_direction)
    offset, scale, reach = _levels(up, focus)
    unexplained = max(fit.unexplained for fit in fits)
    problems = []
    if not_found is not None:
        problems.append(f"the search before the stack did not find focus: {not_found}")
    if unexplained > _MOST_UNEXPLAINED:
        problems.append(
            f"the optics leave {100 * unexplained:.0f} % of the change with z "
            "unexplained; rtfocus psf fit finds better ones"
        )
    if any(fit.at_the_edge for fit in fits):
        problems.append(
            "NA or spherical aberration seem to differ by more than 10 % or 0.3 waves "
            "from the channel's optics; rtfocus psf fit finds them"
        )
    if abs(focus - sharp) > _MOST_APART * unit:
        problems.append(
            f"the image is sharpest {abs(focus - sharp):.2f} um from where the optics "
            "put focus"
        )
    if told and direction_of_core and told != direction_of_core:
        problems.append(
            "the stage runs against what Micro-Manager was told (focus direction in "
            "its hardware wizard), or the spherical aberration has the wrong sign"
        )
    return Calibration(
        channel=channel,
        focus_um=focus,
        sharpest_um=sharp,
        unexplained=unexplained,
        direction=told,
        direction_of_core=direction_of_core,
        backlash_um=fits[1].best_um - focus,
        level_offset_um=offset,
        level_scale=scale,
        level_range_um=reach,
        unit_um=unit,
        problems=problems,
    )


def save_calibration(path: Path, found: Calibration) -> None:
    """Write a calibration as YAML."""
    values = {
        key: round(value, 5) if isinstance(value, float) else value
        for key, value in asdict(found).items()
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def load_calibration(path: Path) -> Calibration:
    """Read a calibration.

    Raises
    ------
    ConfigError
        If the file cannot be read or is none.
    """
    try:
        values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Calibration(**values)
    except (OSError, yaml.YAMLError, TypeError) as error:
        msg = (
            f"autofocus.calibration '{path}' cannot be used: {error}; make it with: "
            "rtfocus calibrate CONFIG"
        )
        raise ConfigError(msg) from error


def draw_calibration(path: Path, found: Calibration, planes: Sequence[Plane]) -> None:
    """Draw sharpness and the engine's reading over z as a PNG."""
    z = np.array([plane.z_um for plane in planes]) - found.focus_um
    sharp = np.array([_sharp(plane) for plane in planes])
    reading = np.array(
        [
            np.nan if plane.reading.defocus_um is None else plane.reading.defocus_um
            for plane in planes
        ]
    )
    canvas = PixelCanvas(_WIDTH, 2 * _HEIGHT)
    x = axis_of("stage z from focus (um)", z)
    upper = (_LEFT, 30.0, _WIDTH - 16, _HEIGHT - 50.0)
    share = sharp / max(float(sharp.max()), 1e-12)
    above = Chart(canvas, upper, x, axis_of("sharpness, of its best", share, zero=True))
    above.curve(z, share, BLUE, "sharpness")
    above.dots(z, share, BLUE)
    lower = (_LEFT, 30.0 + _HEIGHT, _WIDTH - 16, 2 * _HEIGHT - 50.0)
    y = axis_of("distance from focus (um)", np.abs(reading), np.abs(z), zero=True)
    below = Chart(canvas, lower, x, y)
    below.curve(z, np.abs(z), FAINT, "true", dash=4)
    below.curve(z, np.abs(reading), ORANGE, "read by the engine")
    below.dots(z[np.isfinite(reading)], np.abs(reading[np.isfinite(reading)]), ORANGE)
    for chart in (above, below):
        chart.upright(0.0)
    canvas.save(path)


def _fit(comparison: PlaneComparison, planes: Sequence[Plane]) -> PlaneFit:
    # Far planes say little and show the specimen's thickness.
    sharpest = _sharpest_um(planes)
    near = [p for p in planes if abs(p.z_um - sharpest) < 3 * comparison.unit_um]
    return comparison.fit(
        np.array([plane.z_um for plane in near]),
        np.array([plane.reading.spectrum for plane in near]),
        np.array([plane.reading.noise for plane in near]),
    )


def _told_direction(by_direction: dict[int, float]) -> int:
    if len(by_direction) < 2:
        return next(iter(by_direction), 0)
    better, worse = sorted(by_direction, key=lambda turn: by_direction[turn])
    clear = by_direction[worse] > _CLEAR * max(by_direction[better], 1e-4)
    return better if clear else 0


def _sharp(plane: Plane) -> float:
    return sharpness(np.asarray(plane.reading.spectrum))


def _sharpest_um(planes: Sequence[Plane]) -> float:
    """Return the top of the parabola through the sharpest plane's neighbours."""
    ordered = sorted(planes, key=lambda plane: plane.z_um)
    values = np.array([_sharp(plane) for plane in ordered])
    top = int(values.argmax())
    if top in (0, len(ordered) - 1):
        return ordered[top].z_um
    z = np.array([plane.z_um for plane in ordered[top - 1 : top + 2]])
    curve = np.polyfit(z - z[1], values[top - 1 : top + 2], 2)
    return float(z[1] - curve[1] / (2 * curve[0])) if curve[0] < 0 else float(z[1])


def _levels(planes: Sequence[Plane], focus_um: float) -> tuple[float, float, float]:
    """Return offset, scale and range of the engine's reading."""
    pairs = [
        (abs(plane.z_um - focus_um), abs(plane.reading.defocus_um))
        for plane in planes
        if plane.reading.defocus_um is not None
    ]
    if len(pairs) < _FEWEST:
        return 0.0, 0.0, 0.0
    true, read = np.array(pairs).T
    scale, offset = np.polyfit(true, read, 1)
    return float(offset), float(scale), float(true.max())
