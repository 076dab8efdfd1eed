"""Multiscale's task: Charbonnier loss on every scale."""

from typing import Any, Literal

from torch import Tensor, nn

from rtfocus.config.section import Section
from rtfocus.training.data.pair_recipe import PairRecipe
from rtfocus.training.data.pairs import PairBatches
from rtfocus.training.losses.charbonnier import scales_loss
from rtfocus.training.networks.multiscale import MULTIPLE_PX, MultiScale
from rtfocus.training.recipe import Count, Positive
from rtfocus.training.task import Arrays, Graph, Task, Tensors
from rtfocus.training.tasks.restorer import gain_db, restorer_card, restorer_graph

_TILE_PX = 256
_HALO_PX = 32


class MultiScaleSection(Section):
    """Size of the shared network and what its loss looks like."""

    fine: Count = 32
    """Channels at half the resolution of a scale."""
    coarse: Count = 96
    """Channels at a quarter of it."""
    blocks: Count = 3
    """Residual blocks at a quarter."""
    charbonnier: Positive = 0.01
    """Error, as a share of the frame's range, from which on the loss is linear."""


class MultiScaleRecipe(PairRecipe):
    """A training run of the multiscale network."""

    name: str = "multiscale"
    network: Literal["multiscale"] = "multiscale"
    multiscale: MultiScaleSection = MultiScaleSection()


class MultiScaleTask(Task[MultiScaleRecipe]):
    """Restoration, compared with the sharp image on all scales."""

    network: MultiScale

    def __init__(self, recipe: MultiScaleRecipe) -> None:
        super().__init__(recipe)
        settings = recipe.multiscale
        self.network = MultiScale(settings.fine, settings.coarse, settings.blocks)
        self._batches: PairBatches | None = None

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make blurred and sharp patches."""
        if self._batches is None:
            # Made when first needed: an export needs no images.
            self._batches = PairBatches(self.recipe)
        made = self._batches.batch(step, draw)
        return {"blurred": made["blurred"], "sharp": made["sharp"]}

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean Charbonnier loss of the scales."""
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        restored = self.network.scales(blurred)
        loss = scales_loss(restored, sharp, self.recipe.multiscale.charbonnier)
        return loss, {"gain_db": gain_db(blurred, restored[-1].float(), sharp)}

    def graph(self, network: nn.Module) -> Graph:
        """Return the network as it is."""
        return restorer_graph(network, MULTIPLE_PX)

    def card(self) -> dict[str, Any]:
        """Return the card of a multiscale engine."""
        return restorer_card(
            self.recipe.pairs,
            "Restoration on three scales by one encoder-decoder, weights shared.",
            tile_px=_TILE_PX,
            halo_px=_HALO_PX,
            multiple_px=MULTIPLE_PX,
        )


RECIPE = MultiScaleRecipe
TASK = MultiScaleTask
