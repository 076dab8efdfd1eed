"""COMI's task: two generators against two discriminators, Zhang et al. 2022."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rtfocus.training.data.pairs import PairBatches
from rtfocus.training.task import Arrays, Graph, Task, Tensors
from rtfocus.training.tasks.comi_losses import ComiLosses
from rtfocus.training.tasks.comi_networks import ComiNetworks, descend
from rtfocus.training.tasks.comi_recipe import ComiRecipe
from rtfocus.training.tasks.restorer import gain_db, restorer_card, restorer_graph

_TILE_PX = 256
# Nine residual blocks at a quarter see 90 px each way, but weigh little beyond 32.
_HALO_PX = 32
_MULTIPLE_PX = 4
_COLUMNS = (
    "loss",
    "adversarial",
    "content",
    "cycle",
    "pixel",
    "judges",
    "gain_db",
)


class ComiTask(Task[ComiRecipe]):
    """Adversarial, content and cycle losses; four networks, three optimisers.

    The exported network is G_s, from defocused to sharp.
    """

    def __init__(self, recipe: ComiRecipe) -> None:
        super().__init__(recipe)
        self._networks = ComiNetworks.made(recipe.comi)
        self.network = self._networks.restoring
        self._losses = ComiLosses(recipe.comi, self._networks)
        self._batches: PairBatches | None = None

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make defocused and sharp patches, and tell the step they are for."""
        if self._batches is None:
            # Made when first needed: an export needs no images.
            self._batches = PairBatches(self.recipe)
        made = self._batches.batch(step, draw)
        sharp = made["sharp"]
        if not self.recipe.comi.paired:
            # Each defocused patch meets the sharp one of its neighbour.
            sharp = np.roll(sharp, 1, axis=0)
        return {"blurred": made["blurred"], "sharp": sharp, "step": np.array(step)}

    def modules(self) -> dict[str, nn.Module]:
        """Return both generators and both discriminators."""
        return self._networks.modules()

    def make_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """Return Adam for the restoring, the blurring and the judging networks."""
        return self._networks.optimisers(self.recipe.optimiser)

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return content and pixel terms of the restoring generator alone."""
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        restored = self.network(blurred).float()
        loss, terms = self._losses.of_restoring(restored, sharp)
        return loss, {**terms, "gain_db": gain_db(blurred, restored, sharp)}

    def train_step(
        self, tensors: Tensors, optimisers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, float]:
        """Take one step of the generators, then one of the discriminators."""
        if int(tensors["step"]) < self.recipe.comi.restoring_steps:
            return _columns(super().train_step(tensors, optimisers))
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        device = blurred.device.type
        with torch.autocast(device, torch.bfloat16):
            made_sharp = self.network(blurred).float()
            made_blurred = self._networks.blurring(sharp).float()
            images = blurred, sharp, made_blurred, made_sharp
            loss, terms = self._losses.of_generators(*images)
        descend(loss, [optimisers["network"], optimisers["blurring"]])
        with torch.autocast(device, torch.bfloat16):
            judged = self._losses.of_judges(*images)
        descend(judged, [optimisers["judges"]])
        shown = {
            **terms,
            "loss": loss,
            "judges": judged,
            "gain_db": gain_db(blurred, made_sharp, sharp),
        }
        return _columns({name: float(v.detach()) for name, v in shown.items()})

    def graph(self, network: nn.Module) -> Graph:
        """Return the restoring generator as it is."""
        return restorer_graph(network, _MULTIPLE_PX)

    def card(self) -> dict[str, Any]:
        """Return the card of a COMI engine."""
        return restorer_card(
            self.recipe.pairs,
            "Restoration by the generator of a CycleGAN, Zhang et al. 2022 (COMI).",
            tile_px=_TILE_PX,
            halo_px=_HALO_PX,
            multiple_px=_MULTIPLE_PX,
        )


def _columns(shown: Mapping[str, float]) -> dict[str, float]:
    """Return what a curve shows in one order, whichever terms the step had."""
    return {name: shown.get(name, 0.0) for name in _COLUMNS}


RECIPE = ComiRecipe
TASK = ComiTask
