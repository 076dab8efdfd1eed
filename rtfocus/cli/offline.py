"""Offline commands: ``restore`` and ``classify`` files as the live loop would."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TaskID

from rtfocus.cli.options import SetOption, read_config
from rtfocus.config import Config, parse_config
from rtfocus.errors import ConfigError, InputError
from rtfocus.frame import FrameResult
from rtfocus.images import ImageSeries, open_images, write_images
from rtfocus.images.stretching import stretch_histogram
from rtfocus.images.writing import OutputImage
from rtfocus.processing.engines.registry import find_engine
from rtfocus.processing.methods import METHODS
from rtfocus.processing.offline import ImageProcessor, tile_rows
from rtfocus.writers.completion import complete_restoration, count_unrestored
from rtfocus.writers.header import read_header
from rtfocus.writers.naming import SUFFIX

InputArgument = Annotated[
    Path,
    typer.Argument(
        metavar="INPUT",
        help="TIFF, OME-TIFF, PNG, JPEG, OME-Zarr, run folder, or a folder of images.",
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="CONFIG",
        help="Optics, camera and engines; default: those the classifier was made for.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(restore)
    app.command()(classify)


def restore(
    path: InputArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="By its ending: .tif / .ome.tif, .ome.zarr, or a folder of TIFFs. "
            "Not needed for a run folder, whose unrestored frames are then completed.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="wiener, richardson_lucy, richardson_lucy_accelerated, or a restorer "
            "or joint engine by name."
        ),
    ] = None,
    stretch: Annotated[
        bool,
        typer.Option(
            help="Spread each restored plane over 0 to 255, for viewing; 8-bit output."
        ),
    ] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Restore images, plane by plane, on the code path of the live loop.

    [bold]Example:[/] rtfocus restore blurred.tif -o sharp.ome.zarr --engine wiener
    """
    settings = _settings(path, config, overrides)
    if engine is not None:
        settings = _restoring_with(settings, engine, whole=config is None)
    if output is None:
        if stretch:
            msg = "--stretch is for viewing, a run keeps its counts; give --output"
            raise ConfigError(msg)
        _complete(path, settings)
        return
    images = _open(path)
    _refuse_input_as_output(output, path, images)
    dtype: np.dtype[np.generic] | None = None
    if stretch:
        dtype = np.dtype("u1")
    elif settings.store.restored_dtype == "float32":
        dtype = np.dtype("<f4")
    with (
        _progress(sum(map(len, images))) as (progress, task),
        ImageProcessor(settings) as processor,
    ):
        outputs = [
            OutputImage(
                like=series,
                dtype=dtype or series.dtype,
                planes=map(
                    stretch_histogram if stretch else np.asarray,
                    _restored(processor, series, progress, task),
                ),
            )
            for series in images
        ]
        written = write_images(output, outputs)
    typer.echo(f"restored {sum(map(len, images))} planes to {_few(written)}")


