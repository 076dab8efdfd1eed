"""Autofocus commands: focus once, hold it, check it against a stack through focus."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from rtfocus.autofocus.devices import CoreStage
from rtfocus.autofocus.focuser import Focuser, FocusJournal
from rtfocus.autofocus.hold import Holder, seen_by
from rtfocus.autofocus.planes import (
    Calibration,
    Plane,
    PlaneComparison,
    calibrate,
    save_calibration,
)
from rtfocus.autofocus.plans import against_unknown_backlash
from rtfocus.cli.commands import (
    ConfigArgument,
    OverwriteOption,
    SetOption,
    read_config,
)
from rtfocus.cli.display import share_bar
from rtfocus.cli.endings import interruptible
from rtfocus.config.sections import ReplayConfig
from rtfocus.drawing.canvas import BLUE, FAINT, ORANGE, PixelCanvas
from rtfocus.drawing.figures import Chart, axis_of
from rtfocus.errors import ConfigError, ExitCode, OutputError
from rtfocus.files import whole
from rtfocus.focusing import estimate_of, open_focuser
from rtfocus.microscope.core import open_core


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(autofocus)
    app.command(name="calibrate")(calibrate_microscope)


def autofocus(
    config: ConfigArgument,
    overrides: SetOption = None,
    hold: Annotated[
        bool,
        typer.Option("--hold/--once", help="Hold focus until Ctrl-C, or find it once."),
    ] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.0, help="Seconds between images.")
    ] = 1.0,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Hold: end after so many.")
    ] = None,
    journal: Annotated[
        Path | None, typer.Option("--journal", help="Append every decision: NDJSON.")
    ] = None,
) -> None:
    """Find focus by the images of the microscope itself, or hold it.

    The stage never leaves autofocus.low_um to high_um. Exits with 1 where focus was not
    found; the stage then stands at the sharpest z that was seen.

    [bold]Example:[/] rtfocus autofocus my.yaml --set autofocus.high_um=4200
    """
    settings = read_config(config, overrides)
    if isinstance(settings.microscope, ReplayConfig):
        msg = "recorded images cannot be focused; give a microscope with a z-stage"
        raise ConfigError(msg)
    with (
        interruptible() as (stop, _),
        open_core(settings) as core,
        open_focuser(
            core, settings, journal=FocusJournal(journal), tell=typer.echo
        ) as focuser,
    ):
        verdict = focuser.focus()
        if not verdict.focused:
            raise typer.Exit(ExitCode.FAILED)
        if not hold:
            return
        channel = focuser.channel()
        models = focuser.models(channel)
        limits = focuser.limits_around(None)
        holder = Holder(models, focuser.move_rule(models.unit_um, limits))
        holder.begin(_HERE, time.time(), verdict.end_um, seen_by(verdict))
        stage, taken = CoreStage(core), 0
        while not stop.wait(interval_s) and (images is None or taken < images):
            step_um = holder.correction_um(_HERE, time.time(), time.time_ns())
            if step_um:
                for stop_um in focuser.way_to(stage.position_um() + step_um):
                    stage.go_to(stop_um)
                typer.echo(f"held: {step_um:+.2f} um to z {stage.position_um():.2f} um")
            taken += 1
            z_um = stage.position_um()
            holder.take(estimate_of(focuser.look(channel, z_um), taken, z_um))


_WAYS = {1: "towards the specimen", -1: "away from it", 0: "nobody knows where"}
"""What larger z does; an even PSF does not tell."""
_HERE = (0, None)


def calibrate_microscope(
    config: ConfigArgument,
    overrides: SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File; default: autofocus.calibration of the config."
        ),
    ] = None,
    reach: Annotated[
        float, typer.Option(min=1.0, max=8.0, help="Depths of field on either side.")
    ] = 4.0,
    overwrite: OverwriteOption = False,
    step: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Depths of field between planes.")
    ] = 0.5,
) -> None:
    """Check autofocus against a z-stack through focus, up and down again.

    Writes a file for autofocus.calibration and a plot beside it. Exits with 1 where
    the optics cannot be trusted; searches then check every answer on both sides.

    [bold]Example:[/] rtfocus calibrate my.yaml -o focus_20x.yaml
    """
    settings = read_config(config, overrides)
    path = output or settings.autofocus.calibration
    if path is None:
        msg = "where to? give --output FILE, or autofocus.calibration in the config"
        raise ConfigError(msg)
    picture = path.with_suffix(".png")
    for target in (path, picture):
        if target.exists() and not overwrite:
            msg = f"'{target}' exists; give --overwrite to replace it"
            raise OutputError(msg)
    # The one that is being made is not asked how far it can be trusted.
    plain = settings.autofocus.model_copy(update={"calibration": None})
    settings = settings.model_copy(update={"autofocus": plain})
    with (
        interruptible(),
        open_core(settings) as core,
        open_focuser(core, settings, tell=typer.echo) as focuser,
    ):
        channel, stage = focuser.channel(), CoreStage(core)
        comparison = PlaneComparison(focuser.optics_of(channel), 0)
        unit = comparison.unit_um
        # Nobody knows the backlash yet.
        focuser.config = against_unknown_backlash(focuser.config, unit)
        verdict = focuser.focus()
        wanted = verdict.end_um + np.arange(-reach, reach + step / 2, step) * unit
        with share_bar("planes") as show:
            up = _planes(focuser, wanted, unit, lambda share: show(share / 2))
            down = _planes(
                focuser, wanted[::-1], -unit, lambda share: show((1 + share) / 2)
            )
        found = calibrate(
            comparison,
            up,
            down,
            channel=channel,
            direction_of_core=focuser.direction(),
            not_found=None if verdict.focused else verdict.reason,
        )
        stage.go_to(focuser.limits_around(None).clip(found.focus_um))
    with whole(path, overwrite=overwrite) as part:
        save_calibration(part, found)
    with whole(picture, overwrite=overwrite) as part:
        _draw_calibration(part, found, up)
    typer.echo(
        f"focus at z {found.focus_um:.2f} um, sharpest at {found.sharpest_um:.2f}; "
        f"{100 * found.unexplained:.1f} % unexplained; backlash "
        f"{found.backlash_um:+.2f} um; levels read {found.level_offset_um:+.2f} um + "
        f"{found.level_scale:.2f} x distance; larger z leads {_WAYS[found.direction]} "
        f"by the images, {_WAYS[found.direction_of_core]} by Micro-Manager"
    )
    for problem in found.problems:
        typer.echo(f"problem: {problem}")
    typer.echo(f"{path} (autofocus.calibration), {picture}")
    if not found.trusted:
        raise typer.Exit(ExitCode.FAILED)


def _planes(
    focuser: Focuser,
    way_um: NDArray[np.float64],
    run_up_um: float,
    show: Callable[[float], None],
) -> list[Plane]:
    """Take a stack one way, from where backlash is used up before its first plane."""
    channel, stage = focuser.channel(), CoreStage(focuser.core)
    limits = focuser.limits_around(None)
    heights = [float(z_um) for z_um in way_um if limits.holds(float(z_um))]
    stage.go_to(limits.clip(float(way_um[0]) - run_up_um))
    planes: list[Plane] = []
    for z_um in heights:
        stage.go_to(z_um)
        planes.append(Plane(z_um, focuser.look(channel, z_um)))
        show(len(planes) / len(heights))
    return planes


_WIDTH, _HEIGHT, _LEFT = 560.0, 260.0, 72.0


def _draw_calibration(path: Path, found: Calibration, planes: Sequence[Plane]) -> None:
    """Draw sharpness and the engine's reading over z as a PNG."""
    z = np.array([plane.z_um for plane in planes]) - found.focus_um
    sharp = np.array([plane.sharpness for plane in planes])
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
