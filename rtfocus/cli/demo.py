"""Demo command: the virtual microscope through the whole loop, with a picture."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from scipy.ndimage import map_coordinates

from rtfocus import app as loop
from rtfocus.channel import OpticalSystem
from rtfocus.cli.display import display, processor_rows
from rtfocus.cli.interrupt import interruptible
from rtfocus.cli.options import QuietOption, SetOption, read_config
from rtfocus.cli.report import print_report
from rtfocus.config import Config
from rtfocus.config.microscope import VirtualMicroscopeConfig
from rtfocus.drawing.panels import Panel, enlarge, save_panels
from rtfocus.errors import ConfigError
from rtfocus.evaluation.scores import match_intensity, pearson, psnr
from rtfocus.frame import TileGrid
from rtfocus.images.reading import open_images
from rtfocus.microscope.virtual.specimen import Truth, VirtualSpecimen
from rtfocus.monitor import Monitor
from rtfocus.writers.header import read_header

PICTURE_NAME = "picture.png"


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(demo)


def demo(
    folder: Annotated[
        Path, typer.Option("--folder", help="Where the run folder is made.")
    ] = Path("runs"),
    overrides: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Show the whole loop without a microscope: stores, report and a picture.

    A virtual microscope with a tilted specimen runs in Micro-Manager's core; its
    frames go over ZeroMQ to the processor like any other.

    [bold]Example:[/] rtfocus demo --folder runs
    """
    settings = read_config("demo", [f"run.folder={folder}", *(overrides or ())])
    monitors: list[Monitor] = []
    with (
        interruptible() as (stop, abandon),
        display(
            lambda: processor_rows(monitors[-1] if monitors else None), quiet=quiet
        ),
    ):
        run = loop.run(settings, stop=stop, abandon=abandon, on_monitor=monitors.append)
    if run is None:
        return
    outcome = print_report(run)
    _compare(settings, run, monitors[-1])
    raise typer.Exit(outcome.exit_code)


def _compare(settings: Config, run: Path, monitor: Monitor) -> None:
    """Set the run beside the truth: a picture, and two figures."""
    microscope, optics = settings.microscope, settings.channels[0].optics
    if not isinstance(microscope, VirtualMicroscopeConfig) or optics is None:
        msg = (
            "the demo's config must have a virtual microscope and the channel's optics"
        )
        raise ConfigError(msg)
    estimate = monitor.estimate
    z_um = 0.0 if estimate is None or estimate.z_um is None else estimate.z_um
    specimen = VirtualSpecimen(microscope, microscope.optics or optics)
    truth = specimen.truth(z_um)
    raw, restored, defocus = (
        open_images(run / f"{name}.ome.zarr")[0]
        for name in ("raw", "restored", "defocus")
    )
    last = raw.sizes["t"] - 1
    shown = [series.read(t=last) for series in (raw, restored, defocus)]
    _save_picture(run, shown, truth, optics.pixel_size_um)
    Console().print(_figures(shown, truth, optics))
    Console().print(f"picture: {run / PICTURE_NAME}")


def _save_picture(
    run: Path, shown: list[NDArray[Any]], truth: Truth, pixel_um: float
) -> None:
    raw, restored, defocus = shown
    sharp = match_intensity(raw, truth.sharp)
    low, high = (float(value) for value in np.percentile(sharp, (1, 99.8)))
    grid = read_header(run).grid
    assert grid is not None, "the demo has maps"
    found = _on_frame(np.abs(defocus), grid, raw.shape)
    distance = np.abs(truth.defocus_um)
    # The farthest of both: no value lies beyond the colours.
    far = float(
        np.nanmax([found.max(initial=0, where=~np.isnan(found)), distance.max()])
    )
    images = [("raw", raw), ("restored", restored), ("truth", sharp)]
    maps = [("distance from focus, found", found), ("true", distance)]
    save_panels(
        run / PICTURE_NAME,
        [
            *(
                Panel(name, image, low, high, pixel_um=pixel_um)
                for name, image in images
            ),
            *(Panel(name, um, 0.0, far, "um", "even", pixel_um) for name, um in maps),
            Panel(
                "detail: raw on the left, restored on the right",
                np.hstack([_detail(raw), _detail(restored)]),
                low,
                high,
                pixel_um=pixel_um / 3,
            ),
        ],
        columns=3,
    )


def _on_frame(
    values: NDArray[np.floating[Any]], grid: TileGrid, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Return a tile map over the pixels of its frame, evenly between tile centres.

    Tiles overlap by half, so that the defocus of a pixel between two centres is told
    by both. Background stays background.
    """
    places = [
        np.clip((np.arange(length) - grid.origin_px) / grid.stride_px, 0, count - 1)
        for length, count in zip(shape, values.shape, strict=True)
    ]
    where = np.meshgrid(*places, indexing="ij")
    known = ~np.isnan(values)
    total = map_coordinates(np.where(known, values, 0.0), where, order=1)
    weight = map_coordinates(known.astype(np.float64), where, order=1)
    return np.where(weight >= 0.5, total / np.maximum(weight, 1e-9), np.nan)


def _detail(image: NDArray[np.generic]) -> NDArray[np.generic]:
    """Cut a piece near the right edge, where defocus is largest, enlarged 3 times."""
    height, width = image.shape[0], image.shape[1]
    rows, columns = height // 3, width // 6
    piece = image[rows : 2 * rows, width - columns - width // 8 :][:, :columns]
    return enlarge(piece, (height, width // 2))


def _figures(shown: list[NDArray[Any]], truth: Truth, optics: OpticalSystem) -> str:
    """Say how far raw and restored are from the truth, and the map from the surface."""
    raw, restored, defocus = shown
    sharp = match_intensity(raw, truth.sharp)
    span = float(np.ptp(sharp))
    before, after = (
        psnr(sharp, match_intensity(sharp, image), data_range=span)
        for image in (raw, restored)
    )
    found = np.abs(np.asarray(enlarge(defocus, truth.defocus_um.shape), np.float64))
    tissue = ~np.isnan(found)
    true = np.abs(truth.defocus_um)[tissue]
    error = float(np.mean(np.abs(found[tissue] - true)))
    return (
        f"restored {after:.1f} dB against raw {before:.1f} dB (PSNR to the truth after "
        f"matching gain and offset, range {span:.0f} counts); defocus map against "
        f"the surface: correlation {pearson(true, found[tissue]):.2f}, mean error "
        f"{error:.1f} um (depth of field {optics.defocus_unit_um:.1f} um)"
    )
