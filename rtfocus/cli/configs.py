"""Configs and keys: files a user begins with: shipped configs, and keys to connect."""

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from rtfocus.config.loading import find_config
from rtfocus.config.model import reference
from rtfocus.errors import OutputError
from rtfocus.files import resource_folder

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

app = typer.Typer(name="configs", invoke_without_command=True, rich_markup_mode="rich")


def add_to(commands: typer.Typer) -> None:
    """Register the commands of this module."""
    commands.add_typer(app)
    commands.command()(keys)


@app.callback()
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
        typer.echo(reference(), nl=False)
        return
    folder = resource_folder("configs")
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    recipes = [name for name in names if name.startswith(_RECIPES)]
    first = [name for name in _FOR_USERS if name in names]
    width = max(20, min(shutil.get_terminal_size().columns, 100) - 1)
    for name in [*first, *(n for n in names if n not in {*first, *recipes})]:
        said = textwrap.wrap(_about(folder / f"{name}.yaml"), width - 16)
        typer.echo(
            "\n".join(f"{a:15} {b}" for a, b in zip([name], said[:1], strict=False))
        )
        for line in said[1:]:
            typer.echo(f"{'':15} {line}")
    typer.echo(
        "\nCopy one: rtfocus configs copy NAME. Ask your microscope: rtfocus init."
    )
    typer.echo("\nRecipes of the engines (rtfocus train NAME):")
    typer.echo(
        textwrap.fill(
            ", ".join(recipes), width, initial_indent="  ", subsequent_indent="  "
        )
    )
    typer.echo(f"\nAll are in {folder}")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Of a shipped config.")],
    target: Annotated[
        Path | None, typer.Argument(help="File to write; without it NAME.yaml here.")
    ] = None,
) -> None:
    """Copy a shipped config to make it your own; nothing is ever replaced.

    [bold]Example:[/] rtfocus configs copy micromanager my_microscope.yaml
    """
    source = find_config(name)
    path = target or Path(f"{source.stem}.yaml")
    if path.is_dir():
        path = path / f"{source.stem}.yaml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(source.read_text("utf-8"))
    except FileExistsError as error:
        msg = f"'{path}' is there already; give another name"
        raise OutputError(msg) from error
    except OSError as error:
        msg = f"'{path}' cannot be written: {error.strerror}"
        raise OutputError(msg) from error
    typer.echo(path)


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
    """Make CURVE keys that encrypt the connection and name who may connect.

    Existing keys are never replaced.

    [bold]Example:[/] rtfocus keys lab-keys
    """
    # ZeroMQ is loaded for this alone.
    from rtfocus.transport.sockets import create_keys

    made = create_keys(folder)
    typer.echo(
        f"keys in '{made}'; set transport.curve_keys to this folder on both sides.\n"
        "microscope side:  server.key_secret, clients/client.key\n"
        "processor:        client.key_secret, server.key, clients/client.key\n"
        "viewers:          client.key_secret, client.key\n"
        "Copy each side its files only, and keep every key_secret to yourself."
    )
