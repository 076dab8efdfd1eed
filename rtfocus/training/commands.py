"""Training commands: what `rtfocus train` and `rtfocus export` call.

From a checkpoint to an engine folder that runs without torch. And a recipe turned to
the user's objective and sharp images: engines are trained for the optics of their
recipe. Here those are replaced, with all lengths along the axis kept in units of the
defocus that the optics resolve, and the recipe's images give way to a folder of the
user's.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from torch import nn

from rtfocus.channel import OpticalSystem
from rtfocus.config.sections import Section
from rtfocus.engines.card import CARD_NAME, Precision, identity, read_card
from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.images.metadata import TEXT_MARK
from rtfocus.images.optics import read_optics
from rtfocus.images.outputs import OutputGuard
from rtfocus.training.feed import (
    engine_folder,
    load_checkpoint,
    mean_state,
)
from rtfocus.training.networks.rtfocus import Rtfocus2Recipe
from rtfocus.training.onnx_forms import (
    calibration_inputs,
    halve_weights,
    inner_convolutions,
    quantise,
    write_half_network,
    write_onnx,
)
from rtfocus.training.recipe import (
    RecipeBase,
    SourceRecipe,
    file_name,
    load_recipe,
    parse_precisions,
    validate_recipe,
)
from rtfocus.training.task import Task, make_task
from rtfocus.training.trainer import train


def write_precisions(
    task: Task[Any],
    network: nn.Module,
    folder: Path,
    precisions: Sequence[Precision],
    *,
    half_weights: bool,
) -> dict[Precision, str]:
    """Write a network in several precisions.

    Parameters
    ----------
    task
        Of the network; its training data sets the ranges of int8.
    network
        Trained weights, for inference.
    folder
        Where the files go.
    precisions
        ``fp32`` is written whether named or not: it is the reference. ``fp16``
        computes in half precision, ``int8`` in 8 bits between Q/DQ nodes.
    half_weights
        Store the weights that compute in float32 in 16 bits.

    Returns
    -------
    dict
        File name by precision.

    Raises
    ------
    ConfigError
        If int8 is wanted and the training data are not there.
    """
    graph = task.graph(network)
    reference = folder / file_name("fp32")
    write_onnx(graph, reference)
    files: dict[Precision, str] = {"fp32": reference.name}
    if "fp16" in precisions:
        files["fp16"] = file_name("fp16")
        write_half_network(reference, folder / files["fp16"])
    if "int8" in precisions:
        files["int8"] = file_name("int8")
        batches = calibration_inputs(task, tuple(graph.inputs))
        inner = inner_convolutions(reference, graph.float_ends, graph.exact_output)
        quantise(reference, folder / files["int8"], batches, inner)
    if half_weights:
        for precision in files.keys() - {"fp16"}:
            halve_weights(folder / files[precision])
    return files


def export_engine(
    checkpoint: Path,
    folder: Path,
    *,
    name: str | None = None,
    mean_with: Sequence[Path] = (),
    half_weights: bool = False,
    precisions: Sequence[Precision] = ("fp32",),
) -> Path:
    """Write weights and card of a checkpoint's averaged network; returns the card.

    Parameters
    ----------
    checkpoint
        Of any network.
    folder
        Of the engine; made where it is missing.
    name
        Of the engine; None: that of the folder.
    mean_with
        Checkpoints of the same network: the mean of all goes into the engine.
    half_weights
        Store weights in 16 bits, see `rtfocus.training.onnx_forms`.
    precisions
        Files to write, see `rtfocus.training.commands`.

    Raises
    ------
    ConfigError
        If the checkpoint cannot be read, or int8 lacks the training data.
    """
    recipe, state = mean_state(mean_with, checkpoint)
    task, network = trained(recipe, state)
    folder.mkdir(parents=True, exist_ok=True)
    files = write_precisions(
        task, network, folder, precisions, half_weights=half_weights
    )
    card = {
        "name": name or folder.resolve().name,
        **task.card(),
        "files": dict(files),
        "sha256": {
            precision: hashlib.sha256((folder / file).read_bytes()).hexdigest()
            for precision, file in files.items()
        },
        "trained": {
            **_history(recipe, state),
            **(
                {"mean_with": [_earlier(one) for one in mean_with]} if mean_with else {}
            ),
            "data": [source.kind for source in recipe.sources],
            "split": "by field",
            "threads": recipe.threads,
            "parts": recipe.parts if task.in_parts else 1,
            "weights_bits": 16 if half_weights else 32,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
    }
    return write_card(folder, card)


def write_card(folder: Path, card: Mapping[str, Any]) -> Path:
    """Write the card of an engine folder; returns its path."""
    path = folder / CARD_NAME
    text = yaml.safe_dump(dict(card), sort_keys=False, allow_unicode=True, width=88)
    path.write_text(f"{TEXT_MARK}\n{text}", encoding="utf-8")
    return path


def trained(recipe: RecipeBase, state: dict[str, Any]) -> tuple[Task[Any], nn.Module]:
    """Return the task of a checkpoint and its averaged network, for inference."""
    task = make_task(recipe)
    task.network.load_state_dict(state["average"])
    return task, task.network.eval()


def _history(recipe: RecipeBase, state: dict[str, Any]) -> dict[str, Any]:
    """Say how the weights came about, the runs they started from included."""
    name = f"train_{recipe.name}"
    shipped = (resource_folder("configs") / f"{name}.yaml").is_file()
    history: dict[str, Any] = {
        # A recipe of the user's own has a name that others cannot find.
        **({"command": f"rtfocus train {name}"} if shipped else {"run": recipe.name}),
        "seed": recipe.seed,
        "steps": state["step"],
        "minutes": round(state["seconds"] / 60),
    }
    if recipe.start_from is not None:
        history["after"] = _earlier(recipe.start_from)
    return history


def _earlier(source: Path) -> dict[str, Any] | str:
    """Say where the first weights came from: a run, an engine, or a lost file."""
    folder = engine_folder(source)
    if folder is not None:
        return {"engine": identity(read_card(folder))}
    if source.is_file():
        return _history(*load_checkpoint(source))
    return str(source)


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
    paths = sorted(
        path.relative_to(images)
        for path in images.rglob("*")
        if path.suffix.lower() in _SUFFIXES
    )
    if not paths:
        msg = f"no images in '{images}'; give a folder with {', '.join(_SUFFIXES)}"
        raise ConfigError(msg)
    # Names are the user's: they may hold what a pattern takes for its own, and two
    # folders may hold the same.
    files = [escape(path.as_posix()) for path in paths]
    held_out = tuple(f"/{file}" for file in files[_HELD_OUT - 1 :: _HELD_OUT])
    source = _own_source(files, held_out)
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
    source = _own_source([escape(file) for file in files])
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
    return validate_recipe(data, f"recipe '{recipe.name}' for other optics")


def _own_source(files: list[str], held_out: tuple[str, ...] = ()) -> SourceRecipe:
    return SourceRecipe(
        kind="own images",
        files=files,
        validation=held_out,
        zoom=(0.85, 1.15),
        native_share=0.7,
        softness_px=0.35,
        share=4.0,
    )


logger = logging.getLogger(__name__)


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
        Cores to use, see `rtfocus.training.trainer.Trainer`.
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
    logger.info(
        "trained: '%s'; next: rtfocus export %s -o engines/NAME", newest, newest
    )
    return newest


def export_command(
    checkpoint: Path,
    output: Path,
    *,
    mean_with: Sequence[Path] = (),
    half_weights: bool = False,
    precision: str = "fp32",
    overwrite: bool = False,
) -> Path:
    """Write an engine folder from a checkpoint, whole; returns its card.

    `mean_with` are other checkpoints of the same network, whose mean with it becomes
    the engine; `half_weights` stores them in 16 bits; `precision` is a list
    such as ``fp32,fp16,int8``; `overwrite` replaces an earlier export.

    Raises
    ------
    ConfigError
        If the checkpoint cannot be read, or a precision is unknown or cannot be made.
    OutputError
        If `output` must not be replaced or cannot be written.
    """
    precisions = parse_precisions(precision)
    guard = OutputGuard((checkpoint, *mean_with), overwrite=overwrite)
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
    logger.info("exported: '%s'", card)
    return card
