"""Rivals of DelpNet in He's table 2: known networks on the same patches and labels.

They judge a patch as a whole and pool its average, where DelpNet pools its maximum.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.training.layers import TiledClassifier, fold_batch_norm, recalibrate
from rtfocus.training.level_tiles import (
    GEOMETRY,
    LABELS,
    Batches,
    Blurring,
    LevelRecipe,
    TileOptimiserRecipe,
)
from rtfocus.training.networks.delpnet import accuracies, level_card, loss_of
from rtfocus.training.scenes import load_fields
from rtfocus.training.task import Arrays, Graph, Task, Tensors

# Expansion, width, blocks and first stride of every stage (Sandler 2018, table 2).
_INVERTED_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_FIRST = 32
_LAST = 1280


class InvertedResidual(nn.Module):
    """Widen, convolve every map alone, narrow without activation."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += _convolution(inputs, inner, 1, 1, 1)
        layers += _convolution(inner, inner, 3, stride, inner)
        layers += [nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == width

    def forward(self, maps: Tensor) -> Tensor:
        """Return (N, width, H / stride, W / stride)."""
        result: Tensor = self.body(maps)
        return maps + result if self.adds else result


class MobileNetV2(nn.Module):
    """MobileNet v2 of width 1; one input channel, any number of labels.

    References
    ----------
    .. [1] M. Sandler et al., "MobileNetV2: inverted residuals and linear
       bottlenecks", CVPR 2018.
    """

    def __init__(self, *, labels: int) -> None:
        super().__init__()
        layers = _convolution(1, _FIRST, 3, 2, 1)
        inputs = _FIRST
        for expansion, width, blocks, first_stride in _INVERTED_STAGES:
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                layers.append(InvertedResidual(inputs, width, stride, expansion))
                inputs = width
        layers += _convolution(inputs, _LAST, 1, 1, 1)
        self.features = nn.Sequential(*layers)
        self.dense = nn.Linear(_LAST, labels)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits (N, labels) of patches (N, 1, H, W)."""
        logits: Tensor = self.dense(self.features(patches).mean(dim=(2, 3)))
        return logits


def _convolution(
    inputs: int, width: int, kernel: int, stride: int, groups: int
) -> list[nn.Module]:
    return [
        nn.Conv2d(
            inputs,
            width,
            kernel,
            stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(width),
        nn.ReLU6(inplace=True),
    ]


_RESIDUAL_STAGES = (64, 128, 256, 512)
_BLOCKS = 2


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a short cut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.short_cut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.short_cut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Return (N, width, H / stride, W / stride)."""
        return functional.relu(self.body(maps) + self.short_cut(maps))


class ResNet18(nn.Module):
    """The 18-layer residual network; one input channel, any number of labels.

    References
    ----------
    .. [1] K. He et al., "Deep residual learning for image recognition", CVPR 2016.
    """

    def __init__(self, *, labels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, _RESIDUAL_STAGES[0], 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(_RESIDUAL_STAGES[0]),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        ]
        inputs = _RESIDUAL_STAGES[0]
        for place, width in enumerate(_RESIDUAL_STAGES):
            for block in range(_BLOCKS):
                stride = 2 if place > 0 and block == 0 else 1
                layers.append(BasicBlock(inputs, width, stride))
                inputs = width
        self.features = nn.Sequential(*layers)
        self.dense = nn.Linear(inputs, labels)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits (N, labels) of patches (N, 1, H, W)."""
        logits: Tensor = self.dense(self.features(patches).mean(dim=(2, 3)))
        return logits


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
