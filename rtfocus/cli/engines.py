"""Engine commands: list them, look at one, add one, build GPU plans ahead of time."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bars
from rich.table import Table

from rtfocus.cli.commands import OverwriteOption, read_config
from rtfocus.cli.display import as_written
from rtfocus.cli.endings import interruptible
from rtfocus.engines.card import EngineCard, input_of, verified_file
from rtfocus.engines.registry import (
    FoundEngine,
    find_engine,
    list_engines,
    remove_engine,
    step_um,
    why_unfit,
)
from rtfocus.engines.spec_steps import Values
from rtfocus.errors import ConfigError, EngineError
from rtfocus.evaluation.contenders import multiply_adds_per_pixel
from rtfocus.processing.gpu.cuda.driver import current_context, find_device, why_no_gpu
from rtfocus.runtimes.cpu_backends import BACKENDS
from rtfocus.runtimes.gpu import GPU_BACKENDS, Gpu, gpu_request, pixels_at_once
from rtfocus.runtimes.tensorrt.library import (
    LIBRARIES,
    Progress,
    TensorRt,
    import_tensorrt,
    why_not_importable,
)
from rtfocus.runtimes.tensorrt.plans import (
    ANY_CARD,
    PlanTarget,
    ready_plan,
    rtx_target,
    target_of,
)

Row = tuple[str, str]
"""Topic and value."""

VALUES = {
    Values.input: "as those of its input",
    Values.shown: "as those it is shown, so the steps before it are undone",
    Values.own: "on a scale of its own: only for store.restored_dtype: float32",
}


def _tensors(card: EngineCard) -> Iterator[Row]:
    if card.input is not None:
        tiles = card.input
        colour = "grey" if tiles.channels == 1 else "RGB"
        halo = f" with a halo of {tiles.halo_px} px" if tiles.halo_px else ""
        every = "" if card.kind == "restorer" else f" every {tiles.stride_px:g} px"
        yield "sees", f"{colour} tiles of {tiles.tile_px} px{halo}{every}"
        if card.steps is None:
            yield "normalisation", str(card.normalisation.get("name"))
    if card.steps is not None:
        around = {"before it": card.steps.before, "after it": card.steps.after}
        for topic, steps in around.items():
            yield topic, ", ".join(step.id for step in steps) or "nothing"
        yield "its values", VALUES[card.steps.values]
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
        range_um = f"{card.levels.count} from focus on, {card.levels.step_um:g} um"
        yield "levels", f"{range_um}, {signed}"


def _files(engine: FoundEngine) -> tuple[list[Row], bool]:
    """Describe every weights file; second: whether one is not in order."""
    rows: list[Row] = []
    damaged = False
    for precision in engine.card.files:
        try:
            path = verified_file(engine.folder, engine.card, precision)
            size = path.stat().st_size / 1e6
            detail = f"{path.name}, {size:.2f} MB, sha256 as on the card"
        except EngineError as error:
            detail, damaged = str(error), True
        rows.append((f"weights {precision}", detail))
    return rows, damaged


def _cost(engine: FoundEngine) -> Iterator[Row]:
    if (count := multiply_adds_per_pixel(engine)) is not None:
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
    if card.sees_image_alone:
        yield "on a GPU", "no: steps around a network run on the CPU alone"
        return
    for gpu in GPU_BACKENDS:
        yield f"on {gpu.name}", gpu.why_unavailable(None) or "yes, given a GPU"


def _history(card: EngineCard) -> Iterator[Row]:
    for title, entries in (("trained", card.trained), ("figures", card.figures)):
        for key, value in entries.items():
            yield f"{title}: {key}", as_written(value)


app = typer.Typer(name="engines", invoke_without_command=True, rich_markup_mode="rich")


def add_to(commands: typer.Typer) -> None:
    """Register the commands of this module."""
    commands.add_typer(app)


FolderOption = Annotated[
    list[Path] | None,
    typer.Option("--folder", metavar="FOLDER", help="With more engines; repeatable."),
]

NameOption = Annotated[
    str | None,
    typer.Option(help="Name that configs use; default: as the engine says."),
]


@app.callback()
def engines(context: typer.Context) -> None:
    """List the engines, look at one, add or share one, build GPU plans.

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
    for column in ("name", "kind", "implementation", "weights"):
        table.add_column(column, overflow="fold")
    places: dict[Path, list[str]] = {}
    for engine in list_engines(folder or ()):
        card, weights = engine.card, ", ".join(engine.card.files) or "none"
        table.add_row(engine.name, card.kind, card.implementation, weights)
        places.setdefault(engine.folder.parent, []).append(engine.name)
    Console().print(table)
    # Below the table, where no path is broken in two.
    for place, names in places.items():
        typer.echo(f"in {place}: {', '.join(names) if len(places) > 1 else 'all'}")


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

    The exit code is 1 if a weights file is not what the card says.

    [bold]Example:[/] rtfocus engines info delpnet --config demo
    """
    engine = find_engine(name, folder or ())
    card = engine.card
    files, damaged = _files(engine)
    rows = [
        ("name", engine.name),
        ("folder", str(engine.folder)),
        ("kind", card.kind),
        ("implementation", card.implementation),
        *([("description", card.description)] if card.description else ()),
        *_tensors(card),
        *files,
        *(() if damaged else _cost(engine)),
        *_optics(card, config),
        *_runtimes(card),
        *_history(card),
    ]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for topic, value in rows:
        table.add_row(topic, escape(value))
    Console().print(table)
    if damaged:
        raise typer.Exit(1)


@app.command()
def add(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|ZIP|URL",
            help="Folder with an engine.yaml, or a model package of bioimage.io.",
        ),
    ],
    name: NameOption = None,
    values: Annotated[
        Values | None,
        typer.Option(
            help="Which values a foreign model gives: those of its [bold]input[/], "
            "those it is [bold]shown[/], or its [bold]own[/]; default: by its test."
        ),
    ] = None,
) -> None:
    """Copy an engine to your own engines, where every config finds it by name.

    [bold]Example:[/] rtfocus engines add checkpoints/my_objective/engine
    """
    from rtfocus.sharing.admission import PROOF, add_model

    added = add_model(source, name=name, values=values, tell=typer.echo)
    typer.echo(f"added {added.card.kind} '{added.name}' in {added.folder}")
    if (steps := added.card.steps) is not None and PROOF in added.card.figures:
        typer.echo(f"its test tensors reproduce; its values: {VALUES[steps.values]}")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="One of your own engines.")],
) -> None:
    """Remove an engine that [bold]engines add[/] brought; no other.

    [bold]Example:[/] rtfocus engines remove my_objective
    """
    typer.echo(f"removed '{remove_engine(name)}'")


@app.command("export")
def export_model(
    name: Annotated[str, typer.Argument(help="Engine by name or folder.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Model package to write, a .zip.")
    ],
    author: Annotated[
        list[str], typer.Option(metavar="NAME", help="Who made it; repeatable.")
    ],
    cite: Annotated[
        str, typer.Option(help="DOI (10....) or address (https://...) to cite.")
    ],
    licence: Annotated[
        str, typer.Option(help="Licence of the weights, an SPDX identifier.")
    ] = "BSD-3-Clause",
    folder: FolderOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write an engine that restores as a model package of bioimage.io (spec 0.5).

    [bold]Example:[/] rtfocus engines export multiscale -o multiscale.zip
    --author "Jane Doe" --cite https://example.org/paper
    """
    from rtfocus.sharing.export import export_bioimageio

    engine = find_engine(name, folder or ())
    written = export_bioimageio(
        engine, output, authors=author, cite=cite, licence=licence, overwrite=overwrite
    )
    typer.echo(f"exported {engine.card.kind} '{engine.name}' to {written}")


