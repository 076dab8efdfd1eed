"""Keys: ``rtfocus keys`` makes what two computers need to trust each other."""

from pathlib import Path
from typing import Annotated

import typer

from rtfocus.transport.sockets import create_keys


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command()(keys)


def keys(
    folder: Annotated[
        Path, typer.Argument(metavar="NAME", help="Folder to make, with the keys.")
    ],
) -> None:
    """Make CURVE keys that encrypt the connection and name who may connect.

    Existing keys are never replaced.

    [bold]Example:[/] rtfocus keys lab-keys
    """
    made = create_keys(folder)
    typer.echo(
        f"keys in '{made}'; set transport.curve_keys to this folder on both sides.\n"
        "microscope side:  server.key_secret, clients/client.key\n"
        "processor:        client.key_secret, server.key, clients/client.key\n"
        "viewers:          client.key_secret, client.key\n"
        "Copy each side its files only, and keep every key_secret to yourself."
    )
