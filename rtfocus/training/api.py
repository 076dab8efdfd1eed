"""Training commands: what `rtfocus train` and `rtfocus export` call."""

import logging
from pathlib import Path

from rtfocus.errors import ConfigError
from rtfocus.images.optics import read_optics
from rtfocus.images.outputs import OutputGuard
from rtfocus.training.export import export_engine, parse_precisions
from rtfocus.training.own_optics import own_recipe
from rtfocus.training.task import load_recipe
from rtfocus.training.trainer import train

_log = logging.getLogger(__name__)


def train_command(
    recipe: Path,
    resume: bool,
    device: str,
    *,
    workers: int = 0,
    optics: str | None = None,
    images: Path | None = None,
    name: str | None = None,
) -> Path:
    """Train the network of a recipe; returns its newest checkpoint.

    Parameters
    ----------
    recipe
        YAML file, see `rtfocus.training.recipe.RecipeBase`.
    resume
        Go on from the newest checkpoint of the same recipe, if there is one.
    device
        ``cpu``, ``cuda`` or ``auto``.
    workers
        Processes that make batches ahead, see `rtfocus.training.feed`.
    optics, images
        The user's own, see `rtfocus.training.own_optics`; both or none.
    name
        Of a run on own optics; None: that of the recipe.

    Raises
    ------
    ConfigError
        If the recipe, its data, the device or the checkpoint cannot be used.
    """
    chosen = load_recipe(recipe)
    if (optics is None) != (images is None):
        msg = "own optics need own sharp images: give both --optics and --images"
        raise ConfigError(msg)
    if optics is not None and images is not None:
        own = read_optics(optics)
        chosen = own_recipe(chosen, own, images, name=name or chosen.name)
    newest = train(chosen, resume=resume, device=device, workers=workers)
    _log.info("trained: '%s'; next: rtfocus export %s -o engines/NAME", newest, newest)
    return newest


def export_command(
    checkpoint: Path,
    output: Path,
    *,
    mean_with: Path | None = None,
    half_weights: bool = False,
    precision: str = "fp32",
    overwrite: bool = False,
) -> Path:
    """Write an engine folder from a checkpoint, whole; returns its card.

    `mean_with` is a second checkpoint of the same network, half of whose weights go
    into the engine; `half_weights` stores them in 16 bits; `precision` is a list
    such as ``fp32,fp16,int8``; `overwrite` replaces an earlier export.

    Raises
    ------
    ConfigError
        If the checkpoint cannot be read, or a precision is unknown or cannot be made.
    OutputError
        If `output` must not be replaced or cannot be written.
    """
    precisions = parse_precisions(precision)
    guard = OutputGuard(filter(None, (checkpoint, mean_with)), overwrite=overwrite)
    guard.claim(output)
    with guard.whole(output) as part:
        card = export_engine(
            checkpoint,
            part,
            name=output.resolve().name,
            mean_with=mean_with,
            half_weights=half_weights,
            precisions=precisions,
        )
    card = output / card.name
    _log.info("exported: '%s'", card)
    return card
