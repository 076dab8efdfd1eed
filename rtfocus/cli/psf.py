"""PSF, kernels and focus: the blur of a microscope, of an image, and over z.

``psf fit`` calibrates the optics by images of the microscope itself; ``kernels`` shows
what a network saw, tile by tile, as numbers and a picture; ``calibrate`` checks
autofocus against a z-stack through focus.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tifffile
import typer
from PIL import Image
from rich.console import Console

from rtfocus.autofocus.planes import (
    FEWEST_PLANES,
    FocusCalibration,
    PlaneComparison,
    ZPlane,
    calibrate_focus,
)
from rtfocus.autofocus.policy import load_calibration, save_calibration
from rtfocus.calibration.bead_fit import calibrate_from_beads
from rtfocus.calibration.pair_fit import calibrate_from_pairs
from rtfocus.calibration.pairs import read_pairs
from rtfocus.calibration.report import (
    FIGURES_NAME,
    REPORT_NAMES,
    Calibration,
    write_calibration,
)
from rtfocus.calibration.stack_fit import calibrate_from_stack, read_stack
from rtfocus.channel import OpticalSystem
from rtfocus.cli.commands import (
    ConfigArgument,
    ConfigOption,
    InputArgument,
    OneInput,
    OverwriteOption,
    SetOption,
    read_config,
    refuse_options,
)
from rtfocus.cli.display import passing_time, share_bar
from rtfocus.cli.endings import heeding, interruptible
from rtfocus.config import Config
from rtfocus.config.loading import with_engine
from rtfocus.drawing.figures import draw_through_focus
from rtfocus.errors import ConfigError, ExitCode, OutputError, number_of
from rtfocus.images.metadata import SOFTWARE, png_mark, written_by_rtfocus
from rtfocus.images.outputs import OutputGuard
from rtfocus.images.reading import companions, open_images
from rtfocus.images.series import ImageSeries
from rtfocus.offline import Kernels, extract_kernels
from rtfocus.report.pictures import draw_kernels

commands = typer.Typer(
    name="psf",
    help="Measure your microscope's PSF.\n\n[bold]Example:[/] rtfocus psf fit --help",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.add_typer(commands)
    app.command(cls=OneInput)(kernels)
    app.command()(calibrate)


@commands.callback()
def _group() -> None:
    """Keep ``fit`` a subcommand although it is the only one."""


@commands.command()
def fit(
    pairs: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="SHARP DEFOCUSED",
            help="Two files, or two folders with equal file names.",
        ),
    ] = None,
    stack: Annotated[
        Path | None, typer.Option(help="Z-stack of a flat specimen through focus.")
    ] = None,
    beads: Annotated[
        Path | None, typer.Option(help="Z-stack of small single beads.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for config and picture."),
    ] = Path("psf"),
    na: Annotated[float | None, typer.Option(help="Nominal NA.")] = None,
    wavelength_nm: Annotated[
        float | None, typer.Option(help="Emission wavelength.")
    ] = None,
    pixel_size_um: Annotated[
        float | None, typer.Option(help="In the specimen; default: as the files say.")
    ] = None,
    refractive_index: Annotated[
        float, typer.Option(help="Refractive index of the immersion.")
    ] = 1.0,
    config: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="Config with the nominal optics."),
    ] = None,
    channel: Annotated[
        str | None,
        typer.Option(
            help="Name of the channel, in both configs; default: the only one."
        ),
    ] = None,
    defocus_um: Annotated[
        float | None,
        typer.Option(help="Pairs: nominal defocus; positive: too far."),
    ] = None,
    exact_defocus: Annotated[
        bool,
        typer.Option(
            "--exact-defocus",
            help="Pairs: the nominal defocus is exact, so NA follows from it.",
        ),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Pairs: take only these; repeatable."),
    ] = None,
    most_pairs: Annotated[int, typer.Option(min=1, help="Pairs used at most.")] = 6,
    step_um: Annotated[
        float | None, typer.Option(help="Stacks: distance between planes.")
    ] = None,
    z_csv: Annotated[
        Path | None, typer.Option(help="Stacks: file with one z in um per plane.")
    ] = None,
    z_increases: Annotated[
        Literal["away", "nearer"],
        typer.Option(help="Stacks: from plane to plane, does the specimen go away?"),
    ] = "away",
    channel_index: Annotated[
        int, typer.Option(min=0, help="Stacks: which channel of the file.")
    ] = 0,
    bead_diameter_um: Annotated[
        float, typer.Option(min=0, help="Beads: their size; 0: points.")
    ] = 0.0,
    fixed_na: Annotated[
        bool, typer.Option("--fixed-na", help="Keep the nominal NA.")
    ] = False,
    astigmatism: Annotated[
        bool, typer.Option("--astigmatism", help="Fit astigmatism too: slower.")
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Fit NA, defocus and aberrations; write them as the optics of a config.

    [bold]Examples:[/]
    rtfocus psf fit --pairs sharp blurred --defocus-um 10 --na 0.5
    --wavelength-nm 451 --pixel-size-um 0.65 -o psf
    rtfocus psf fit --beads beads.tif --step-um 0.2 --config my.yaml -o psf
    """
    if sum(given is not None for given in (pairs, stack, beads)) != 1:
        msg = "give one of --pairs, --stack or --beads"
        raise ConfigError(msg)
    guard = OutputGuard([*(pairs or ()), stack, beads], overwrite=overwrite)
    guard.claim_report(output, FIGURES_NAME, REPORT_NAMES)
    of_pairs = {"--defocus-um": defocus_um, "--only": only}
    of_planes = {"--step-um": step_um, "--z-csv": z_csv}
    refuse_options(of_planes if pairs else of_pairs, "pairs and stacks have their own")
    stated = None
    if config is not None:
        of_config = {"--na": na, "--wavelength-nm": wavelength_nm}
        refuse_options(of_config, "the optics are those of --config")
        channel, stated = read_config(config, None).optics_of(channel)

    def nominal(pixel_um: float | None) -> OpticalSystem:
        return stated or _optics(na, wavelength_nm, pixel_um, refractive_index)

    free: Any = {"fit_aperture": not fixed_na, "fit_astigmatism": astigmatism}
    if pairs is not None:
        if not defocus_um:
            msg = "--pairs need their nominal defocus, not 0: --defocus-um"
            raise ConfigError(msg)
        read = read_pairs(*pairs, most=most_pairs, only=only or ("*",))
        with passing_time("fitting the optics to the pairs"):
            calibration = calibrate_from_pairs(
                read,
                nominal(pixel_size_um),
                nominal_defocus_um=defocus_um,
                defocus_is_exact=exact_defocus,
                **free,
            )
    else:
        planes = read_stack(
            stack or beads or Path(),
            z_csv=z_csv,
            step_um=step_um,
            channel=channel_index,
            descending=z_increases == "nearer",
        )
        start = nominal(pixel_size_um or planes.pixel_size_um)
        free |= {"bead_diameter_um": bead_diameter_um} if beads else {}
        calibrate = calibrate_from_beads if beads else calibrate_from_stack
        with passing_time("fitting the optics to the stack"):
            calibration = calibrate(planes, start, **free)
    with guard.report(output, FIGURES_NAME, REPORT_NAMES) as part:
        files = write_calibration(part, calibration, channel=channel or "default")
    _tell(calibration, [output / file.name for file in files])


