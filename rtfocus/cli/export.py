"""Export command: a run for other programs, or a checkpoint as an engine."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from rtfocus.cli.options import OverwriteOption
from rtfocus.cli.train import need_torch
from rtfocus.errors import ConfigError
from rtfocus.writers.header import HEADER_NAME


class ImageChoice(StrEnum):
    """Images of a run."""

    raw = "raw"
    restored = "restored"
    defocus = "defocus"


class VersionChoice(StrEnum):
    """Versions of OME-Zarr."""

    v05 = "0.5"
    v04 = "0.4"


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command()(export)


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
            help="Of a run, by its ending: .ome.tif, .ome.zarr, or a folder of "
            "OME-TIFFs. Of a checkpoint: the engine folder.",
        ),
    ],
    image: Annotated[
        list[ImageChoice] | None,
        typer.Option(help="Run: what to export; repeatable. Default: all it has."),
    ] = None,
    zarr_version: Annotated[
        VersionChoice, typer.Option(help="Run: version of an OME-Zarr.")
    ] = VersionChoice.v05,
    mean_with: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint: a second one of the network; export the mean of both."
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
            help="Checkpoint: files to write, fp32, fp16, int8, by commas. "
            "Default: fp32."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Export a run for other programs, or a checkpoint as an engine folder.

    A run becomes OME-TIFF or plain OME-Zarr, unsharded and with a
    pyramid.

    [bold]Example:[/] rtfocus export runs/day1.rtfocus -o day1.ome.tif

    rtfocus export checkpoints/delpnet/last.pt -o engines/delpnet
    """
    of_run = {"--image": image, "--zarr-version": zarr_version != VersionChoice.v05}
    of_engine = {
        "--mean-with": mean_with,
        "--half-weights": half_weights,
        "--precision": precision,
    }
    if (source / HEADER_NAME).is_file():
        _refuse(of_engine, f"'{source}' is a run")
        _export_run(source, output, image or [], zarr_version.value, overwrite)
        return
    if source.is_dir():
        msg = f"'{source}' is no run folder (no {HEADER_NAME}) and no checkpoint file"
        raise ConfigError(msg)
    _refuse(of_run, f"'{source}' is no run folder")
    need_torch()
    from rtfocus.training.api import export_command

    export_command(
        source,
        output,
        mean_with=mean_with,
        half_weights=half_weights,
        precision=precision or "fp32",
        overwrite=overwrite,
    )


def _refuse(options: dict[str, Any], because: str) -> None:
    """Refuse options that mean nothing here."""
    given = [name for name, value in options.items() if value]
    if given:
        msg = f"{', '.join(given)} cannot be used: {because}"
        raise ConfigError(msg)


def _export_run(
    folder: Path,
    output: Path,
    images: list[ImageChoice],
    zarr_version: Literal["0.5", "0.4"],
    overwrite: bool,
) -> None:
    from rtfocus.exports import RunExport
    from rtfocus.runs import open_run

    export = RunExport(
        open_run(folder),
        output,
        kinds=[image.value for image in images],
        zarr_version=zarr_version,
        overwrite=overwrite,
    )
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{len(export.images)} images", total=export.planes)
        done = export.write(lambda: bar.advance(task))
    for name, number in done.absent.items():
        typer.echo(f"image '{name}': {number} planes without a frame", err=True)
    typer.echo(
        f"exported {len(done.images)} images with {export.planes} planes to {output}"
    )
