"""Train and evaluate: engines made, and engines measured side by side.

Torch is imported only when a training runs.
"""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtfocus.batch.plan import Failure
from rtfocus.batch.scheduler import WORKERS_S
from rtfocus.channel import OpticalSystem
from rtfocus.cli.batch import (
    Many,
    ResourcesOption,
    SchedulerOption,
    WaitOption,
    do_on_workers,
    named,
)
from rtfocus.cli.commands import (
    OverwriteOption,
    need_torch,
    read_config,
)
from rtfocus.cli.display import counting
from rtfocus.config import find_config
from rtfocus.errors import ConfigError, IncompleteError, InputError, number_of
from rtfocus.evaluation.contenders import Contender
from rtfocus.evaluation.data_sets import KNOWN
from rtfocus.evaluation.evaluate import ScoreSheet
from rtfocus.evaluation.evaluate import evaluate as evaluate_one
from rtfocus.evaluation.parts import Done, Gathering, Part, Wish, measure_part, parts_of
from rtfocus.evaluation.samples import DataSet
from rtfocus.evaluation.scorecard import (
    JSON_NAME,
    report_names,
    tables,
    write_report,
)
from rtfocus.images.outputs import OutputGuard
from rtfocus.training.recipe import DATA_VARIABLE


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(train)
    app.command()(evaluate)


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Recipe YAML, or the name of a shipped one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the newest checkpoint, if there is one.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Cores to use; the weights are the same with any number.",
        ),
    ] = 0,
    optics: Annotated[
        str | None,
        typer.Option(
            help="Your optics: a file of [bold]rtfocus psf fit[/], or NA=, "
            "wavelength= and pixel=, separated by commas; with --own or --images."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of your own sharp images.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of a training with your own optics.")
    ] = None,
    own: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a recipe: folder of your sharp fields or z-stacks, which "
            "become a checked engine."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="With --own: folder and name of the engine."
        ),
    ] = None,
    channel: Annotated[
        str | None, typer.Option(help="With --own: channel by name or number.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="With --own: how long to train.")
    ] = 20.0,
) -> None:
    """Train an engine by a recipe, or on your own images; continues after a kill.

    [bold]Example:[/] rtfocus train train_delpnet

    [bold]From your own images to an engine:[/] rtfocus train --own my_images
    -o my_20x --optics NA=0.75,wavelength=520,pixel=0.325

    [bold]For your own objective:[/] rtfocus train train_delpnet_own
    --optics optics.yaml --images my_sharp_images --name my_20x
    """
    need_torch()
    _refuse_mixture(
        {"RECIPE": recipe, "--images": images, "--name": name}, own, output, channel
    )
    if own is not None and output is not None:
        from rtfocus.evaluation.own import OwnWish, train_own

        wish = OwnWish(
            own, output, optics, channel, minutes, device, workers, resume=resume
        )
        engine, verdict = train_own(wish, say=lambda line: typer.echo(line, err=True))
        typer.echo(f"engine '{engine.name}' with README and picture in '{engine}'")
        typer.echo(verdict.text)
        return
    from rtfocus.training.commands import train_command

    train_command(
        find_config(str(recipe)),
        resume=resume,
        device=device,
        workers=workers,
        optics=optics,
        images=images,
        name=name,
    )


def _refuse_mixture(
    of_recipe: dict[str, object],
    own: Path | None,
    output: Path | None,
    channel: str | None,
) -> None:
    """Refuse options of the one way of training beside those of the other."""
    given = [option for option, value in of_recipe.items() if value is not None]
    if own is not None and given:
        msg = f"{', '.join(given)} cannot be used with --own: it chooses its own"
        raise ConfigError(msg)
    if own is not None and output is None:
        msg = "--own needs the engine's name: -o NAME"
        raise ConfigError(msg)
    if own is None and (output or channel):
        msg = "--output and --channel are for --own FOLDER"
        raise ConfigError(msg)
    if own is None and "RECIPE" not in given:
        msg = "name a recipe, e.g. train_delpnet, or your images: --own FOLDER -o NAME"
        raise ConfigError(msg)


# Wide enough for every column where no terminal says how wide it is.
_PIPED_WIDTH = 160


Told = Literal["optics", "nothing", "both"]
"""What engines are told of the optics."""
_BLIND: dict[Told, tuple[bool, ...]] = {
    "optics": (False,),
    "nothing": (True,),
    "both": (False, True),
}


