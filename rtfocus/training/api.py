"""Training commands: what `rtfocus train` and `rtfocus export` call.

And a recipe turned to the user's objective and sharp images: engines are trained for
the optics of their recipe. Here those are replaced, with all lengths along the axis
kept in units of the defocus that the optics resolve, and the recipe's images give way
to a folder of the user's.
"""

import logging
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rtfocus.channel import OpticalSystem
from rtfocus.config.sections import Section
from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.images.optics import read_optics
from rtfocus.images.outputs import OutputGuard
from rtfocus.training.export import export_engine, parse_precisions
from rtfocus.training.networks.rtfocus_2 import Rtfocus2Recipe
from rtfocus.training.recipe import RecipeBase, SourceRecipe
from rtfocus.training.task import load_recipe, validate_recipe
from rtfocus.training.trainer import train

_SUFFIXES = (".tif", ".tiff", ".png")
_HELD_OUT = 5
_SECTIONS = ("blur", "pairs", "signed")


def own_recipe(
    recipe: RecipeBase, optics: OpticalSystem, images: Path, *, name: str
) -> RecipeBase:
    """Turn a recipe to other optics and images.

    Parameters
    ----------
    recipe
        Of any network that learns from blurred images.
    optics
        The user's, calibrated if possible (`rtfocus psf fit`).
    images
        Folder of sharp images, with those in its subfolders. Every fifth file, by
        name, is held out.
    name
        Of the run.

    Raises
    ------
    ConfigError
        If the recipe has no optics or the folder no images.
    """
    source = _own_source(images)
    return _turned(recipe, optics, name, {"data_folder": images, "sources": [source]})


REFINED = {"rtfocus-2": "train_rtfocus_2", "multiscale": "train_multiscale"}
"""Shipped engines that are trained on with a laboratory's images, and their recipes."""


def refining_recipe(
    start: str,
    optics: OpticalSystem,
    folder: Path,
    files: Sequence[str],
    *,
    name: str,
    checkpoints: Path,
    steps: int,
) -> RecipeBase:
    """Make the recipe that trains a shipped engine on with own images.

    Parameters
    ----------
    start
        Of `REFINED`.
    optics
        Of the images.
    folder, files
        Sharp planes to train on, as files below a folder.
    name, checkpoints
        Of the run, and where its state goes.
    steps
        Length of the run.
    """
    recipe = load_recipe(resource_folder("configs") / f"{REFINED[start]}.yaml")
    source = SourceRecipe(
        kind="own images",
        files=[escape(file) for file in files],
        zoom=(0.85, 1.15),
        native_share=0.7,
        softness_px=0.35,
        share=4.0,
    )
    changed: dict[str, Any] = {
        "data_folder": folder,
        "sources": [source],
        "checkpoints": checkpoints,
        "start_from": Path("engines") / start,
        "checkpoint_steps": 25,
        "specimens": {**_plain(recipe.specimens), "share": 1.0},
        "pool": {**_plain(recipe.pool), "entries": 48, "shards": 4},
        "pairs": {"reference_share": 0.5, "near_share": 0.3, "sharp_share": 0.12},
        "optimiser": {
            **_plain(recipe.optimiser),
            "steps": steps,
            # Weights that are good already are spoilt by longer strides.
            "rate": 1e-4,
            "warmup_steps": max(steps // 10, 1),
            "decay": "cosine",
            "average_decay": 0.98,
        },
    }
    if isinstance(recipe, Rtfocus2Recipe):
        changed["rtfocus_2"] = {
            **_plain(recipe.rtfocus_2),
            "trained": "all",
            "label_weight": 0.03,
            "blind_share": 0.3,
            "hidden_sampling_share": 0.3,
        }
    return _turned(recipe, optics, name, changed)


def _plain(section: Section | None) -> dict[str, Any]:
    return {} if section is None else section.model_dump(mode="json")


def _turned(
    recipe: RecipeBase, optics: OpticalSystem, name: str, changed: dict[str, Any]
) -> RecipeBase:
    """Return a recipe for other optics, with some of its values changed."""
    data = recipe.model_dump(mode="json")
    section = next((s for s in _SECTIONS if "reference" in (data.get(s) or {})), None)
    if section is None:
        msg = (
            f"recipe '{recipe.name}' has no reference optics to replace; use one of "
            "train_delpnet_own, train_rtfocus_1, train_wei_classifier"
        )
        raise ConfigError(msg)
    earlier: OpticalSystem = getattr(recipe, section).reference
    factor = optics.defocus_unit_um / earlier.defocus_unit_um
    scaled = {
        key: value * factor if key.endswith("_um") else value
        for key, value in data[section].items()
    }
    scaled["reference"] = TypeAdapter(OpticalSystem).dump_python(optics, mode="json")
    if "real" in scaled:
        # Real pairs belong to the microscope they were taken with.
        scaled["real"] = []
    data |= {**changed, section: {**scaled, **changed.get(section, {})}, "name": name}
    data["data_folder"] = str(Path(data["data_folder"]).resolve())
    return validate_recipe(data)


def _own_source(images: Path) -> SourceRecipe:
    found = sorted(
        path.relative_to(images)
        for path in images.rglob("*")
        if path.suffix.lower() in _SUFFIXES
    )
    if not found:
        msg = f"no images in '{images}'; give a folder with {', '.join(_SUFFIXES)}"
        raise ConfigError(msg)
    # Names are the user's: they may hold what a pattern takes for its own, and two
    # folders may hold the same.
    files = [escape(path.as_posix()) for path in found]
    return SourceRecipe(
        kind="own images",
        files=files,
        validation=tuple(f"/{file}" for file in files[_HELD_OUT - 1 :: _HELD_OUT]),
        zoom=(0.85, 1.15),
        native_share=0.7,
        softness_px=0.35,
        share=4.0,
    )


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
        The user's own, see `own_recipe`; both or none.
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
