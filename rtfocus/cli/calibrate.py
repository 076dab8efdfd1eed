"""Calibrate command: a z-stack through focus on the user's own microscope."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from rtfocus.autofocus.calibration import (
    Plane,
    calibrate,
    draw_calibration,
    save_calibration,
)
from rtfocus.autofocus.focuser import CoreStage
from rtfocus.autofocus.planes import PlaneComparison
from rtfocus.cli.display import share_bar
from rtfocus.cli.interrupt import interruptible
from rtfocus.cli.options import (
    ConfigArgument,
    OverwriteOption,
    SetOption,
    read_config,
)
from rtfocus.errors import ConfigError, ExitCode, OutputError
from rtfocus.files import whole
from rtfocus.focusing import open_focuser
from rtfocus.microscope.core import open_core


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(name="calibrate")(calibrate_microscope)


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
        verdict = focuser.focus()
        channel, stage = focuser.channel(), CoreStage(core)
        optics = focuser.optics_of(channel)
        comparison = PlaneComparison(optics, 0)
        unit = comparison.unit_um
        limits = focuser.limits_around(None)
        wanted = verdict.end_um + np.arange(-reach, reach + step / 2, step) * unit
        heights = [float(z) for z in wanted if limits.holds(float(z))]
        stacks: list[list[Plane]] = []
        with share_bar("planes") as show:
            for ways_done, way in enumerate((heights, heights[::-1])):
                planes: list[Plane] = []
                for z_um in way:
                    stage.go_to(z_um)
                    planes.append(Plane(z_um, focuser.look(channel, z_um)))
                    show((ways_done + len(planes) / len(heights)) / 2)
                stacks.append(planes)
        found = calibrate(
            comparison,
            stacks[0],
            stacks[1],
            channel=channel,
            direction_of_core=focuser.direction(),
            not_found=None if verdict.focused else verdict.reason,
        )
        stage.go_to(limits.clip(found.focus_um))
    with whole(path, overwrite=overwrite) as part:
        save_calibration(part, found)
    with whole(picture, overwrite=overwrite) as part:
        draw_calibration(part, found, stacks[0])
    typer.echo(
        f"focus at z {found.focus_um:.2f} um, sharpest at {found.sharpest_um:.2f}; "
        f"{100 * found.unexplained:.1f} % unexplained; backlash "
        f"{found.backlash_um:+.2f} um; levels read {found.level_offset_um:+.2f} um + "
        f"{found.level_scale:.2f} x distance; direction by images "
        f"{found.direction:+d}, by Micro-Manager {found.direction_of_core:+d}"
    )
    for problem in found.problems:
        typer.echo(f"problem: {problem}")
    typer.echo(f"{path} (autofocus.calibration), {picture}")
    if not found.trusted:
        raise typer.Exit(ExitCode.FAILED)