def _optics(
    na: float | None, wavelength_nm: float | None, pixel_um: float | None, index: float
) -> OpticalSystem:
    """Return the optics that the options say; refuse to guess what they lack."""
    if not na or not wavelength_nm or not pixel_um:
        msg = (
            "the nominal optics are missing: give --na, --wavelength-nm and "
            "--pixel-size-um, or --config with the channel's optics"
        )
        raise ConfigError(msg)
    return OpticalSystem(na, wavelength_nm, pixel_um, refractive_index=index)


def _tell(calibration: Calibration, paths: list[Path]) -> None:
    """Say what was found, what is doubtful, and where it lies."""
    console = Console()
    console.print(calibration.statement, highlight=False)
    for warning in calibration.warnings:
        console.print(f"[yellow]doubtful:[/] {warning}", highlight=False)
    typer.echo("\n".join(map(str, paths)))


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
        str | None, typer.Option(help="Engine that finds the level of every tile.")
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
    settings = read_config(config, overrides)
    if classifier is not None:
        settings = with_engine(settings, "classifier", classifier)
    result = extract_kernels(settings, engine, pixels, channel=channel)
    with guard.whole(output) as part:
        _write(part, result, as_tiff=output.suffix != ".npz")
    with guard.whole(picture) as part:
        drawn = Image.fromarray(draw_kernels(pixels, result))
        drawn.save(part, format="png", pnginfo=png_mark())
    rows, columns, side, _ = result.kernels.shape
    typer.echo(
        f"{rows} x {columns} kernels of {side} px in {output}, drawn in {picture}"
    )