Backend = Literal["auto", "tensorrt", "tensorrt_rtx"]
"""Libraries that need a plan."""


@app.command()
def build(
    name: Annotated[
        str, typer.Argument(help="Engine to build, or [bold]all[/] there are.")
    ],
    backend: Annotated[
        Backend, typer.Option(help="auto: tensorrt, then tensorrt_rtx.")
    ] = "auto",
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option(help="Default: fp16 where the engine has it, else fp32."),
    ] = None,
    gpu: Annotated[
        int | None, typer.Option(min=0, help="GPU in the driver's list; default: 0.")
    ] = None,
    capability: Annotated[
        str | None,
        typer.Option(
            metavar="M.N", help="For a GPU that is not here (tensorrt_rtx): e.g. 8.6."
        ),
    ] = None,
    frame: Annotated[
        str, typer.Option(metavar="HxW", help="The camera's frame in pixels.")
    ] = "2048x2048",
    tiles_per_batch: Annotated[
        int | None,
        typer.Option(min=1, help="As processing.gpu.tiles_per_batch of the run."),
    ] = None,
    tf32: Annotated[
        bool, typer.Option(help="Let fp32 products round to 10 bits, which is faster.")
    ] = True,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Even if the cache has the plan.")
    ] = False,
) -> None:
    """Build the GPU plan of an engine; a run would do so at its first start.

    With TensorRT for RTX this needs no GPU.

    [bold]Example:[/] rtfocus engines build delpnet --precision fp32 --frame 2048x2048
    """
    shape = _shape(frame)
    library, device, target = _target(backend, gpu, capability)
    pixels = pixels_at_once(device)
    for engine in _engines_to_build(name):
        most: dict[str, Any] = {"tiles_per_batch": tiles_per_batch, "pixels": pixels}
        request = gpu_request(engine, shape, precision, tf32=tf32, **most)
        context = nullcontext() if device is None else current_context(device.gpu_index)
        with context, interruptible() as (stop, _), _bar(engine.name, stop) as progress:
            plan = ready_plan(
                library, request, target, progress=progress, rebuild=rebuild
            )
        how = "was there" if plan.build_s is None else f"built in {plan.build_s:.1f} s"
        tiles = request.inputs[input_of(engine.card).name].largest[0]
        batch = f"{tiles} tiles at once, " if engine.card.kind == "restorer" else ""
        typer.echo(
            f"{engine.name} {request.precision}: {library.name} {library.release} plan "
            f"for {target.gpu}, {batch}{len(plan.data) / 1e6:.1f} MB, {how}"
        )


