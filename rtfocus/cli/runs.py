"""Run commands: a run folder reported, checked and exported.

The numbers of a report are ``report.json``'s. Of autofocus it says what it did, as one
line and as a picture. The picture shows, for the first position, the defocus as the
images told it: held, and as it would have become had the stage stood still.
"""

import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtfocus.cli.commands import OverwriteOption, need_torch, refuse_options
from rtfocus.cli.display import counting, share_bar
from rtfocus.errors import ExitCode, IncompleteError, InputError, number_of
from rtfocus.metrics import STEPS, Outcome, accounting_in_words, plan_in_words
from rtfocus.writers.header import HEADER_NAME, is_finished

if TYPE_CHECKING:
    from rtfocus.transport.viewer import FocusLine

PICTURE = "focus.png"
_WIDTH_PT, _HEIGHT_PT = 760.0, 300.0


def draw_focus(folder: Path, lines: "list[FocusLine]") -> Path | None:
    """Draw the trace of the first held position; None where none was held."""
    from rtfocus.transport.viewer import HoldLine

    holds = [line for line in lines if isinstance(line, HoldLine)]
    if not holds:
        return None
    # Loaded when there is something to draw: a processor side starts without it.
    import numpy as np

    from rtfocus.drawing.canvas import BLUE, GREEN, ORANGE, PixelCanvas
    from rtfocus.drawing.figures import Axis, Chart, axis_of

    mine = [line for line in holds if line.p == holds[0].p]
    time_s = np.array([(line.time_ns - mine[0].time_ns) / 1e9 for line in mine])
    steps_um = np.array([line.step_um for line in mine])
    held = np.array([line.error_um for line in mine]) - steps_um
    alone = held + np.cumsum(steps_um)
    canvas = PixelCanvas(_WIDTH_PT, _HEIGHT_PT)
    chart = Chart(
        canvas,
        (70.0, 34.0, _WIDTH_PT - 20.0, _HEIGHT_PT - 44.0),
        Axis("time since the first image held (s)", 0.0, max(float(time_s[-1]), 1e-9)),
        axis_of(f"defocus found, position {mine[0].p} (um)", held, alone, zero=True),
    )
    chart.level(0.0, dash=0)
    chart.curve(time_s, alone, ORANGE, "had the stage stood still")
    chart.curve(time_s, held, BLUE, "held by rtfocus")
    chart.dots(time_s[steps_um != 0], held[steps_um != 0], GREEN, "moves")
    canvas.save(folder / PICTURE)
    return folder / PICTURE


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(report)
    app.command()(check)
    app.command()(export)


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, NAME.rtfocus.")],
) -> None:
    """Write the page of a run, report.html, again from its folder.

    Works on a run that was cut off, and on one that is being recorded.

    [bold]Example:[/] rtfocus report runs/demo.rtfocus
    """
    from rtfocus.report.page import write_page
    from rtfocus.writers.commit import report_of

    typer.echo(write_page(run))
    if is_finished(run):
        report_of(run)  # fails if it is damaged: the page only shows what is there


class ReportConsole(Console):
    """Breaks lines in a terminal alone, and goes on where its output is no longer read.

    As in ``| grep``, where a line is one, and in ``| head``: the work is done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.soft_wrap = not self.is_terminal

    def on_broken_pipe(self) -> None:
        """Write to nothing; the exit code stays that of the run."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def print_report(folder: Path) -> Outcome:
    """Print loss accounting, throughput and stage times of a finished run.

    Returns
    -------
    Outcome
        How much of the plan is written.
    """
    # With it comes what reads stores, which no other command's help needs.
    from rtfocus.report.facts import (
        focus_in_words,
        left_out_by_hold,
        read_focus_log,
        throughput_in_words,
    )
    from rtfocus.writers.commit import report_of

    report = report_of(folder)
    outcome = Outcome.of_report(report)
    console = ReportConsole()
    done = "completed" if outcome.is_plain else outcome
    console.print(f"[bold]{escape(str(folder))}[/]  ({escape(str(done))})")
    if report["accounting"].get("planned") is not None:
        console.print(plan_in_words(report["accounting"]))
    style = "bold red" if report["accounting"]["unaccounted"] else None
    console.print(accounting_in_words(report["accounting"]), style=style, markup=False)
    if text := throughput_in_words(report):
        console.print(text)
    for kind, backend in report.get("backends", {}).items():
        console.print(f"{kind}: {backend}", markup=False, highlight=False)
    for line in _shares(report):
        console.print(line, markup=False, highlight=False)
    console.print(_stage_table(report.get("stages", {})))
    if text := left_out_by_hold(report):
        console.print(text, markup=False, highlight=False)
    if lines := read_focus_log(folder):
        console.print(focus_in_words(lines), markup=False, highlight=False)
        if (picture := draw_focus(folder, lines)) is not None:
            console.print(f"focus trace: {picture}", markup=False, highlight=False)
    if (page := folder / "report.html").is_file():
        console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    for warning in report.get("warnings", ()):
        console.print(f"warning: {warning}", markup=False, highlight=False)
    return outcome


def _shares(report: dict[str, Any]) -> Iterator[str]:
    """Yield how many frames each device processed, and by which way they came."""
    devices, ways = report.get("devices", {}), report.get("came_by", {})
    if len(devices) > 1:
        yield "frames by device: " + ", ".join(f"{k} {n}" for k, n in devices.items())
    if ways:
        yield "frames came by: " + ", ".join(f"{k} {n}" for k, n in ways.items())


