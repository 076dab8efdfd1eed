"""Registry: recipes read from YAML, and which task trains the network they name."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from pydantic import ValidationError

from rtfocus.errors import ConfigError
from rtfocus.training.recipe import RecipeBase
from rtfocus.training.task import Task

# Name of the network: module in `rtfocus.training.networks` that holds its
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
    "rtfocus_2": "rtfocus_2",
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
    return import_module(f"rtfocus.training.networks.{_MODULES[network]}")


def load_recipe(path: Path) -> RecipeBase:
    """Read a recipe; its class is that of its network.

    The key ``base`` names another recipe beside this one, of which this one changes
    some values.

    Raises
    ------
    ConfigError
        Names the file and every key that does not fit, with the rule.
    """
    data = _read(path)
    try:
        return validate_recipe(data)
    except ValidationError as error:
        faults = "; ".join(
            f"'{'.'.join(str(part) for part in fault['loc'])}': {fault['msg']}"
            for fault in error.errors()
        )
        msg = f"recipe '{path}': {faults}; see configs/train_delpnet.yaml"
        raise ConfigError(msg) from error


def _read(path: Path, above: tuple[Path, ...] = ()) -> object:
    """Read the plain values of a recipe, those of its base included.

    `above` are the recipes that it is a base of.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"recipe '{path}' cannot be read: {error.strerror}; give a YAML file"
        raise ConfigError(msg) from error
    except yaml.YAMLError as error:
        msg = f"recipe '{path}' is not valid YAML: {error}"
        raise ConfigError(msg) from error
    if not isinstance(data, dict) or "base" not in data:
        return data
    base = path.parent / str(data.pop("base"))
    if base in (path, *above):
        msg = f"recipe '{base}' is its own base; name another one"
        raise ConfigError(msg)
    return _merge(_read(base, (path, *above)), data)


def _merge(base: object, changes: object) -> object:
    """Return `base` with the values that `changes` names, section by section."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    merged = {key: _merge(base.get(key), value) for key, value in changes.items()}
    return {**base, **merged}


def validate_recipe(data: object) -> RecipeBase:
    """Make a recipe of plain values, of the class its network asks for.

    Raises
    ------
    ConfigError
        If the network is unknown.
    pydantic.ValidationError
        If a key or value does not fit.
    """
    name = data.get("network") if isinstance(data, dict) else None
    return recipe_class(str(name)).model_validate(data)
