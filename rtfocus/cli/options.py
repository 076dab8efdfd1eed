"""Options that several commands share."""

from typing import Annotated

import typer

from rtfocus.config import Config, load_config

ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="YAML file, or the name of a shipped config: demo ..."
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
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an earlier result of rtfocus; never an input."
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress display.")
]


def read_config(name: str, overrides: list[str] | None) -> Config:
    """Load a config given by path or name with its ``--set`` overrides."""
    return load_config(name, overrides or ())
