"""Rivals of DelpNet in He's table 2: known networks on the same patches and labels.

They judge a patch as a whole and pool its average, where DelpNet pools its maximum.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtfocus.training.data.fields import load_fields
from rtfocus.training.data.level_recipe import LevelRecipe, TileOptimiserRecipe
from rtfocus.training.data.level_scenes import Blurring
from rtfocus.training.data.level_tiles import Batches
from rtfocus.training.losses.levels import accuracies, loss_of
from rtfocus.training.networks.batch_norm import fold_batch_norm, recalibrate
from rtfocus.training.networks.delpnet import GEOMETRY, LABELS
from rtfocus.training.networks.mobilenet_v2 import MobileNetV2
from rtfocus.training.networks.resnet18 import ResNet18
from rtfocus.training.networks.tiled import TiledClassifier
from rtfocus.training.task import Arrays, Graph, Task, Tensors
from rtfocus.training.tasks.delpnet import level_card

_CALIBRATION_BATCHES = 20
_NETWORKS: dict[str, type[ResNet18 | MobileNetV2]] = {
    "resnet18": ResNet18,
    "mobilenet_v2": MobileNetV2,
}


class RivalOptimiserRecipe(TileOptimiserRecipe):
    """Optimiser of a network that sees single tiles."""

    crop_sides_px: tuple[Literal[96]] = (96,)


class RivalRecipe(LevelRecipe):
    """A training run of a rival."""

    name: str = "rival"
    network: Literal["resnet18", "mobilenet_v2"]
    optimiser: RivalOptimiserRecipe = RivalOptimiserRecipe()


class RivalTask(Task[RivalRecipe]):
    """DelpNet's loss on single tiles."""

    def __init__(self, recipe: RivalRecipe) -> None:
        super().__init__(recipe)
        self.network = _NETWORKS[recipe.network](labels=len(LABELS))
        self._batches: Batches | None = None

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make single tiles, each with its label."""
        if self._batches is None:
            # Made when first needed: an export needs no images.
            fields = load_fields(self.recipe)
            blurring = Blurring(self.recipe, fields, validation=False)
            self._batches = Batches(self.recipe, blurring)
        made = self._batches.batch(step, draw)
        return {"crops": made.crops, "labels": made.labels}

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `loss_of` over the tiles."""
        logits = self.network(tensors["crops"]).float()[:, :, None, None]
        labels = tensors["labels"]
        loss = loss_of(logits, labels, self.recipe.optimiser.ordinal_weight)
        return loss, accuracies(logits, labels)

    def finish_average(self, average: nn.Module, batches: Iterable[Tensors]) -> None:
        """Give the averaged weights exact batch statistics of their own."""
        crops = (batch["crops"] for batch in islice(batches, _CALIBRATION_BATCHES))
        recalibrate(average, crops)

    def graph(self, network: nn.Module) -> Graph:
        """Return the network over whole frames, one label per tile."""
        side = GEOMETRY.tile_px
        return Graph(
            TiledClassifier(fold_batch_norm(network), side),
            {"tiles": torch.zeros(2, 1, 2 * side, 3 * side)},
            ("logits",),
            {"tiles": {0: "number", 2: "height", 3: "width"}},
        )

    def card(self) -> dict[str, Any]:
        """Return the card: DelpNet's, with tiles side by side."""
        side = GEOMETRY.tile_px
        return {
            **level_card(self.recipe),
            "description": f"Defocus level of patches, {self.recipe.network}.",
            "input": {
                "name": "tiles",
                "channels": 1,
                "tile_px": side,
                "stride_px": side,
                "origin_px": side // 2,
                "multiple_px": side,
            },
            "output": {"name": "logits", "labels": list(LABELS)},
        }


RECIPE = RivalRecipe
TASK = RivalTask
