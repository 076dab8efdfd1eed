"""Registry: which task trains a network, by the name a recipe gives."""

from importlib import import_module
from types import ModuleType
from typing import Any

from rtfocus.errors import ConfigError
from rtfocus.training.recipe import RecipeBase
from rtfocus.training.task import Task

# Name of the network: module in `rtfocus.training.tasks` that holds its
# `RECIPE` class and its `TASK` class.
_MODULES = {
    "comi": "comi",
    "delpnet": "delpnet",
    "learned_wiener": "learned_wiener",
    "multiscale": "multiscale",
    "mobilenet_v2": "rivals",
    "resnet18": "rivals",
    "rrdb": "rrdb",
    "rtfocus_1": "rtfocus_1",
    "wei_classifier": "wei_classifier",
    "wei_unet": "wei_unet",
}


def network_names() -> tuple[str, ...]:
    """Return the names a recipe may give."""
    return tuple(_MODULES)


def recipe_class(network: str) -> type[RecipeBase]:
    """Return the recipe class of a network; ConfigError for an unknown name."""
    found: type[RecipeBase] = _module(network).RECIPE
    return found


def make_task(recipe: RecipeBase) -> Task[Any]:
    """Make the task of a recipe, its network freshly initialised."""
    made: Task[Any] = _module(recipe.network).TASK(recipe)
    return made


def _module(network: str) -> ModuleType:
    if network not in _MODULES:
        msg = f"network '{network}' is unknown; choose one of {', '.join(_MODULES)}"
        raise ConfigError(msg)
    return import_module(f"rtfocus.training.tasks.{_MODULES[network]}")