def classify(
    path: InputArgument,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the full result here.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Classifier engine.")] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Estimate the defocus of images, tile by tile.

    [bold]Example:[/] rtfocus classify stack.tif --json defocus.json
    """
    settings = _settings(path, config, overrides)
    if engine is not None:
        settings = _with(settings, "classifier", engine)
    images = _open(path)
    found: list[dict[str, Any]] = []
    with (
        _progress(sum(map(len, images))) as (progress, task),
        ImageProcessor(settings) as processor,
    ):
        for series in images:
            for index in series.indices():
                pixels = series.read(**index)
                result = processor.classify(pixels, channel=_channel(series, index))
                found.append(_described(series, index, result))
                progress.advance(task)
    name = settings.processing.classifier
    if json_file is not None:
        text = json.dumps({"engine": name, "images": found}, indent=1, allow_nan=False)
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(text, "utf-8")
        typer.echo(f"classified {len(found)} planes to {json_file}")
        return
    for image in found:
        typer.echo(f"{_place(image)}: {_in_words(image['estimate'])}")


def _refuse_input_as_output(
    output: Path, path: Path, images: list[ImageSeries]
) -> None:
    """Never replace what is being restored: it cannot be acquired again."""
    if output.resolve() in {p.resolve() for p in (path, *(i.path for i in images))}:
        msg = f"'{output}' is the input itself; choose another output"
        raise InputError(msg)


def _complete(run: Path, settings: Config) -> None:
    """Restore the frames of a run folder that were recorded raw only."""
    if not _is_run(run):
        msg = f"'{run}' is no run folder; say where to write with --output"
        raise ConfigError(msg)
    with (
        _progress(count_unrestored(run)) as (progress, task),
        ImageProcessor(settings) as processor,
    ):
        number = complete_restoration(
            run,
            lambda pixels, channel: processor.restore(pixels, channel=channel),
            on_frame=lambda: progress.advance(task),
        )
    typer.echo(f"restored {number} frames of {run} that were recorded raw only")


def _settings(path: Path, config: str | None, overrides: list[str] | None) -> Config:
    """Return the config that is given, that of a run folder, or the defaults."""
    if config is not None:
        return read_config(config, overrides)
    if overrides:
        msg = "--set changes a config; give one with --config"
        raise ConfigError(msg)
    if _is_run(path):
        header = read_header(path)
        return parse_config(header.provenance["config"], origin=str(path))
    return Config()


def _restoring_with(settings: Config, engine: str, *, whole: bool) -> Config:
    """Return `settings` with one restoration for all channels.

    A joint engine also says what is out of focus, if `whole`: one pass less, and
    nobody has named a classifier.
    """
    method = settings.processing.restoration.model_copy(update={"method": engine})
    settings = _with(settings, "restoration", method.model_dump())
    if not whole or engine in (*METHODS, "none"):
        return settings
    found = find_engine(engine, settings.processing.engine_folders)
    return _with(settings, "classifier", engine) if found.kind == "joint" else settings


def _with(settings: Config, key: str, value: object) -> Config:
    """Return `settings` with one engine for all channels."""
    data = settings.model_dump()
    data["processing"][key] = value
    for channel in data["channels"]:
        channel[key] = None
    return parse_config(data)


def _open(path: Path) -> list[ImageSeries]:
    """Open images; of a run folder only what the camera saw."""
    return open_images(path / "raw.ome.zarr" if _is_run(path) else path)


def _is_run(path: Path) -> bool:
    return path.suffix == SUFFIX and path.is_dir()


@contextmanager
def _progress(total: int) -> Iterator[tuple[Progress, TaskID]]:
    """Show a bar over all planes, on standard error."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield progress, progress.add_task("planes", total=total)


def _restored(
    processor: ImageProcessor, series: ImageSeries, progress: Progress, task: TaskID
) -> Iterator[NDArray[np.generic]]:
    """Yield the restored planes of a series in the order they are written."""
    for index in series.indices():
        pixels = series.read(**index)
        result = processor.restore(pixels, channel=_channel(series, index))
        progress.advance(task)
        if result.restored is None:
            msg = f"'{series.path}': plane {index} was not restored"
            raise ConfigError(msg)
        yield result.restored


def _channel(series: ImageSeries, index: dict[str, int]) -> str:
    """Return the channel's name, by which the config finds its optics."""
    names = series.channel_names
    return names[index["c"]] if index["c"] < len(names) else "default"


def _described(
    series: ImageSeries, index: dict[str, int], result: FrameResult
) -> dict[str, Any]:
    estimate = result.estimate
    described = None
    if estimate is not None:
        described = {
            "level": estimate.level,
            "defocus_um": estimate.defocus_um,
            "signed": estimate.signed,
            "confidence": estimate.confidence,
        }
    return {
        "path": str(series.path),
        "name": series.name,
        "index": index,
        "shape": list(series.shape),
        "estimate": described,
        "tiles": tile_rows(result),
    }


def _place(image: dict[str, Any]) -> str:
    index = " ".join(f"{axis}{n}" for axis, n in image["index"].items())
    return f"{image['path']} ({image['name']} {index})"


def _in_words(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "no estimate"
    if estimate["level"] is None:
        return "background"
    sign = "" if estimate["signed"] else "+-"
    confidence = 100 * estimate["confidence"]
    return (
        f"level {estimate['level']}, {sign}{estimate['defocus_um']:.1f} um "
        f"({confidence:.0f} %)"
    )


def _few(paths: list[Path]) -> str:
    return (
        str(paths[0]) if len(paths) == 1 else f"{len(paths)} files in {paths[0].parent}"
    )
