"""Commands: which there are, and the options that several share.

To add a command, write a module with ``add_to(app)`` and give it a line in `COMMANDS`:
it is loaded when it is run. Those that need next to nothing are here: ``configs`` and
``keys``, the files a user begins with.
"""

import importlib
import importlib.util
import inspect
import logging
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from rtfocus import __version__
from rtfocus.cli.endings import Interrupted
from rtfocus.errors import ConfigError, ExitCode, OutputError, writing
from rtfocus.files import resource_folder

if TYPE_CHECKING:
    from rtfocus.config import Config

DEBUG_VARIABLE = "RTFOCUS_DEBUG"
"""Environment variable that shows tracebacks, as ``--debug`` does."""


class LazyCommand(NamedTuple):
    """Where a command is, before it is loaded."""

    module: str
    """Module below `rtfocus.cli` whose ``add_to`` registers it."""
    summary: str
    """First line of its help."""


COMMANDS = {
    "demo": LazyCommand(
        "demo",
        "Show the whole loop without a microscope: stores, report and a picture.",
    ),
    "init": LazyCommand(
        "init",
        "Write a first config from what Micro-Manager finds and what you answer.",
    ),
    "run": LazyCommand(
        "live", "Acquire, find defocus, restore and record, all on this machine."
    ),
    "acquire": LazyCommand(
        "live",
        "Acquire one series and send it to a processor: the microscope side alone.",
    ),
    "process": LazyCommand(
        "live", "Receive, find defocus, restore and record: the processor side alone."
    ),
    "view": LazyCommand(
        "live", "Show a run in the browser: live, while it is written, or afterwards."
    ),
    "autofocus": LazyCommand(
        "live", "Find focus with the camera's own images, or hold it."
    ),
    "calibrate": LazyCommand(
        "psf", "Check autofocus against a z-stack through focus, up and down again."
    ),
    "keys": LazyCommand(
        "commands",
        "Make CURVE keys: they encrypt the connection and say who may connect.",
    ),
    "restore": LazyCommand(
        "offline", "Restore what is out of focus in image files, as a live run does."
    ),
    "classify": LazyCommand("offline", "Find the defocus of images, tile by tile."),
    "check": LazyCommand(
        "runs",
        "Check that a run folder is sound and that every frame is accounted for.",
    ),
    "report": LazyCommand(
        "runs", "Write the page of a run, report.html, again from its folder."
    ),
    "doctor": LazyCommand(
        "init", "Show what this machine has, what is missing, and the remedy."
    ),
    "configs": LazyCommand(
        "commands",
        "List the configs that come with rtfocus; copy one to make your own.",
    ),
    "train": LazyCommand(
        "train",
        "Train an engine by a recipe, or on your own images; continues after a kill.",
    ),
    "export": LazyCommand(
        "runs", "Export a run for other programs, or a checkpoint as an engine folder."
    ),
    "psf": LazyCommand("psf", "Measure your microscope's PSF."),
    "evaluate": LazyCommand(
        "train",
        "Compare engines side by side: quality, levels, cost; tables and pictures.",
    ),
    "kernels": LazyCommand("psf", "Extract the blur kernel of every tile of an image."),
    "engines": LazyCommand(
        "engines",
        "List the engines, look at one, add or share one, build GPU plans.",
    ),
}


def _as_meant(word: str) -> str:
    """Return a word of a command line with the home folder that no shell filled in.

    An empty one would be the folder one works in: it is refused.
    """
    option, is_joined, value = word.rpartition("=")
    if word == "" or (value == "" and re.fullmatch(r"--[a-z][a-z-]*", option)):
        msg = (
            f"'{word}' is empty, as of a variable without a value; give a value, or "
            "leave it out"
        )
        raise typer.BadParameter(msg)
    if value.startswith("~/") and (not is_joined or option.startswith("--")):
        return f"{option}{is_joined}{os.path.expanduser(value)}"
    return word


