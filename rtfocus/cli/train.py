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
        str | None, typer.Argument(help="Recipe YAML, or the name of a shipped one.")
    ] = None,
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
    own: Annotated[
        Path | None,
        typer.Option(
            help="In place of a recipe: your sharp fields or z-stacks; they become a "
            "checked engine."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="With --own: folder and name of it."),
    ] = None,
    channel: Annotated[
        str | None, typer.Option(help="With --own: channel by name or number.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="With --own: how long to train.")
    ] = 20.0,
) -> None:
    """Train an engine from a recipe, or from your own images; resumable after a kill.

    [bold]Example:[/] rtfocus train train_delpnet

    [bold]From your own images to an engine:[/] rtfocus train --own my_images
    -o my_20x --optics NA=0.75,wavelength=520,pixel=0.325

    [bold]For your own objective:[/] rtfocus train train_delpnet_own
    --optics optics.yaml --images my_sharp_images --name my_20x
    """
    need_torch()
    _refuse_mixture(
        {"RECIPE": recipe, "--images": images, "--name": name}, own, output, channel
    )
    if own is not None and output is not None:
        from rtfocus.evaluation.own import OwnWish, train_own

        wish = OwnWish(
            own, output, optics, channel, minutes, device, workers, resume=resume
        )
        engine, verdict = train_own(wish, say=lambda line: typer.echo(line, err=True))
        typer.echo(f"engine '{engine.name}' with README and picture in '{engine}'")
        typer.echo(verdict.text)
        return
    from rtfocus.training.api import train_command

    train_command(
        find_config(str(recipe)),
        resume=resume,
        device=device,
        workers=workers,
        optics=optics,
        images=images,
        name=name,
    )


def _refuse_mixture(
    of_recipe: dict[str, object],
    own: Path | None,
    output: Path | None,
    channel: str | None,
) -> None:
    """Refuse options of the one way of training beside those of the other."""
    given = [option for option, value in of_recipe.items() if value is not None]
    if own is not None and given:
        msg = f"{', '.join(given)} cannot be used with --own: it chooses its own"
        raise ConfigError(msg)
    if own is not None and output is None:
        msg = "--own needs the engine's name: -o NAME"
        raise ConfigError(msg)
    if own is None and (output or channel):
        msg = "--output and --channel are for --own FOLDER"
        raise ConfigError(msg)
    if own is None and "RECIPE" not in given:
        msg = "name a recipe, e.g. train_delpnet, or your images: --own FOLDER -o NAME"
        raise ConfigError(msg)


def need_torch() -> None:
    """Say how to get torch where it is missing."""
    if find_spec("torch") is None:
        msg = "training needs torch, which is not installed: pip install rtfocus[train]"
        raise ConfigError(msg)
