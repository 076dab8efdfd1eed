"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from rtfocus.config import Config, load_config
from rtfocus.errors import ConfigError
from rtfocus.resources import resource_folder

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


def find_config(name: str) -> Path:
    """Return the path of a config given by path or by the name of a shipped one.

    Raises
    ------
    ConfigError
        If it is neither; lists the shipped names.
    """
    path = Path(name)
    # A run folder or a data folder may well be called like a shipped config.
    if path.is_file():
        return path
    folder = resource_folder("configs")
    shipped = folder / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    msg = f"config '{name}' is no file and no shipped config; shipped: {names}"
    raise ConfigError(msg)


def read_config(name: str, overrides: list[str] | None) -> Config:
    """Load a config given by path or name with its ``--set`` overrides."""
    return load_config(find_config(name), overrides or ())
