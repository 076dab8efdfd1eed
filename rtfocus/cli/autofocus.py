"""Autofocus command: focus once, or hold it, on the configured microscope."""

import time
from pathlib import Path
from typing import Annotated

import typer

from rtfocus.autofocus.focuser import CoreStage, FocusJournal
from rtfocus.autofocus.hold import Holder, seen_by
from rtfocus.cli.interrupt import interruptible
from rtfocus.cli.options import ConfigArgument, SetOption, read_config
from rtfocus.config.microscope import ReplayConfig
from rtfocus.errors import ConfigError, ExitCode
from rtfocus.focusing import estimate_of, open_focuser
from rtfocus.microscope.core import open_core


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command()(autofocus)


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


_HERE = (0, None)