def evaluate(
    engines: Annotated[
        list[str],
        typer.Argument(
            metavar="ENGINE...",
            help="Engines by name or folder, wiener, richardson_lucy, "
            "richardson_lucy_accelerated, richardson_lucy_blind; METHOD:exact, told "
            "the defocus; ENGINE:8, the mean over 2, 4 or 8 orientations.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help="bbbc006_pairs, bbbc006_factin, bbbc006_16bit, sharp, unseen, "
            "packages, synthetic, synthetic_textures, _signed, _dim, _even, _other, or "
            "a folder with sharp/ and others beside it; repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for tables and pictures.")
    ] = Path("evaluation"),
    tell: Annotated[
        Told | None,
        typer.Option(
            help="Tell engines the optics, nothing, or try both; default: the optics."
        ),
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="The same as --tell nothing.")
    ] = False,
    optics: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG", help="Config with optics and camera of a data folder."
        ),
    ] = None,
    channel: Annotated[
        str | None, typer.Option(help="Channel of that config; default: the only one.")
    ] = None,
    classifier: Annotated[
        str, typer.Option(help="Finds the defocus for restorers.")
    ] = "delpnet",
    data_folder: Annotated[
        Path | None,
        typer.Option(envvar=DATA_VARIABLE, help="Folder with the published images."),
    ] = None,
    engine_folder: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Folder with more engines; repeatable."),
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of networks and Fourier transforms.")
    ] = 1,
    precision: Annotated[
        str, typer.Option(help="auto, f32, bf16, fp16 or int8, as in a config.")
    ] = "auto",
    overwrite: OverwriteOption = False,
    scheduler: SchedulerOption = None,
    resources: ResourcesOption = None,
    wait_workers: WaitOption = WORKERS_S,
) -> None:
    """Compare engines side by side: quality, levels, cost; tables and pictures.

    [bold]Example:[/] rtfocus evaluate delpnet wiener richardson_lucy
    --data bbbc006_pairs --data-folder images -o evaluation
    """
    given, offset_counts = _microscope(optics, channel)
    wish = Wish(
        sets=tuple(data or ["bbbc006_pairs"]),
        data_folder=data_folder,
        optics=given,
        offset_counts=offset_counts,
        classifier=classifier,
        folders=tuple(engine_folder or []),
        threads=threads,
        precision=precision,
    )
    if blind and tell not in (None, "nothing"):
        msg = f"--blind is --tell nothing, and --tell is '{tell}'; give one of the two"
        raise ConfigError(msg)
    told: Told = "nothing" if blind else tell or "optics"
    rows = wish.contenders(engines, _BLIND[told])
    sets = wish.data_sets()
    for one in sets:
        if given is None and one.name not in KNOWN:
            typer.echo(one.title, err=True)
    names = report_names(rows, [one.name for one in sets])
    guard = OutputGuard(overwrite=overwrite)
    guard.claim_report(output, JSON_NAME, names)
    many = Many(scheduler, resources, wait_workers)
    failed = _Failed(output)
    taken_on: str | None = None
    if many.is_asked_for:
        sheets, taken_on = _run_on_workers(wish, rows, sets, many, failed)
    else:
        sheets = _run(wish, rows, sets)
    _show(sheets)
    command = shlex.join(["rtfocus", *sys.argv[1:]])
    with guard.report(output, JSON_NAME, names) as part:
        paths = write_report(
            part, sheets, command=command, lacking=failed.lines, taken_on=taken_on
        )
        written = [path.name for path in paths]
    for name in written:
        typer.echo(str(output / name))
    failed.refuse()


class _Failed:
    """Fields that an engine did not measure, and why."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.total = 0
        self.lines: list[str] = []
        self._names: list[str] = []

    def add(self, row: ScoreSheet, part: Part, reason: str) -> str:
        """Add one and return the line that says so."""
        where = f"{row.data.name}: {part.field}"
        line = f"{row.contender.title} on {where}: {reason}"
        self._names.append(where)
        self.lines.append(line)
        return f"failed: {line}"

    def refuse(self) -> None:
        """Fail if there are any, after all else was done.

        Raises
        ------
        IncompleteError
            Names them.
        InputError
            If nothing else was done.
        """
        if not self.lines:
            return
        msg = f"{len(self.lines)} of {self.total} fields failed: {named(self._names)}"
        if len(self.lines) == self.total:
            raise InputError(msg)
        msg += f"; the rest is in '{self._output}'; the same command begins anew"
        raise IncompleteError(msg)


def _run_on_workers(
    wish: Wish,
    contenders: list[Contender],
    sets: list[DataSet],
    many: Many,
    failed: _Failed,
) -> tuple[list[ScoreSheet], str]:
    """Run every contender on every field by workers; return where they were too."""
    parts = parts_of(wish, contenders, sets)
    gathering, failed.total = Gathering(parts, contenders, sets), len(parts)

    def take(part: Part, result: Done | Failure) -> str | None:
        if isinstance(result, Failure):
            gathering.take(part, None)
            return failed.add(gathering.row(part), part, result.reason)
        gathering.take(part, result)
        return None

    do_on_workers(
        many,
        partial(measure_part, wish.anywhere()),
        parts,
        take,
        what="fields",
        rest=lambda left: (
            f"{number_of(left, 'field')} not evaluated; the same command begins anew"
        ),
    )
    if not gathering.done:
        failed.refuse()
    return gathering.sheets(), "workers on " + "; ".join(sorted(gathering.machines))


def _run(
    wish: Wish, contenders: list[Contender], sets: list[DataSet]
) -> list[ScoreSheet]:
    """Run every contender over every data set, with a bar on standard error."""
    sheets: list[ScoreSheet] = []
    for data in sets:
        frames: int | None = None  # until the first contender has seen them
        for one in contenders:
            config = wish.config(one, data)
            with counting(f"{one.title} on {data.name}", frames) as on_frame:
                sheets.append(evaluate_one(one, data, config, on_frame=on_frame))
            frames = sheets[-1].measured
    return sheets


def _microscope(
    config: str | None, channel: str | None
) -> tuple[OpticalSystem | None, float]:
    """Return optics and camera offset of a config; without one nothing and 0."""
    if config is None:
        return None, 0.0
    settings = read_config(config, None)
    _, optics = settings.optics_of(channel)
    return optics, settings.camera.offset_counts


def _show(sheets: list[ScoreSheet]) -> None:
    """Print one table per data set and kind of figure."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    for title, columns, rows in tables(sheets):
        for name in dict.fromkeys(row[0] for row in rows):
            table = Table(*columns[1:], title=f"{name}: {title}")
            for row in rows:
                if row[0] == name:
                    table.add_row(*row[1:])
            console.print(table)
    for sheet in sheets:
        if why := sheet.nothing_found():
            console.print(escape(why), highlight=False, soft_wrap=True)