def _plane(
    path: Path, images: list[ImageSeries], number: int
) -> tuple[np.ndarray, str | None]:
    """Return one plane of a file and the name of its channel; None: it has none."""
    planes = [(series, index) for series in images for index in series.indices()]
    if number >= len(planes):
        there = number_of(len(planes), "plane")
        msg = f"'{path}' has {there}, the last is number {len(planes) - 1}"
        raise ConfigError(msg)
    series, index = planes[number]
    names = series.channel_names
    channel = names[index["c"]] if index["c"] < len(names) else None
    return series.read(**index), channel


def _write(output: Path, result: Kernels, *, as_tiff: bool) -> None:
    if as_tiff:
        side = result.kernels.shape[-1]
        pages = result.kernels.reshape(-1, side, side)
        tifffile.imwrite(output, pages, photometric="minisblack", software=SOFTWARE)
        return
    # By handle: a path without the ending would get one.
    with output.open("wb") as file:
        np.savez_compressed(
            file,
            kernels=result.kernels,
            defocus_um=result.defocus_um,
            own_px=result.own_px,
            written_by=np.array(SOFTWARE),
        )


_WAYS = {1: "towards the specimen", -1: "away from it", 0: "nobody knows where"}
"""What larger z does; an even PSF does not tell."""


def calibrate(
    config: ConfigArgument,
    overrides: SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File; default: autofocus.calibration of the config."
        ),
    ] = None,
    reach: Annotated[
        float, typer.Option(min=1.0, max=8.0, help="Depths of field to either side.")
    ] = 4.0,
    overwrite: OverwriteOption = False,
    step: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Depths of field between planes.")
    ] = 0.5,
) -> None:
    """Check autofocus against a z-stack through focus, up and down again.

    Writes a file for autofocus.calibration and a plot beside it. If the optics cannot
    be trusted, the exit code is 1; searches then look at both sides of focus.

    [bold]Example:[/] rtfocus calibrate my.yaml -o focus_20x.yaml
    """
    settings = read_config(config, overrides)
    path = output or settings.autofocus.calibration
    if path is None:
        msg = "where to? give --output FILE, or autofocus.calibration in the config"
        raise ConfigError(msg)
    guard = OutputGuard([Path(config)], overwrite=overwrite)
    _refuse_unmarked(path)
    guard.claim(path)
    picture = guard.claim(path.with_suffix(".png"))
    depths = _planes_asked(reach, step)
    # The one that is being made is not asked how far it can be trusted.
    focus, up = _through_focus(settings.changed("autofocus", calibration=None), depths)
    with guard.whole(path) as part:
        save_calibration(part, focus)
    with guard.whole(picture) as part:
        _draw(part, focus, up)
    play_um = focus.backlash_um
    typer.echo(
        f"focus at z {focus.focus_um:.2f} um, sharpest at {focus.sharpest_um:.2f}; "
        f"{100 * focus.unexplained:.1f} % unexplained; backlash {abs(play_um):.2f} um: "
        f"focus is at a {'lower' if play_um < 0 else 'higher'} z from above than from "
        f"below; levels read {focus.level_offset_um:+.2f} um + "
        f"{focus.level_scale:.2f} x distance; larger z leads {_WAYS[focus.direction]} "
        f"by the images, {_WAYS[focus.direction_of_core]} by Micro-Manager"
    )
    for problem in focus.problems:
        typer.echo(f"problem: {problem}")
    typer.echo(f"{path} (autofocus.calibration), {picture}")
    if not focus.trusted:
        raise typer.Exit(ExitCode.FAILED)


