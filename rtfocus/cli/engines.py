"""Engine commands: list them, look at one, add one, build GPU plans ahead of time."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from threading import Event
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bars
from rich.table import Table

from rtfocus.cli.commands import OverwriteOption
from rtfocus.cli.endings import interruptible
from rtfocus.cli.engine_facts import VALUES, facts
from rtfocus.engines.registry import (
    FoundEngine,
    find_engine,
    list_engines,
    remove_engine,
)
from rtfocus.engines.spec_steps import Values
from rtfocus.errors import ConfigError, EngineError
from rtfocus.processing.gpu.cuda.driver import current_context, find_device, why_no_gpu
from rtfocus.runtimes.gpu import Gpu, gpu_request
from rtfocus.runtimes.tensorrt.build import Progress
from rtfocus.runtimes.tensorrt.library import (
    LIBRARIES,
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
from rtfocus.sharing.admission import add_model
from rtfocus.sharing.export import export_bioimageio

app = typer.Typer(
    name="engines",
    invoke_without_command=True,
    rich_markup_mode="rich",
)


def add_to(commands: typer.Typer) -> None:
    """Register the commands of this module."""
    commands.add_typer(app)


FolderOption = Annotated[
    list[Path] | None,
    typer.Option("--folder", help="Folder with further engines; repeatable."),
]


NameOption = Annotated[
    str | None,
    typer.Option(help="Name that configs use; default: as the engine says."),
]


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
    for column in ("name", "kind", "implementation", "weights"):
        table.add_column(column, overflow="fold")
    places: dict[Path, list[str]] = {}
    for found in list_engines(folder or ()):
        weights = ", ".join(found.card.files) or "none"
        table.add_row(found.name, found.kind, found.implementation, weights)
        places.setdefault(found.folder.parent, []).append(found.name)
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

    Exits with 1 when a weights file is not what the card says.

    [bold]Example:[/] rtfocus engines info delpnet --config demo
    """
    found = find_engine(name, folder or ())
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows, damaged = facts(found, config)
    for topic, said in rows:
        table.add_row(topic, escape(said))
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
    found = add_model(source, name=name, values=values, tell=typer.echo)
    typer.echo(f"added {found.kind} '{found.name}' in {found.folder}")
    if (steps := found.card.steps) is not None:
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
        list[str], typer.Option(help="Who made the weights; repeatable.")
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
    found = find_engine(name, folder or ())
    written = export_bioimageio(
        found,
        output,
        authors=author,
        cite=cite,
        licence=licence,
        overwrite=overwrite,
    )
    typer.echo(f"exported {found.kind} '{found.name}' to {written}")


ALL = "all"


class BackendChoice(StrEnum):
    """Libraries that need a plan."""

    auto = "auto"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


class PrecisionChoice(StrEnum):
    """Weights files an engine may have."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


@app.command()
def build(
    name: Annotated[
        str, typer.Argument(help="Engine to build, or [bold]all[/] there are.")
    ],
    backend: Annotated[
        BackendChoice, typer.Option(help="auto: tensorrt, then tensorrt_rtx.")
    ] = BackendChoice.auto,
    precision: Annotated[
        PrecisionChoice | None,
        typer.Option(help="Default: fp16 where the engine has it, else fp32."),
    ] = None,
    gpu: Annotated[
        int | None, typer.Option(min=0, help="GPU in the driver's list; default: 0.")
    ] = None,
    capability: Annotated[
        str | None,
        typer.Option(
            metavar="M.N", help="Without that GPU at hand (tensorrt_rtx): e.g. 8.6."
        ),
    ] = None,
    frame: Annotated[
        str, typer.Option(metavar="HxW", help="The camera's frame in pixels.")
    ] = "2048x2048",
    tf32: Annotated[
        bool, typer.Option(help="Let fp32 products round to 10 bits, which is faster.")
    ] = True,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Also if the cache has the plan.")
    ] = False,
) -> None:
    """Build the GPU plan of an engine; a run would do so at its first start.

    TensorRT for RTX needs no GPU for it.

    [bold]Example:[/] rtfocus engines build delpnet --precision fp32 --frame 2048x2048
    """
    shape = _shape(frame)
    library, device, target = _target(backend, gpu, capability)
    for found in _chosen(name):
        request = gpu_request(
            found,
            shape,
            None if precision is None else precision.value,
            tf32=tf32,
        )
        context = nullcontext() if device is None else current_context(device.gpu_index)
        with context, interruptible() as (stop, _), _bar(found.name, stop) as progress:
            plan = ready_plan(
                library, request, target, progress=progress, rebuild=rebuild
            )
        how = "was there" if plan.build_s is None else f"built in {plan.build_s:.1f} s"
        typer.echo(
            f"{found.name} {request.precision}: {library.name} {library.release} plan "
            f"for {target.gpu}, {len(plan.data) / 1e6:.1f} MB, {how}"
        )


def _chosen(name: str) -> list[FoundEngine]:
    if name != ALL:
        return [find_engine(name)]
    return [
        found
        for found in list_engines()
        if "fp32" in found.card.files and not found.card.sees_image_alone
    ]


def _target(
    backend: BackendChoice, gpu: int | None, capability: str | None
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


def _library(backend: BackendChoice) -> TensorRt:
    reasons = []
    for name in LIBRARIES:
        if backend in (BackendChoice.auto, name):
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
            bars.update(
                task, description=f"{name}: {phase}", completed=done, total=steps
            )
            return not stop.is_set()

        yield progress
