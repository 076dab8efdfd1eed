"""Train command; torch is imported only when it runs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from rtfocus.config import find_config
from rtfocus.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(train)


def train(
    recipe: Annotated[
        str, typer.Argument(help="Recipe YAML, or the name of a shipped one.")
    ],
    resume: Annotated[
        bool, typer.Option(help="Go on from the newest checkpoint, if there is one.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes that make batches ahead; the weights are the same.",
        ),
    ] = 0,
    optics: Annotated[
        str | None,
        typer.Option(
            help="Your optics: a file of [bold]rtfocus psf fit[/], or "
            "NA=0.75,wavelength=520,pixel=0.325; needs --images."
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of your own sharp images.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of a run on your own optics.")
    ] = None,
) -> None:
    """Train an engine from a recipe; resumable after a kill.

    [bold]Example:[/] rtfocus train train_delpnet

    [bold]For your own objective:[/] rtfocus train train_delpnet_own
    --optics optics.yaml --images my_sharp_images --name my_20x
    """
    need_torch()
    from rtfocus.training.api import train_command

    train_command(
        find_config(recipe),
        resume=resume,
        device=device,
        workers=workers,
        optics=optics,
        images=images,
        name=name,
    )


def need_torch() -> None:
    """Say how to get torch where it is missing."""
    if find_spec("torch") is None:
        msg = "training needs torch, which is not installed: pip install rtfocus[train]"
        raise ConfigError(msg)
