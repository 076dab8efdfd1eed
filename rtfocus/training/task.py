"""Task: what a network learns, from its batches to the card of its engine."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rtfocus.channel import OpticalSystem
from rtfocus.machine import multiplies_bf16
from rtfocus.optics.normalisation import ContrastToNoise, PercentileRange
from rtfocus.training.layers import recalibrate
from rtfocus.training.pairs import PairBatches
from rtfocus.training.recipe import (
    PairRecipe,
    PairsRecipe,
    RecipeBase,
    network_classes,
)

Arrays = Mapping[str, NDArray[np.generic]]
Tensors = Mapping[str, Tensor]
R = TypeVar("R", bound=RecipeBase)
P = TypeVar("P", bound=PairRecipe)

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
    exact_output: str | None = None
    """An output that small errors change in kind, as labels: of the convolutions that
    it is computed by, int8 takes only those behind a ReLU."""


class BatchSource(Protocol):
    """Makes batches by number."""

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make batch number `step`; other draws are other samples of the same time."""


class Task(ABC, Generic[R]):
    """A network, its batches, its losses and what its engine's card says.

    Subclasses build `network` in their constructor and are pure otherwise: batch
    number n depends on (recipe, n) alone, so a killed run resumes to the bit.
    """

    network: nn.Module
    """What is trained, averaged and exported."""
    in_parts: bool = True
    """Whether a step is the mean of what the parts of a batch ask for."""
    statistics_of: tuple[str, ...] = ()
    """Entries of a batch that the network takes, in its order: over them BatchNorm is
    measured anew for averaged weights; none: it has no BatchNorm."""
    statistics_batches: int = 40

    def __init__(self, recipe: R) -> None:
        self.recipe = recipe

    @cached_property
    def source(self) -> BatchSource:
        """What makes batches; made when first needed, for an export needs no images."""
        return self.make_source()

    @abstractmethod
    def make_source(self) -> BatchSource:
        """Read the images that batches are made of."""

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make batch number `step`; other draws are other samples of the same time."""
        return self.source.batch(step, draw)

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

    def begin(self) -> None:
        """Get ready; called with the first weights, before a run that goes on has its.

        Networks that learn from what they were at first override it.
        """

    def take_size(self, weights: Mapping[str, Tensor]) -> None:
        """Become as wide and deep as weights are; copies that teach are.

        Networks that come in several sizes override it.
        """

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

        Networks whose exported form has others (folded, for example) override it.

        Raises
        ------
        RuntimeError
            If a weight is missing or has another shape.
        """
        own = dict(self.network.named_parameters())
        if missing := own.keys() - weights.keys():
            msg = (
                "its exported form holds other weights than its training: it lacks "
                f"'{min(missing)}'"
            )
            raise RuntimeError(msg)
        for name, parameter in own.items():
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
        gradients, figures = self.gradients(tensors)
        self.descend(gradients, optimisers)
        return figures

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
        # The cache of rounded weights is one for all threads, and the part that ends
        # first empties it: a weight that serves twice was then rounded once or twice.
        with mixed_precision(device, cached=False):
            loss, figures = self.loss(tensors)
        learning = self.learning()
        gradients = torch.autograd.grad(share * loss, learning, allow_unused=True)
        measured = {"loss": loss, **figures}
        return list(gradients), {
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
        """Make averaged weights ready for use: give BatchNorm statistics of their own.

        `batches` is endless and made on demand.
        """
        average.eval()
        if self.statistics_of:
            some = islice(batches, self.statistics_batches)
            names = self.statistics_of
            recalibrate(average, (tuple(b[n] for n in names) for b in some))


def mixed_precision(device: str, *, cached: bool = True) -> torch.autocast:
    """Return the block in which networks compute in bf16 where that is faster.

    `cached`: a weight that serves twice in it is rounded once.
    """
    mixed = device != "cpu" or multiplies_bf16()
    return torch.autocast(device, torch.bfloat16, mixed, cache_enabled=cached)


def _laid_out_as(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return a gradient in the memory layout of its parameter, as optimisers want."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class PairTask(Task[P]):
    """A task on blurred and sharp patches."""

    def make_source(self) -> BatchSource:
        """Read the sharp images and the real pairs of the recipe."""
        return PairBatches(self.recipe)

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make blurred and sharp patches."""
        batch = super().batch(step, draw)
        return {"blurred": batch["blurred"], "sharp": batch["sharp"]}


class RestorerTask(PairTask[P]):
    """A task whose network restores tiles, and gets nothing else by default.

    What its engine's card says is set by subclasses.
    """

    description: str
    """One sentence."""
    tile_px: int = 256
    """Side of a tile, halo included."""
    halo_px: int = 32
    """Border on each side that neighbouring tiles share."""
    multiple_px: int
    """Sides of tiles must be multiples of it."""
    any_size: bool = False
    """Whether nothing beyond the halo counts, so that tiles may be larger."""

    def graph(self, network: nn.Module) -> Graph:
        """Return the network as it is, from `tiles` to `restored`."""
        sides_px = (16 * self.multiple_px, 24 * self.multiple_px)
        return frames_graph(network, sides_px, ("restored",))

    def card(self) -> dict[str, Any]:
        """Return the card of a restorer."""
        pairs = self.recipe.pairs
        return {
            "kind": "restorer",
            "implementation": "onnx",
            "description": self.description,
            "input": {
                "name": "tiles",
                "channels": 1,
                "tile_px": self.tile_px,
                "halo_px": self.halo_px,
                "multiple_px": self.multiple_px,
                **({"any_size": True} if self.any_size else {}),
            },
            "output": {"name": "restored"},
            "levels": {"step_um": pairs.level_step_um, "count": 11, "signed": True},
            "normalisation": pair_normalisation(),
            "optics": pair_optics(pairs),
        }


def frames_graph(
    network: nn.Module,
    sides_px: tuple[int, int],
    outputs: tuple[str, ...],
    *,
    channels: int = 1,
    entries: int = 0,
    float_ends: tuple[int, int] = (1, 1),
    exact_output: str | None = None,
) -> Graph:
    """Return the graph of a network that takes `tiles`, any number of any size.

    Parameters
    ----------
    network
        Takes tiles (N, channels, y, x), and the condition where it has one.
    sides_px
        Two unequal sides (y, x) of an example.
    outputs
        Names of what it returns.
    channels
        Of the tiles.
    entries
        Of the input `condition`, shape (N, entry); 0: there is none.
    float_ends, exact_output
        See `Graph`.
    """
    inputs = {"tiles": torch.zeros(2, channels, *sides_px)}
    dynamic = {"tiles": {0: "number", 2: "height", 3: "width"}}
    if entries:
        inputs["condition"] = torch.zeros(2, entries)
        dynamic["condition"] = {0: "number"}
    return Graph(network, inputs, outputs, dynamic, float_ends, exact_output)


# Optics drawn as pairs lie within these factors of the reference sampling.
_PAIR_SAMPLING = (0.6, 1.6)


def pair_normalisation() -> dict[str, Any]:
    """Return how frames are scaled for networks that learned from pairs."""
    rule = asdict(PercentileRange())
    del rule["sample_px"]
    return {"name": "percentile_range", **rule}


def pair_optics(pairs: PairsRecipe) -> dict[str, Any]:
    """Return the optics on the card of a network that learned from pairs."""
    return optics_range(pairs.reference, _PAIR_SAMPLING)


def optics_range(
    reference: OpticalSystem, factors: tuple[float, float]
) -> dict[str, Any]:
    """Return the optics on a card; `factors` bound the sampling, in the reference's."""
    low, high = (round(factor * reference.sampling, 3) for factor in factors)
    return {
        "sampling_min": low,
        "sampling_max": high,
        "reference": asdict(reference),
    }


def grid_input(
    tile_px: int, stride_px: int, origin_px: float, *, channels: int = 1
) -> dict[str, Any]:
    """Return the input on the card of a network that labels a grid of tiles."""
    return {
        "name": "tiles",
        "channels": channels,
        "tile_px": tile_px,
        "stride_px": stride_px,
        "origin_px": origin_px,
        "multiple_px": stride_px,
    }


def background_rule() -> dict[str, Any]:
    """Return the rule for empty tiles on a card."""
    rule = asdict(ContrastToNoise())
    # The step between values belongs to the camera, not to the engine.
    del rule["quantum"]
    return {"name": "contrast_to_noise", **rule}


def gain_db(blurred: Tensor, restored: Tensor, sharp: Tensor) -> Tensor:
    """Return by how many dB a batch came nearer to its target."""
    before = (blurred - sharp).square().mean()
    after = (restored.detach() - sharp).square().mean()
    return 10 * torch.log10((before + 1e-9) / (after + 1e-9))


def make_task(recipe: RecipeBase) -> Task[Any]:
    """Make the task of a recipe, its network freshly initialised."""
    task: Task[Any] = network_classes(recipe.network)[1](recipe)
    return task