class LazyGroup(TyperGroup):
    """Knows every command by name and summary, and imports the one that is run."""

    # The types of typer's own classes differ between its releases.
    def __init__(self, **attributes: Any) -> None:  # noqa: ANN401
        super().__init__(**attributes)
        for name, (_, summary) in COMMANDS.items():
            command = TyperCommand(name, help=summary, short_help=summary)
            self.commands[name] = command

    def parse_args(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401
        """Parse, or show the commands where nothing is asked."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit(ExitCode.USAGE)
        return super().parse_args(ctx, [_as_meant(word) for word in args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401
        """Find the command that is called and load it."""
        name, command, resolved = super().resolve_command(ctx, args)
        return name, command if name is None else load(name), resolved

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run the command; typer would end an interrupt without a word."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, typer.Abort) as error:
            raise Interrupted from error


class OneInput(TyperCommand):
    """A command of one `InputArgument`, which says what to do with several images."""

    allow_extra_args = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        """Parse, and refuse what is left over."""
        further = super().parse_args(ctx, args)
        if further and not ctx.resilient_parsing:
            words = " ".join(further)
            ctx.fail(f"'{words}' is too much; a folder stands for all images in it")
        return further


def load(name: str) -> Any:  # noqa: ANN401 (as above)
    """Import a command's module and return the command."""
    module = importlib.import_module(f"rtfocus.cli.{COMMANDS[name].module}")
    loaded = typer.Typer(rich_markup_mode="rich")
    module.add_to(loaded)
    command = typer.main.get_group(loaded).commands[name]
    for one in (command, *getattr(command, "commands", {}).values()):
        one.help = _flowing(one.help or "")
        for param in one.params:
            # An option's is its type; an argument's would be its name in small letters.
            if param.param_type_name == "argument":
                param.metavar = param.metavar or param.name.upper()
            elif param.is_flag:
                # Its type reads as if a value followed.
                param.metavar = ""
    return command


def _flowing(text: str) -> str:
    """Join the lines of a help that its source broke; a command line begins its own."""
    return re.sub(r"(?<!\n)\n(?!\n|rtfocus |\[bold\])", " ", inspect.cleandoc(text))


app = typer.Typer(
    name="rtfocus",
    cls=LazyGroup,
    help="Finds, corrects and records defocus while a microscope acquires.\n\n"
    "Try it without a microscope: rtfocus demo. On images you have: rtfocus restore. "
    "At your microscope: rtfocus init, then rtfocus run.",
    pretty_exceptions_enable=False,
    # Plain: importing rich takes longer than all the rest of the list of commands.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is now: above a screen that is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rtfocus {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show it."
    ),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what happens."),
    debug: bool = typer.Option(
        False,
        "--debug",
        envvar=DEBUG_VARIABLE,
        help="Show the traceback of an error.",
    ),
) -> None:
    if debug:
        # In the environment, so that child processes show theirs too.
        os.environ[DEBUG_VARIABLE] = "1"
    level = logging.INFO if verbose else logging.WARNING
    # Of the handler: pymmcore-plus sets that of the root to DEBUG when it is imported.
    shown = _StandardError()
    shown.setLevel(level)
    logging.basicConfig(
        level=level,
        handlers=[shown],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="YAML file, or a shipped config by name, such as demo."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key, e.g. [bold]store.codec=zstd[/]; repeatable.",
    ),
]
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
        help="Config with optics, camera and engines; default: as the file states.",
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an earlier result of rtfocus; never an input."
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress display.")
]


def need_torch() -> None:
    """Say how to get torch where it is missing."""
    if importlib.util.find_spec("torch") is None:
        msg = (
            'training needs torch, which is not installed: pip install "rtfocus[train]"'
        )
        raise ConfigError(msg)


