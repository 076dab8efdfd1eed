"""Start: the weights a training run begins with instead of random ones.

They come from a checkpoint, or from an engine whose checkpoint is long gone:
``start_from: engines/delpnet`` refines the shipped network.
"""

import hashlib
from pathlib import Path
from typing import Any

import onnx
import yaml
from torch import Tensor

from rtfocus.errors import ConfigError
from rtfocus.resources import resource_folder
from rtfocus.training.checkpoint import load_checkpoint
from rtfocus.training.half_weights import float_weights
from rtfocus.training.task import Task

_CARD_NAME = "engine.yaml"


def start_from(task: Task[Any], source: Path) -> None:
    """Give the network of a task its first weights.

    Parameters
    ----------
    task
        Its network takes the weights.
    source
        Checkpoint file, or engine folder; ``engines/NAME`` also finds a shipped one.

    Raises
    ------
    ConfigError
        If there is nothing at `source`, or weights of another network.
    """
    folder = find_engine(source)
    if folder is None:
        _, earlier = load_checkpoint(source)
        weights = earlier["average"]
    else:
        weights = read_weights(folder)
    try:
        if folder is None:
            task.network.load_state_dict(weights)
        else:
            task.take_exported(weights)
    except (KeyError, RuntimeError) as error:
        msg = (
            f"start_from '{source}' holds no weights of network "
            f"'{task.recipe.network}': {error}; give one that was trained for it"
        )
        raise ConfigError(msg) from error


def find_engine(source: Path) -> Path | None:
    """Return the engine folder that `source` names; None: it is a file."""
    if source.is_dir():
        return source
    if not source.exists() and len(source.parts) == 2 and source.parts[0] == "engines":
        shipped = resource_folder("engines") / source.name
        return shipped if shipped.is_dir() else None
    return None


def identity(folder: Path) -> str:
    """Return ``name@hash`` of an engine, as its runs record it."""
    card = _read_card(folder)
    return f"{card['name']}@{card['sha256']['fp32'][:12]}"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the float32 weights of an engine by name.

    Raises
    ------
    ConfigError
        If card or weights are missing or do not belong together.
    """
    card = _read_card(folder)
    path = folder / card["files"]["fp32"]
    try:
        content = path.read_bytes()
    except OSError as error:
        msg = f"weights '{path}' cannot be read: {error.strerror}; copy the engine"
        raise ConfigError(msg) from error
    if hashlib.sha256(content).hexdigest() != card["sha256"]["fp32"]:
        msg = f"weights '{path}' are not those of their card; copy the engine again"
        raise ConfigError(msg)
    return float_weights(onnx.load_from_string(content).graph)


def _read_card(folder: Path) -> dict[str, Any]:
    """Read what starting needs of a card: name, file and checksum of the weights."""
    path = folder / _CARD_NAME
    try:
        card: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        _ = card["name"], card["files"]["fp32"], card["sha256"]["fp32"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        msg = (
            f"engine card '{path}' names no fp32 weights ({error}); "
            "an engine is a folder with an engine.yaml"
        )
        raise ConfigError(msg) from error
    return card
