"""Checkpoint: the state of a training run, written so that a kill cannot spoil it."""

import os
from pathlib import Path
from typing import Any

import torch

from rtfocus.errors import ConfigError
from rtfocus.training.recipe import RecipeBase, validate_recipe

NEWEST = "last.pt"
_FORMAT = 2


def save_checkpoint(path: Path, recipe: RecipeBase, state: dict[str, Any]) -> None:
    """Write recipe and state; the old file stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {"format": _FORMAT, "recipe": recipe.model_dump(mode="json"), **state}, partial
    )
    os.replace(partial, path)


def load_checkpoint(path: Path) -> tuple[RecipeBase, dict[str, Any]]:
    """Read a checkpoint; tensors land on the CPU.

    Raises
    ------
    ConfigError
        If the file is missing, damaged or of another format.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        msg = f"no checkpoint at '{path}'; make one with: rtfocus train RECIPE"
        raise ConfigError(msg) from error
    except Exception as error:  # torch raises whatever the unpickler met
        msg = f"checkpoint '{path}' cannot be read: {error}; train again"
        raise ConfigError(msg) from error
    if state.get("format") != _FORMAT:
        msg = (
            f"checkpoint '{path}' has format {state.get('format')}, this version reads "
            f"{_FORMAT}; train again"
        )
        raise ConfigError(msg)
    return validate_recipe(state.pop("recipe")), state