def _stage_table(stages: dict[str, dict[str, float | int | None]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("step (ms)")
    for column in ("median", "95 % within", "99 % within", "longest"):
        table.add_column(column, justify="right")
    for name, times in stages.items():
        values = [times.get(key) for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
        cells = ("-" if v is None else f"{v:.1f}" for v in values)
        table.add_row(STEPS.get(name, name), *cells)
    return table


def check(
    run: Annotated[Path, typer.Argument(help="Run folder, NAME.rtfocus.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Finish a run that was cut off.")
    ] = False,
) -> None:
    """Check that a run folder is sound and that every frame is accounted for.

    Exit codes: 0 sound and complete, 1 something is wrong, 4 no run folder, 5 sound
    but fewer frames than planned, 7 being written.

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


class ImageChoice(StrEnum):
    """Images of a run; Typer takes no list of literals."""

    raw = "raw"
    restored = "restored"
    defocus = "defocus"
    deviation = "deviation"
    expected_error = "expected_error"


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CHECKPOINT",
            help="A finished run folder, or a checkpoint file of a training.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Run: .ome.tif, .ome.zarr, .csv (table of frames), or no ending: a "
            "folder of OME-TIFFs. Checkpoint: the engine folder.",
        ),
    ],
    image: Annotated[
        list[ImageChoice] | None,
        typer.Option(
            metavar="raw|restored|defocus|deviation|expected_error",
            help="Run: what to export; repeatable. Default: everything.",
        ),
    ] = None,
    zarr_version: Annotated[
        Literal["0.5", "0.4"], typer.Option(help="Run: version of OME-Zarr.")
    ] = "0.5",
    mean_with: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="CHECKPOINT|ENGINE",
            help="Checkpoint: export the mean with another one of the same network; "
            "repeatable.",
        ),
    ] = None,
    half_weights: Annotated[
        bool,
        typer.Option(
            "--half-weights",
            help="Checkpoint: store weights in 16 bits, half the file.",
        ),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint: files to write, of fp32, fp16, int8, separated by "
            "commas. Default: fp32."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Export a run for other programs, or a checkpoint as an engine folder.

    A run becomes OME-TIFF, OME-Zarr without shards and with a pyramid, or a table of
    its frames with their defocus.

    [bold]Example:[/] rtfocus export runs/day1.rtfocus -o day1.ome.tif

    rtfocus export checkpoints/delpnet/last.pt -o engines/delpnet
    """
    of_run = {"--image": image, "--zarr-version": zarr_version != "0.5" or None}
    of_engine = {
        "--mean-with": mean_with,
        "--half-weights": half_weights or None,
        "--precision": precision,
    }
    if (source / HEADER_NAME).is_file():
        refuse_options(of_engine, f"'{source}' is a run")
        _export_run(source, output, image or [], zarr_version, overwrite)
        return
    if not source.exists():
        msg = f"'{source}' does not exist; give a run folder, or a checkpoint file"
        raise InputError(msg)
    if source.is_dir():
        msg = f"'{source}' is no run folder (no {HEADER_NAME}) and no checkpoint file"
        raise InputError(msg)
    refuse_options(of_run, f"'{source}' is no run folder")
    # Of a run nothing is trained, and what trains takes long to import.
    need_torch()
    from rtfocus.training.commands import export_command

    export_command(
        source,
        output,
        mean_with=mean_with or (),
        half_weights=half_weights,
        precision=precision or "fp32",
        overwrite=overwrite,
    )


def _export_run(
    folder: Path,
    output: Path,
    images: list[ImageChoice],
    zarr_version: Literal["0.5", "0.4"],
    overwrite: bool,
) -> None:
    if zarr_version != "0.5" and output.suffix.lower() != ".zarr":
        refuse_options({"--zarr-version": zarr_version}, f"'{output}' is no OME-Zarr")
    from rtfocus.exports import RunExport, write_table
    from rtfocus.runs import open_run

    if output.suffix.lower() == ".csv":
        whole = {"--image": images or None}
        refuse_options(whole, f"'{output}' is a table of all frames")
        frames = write_table(open_run(folder), output, overwrite=overwrite)
        typer.echo(f"exported {number_of(frames, 'frame')} to {output}")
        return
    export = RunExport(
        open_run(folder),
        output,
        kinds=[image.value for image in images],
        zarr_version=zarr_version,
        overwrite=overwrite,
    )
    with counting("planes", export.planes) as on_plane:
        done = export.write(on_plane)
    for name, reasons in done.empty.items():
        for why, number in reasons.items():
            typer.echo(f"image '{name}': {number_of(number, 'plane')} {why}", err=True)
    typer.echo(
        f"exported {number_of(len(done.images), 'image')} with "
        f"{number_of(export.planes, 'plane')} to {output}"
    )
    gone = [f"image '{name}'" for name in export.lost]
    gone += [number_of(done.gone, "plane")] if done.gone else []
    if gone:
        msg = (
            f"{', '.join(gone)} recorded and not exported: files are gone; which: "
            f"rtfocus check {folder}"
        )
        raise IncompleteError(msg)
