"""Engine commands: list them, look at one, add one, build GPU plans."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtfocus.cli import build
from rtfocus.cli.options import read_config
from rtfocus.errors import EngineError
from rtfocus.evaluation.contenders import multiply_adds_per_pixel
from rtfocus.processing.cpu.backends import BACKENDS
from rtfocus.processing.engines.card import EngineCard, verified_file
from rtfocus.processing.engines.registry import (
    FoundEngine,
    add_engine,
    find_engine,
    list_engines,
    step_um,
    why_unfit,
)
from rtfocus.processing.gpu.backends import GPU_BACKENDS

app = typer.Typer(
    name="engines",
    invoke_without_command=True,
    rich_markup_mode="rich",
)
build.add_to(app)


def add_to(commands: typer.Typer) -> None:
    """Register the commands of this module."""
    commands.add_typer(app)


FolderOption = Annotated[
    list[Path] | None,
    typer.Option("--folder", help="Folder with further engines; repeatable."),
]
Row = tuple[str, str]


@app.callback()
def engines(context: typer.Context) -> None:
    """List the engines that configs can name, look at one, add one, build GPU plans.

    [bold]Example:[/] rtfocus engines
    """
    if context.invoked_subcommand is None:
        show_list(None)


@app.command("list")
def show_list(folder: FolderOption = None) -> None:
    """List the engines that configs can name.

    [bold]Example:[/] rtfocus engines list
    """
    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "implementation", "weights", "folder"):
        table.add_column(column, overflow="fold")
    for found in list_engines(folder or ()):
        weights = ", ".join(found.card.files) or "none"
        row = (found.name, found.kind, found.implementation, weights)
        table.add_row(*row, str(found.folder))
    Console().print(table)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Engine by name or folder.")],
    folder: FolderOption = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="CONFIG", help="Does it fit the optics of this config?"
        ),
    ] = None,
) -> None:
    """Show what an engine is, check its files, and say where it can run.

    Exits with 1 when a weights file is not what the card says.

    [bold]Example:[/] rtfocus engines info delpnet --config demo
    """
    found = find_engine(name, folder or ())
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    files, damaged = _files(found)
    rows = [*_what(found), *_tensors(found.card), *files]
    if not damaged:
        rows += _cost(found)
    rows += [*_optics(found.card, config), *_runtimes(found.card)]
    rows += _history(found.card)
    for topic, said in rows:
        table.add_row(topic, escape(said))
    Console().print(table)
    if damaged:
        raise typer.Exit(1)


@app.command()
def add(
    path: Annotated[Path, typer.Argument(help="Folder with an engine.yaml.")],
) -> None:
    """Copy an engine to your own engines, where every config finds it by name.

    [bold]Example:[/] rtfocus engines add checkpoints/my_objective/engine
    """
    found = add_engine(path)
    typer.echo(f"added {found.kind} '{found.name}' in {found.folder}")


def _what(found: FoundEngine) -> Iterator[Row]:
    card = found.card
    yield "name", found.name
    yield "folder", str(found.folder)
    yield "kind", card.kind
    yield "implementation", card.implementation
    if card.description:
        yield "description", card.description


def _tensors(card: EngineCard) -> Iterator[Row]:
    if card.input is not None:
        tiles = card.input
        colour = "grey" if tiles.channels == 1 else "RGB"
        halo = f" with a halo of {tiles.halo_px} px" if tiles.halo_px else ""
        every = "" if card.kind == "restorer" else f" every {tiles.stride_px:g} px"
        yield "sees", f"{colour} tiles of {tiles.tile_px} px{halo}{every}"
        yield "normalisation", str(card.normalisation.get("name"))
    if card.condition is not None:
        yield "is told", ", ".join(card.condition.entries)
    given = []
    if card.output is not None and card.output.labels:
        given.append(f"{len(card.output.labels)} labels")
    if card.kind != "classifier":
        given.append("restored image")
    if card.kernel_output is not None:
        side = card.kernel_output.size_px
        given.append(f"blur kernel of {side} x {side} px")
    yield "gives", ", ".join(given)
    if card.levels is not None:
        signed = "both sides of focus" if card.levels.signed else "no direction"
        yield (
            "levels",
            f"{card.levels.count} from focus on, {card.levels.step_um:g} um, {signed}",
        )


def _files(found: FoundEngine) -> tuple[list[Row], bool]:
    """Describe every weights file; second: whether one is not in order."""
    rows, damaged = [], False
    for precision in found.card.files:
        try:
            path = verified_file(found.folder, found.card, precision)
            size = path.stat().st_size / 1e6
            said = f"{path.name}, {size:.2f} MB, sha256 as on the card"
        except EngineError as error:
            said, damaged = str(error), True
        rows.append((f"weights {precision}", said))
    return rows, damaged


def _cost(found: FoundEngine) -> Iterator[Row]:
    count = multiply_adds_per_pixel(found)
    if count is not None:
        yield "multiply-adds", f"{count:,.0f} per pixel"


def _optics(card: EngineCard, config: str | None) -> Iterator[Row]:
    if card.optics is None:
        return
    lowest, highest = card.optics.sampling_min, card.optics.sampling_max
    yield "trained for", f"pixels of {lowest:g} to {highest:g} lambda/NA"
    if config is None:
        return
    for channel in read_config(config, None).channels:
        topic = f"fits '{channel.name}'"
        if channel.optics is None:
            yield topic, "unknown: the channel has no optics"
            continue
        why = why_unfit(card, channel.optics)
        step = step_um(card, channel.optics)
        yield topic, f"yes, levels of {step:.3g} um" if why is None else f"no: {why}"


def _runtimes(card: EngineCard) -> Iterator[Row]:
    if not card.is_network:
        yield "runs on", "any CPU: no network"
        return
    for cpu in BACKENDS:
        yield f"on {cpu.name}", cpu.why_unavailable() or "yes"
    for gpu in GPU_BACKENDS:
        yield f"on {gpu.name}", gpu.why_unavailable(None) or "yes, given a GPU"


def _history(card: EngineCard) -> Iterator[Row]:
    for title, entries in (("trained", card.trained), ("figures", card.figures)):
        for key, value in entries.items():
            yield f"{title}: {key}", str(value)
