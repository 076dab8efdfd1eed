"""Configs command: the shipped configs, and every key of a config."""

from typing import Annotated

import typer

from rtfocus.config.model import reference
from rtfocus.files import resource_folder


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(configs)


def configs(
    show_reference: Annotated[
        bool, typer.Option("--reference", help="Print every key as Markdown instead.")
    ] = False,
) -> None:
    """List the configs that come with rtfocus; copy one to make your own.

    [bold]Example:[/] rtfocus configs
    """
    if show_reference:
        typer.echo(reference(), nl=False)
        return
    for path in sorted(resource_folder("configs").glob("*.yaml")):
        first = path.read_text("utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{path.stem:16} {first}\n{'':16} {path}")
