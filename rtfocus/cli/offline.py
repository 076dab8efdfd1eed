"""Offline commands: ``restore`` and ``classify`` files as the live loop would."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from rtfocus.batch.ends import ErrorMaps
from rtfocus.batch.findings import Findings, find_in, texts_of
from rtfocus.batch.plan import BatchJob, Command, content_of
from rtfocus.batch.scheduler import WORKERS_S
from rtfocus.cli.batch import (
    FinishOption,
    InitOption,
    Many,
    ResourcesOption,
    SchedulerOption,
    UnitOption,
    WaitOption,
    files_of_many,
    named,
    notes_of,
    refuse_with_many,
    run_batch,
)
from rtfocus.cli.commands import (
    ConfigOption,
    InputArgument,
    OneInput,
    OverwriteOption,
    SetOption,
    read_config,
)
from rtfocus.cli.display import counting, told_of
from rtfocus.config import Config, parse_config
from rtfocus.config.loading import overridden, restoring_in, with_engine
from rtfocus.errors import ConfigError, IncompleteError, InputError, number_of
from rtfocus.frame import FrameResult
from rtfocus.image_set import ImageSet, restoring_with
from rtfocus.images.metadata import OutputImage
from rtfocus.images.optics import StatedOptics, stated_optics
from rtfocus.images.outputs import STANDARD_OUTPUT, ImageOutput, OutputGuard
from rtfocus.images.reading import (
    BrokenImage,
    FoundImages,
    companions,
    find_images,
    stretch_histogram,
)
from rtfocus.offline import ImageProcessor
from rtfocus.report.pictures import SideBySide
from rtfocus.writers.finish import complete_restoration, count_unrestored
from rtfocus.writers.folder import SUFFIX
from rtfocus.writers.header import read_header

OpticsOption = Annotated[
    str | None,
    typer.Option(
        "--optics",
        metavar="OPTICS",
        help="NA=, wavelength= (nm) and pixel= (um), separated by commas, or a file of "
        "[bold]rtfocus psf fit[/]; what you leave out comes from the image file.",
    ),
]
PictureOption = Annotated[
    Path | None,
    typer.Option(
        "--picture",
        metavar="FILE.png",
        help="Draw the first plane of up to four images, with the result, as a PNG.",
    ),
]
ErrorOption = Annotated[
    Path | None,
    typer.Option(
        "--expected-error",
        metavar="OUTPUT",
        help="Also write the error expected to be left, in counts: a float32 pixel per "
        "tile, named as --output. Only rtfocus-2, blind, in one orientation.",
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Write the full result; - is standard output."),
]
CsvOption = Annotated[
    Path | None,
    typer.Option(
        "--csv",
        metavar="FILE.csv",
        help="Write a table, a row per plane; - is standard output.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command(cls=OneInput)(restore)
    app.command(cls=OneInput)(classify)


def restore(
    path: InputArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="What to write, by its ending: .tif, .ome.tif, .ome.zarr, none for a "
            "folder of TIFFs. Without it, a run folder gets its unrestored frames.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Built-in method, such as wiener or richardson_lucy, or an engine "
            "that restores. Default: wiener, or rtfocus-2 if the optics are unknown."
        ),
    ] = None,
    orientations: Annotated[
        int | None,
        typer.Option(
            metavar="[1|2|4|8]",
            help="Networks: restore so many turned and mirrored copies and take their "
            "mean; better, and as many times slower.",
        ),
    ] = None,
    optics: OpticsOption = None,
    stretch: Annotated[
        bool,
        typer.Option(
            help="Spread each restored plane over 0 to 255, for viewing; 8-bit output."
        ),
    ] = False,
    picture: PictureOption = None,
    expected_error: ErrorOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
    scheduler: SchedulerOption = None,
    resources: ResourcesOption = None,
    wait_workers: WaitOption = WORKERS_S,
    init: InitOption = False,
    unit: UnitOption = None,
    finish: FinishOption = False,
) -> None:
    """Restore what is out of focus in image files, as a live run does.

    Plane by plane; what is in focus stays as it is.

    [bold]Example:[/] rtfocus restore blurred.tif -o sharp.ome.zarr
    --optics NA=0.75,wavelength=520,pixel=0.325
    """
    settings = _settings(path, config, overrides)
    if engine is not None:
        whole = not _names(config, overrides, "classifier")
        settings = restoring_with(settings, engine, whole=whole)
    if orientations is not None:
        settings = restoring_in(settings, orientations)
    if output is None:
        given = {"--stretch": stretch or None, "--picture": picture}
        _restore_run(path, settings, {**given, "--expected-error": expected_error})
        return
    is_named = _names(config, overrides, "classifier", "restoration", ".method")
    free_choice = engine is None and not is_named and not _is_run(path)
    many = Many(scheduler, resources, wait_workers, init, unit, finish)
    if many.is_asked_for:
        refuse_with_many("--picture", picture)
        job = _job("restore", path, output, settings, optics)
        errors = None if expected_error is None else os.path.abspath(expected_error)
        job = msgspec.structs.replace(
            job, free_choice=free_choice, stretch=stretch, expected_error=errors
        )
        run_batch(job, many, overwrite=overwrite)
        return
    found = find_images(path)
    as_found = _contents(found)
    guard = _guard(path, found, overwrite)
    place = ImageOutput(output, found.series, guard, path)
    maps = ErrorMaps(expected_error, found.series, guard, path)
    picture_of = SideBySide(guard, picture)
    images = ImageSet(
        settings,
        found.series,
        stated=_stated_optics(optics),
        free_choice=free_choice,
        states_error=expected_error is not None,
    )
    _tell(notes_of(found, images))
    with counting("planes", sum(map(len, found.series))) as on_plane, images:
        outputs = [
            _output(images, number, stretch, picture_of, maps, on_plane)
            for number in range(len(found.series))
        ]
        broken = place.write(outputs)
        maps.write(images)
    _tell(images.doubts())
    _tell_picture(picture_of.save())
    _tell([] if expected_error is None else [f"expected error: {expected_error}"])
    _say_restored(place, found, broken)
    _refuse_changed(found, as_found)


def classify(
    path: InputArgument,
    json_file: JsonOption = None,
    csv_file: CsvOption = None,
    engine: Annotated[str | None, typer.Option(help="Engine that finds it.")] = None,
    optics: OpticsOption = None,
    picture: PictureOption = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
    scheduler: SchedulerOption = None,
    resources: ResourcesOption = None,
    wait_workers: WaitOption = WORKERS_S,
    init: InitOption = False,
    unit: UnitOption = None,
    finish: FinishOption = False,
) -> None:
    """Find the defocus of images, tile by tile.

    [bold]Example:[/] rtfocus classify stack.tif --json defocus.json

    rtfocus classify plate.ome.zarr --csv planes.csv
    """
    settings = _settings(path, config, overrides)
    settings = settings.without_restoration()
    if engine is not None:
        settings = with_engine(settings, "classifier", engine)
    many = Many(scheduler, resources, wait_workers, init, unit, finish)
    if many.is_asked_for:
        refuse_with_many("--picture", picture)
        target, table = files_of_many(json_file, csv_file)
        job = _job("classify", path, target, settings, optics)
        job = msgspec.structs.replace(job, table=table)
        run_batch(job, many, overwrite=overwrite)
        return
    found = find_images(path)
    as_found = _contents(found)
    guard = _guard(path, found, overwrite)
    texts = texts_of(json_file, csv_file)
    for target, kind in texts:
        guard.claim_text(target, kind)
    picture_of = SideBySide(guard, picture)
    images = ImageSet(settings, found.series, stated=_stated_optics(optics))
    _tell(notes_of(found, images))
    with counting("planes", sum(map(len, found.series))) as on_plane, images:
        tiles = json_file is not None
        findings, lost = _classify_all(images, picture_of, on_plane, tiles=tiles)
    _tell(images.doubts())
    broken = [*found.broken, *lost]
    _tell_picture(picture_of.save())
    to_output = any(str(target) in STANDARD_OUTPUT for target, _ in texts)
    number, engine = len(findings.planes), settings.processing.classifier
    if texts and number:
        root = _source(path)
        for target, kind in texts:
            text = findings.text(kind, engine=engine, broken=broken, root=root)
            guard.write_text(target, text)
        places = " and ".join(str(target) for target, _ in texts)
        done = f"classified {number_of(number, 'plane')} to {places}"
        typer.echo(done, err=to_output)
    for line in told_of(findings, each=not texts):
        typer.echo(line, err=to_output)
    _refuse_broken(broken, number, "plane", "classified")
    _refuse_changed(found, as_found)


def _classify_all(
    images: ImageSet, shown: SideBySide, on_plane: Callable[[], None], *, tiles: bool
) -> tuple[Findings, list[BrokenImage]]:
    """Return what is found in the images, and those that cannot be read."""
    findings, broken = Findings(), []
    for number, series in enumerate(images.series):
        planes = shown.classified(images, number, images.classified(number))
        try:
            found = find_in(images, number, planes, on_plane, with_tiles=tiles)
        except InputError as error:
            broken.append(BrokenImage(series.path, str(error), series))
        else:
            findings.add(found)
    return findings, broken


def _job(
    command: Command, path: Path, output: Path, settings: Config, optics: str | None
) -> BatchJob:
    source = _source(path)
    # Workers stand in other folders, and files may change until they begin.
    folders = map(os.path.abspath, settings.processing.engine_folders)
    settings = settings.with_processing(engine_folders=[*map(Path, folders)])
    return BatchJob(
        command=command,
        source=os.path.abspath(source),
        given=str(source),
        output=os.path.abspath(output),
        settings=settings.model_dump(mode="json"),
        optics=None if optics is None else stated_optics(optics),
        optics_origin=optics or "",
    )


def _source(path: Path) -> Path:
    return path / "raw.ome.zarr" if _is_run(path) else path


def _output(
    images: ImageSet,
    number: int,
    stretch: bool,
    shown: SideBySide,
    maps: ErrorMaps,
    on_plane: Callable[[], None],
) -> OutputImage:
    def on_result(result: FrameResult) -> None:
        on_plane()
        maps.note(number, result)

    planes = shown.restored(images, number, images.restored(number, on_result))
    return replace(
        images.outline(number, stretch=stretch),
        planes=map(stretch_histogram, planes) if stretch else planes,
    )


def _guard(path: Path, images: FoundImages, overwrite: bool) -> OutputGuard:
    inputs = [*companions(images.series), *(one.path for one in images.broken)]
    if _is_run(path) or path.is_file():
        inputs.append(path)
    return OutputGuard(inputs, overwrite=overwrite)


def _stated_optics(optics: str | None) -> StatedOptics | None:
    return None if optics is None else StatedOptics(stated_optics(optics), optics)


def _tell_picture(path: Path | None) -> None:
    if path is not None:
        typer.echo(f"picture: {path}", err=True)


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line, err=True)


def _say_restored(
    place: ImageOutput, images: FoundImages, broken: list[BrokenImage]
) -> None:
    """Say what is on the disk, counted there; fail if some is missing."""
    written = place.written()
    targets = place.targets * (1 if place.is_folder else len(images.series))
    pairs = zip(images.series, targets, strict=True)
    planes = sum(len(series) for series, target in pairs if target in written)
    where = str(place.path)
    if place.is_folder:
        where = f"{number_of(len(written), 'file')} in {place.path}"
    if written:
        typer.echo(f"restored {number_of(planes, 'plane')} to {where}")
    everything = [*images.broken, *broken]
    _refuse_broken(everything, len(written), "file", "written")
    if len(written) < len(place.targets):
        msg = f"{len(written)} of {len(place.targets)} files are in '{place.path}'"
        raise IncompleteError(msg)


def _refuse_broken(broken: list[BrokenImage], done: int, what: str, how: str) -> None:
    """Name what could not be read, after everything else was done."""
    if not broken:
        return
    _tell(f"broken: {image.reason}" for image in broken)
    names = named(image.path for image in broken)
    count = number_of(len(broken), "image")
    msg = f"{count} cannot be read: {names}; {number_of(done, what)} {how}"
    raise (IncompleteError if done else InputError)(msg)


def _restore_run(run: Path, settings: Config, given: Mapping[str, object]) -> None:
    """Restore the frames of a run folder that were recorded raw only."""
    if not _is_run(run):
        msg = f"'{run}' is no run folder; say where to write with --output"
        raise ConfigError(msg)
    for option, value in given.items():
        if value is not None:
            msg = (
                f"{option} is for other files: a run keeps its counts, and the "
                "expected error where one is stated; give --output"
            )
            raise ConfigError(msg)
    with (
        counting("planes", count_unrestored(run)) as on_frame,
        ImageProcessor(settings) as processor,
    ):
        number = complete_restoration(
            run,
            lambda pixels, channel: processor.restore(pixels, channel=channel),
            on_frame=on_frame,
        )
    if number:
        text = f"restored {number_of(number, 'frame')} of {run} that had been left raw"
    else:
        text = f"no frame of {run} was left raw: nothing to restore"
    typer.echo(text)


def _settings(path: Path, config: str | None, overrides: list[str] | None) -> Config:
    """Return the config that is given, that of a run folder, or the defaults."""
    if config is None and _is_run(path):
        header = read_header(path)
        own = parse_config(header.provenance["config"], origin=str(path))
        return overridden(own, overrides or ())
    return read_config(config, overrides)


def _names(config: str | None, overrides: list[str] | None, *engines: str) -> bool:
    """Tell whether an engine is named: a config always names one."""
    keys = (one.partition("=")[0].strip() for one in overrides or ())
    return config is not None or any(key.endswith(engines) for key in keys)


def _contents(images: FoundImages) -> list[str]:
    known: dict[Path, str] = {}
    return [content_of(series, known) for series in images.series]


def _refuse_changed(images: FoundImages, as_found: list[str]) -> None:
    """Name files that something wrote while they were read."""
    pairs = zip(images.series, _contents(images), as_found, strict=True)
    changed = {series.path: None for series, now, then in pairs if now != then}
    if changed:
        msg = (
            f"{number_of(len(changed), 'image')} changed while being read: "
            f"{named(changed)}; their results may mix old and new pixels: do them "
            "again once nothing writes them"
        )
        raise IncompleteError(msg)


def _is_run(path: Path) -> bool:
    return path.suffix == SUFFIX and path.is_dir()
