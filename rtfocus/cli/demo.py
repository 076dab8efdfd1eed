"""Demo command: the virtual microscope through the whole loop, with a picture."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from rtfocus import app as loop
from rtfocus.channel import OpticalSystem
from rtfocus.cli.commands import QuietOption, SetOption, read_config
from rtfocus.cli.display import display_run
from rtfocus.cli.endings import interruptible
from rtfocus.cli.runs import ReportConsole, print_report
from rtfocus.config import Config
from rtfocus.config.sections import VirtualMicroscopeConfig
from rtfocus.drawing.canvas import (
    BLUE,
    FAINT,
    GREEN,
    ORANGE,
    Box,
    Canvas,
    PixelCanvas,
    enlarge,
)
from rtfocus.drawing.figures import (
    Axis,
    Chart,
    Panel,
    axis_of,
    draw_panels,
    figure_size,
)
from rtfocus.errors import ConfigError
from rtfocus.evaluation.scores import match_intensity, pearson, psnr
from rtfocus.frame import Role, TileGrid
from rtfocus.images.reading import open_images
from rtfocus.microscope.virtual_specimen import Truth, VirtualSpecimen
from rtfocus.writers.header import JOURNAL_NAME, read_header

PICTURE_NAME = "picture.png"
_COLUMNS, _SIDE_PT, _TRACE_PT = 3, 256.0, 220.0


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

    A virtual microscope with a tilted, drifting specimen runs in Micro-Manager's core.
    Its frames go over ZeroMQ to the processor like any other, and rtfocus holds the
    left edge in focus. An earlier demo is replaced, no other run.

    [bold]Example:[/] rtfocus demo --folder runs
    """
    changes = [f"run.folder={folder}", *(overrides or ())]
    settings = read_config("demo", changes)
    # Of all runs demos alone have a picture.
    if (settings.run.folder / f"{settings.run.name}.rtfocus" / PICTURE_NAME).is_file():
        settings = read_config("demo", ["store.overwrite=true", *changes])
    with (
        interruptible() as (stop, abandon),
        display_run(quiet=quiet) as on_monitor,
    ):
        run = loop.run(settings, stop=stop, abandon=abandon, on_monitor=on_monitor)
    if run is None:
        return
    outcome = print_report(run)
    _compare(settings, run)
    raise typer.Exit(outcome.exit_code)


def _compare(settings: Config, run: Path) -> None:
    """Set the run beside the truth: a picture, and some figures."""
    microscope, optics = settings.microscope, settings.channels[0].optics
    if not isinstance(microscope, VirtualMicroscopeConfig) or optics is None:
        msg = (
            "the demo's config must have a virtual microscope and the channel's optics"
        )
        raise ConfigError(msg)
    specimen = VirtualSpecimen(microscope, microscope.optics or optics)
    trace = Trace.of(run, specimen, settings.autofocus.region)
    raw, restored, defocus = (
        open_images(run / f"{name}.ome.zarr")[0]
        for name in ("raw", "restored", "defocus")
    )
    last = raw.sizes["t"] - 1
    images = [series.read(t=last) for series in (raw, restored, defocus)]
    truth = specimen.truth(float(trace.z_um[-1]), time_s=float(trace.seconds[-1]))
    _save_picture(run, images, truth, trace, optics)
    console = ReportConsole()
    console.print(_figures(images, truth, optics))
    console.print(trace.in_words(optics))
    console.print(f"picture: {run / PICTURE_NAME}")