def _through_focus(
    config: Config, depths: np.ndarray
) -> tuple[FocusCalibration, list[ZPlane]]:
    """Take planes at depths of field about focus; return what they say and those up."""
    # The microscope is loaded for this command alone.
    from rtfocus.autofocus.devices import CoreStage
    from rtfocus.autofocus.policy import against_unknown_backlash
    from rtfocus.focusing import open_focuser
    from rtfocus.microscope.core import open_core

    with (
        interruptible() as (stop, _),
        open_core(config) as core,
        open_focuser(core, config, tell=typer.echo) as focuser,
    ):
        channel, stage = focuser.channel(), CoreStage(core)
        comparison = PlaneComparison(focuser.optics_of(channel), 0)
        unit = comparison.unit_um
        # The backlash is not known yet.
        focuser.config = against_unknown_backlash(focuser.config, unit)
        verdict = focuser.focus(is_canceled=stop.is_set)
        z_um = verdict.end_um + depths * unit
        with share_bar("planes") as bar:
            show = heeding(stop, bar)
            show(0.0)
            up = focuser.planes(z_um, unit, lambda share: show(share / 2))
            down = focuser.planes(z_um[::-1], -unit, lambda s: show((1 + s) / 2))
        focus = calibrate_focus(
            *(comparison, up, down),
            channel=channel,
            direction_of_core=focuser.direction(),
            not_found=None if verdict.focused else verdict.reason,
        )
        stage.go_to(focuser.limits_around(None).clip(focus.focus_um))
    return focus, up


def _refuse_unmarked(path: Path) -> None:
    """Say what to do with a calibration that does not say who wrote it."""
    with suppress(ConfigError):
        if path.is_file() and not written_by_rtfocus(path) and load_calibration(path):
            picture = path.with_suffix(".png")
            msg = (
                f"'{path}' is a calibration without the mark of rtfocus, as earlier "
                "versions wrote it: it is not replaced; move it away, and the "
                f"picture '{picture}', or give another --output"
            )
            raise OutputError(msg)


def _planes_asked(reach: float, step: float) -> np.ndarray:
    """Return the planes about focus, in depths of field; refuse too few of them."""
    planes = np.arange(-reach, reach + step / 2, step)
    if len(planes) < FEWEST_PLANES:
        msg = (
            f"--reach {reach:g} and --step {step:g} are {len(planes)} planes; take "
            f"{FEWEST_PLANES} or more: a larger --reach, or a smaller --step"
        )
        raise ConfigError(msg)
    return planes


def _draw(path: Path, calibration: FocusCalibration, planes: Sequence[ZPlane]) -> None:
    """Draw sharpness and the engine's reading over z."""
    z_um = np.array([plane.z_um for plane in planes]) - calibration.focus_um
    sharp = np.array([plane.sharpness for plane in planes])
    read_um = np.array([plane.reading.defocus_um for plane in planes], dtype=float)
    share = sharp / max(float(sharp.max()), 1e-12)
    draw_through_focus(z_um, share, np.abs(read_um)).save(path, png_mark())
