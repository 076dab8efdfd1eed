"""Check command: validates a run folder and finishes a cut-off one."""

from pathlib import Path
from typing import Annotated

import typer

from rtfocus.cli.display import share_bar
from rtfocus.errors import ExitCode


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(check)


def check(
    run: Annotated[Path, typer.Argument(help="Run folder, NAME.rtfocus.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Finish a run that was cut off.")
    ] = False,
) -> None:
    """Validate a run folder: stores, journal, and that no frame is unaccounted for.

    Exits with 1 when something is wrong, with 5 when all is sound but there are fewer
    frames than planned, with 7 when the run is being written.

    [bold]Example:[/] rtfocus check runs/demo.rtfocus --repair
    """
    # Here, because it takes long to import and help needs none.
    from rtfocus.writers.check import check_run

    with share_bar("frames") as on_progress:
        report = check_run(run, repair=repair, on_progress=on_progress)
    typer.echo(report)
    if report.problems:
        raise typer.Exit(ExitCode.FAILED)
    if report.holder is not None:
        raise typer.Exit(ExitCode.BUSY)
    if report.outcome is not None and not report.outcome.is_complete:
        raise typer.Exit(report.outcome.exit_code)