def _engines_to_build(name: str) -> list[FoundEngine]:
    if name != "all":
        return [find_engine(name)]
    return [
        engine
        for engine in list_engines()
        if "fp32" in engine.card.files and not engine.card.sees_image_alone
    ]


def _target(
    backend: Backend, gpu: int | None, capability: str | None
) -> tuple[TensorRt, Gpu | None, PlanTarget]:
    """Return the library, the GPU if one is at hand, and what the plan is for."""
    library = _library(backend)
    if capability is not None:
        return library, None, _named_target(library, gpu, capability)
    why = why_no_gpu()
    if why is None:
        device = find_device(gpu or 0)
        return library, device, target_of(library, device)
    if gpu is not None or not library.is_rtx:
        msg = f"a {library.name} plan for this GPU cannot be built: {why}"
        raise EngineError(msg)
    typer.echo(f"building for any card from 8.0 on ({why})", err=True)
    return library, None, ANY_CARD


def _library(backend: Backend) -> TensorRt:
    reasons = []
    for name in LIBRARIES:
        if backend in ("auto", name):
            why = why_not_importable(name)
            if why is None:
                return import_tensorrt(name)
            reasons.append(why)
    raise EngineError("; ".join(reasons))


def _named_target(library: TensorRt, gpu: int | None, capability: str) -> PlanTarget:
    numbers = re.fullmatch(r"(\d+)\.(\d)", capability)
    if numbers is None:
        msg = f"--capability '{capability}' is no compute capability, e.g. 8.6"
        raise ConfigError(msg)
    if gpu is not None or not library.is_rtx:
        msg = (
            "--capability is for tensorrt_rtx and a GPU that is not at hand; name "
            "--gpu for one that is"
        )
        raise ConfigError(msg)
    return rtx_target(library, (int(numbers[1]), int(numbers[2])))


def _shape(frame: str) -> tuple[int, int]:
    sides = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", frame)
    if sides is None:
        msg = f"--frame '{frame}' is no frame size; write HEIGHTxWIDTH, e.g. 2048x2048"
        raise ConfigError(msg)
    return int(sides[1]), int(sides[2])


@contextmanager
def _bar(name: str, stop: Event) -> Iterator[Progress]:
    """Show the build's phase on a terminal; Ctrl-C cancels between two steps."""
    with Bars(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(name)

        def progress(phase: str, done: int, steps: int) -> bool:
            if stop.is_set():
                raise KeyboardInterrupt
            text = f"{name}: {phase}"
            bars.update(task, description=text, completed=done, total=steps)
            return True

        yield progress
