"""Kernels command: what blur a network saw, tile by tile, as numbers and a picture."""

from pathlib import Path
from typing import Annotated

import numpy as np
import tifffile
import typer
from PIL import Image

from rtfocus.cli.offline import ConfigOption, InputArgument
from rtfocus.cli.options import OverwriteOption, SetOption, read_config
from rtfocus.config import Config, parse_config
from rtfocus.errors import ConfigError
from rtfocus.images.outputs import OutputGuard, companions
from rtfocus.images.provenance import SOFTWARE, png_mark
from rtfocus.images.reading import open_images
from rtfocus.images.series import ImageSeries
from rtfocus.processing.offline import KernelExtractor, Kernels, draw_kernels


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(kernels)


def kernels(
    path: InputArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help=".npz, or .tif with one page per tile; a .png of the same name "
            "shows the kernels over the image.",
        ),
    ],
    engine: Annotated[
        str, typer.Option(help="Engine with a kernel output.")
    ] = "wei_unet",
    classifier: Annotated[
        str | None, typer.Option(help="Engine that tells it the level of every tile.")
    ] = None,
    plane: Annotated[
        int, typer.Option(min=0, help="Which plane of the input, in file order.")
    ] = 0,
    config: ConfigOption = None,
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Extract the blur kernel of every tile of an image.

    [bold]Example:[/] rtfocus kernels blurred.tif -o kernels.npz
    """
    if output.suffix not in (".npz", ".tif", ".tiff"):
        msg = f"'{output}' is no .npz and no .tif; choose one of them"
        raise ConfigError(msg)
    picture = output.with_suffix(".png")
    series = open_images(path)
    guard = OutputGuard([path, *companions(series)], overwrite=overwrite)
    guard.claim(output)
    guard.claim(picture)
    pixels, channel = _plane(path, series, plane)
    settings = _settings(config, overrides, classifier)
    with KernelExtractor(settings, engine) as extractor:
        found = extractor.extract(pixels, channel=channel)
    with guard.whole(output) as part:
        _write(part, found, as_tiff=output.suffix != ".npz")
    with guard.whole(picture) as part:
        drawn = Image.fromarray(draw_kernels(pixels, found))
        drawn.save(part, format="png", pnginfo=png_mark())
    rows, columns, side, _ = found.kernels.shape
    typer.echo(
        f"{rows} x {columns} kernels of {side} px in {output}, drawn in {picture}"
    )


def _settings(
    config: str | None, overrides: list[str] | None, classifier: str | None
) -> Config:
    if config is None and overrides:
        msg = "--set changes a config; give one with --config"
        raise ConfigError(msg)
    settings = Config() if config is None else read_config(config, overrides)
    if classifier is None:
        return settings
    data = settings.model_dump()
    data["processing"]["classifier"] = classifier
    for channel in data["channels"]:
        channel["classifier"] = None
    return parse_config(data)


def _plane(
    path: Path, images: list[ImageSeries], number: int
) -> tuple[np.ndarray, str]:
    """Return one plane of a file and the name of its channel."""
    planes = [(series, index) for series in images for index in series.indices()]
    if number >= len(planes):
        msg = f"'{path}' has {len(planes)} planes, the last is number {len(planes) - 1}"
        raise ConfigError(msg)
    series, index = planes[number]
    names = series.channel_names
    channel = names[index["c"]] if index["c"] < len(names) else "default"
    return series.read(**index), channel


def _write(output: Path, found: Kernels, *, as_tiff: bool) -> None:
    if as_tiff:
        side = found.kernels.shape[-1]
        pages = found.kernels.reshape(-1, side, side)
        tifffile.imwrite(output, pages, photometric="minisblack", software=SOFTWARE)
        return
    # By handle: a path without the ending would get one.
    with output.open("wb") as file:
        np.savez_compressed(
            file,
            kernels=found.kernels,
            defocus_um=found.defocus_um,
            own_px=found.own_px,
            written_by=np.array(SOFTWARE),
        )