@dataclass(frozen=True)
class Trace:
    """How far from focus every frame truly was, and would have been without hold."""

    seconds: NDArray[np.float64]
    """Since the first exposure; the drift began there."""
    z_um: NDArray[np.float64]
    """Of the stage."""
    held_um: NDArray[np.float64]
    """Defocus of the region that is held."""
    alone_um: NDArray[np.float64]
    """The same, had the stage stayed where the first frame found it."""
    moves: NDArray[np.float64]
    """When the stage was sent elsewhere, in seconds."""

    @classmethod
    def of(
        cls,
        run: Path,
        specimen: VirtualSpecimen,
        region: tuple[int, int, int, int] | None,
    ) -> "Trace":
        """Read it off a run's journal and the specimen's true surface."""
        text = (run / JOURNAL_NAME).read_text("utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        lines = [line for line in lines if line.get("z_um") is not None]
        begun_s = [
            line["captured_ns"] / 1e9 - line["exposure_ms"] / 1e3 for line in lines
        ]
        first_s = min(begun_s)
        pairs = [
            (time_s - first_s, line["z_um"])
            for time_s, line in zip(begun_s, lines, strict=True)
            if line["role"] != Role.FOCUS
        ]
        seconds, z_um = np.array(sorted(pairs)).T
        x, y, width, height = region or (0, 0, *reversed(specimen.shape))
        surface = [
            float(
                specimen.defocus_um(0.0, time_s=s)[y : y + height, x : x + width].mean()
            )
            for s in seconds
        ]
        moved = np.flatnonzero(np.diff(z_um)) + 1
        return cls(
            seconds,
            z_um,
            np.array(surface) - z_um,
            np.array(surface) - z_um[0],
            seconds[moved],
        )

    def draw(self, canvas: Canvas, box: Box, half_um: float) -> None:
        """Draw both over time, with the band of half a depth of field."""
        x = Axis("time since the first exposure (s)", 0.0, float(self.seconds[-1]))
        # Between two frames the specimen drifts on, then the stage steps.
        moved = np.searchsorted(self.seconds, self.moves)
        steps_um = self.z_um[moved] - self.z_um[moved - 1]
        seconds = np.insert(self.seconds, moved, self.moves)
        held_um = np.insert(self.held_um, moved, self.held_um[moved] + steps_um)
        values = (held_um, self.alone_um, [-half_um, half_um])
        name = "defocus where held (um)"
        chart = Chart(canvas, box, x, axis_of(name, *values, zero=True))
        chart.level(0.0, dash=0)
        for edge in (-half_um, half_um):
            chart.level(edge)
        chart.curve(self.seconds, self.alone_um, ORANGE, "had the stage stood still")
        chart.curve(seconds, held_um, BLUE, "held by rtfocus")
        chart.dots(self.moves, self.held_um[moved], GREEN, "moves")
        chart.name("half a depth of field", FAINT)

    def in_words(self, optics: OpticalSystem) -> str:
        """Say how far from focus the frames were on average and at most."""
        unit = optics.defocus_unit_um
        held, alone = np.abs(self.held_um), np.abs(self.alone_um)
        return (
            f"focus held within {held.max():.1f} um, {held.mean():.1f} um on average "
            f"({held.mean() / unit:.2f} depths of field) with {len(self.moves)} moves; "
            f"had the stage stood still: {alone.max():.1f} um in the end"
        )


def _save_picture(
    run: Path,
    shown: list[NDArray[Any]],
    truth: Truth,
    trace: Trace,
    optics: OpticalSystem,
) -> None:
    raw, restored, defocus = shown
    pixel_um = optics.pixel_size_um
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
    images = [("raw", raw), ("restored", restored), ("the specimen itself", sharp)]
    maps = [
        ("distance from focus, found", found),
        ("distance from focus, true", distance),
    ]
    panels = [
        *(Panel(name, image, low, high, pixel_um=pixel_um) for name, image in images),
        *(Panel(name, um, 0.0, far, "um", "even", pixel_um) for name, um in maps),
        Panel(
            "detail: raw on the left, restored on the right",
            np.hstack([_detail(raw), _detail(restored)]),
            low,
            high,
            pixel_um=pixel_um / 3,
        ),
    ]
    width, height = figure_size(panels, _COLUMNS, _SIDE_PT)
    canvas = PixelCanvas(width, height + _TRACE_PT)
    draw_panels(canvas, panels, columns=_COLUMNS, side_pt=_SIDE_PT)
    box = (70.0, height + 24.0, width - 20.0, height + _TRACE_PT - 44.0)
    trace.draw(canvas, box, optics.defocus_unit_um / 2)
    canvas.save(run / PICTURE_NAME)


def _on_frame(
    values: NDArray[np.floating[Any]], grid: TileGrid, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Return a tile map over the pixels of its frame, evenly between tile centres.

    Tiles overlap by half, so that the defocus of a pixel between two centres is shown
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


def _figures(images: list[NDArray[Any]], truth: Truth, optics: OpticalSystem) -> str:
    """Say how far raw and restored are from the truth, and the map from the surface."""
    raw, restored, defocus = images
    sharp = match_intensity(raw, truth.sharp)
    span = float(np.ptp(sharp))
    before, after = (
        psnr(sharp, match_intensity(sharp, image), data_range=span)
        for image in (raw, restored)
    )
    distance = np.abs(np.asarray(enlarge(defocus, truth.defocus_um.shape), np.float64))
    tissue = ~np.isnan(distance)
    true = np.abs(truth.defocus_um)[tissue]
    error = float(np.mean(np.abs(distance[tissue] - true)))
    return (
        f"restored {after:.1f} dB against raw {before:.1f} dB (PSNR to the truth after "
        f"matching gain and offset, range {span:.0f} counts); defocus map against "
        f"the surface: correlation {pearson(true, distance[tissue]):.2f}, mean error "
        f"{error:.1f} um (depth of field {optics.defocus_unit_um:.1f} um)"
    )