def refuse_options(options: dict[str, Any], because: str) -> None:
    """Refuse options that mean nothing here; those that are None are not given."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        msg = f"{', '.join(given)} cannot be used: {because}"
        raise ConfigError(msg)


def read_config(name: str | None, overrides: list[str] | None) -> "Config":
    """Load a config given by path or name, else the defaults, with its overrides."""
    # Loaded where it is used: a list of commands is shown at once.
    from rtfocus.config import Config, load_config
    from rtfocus.config.loading import overridden

    if name is not None:
        return load_config(name, overrides or ())
    return overridden(Config(), overrides or ())


_FOR_USERS = (
    "demo",
    "micromanager",
    "democamera",
    "replay",
    "virtual_tilt",
    "virtual_hold",
)
"""Shown first, in this order; what is in no list is shown too."""
_RECIPES = "train_"

_configs = typer.Typer(
    name="configs", invoke_without_command=True, rich_markup_mode="rich"
)


def add_to(commands: typer.Typer) -> None:
    """Register the commands of this module, which need next to nothing loaded."""
    commands.add_typer(_configs)
    commands.command()(keys)


@_configs.callback()
def configs(
    context: typer.Context,
    show_reference: Annotated[
        bool, typer.Option("--reference", help="Print every key as Markdown instead.")
    ] = False,
) -> None:
    """List the configs that come with rtfocus; copy one to make your own.

    [bold]Example:[/] rtfocus configs copy micromanager my_microscope.yaml
    """
    if context.invoked_subcommand is not None:
        return
    if show_reference:
        from rtfocus.config.model import reference

        typer.echo(reference(), nl=False)
        return
    folder = resource_folder("configs")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    recipes = [name for name in names if name.startswith(_RECIPES)]
    first = [name for name in _FOR_USERS if name in names]
    width = max(20, min(shutil.get_terminal_size().columns, 100) - 1)
    for name in [*first, *(n for n in names if n not in {*first, *recipes})]:
        about = _about(folder / f"{name}.yaml")
        typer.echo(_hanging(f"{name:15} ", about, width))
    typer.echo(
        "\nCopy one: rtfocus configs copy NAME. Ask your microscope: rtfocus init."
    )
    typer.echo("\nRecipes of the engines (rtfocus train NAME):")
    typer.echo(_hanging("  ", ", ".join(recipes), width))
    typer.echo(f"\nAll are in {folder}")


def _hanging(first: str, text: str, width: int) -> str:
    indent = " " * len(first)
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=indent)


@_configs.command()
def copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped config.")],
    target: Annotated[
        Path | None, typer.Argument(help="File to write; without it NAME.yaml here.")
    ] = None,
) -> None:
    """Copy a shipped config to make it your own; nothing is ever replaced.

    [bold]Example:[/] rtfocus configs copy micromanager my_microscope.yaml
    """
    from rtfocus.config.loading import find_config

    source = find_config(name)
    path = target or Path(f"{source.stem}.yaml")
    if path.is_dir():
        path = path / f"{source.stem}.yaml"
    write_new(path, source.read_text("utf-8"))
    typer.echo(path)


def write_new(path: Path, text: str) -> None:
    """Write a file; one that is there is kept, and that is an error."""
    try:
        with writing(path, OutputError), path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OutputError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        msg = f"'{path}' is there already; give another name"
        raise OutputError(msg) from error


def _about(path: Path) -> str:
    """Return the sentence that a config begins with."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        text = line.removeprefix("# ")
        if not line.startswith("# ") or text.startswith(" "):
            break
        lines.append(text)
    sentence, _, _ = " ".join(lines).partition(". ")
    return sentence.rstrip(".:") + "."


def keys(
    folder: Annotated[
        Path, typer.Argument(metavar="NAME", help="Folder to make, with the keys.")
    ],
) -> None:
    """Make CURVE keys: they encrypt the connection and say who may connect.

    Existing keys are never replaced.

    [bold]Example:[/] rtfocus keys lab-keys
    """
    from rtfocus.transport.sockets import create_keys

    path = create_keys(folder)
    typer.echo(
        f"keys in '{path}'; set transport.curve_keys to this folder on both sides.\n"
        "microscope side:  server.key_secret, clients/client.key\n"
        "processor:        client.key_secret, server.key\n"
        "viewers:          client.key_secret, client.key\n"
        "Copy each side its files only, and keep every key_secret to yourself."
    )
