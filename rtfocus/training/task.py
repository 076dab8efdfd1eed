"""Task: what a network learns, from its batches to the card of its engine.

Which task a recipe asks for, its key ``network`` says; that module alone is imported.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from rtfocus.config.loading import read_yaml
from rtfocus.errors import ConfigError
from rtfocus.machine import multiplies_bf16
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.training.recipe import PairsRecipe, RecipeBase

Arrays = Mapping[str, NDArray[np.generic]]
Tensors = Mapping[str, Tensor]
R = TypeVar("R", bound=RecipeBase)

_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True, slots=True)
class Graph:
    """A network as it is exported: module, example inputs, names of its tensors."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    """Example per input name, in the order of the module's arguments; at least two
    samples and unequal sides, for a side of one would be taken for a constant."""
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    """Per input name the axes that may vary: axis number to its name."""
    float_ends: tuple[int, int] = (1, 1)
    """How many of the first and the last convolutions int8 leaves in float."""


class Task(ABC, Generic[R]):
    """A network, its batches, its losses and what its engine's card says.

    Subclasses build `network` in their constructor and are pure otherwise: batch
    number n depends on (recipe, n) alone, so a killed run resumes to the bit.
    """

    network: nn.Module
    """What is trained, averaged and exported."""
    in_parts: bool = True
    """Whether a step is the mean of what the parts of a batch ask for."""

    def __init__(self, recipe: R) -> None:
        self.recipe = recipe

    @abstractmethod
    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make batch number `step`; other draws are other samples of the same time."""

    @abstractmethod
    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of `network` on a batch, and what a curve shows of it."""

    @abstractmethod
    def graph(self, network: nn.Module) -> Graph:
        """Return the inference form of a (trained, averaged) network."""

    @abstractmethod
    def card(self) -> dict[str, Any]:
        """Return the engine's card without name, files, checksums and history."""

    def modules(self) -> dict[str, nn.Module]:
        """Return every trained module by name; `network` is among them."""
        return {"network": self.network}

    def take_state(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of a checkpoint of this network.

        Networks that go on from those of another override it.

        Raises
        ------
        KeyError
            If a weight is missing.
        RuntimeError
            If one has another shape.
        """
        self.network.load_state_dict(weights)

    @torch.no_grad()
    def take_exported(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of an engine of this network, by their names in its file.

        Networks whose exported form is another (folded, for example) override it.

        Raises
        ------
        KeyError
            If a weight is missing.
        RuntimeError
            If one has another shape.
        """
        own = {id(parameter) for parameter in self.network.parameters()}
        for name, parameter in self.graph(self.network).module.named_parameters():
            if id(parameter) not in own:
                msg = "its exported form holds other weights than its training"
                raise RuntimeError(msg)
            parameter.copy_(weights[name])

    def make_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimisers by name, each over its own parameters."""
        settings = self.recipe.optimiser
        optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        return {"network": optimiser}

    def train_step(
        self, tensors: Tensors, optimisers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, float]:
        """Take one step with every optimiser; their rates are already set.

        Tasks with several losses, such as adversarial ones, override it, and say in
        `in_parts` that they want a batch whole.
        """
        gradients, shown = self.gradients(tensors)
        self.descend(gradients, optimisers)
        return shown

    def gradients(
        self, tensors: Tensors, share: float = 1.0
    ) -> tuple[list[Tensor | None], dict[str, float]]:
        """Return what a batch, or a part of one, says of `network`.

        Parameters
        ----------
        tensors
            The part.
        share
            Of the batch; gradients and measured values are multiplied by it, so that
            those of all parts add up.

        Returns
        -------
        tuple
            Gradient per parameter that learns, None where it has none, in the order
            of `learning`; and what the part measured, the loss first.
        """
        device = next(self.network.parameters()).device.type
        mixed = device != "cpu" or multiplies_bf16()
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            loss, shown = self.loss(tensors)
        learning = self.learning()
        found = torch.autograd.grad(share * loss, learning, allow_unused=True)
        measured = {"loss": loss, **shown}
        return list(found), {
            name: share * float(value.detach()) for name, value in measured.items()
        }

    def learning(self) -> list[nn.Parameter]:
        """Return the parameters of `network` that are trained."""
        return [one for one in self.network.parameters() if one.requires_grad]

    def descend(
        self,
        gradients: Iterable[Tensor | None],
        optimisers: Mapping[str, torch.optim.Optimizer],
    ) -> None:
        """Take the step that the gradients of a whole batch ask for."""
        for parameter, gradient in zip(self.learning(), gradients, strict=True):
            parameter.grad = _laid_out_as(gradient, parameter)
        nn.utils.clip_grad_norm_(self.network.parameters(), _LARGEST_GRADIENT)
        optimisers["network"].step()

    def finish_average(self, average: nn.Module, batches: Iterable[Tensors]) -> None:
        """Make averaged weights ready for use; BatchNorm needs statistics of its own.

        `batches` is endless and made on demand.
        """
        del batches
        average.eval()


def _laid_out_as(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return a gradient in the memory layout of its parameter, as optimisers want."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


# Optics drawn in training lie within these factors of the reference sampling.
_SAMPLING_RANGE = (0.6, 1.6)


def restorer_graph(network: nn.Module, multiple_px: int) -> Graph:
    """Return the graph of a network from `tiles` to `restored`, nothing else given."""
    return Graph(
        network,
        {"tiles": torch.zeros(2, 1, 16 * multiple_px, 24 * multiple_px)},
        ("restored",),
        {"tiles": {0: "number", 2: "height", 3: "width"}},
    )


def restorer_card(
    pairs: PairsRecipe,
    description: str,
    *,
    tile_px: int,
    halo_px: int,
    multiple_px: int,
) -> dict[str, Any]:
    """Return the card of a restorer that is told nothing but its tile.

    Parameters
    ----------
    pairs
        Data it was trained on: optics and levels.
    description
        One sentence.
    tile_px
        Side of a tile, halo included.
    halo_px
        Border on each side that neighbouring tiles share.
    multiple_px
        Sides of tiles must be multiples of it.
    """
    low, high = (factor * pairs.reference.sampling for factor in _SAMPLING_RANGE)
    normalisation = asdict(PercentileRange())
    del normalisation["sample_px"]
    return {
        "kind": "restorer",
        "implementation": "onnx",
        "description": description,
        "input": {
            "name": "tiles",
            "channels": 1,
            "tile_px": tile_px,
            "halo_px": halo_px,
            "multiple_px": multiple_px,
        },
        "output": {"name": "restored"},
        "levels": {"step_um": pairs.level_step_um, "count": 11, "signed": True},
        "normalisation": {"name": "percentile_range", **normalisation},
        "optics": {
            "sampling_min": round(low, 3),
            "sampling_max": round(high, 3),
            "reference": asdict(pairs.reference),
        },
    }


def gain_db(blurred: Tensor, restored: Tensor, sharp: Tensor) -> Tensor:
    """Return by how many dB a batch came nearer to its target."""
    before = (blurred - sharp).square().mean()
    after = (restored.detach() - sharp).square().mean()
    return 10 * torch.log10((before + 1e-9) / (after + 1e-9))


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
        data = read_yaml(path)
    except OSError as error:
        msg = f"recipe '{path}' cannot be read: {error.strerror}; give a YAML file"
        raise ConfigError(msg) from error
    except ValueError as error:
        msg = f"recipe '{path}' {error}"
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
