"""rtfocus-2: rtfocus-1 for microscopes that nobody has described.

The same network but for three things, so that it goes on from weights of the first:

- *sampling may be hidden*: a flag says whether it is told. Where it is not, levels are
  those of the reference optics that blur over as many pixels: a width in pixels is all
  that an image alone can tell.
- *doubt*: how much of the correction is applied is learned from the restoration itself,
  beside the labels. Labels that are wrong on what was never seen can be overruled, and
  where neither is sure a part of the correction is applied.

- *no BatchNorm*: what it goes on from has it folded into the convolutions. Batches of
  very unlike kinds would spoil its statistics, and steps are cheaper without.

The loss counts decibels beside absolute error: what is sharp must stay sharp to a
thousandth, and dim images weigh as much as bright ones.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.training.layers import fold_batch_norm
from rtfocus.training.networks.rtfocus_1 import (
    ResidualBlock,
    Rtfocus1,
    Rtfocus1Section,
    Rtfocus1Task,
    around,
)
from rtfocus.training.recipe import Fraction, PairRecipe

CONDITION = (
    "sampling",
    "spherical_waves",
    "optics_known",
    "defocus_levels",
    "defocus_known",
    "sampling_known",
)
"""Entries of the condition vector, see the engine card."""

_LOOK = 64
_DOUBT = 32
# Least probability that a label leaves to its opposite before doubt is heard.
_LEAST_SHARE = 1e-3
# Squared error, as a share of the range, below which decibels do not count: 50 dB.
_ENOUGH = 1e-5


class Rtfocus2(Rtfocus1):
    """Defocus and restoration in one pass, see `Rtfocus1` for the parameters."""

    condition = CONDITION

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128, 192),
        depths: tuple[int, ...] = (1, 1, 1, 2),
    ) -> None:
        super().__init__(widths, depths)
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                block.layers = _without_batch_norm(block.layers)
        self.trust = nn.Parameter(torch.ones(1))
        self.look = nn.Conv2d(widths[-1], _LOOK, 1)
        last = nn.Conv2d(_DOUBT, 1, 1)
        self.doubt = nn.Sequential(nn.Conv2d(_LOOK, _DOUBT, 1), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def gate(self, features: Tensor, evidence: Tensor) -> Tensor:
        """Return the share of the correction per cell: the labels' odds, and doubt."""
        busy = super().gate(features, evidence)
        busy = busy.clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
        seen = around(functional.relu(self.look(features)))
        odds = torch.log(busy / (1 - busy))
        return torch.sigmoid(self.trust * odds + self.doubt(seen))


def _without_batch_norm(layers: nn.Sequential) -> nn.Sequential:
    """Return the same layers as `fold_batch_norm` leaves them."""
    (folded,) = fold_batch_norm(nn.Sequential(layers)).children()
    return cast("nn.Sequential", folded.train())


class Rtfocus2Section(Rtfocus1Section):
    """Size of the network, what its losses weigh and what is hidden from it."""

    hidden_sampling_share: Fraction = 0.5
    """Share of patches whose sampling, and so everything, the network is not told."""
    trained: Literal["all", "gate"] = "all"
    """``gate``: all else stays as it is, and a step costs a third."""
    decibel_weight: Annotated[float, Field(ge=0)] = 0.02
    """Weight of the logarithm of each patch's squared error."""


class Rtfocus2Recipe(PairRecipe):
    """A training run of the flagship for unknown optics."""

    name: str = "rtfocus_2"
    network: Literal["rtfocus_2"] = "rtfocus_2"
    rtfocus_2: Rtfocus2Section = Rtfocus2Section()

    @property
    def rtfocus_1(self) -> Rtfocus1Section:
        """What it shares with the first."""
        return self.rtfocus_2


class Rtfocus2Task(Rtfocus1Task):
    """The losses of rtfocus-1, and decibels; sampling hidden at random."""

    network: Rtfocus2
    network_class = Rtfocus2
    statistics_of = ()

    def __init__(self, recipe: Rtfocus2Recipe) -> None:
        # What the first asks of its recipe, this one has too.
        super().__init__(cast("Any", recipe))
        self._settings = recipe.rtfocus_2
        if recipe.rtfocus_2.trained == "gate":
            self.network.requires_grad_(False)
            for part in (self.network.look, self.network.doubt):
                part.requires_grad_(True)
            self.network.trust.requires_grad_(True)

    def image_loss(self, error: Tensor) -> Tensor:
        """Return Charbonnier plus the mean logarithm of each patch's squared error."""
        power = error.square().mean(dim=(1, 2, 3))
        decibels = torch.log(power / _ENOUGH + 1).mean()
        weight = self._settings.decibel_weight
        return super().image_loss(error) + weight * decibels

    def told(
        self,
        optics: NDArray[np.generic],
        levels: NDArray[np.float32],
        rng: np.random.Generator,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Choose what is told; levels of hidden optics are those of the reference."""
        condition, levels = super().told(optics, levels, rng)
        hidden = rng.random(len(optics)) < self._settings.hidden_sampling_share
        flagged = np.column_stack([condition, np.ones(len(optics), np.float32)])
        flagged[hidden] = 0
        wider = np.where(
            hidden,
            self.recipe.pairs.reference.sampling / np.asarray(optics[:, 0], np.float64),
            1.0,
        )
        return flagged, np.asarray(levels * wider[:, None, None], dtype=np.float32)

    @torch.no_grad()
    def take_state(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights of rtfocus-2, or of rtfocus-1 so that they do the same.

        Hidden sampling is taken for that of the reference then, and nothing doubted.
        """
        if "trust" in weights:
            self.network.load_state_dict(weights)
            return
        settings = self._settings
        earlier = Rtfocus1(settings.widths, settings.depths)
        earlier.load_state_dict(weights)
        weights = fold_batch_norm(earlier).state_dict()
        first, bias = weights["embedding.0.weight"], weights["embedding.0.bias"]
        flag = first[:, :1] * self.recipe.pairs.reference.sampling
        widened = {
            **self.network.state_dict(),
            **weights,
            "embedding.0.weight": torch.cat([first, -flag], dim=1),
            "embedding.0.bias": bias + flag[:, 0],
        }
        self.network.load_state_dict(widened)

    @torch.no_grad()
    def take_exported(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of an engine: there is no BatchNorm that was folded."""
        for name, parameter in self.network.named_parameters():
            parameter.copy_(weights[name])


NETWORKS = {"rtfocus_2": (Rtfocus2Recipe, Rtfocus2Task)}
