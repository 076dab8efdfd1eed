"""Export: from a checkpoint to an engine folder that runs without torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from rtfocus.resources import resource_folder
from rtfocus.training.checkpoint import load_checkpoint
from rtfocus.training.precisions import Precision, write_precisions
from rtfocus.training.recipe import RecipeBase
from rtfocus.training.registry import make_task
from rtfocus.training.start import find_engine, identity
from rtfocus.training.task import Task

CARD_NAME = "engine.yaml"


def export_engine(
    checkpoint: Path,
    folder: Path,
    *,
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
    half_weights
        Store weights in 16 bits, see `rtfocus.training.half_weights`.
    precisions
        Files to write, see `rtfocus.training.precisions`.

    Raises
    ------
    ConfigError
        If the checkpoint cannot be read, or int8 lacks the training data.
    """
    recipe, state = load_checkpoint(checkpoint)
    task, network = trained(recipe, state)
    folder.mkdir(parents=True, exist_ok=True)
    files = write_precisions(
        task, network, folder, precisions, half_weights=half_weights
    )
    card = {
        "name": folder.resolve().name,
        **task.card(),
        "files": dict(files),
        "sha256": {
            precision: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for precision, name in files.items()
        },
        "trained": {
            **_history(recipe, state),
            "data": [source.kind for source in recipe.sources],
            "split": "by field",
            "threads": recipe.threads,
            "weights_bits": 16 if half_weights else 32,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
    }
    path = folder / CARD_NAME
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=88)
    path.write_text(text, encoding="utf-8")
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
        # A recipe of the user's own has a name that nobody else finds.
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
    folder = find_engine(source)
    if folder is not None:
        return {"engine": identity(folder)}
    if source.is_file():
        return _history(*load_checkpoint(source))
    return str(source)
