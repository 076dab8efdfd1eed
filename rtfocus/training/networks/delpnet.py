"""DelpNet, seven convolutions that tell the defocus level of a patch; its rivals.

He et al. 2020 fix the layers' order, the number of labels and the parameter
count, not the widths and strides. Those here put the resolution into few early
channels and the parameters into the deep layers, so that a whole frame costs
5.7 k multiply-adds per pixel. The network is fully convolutional: global max
pooling becomes a max pool over one patch's cells, the dense layer a 1 x 1
convolution, and a frame gives one label per tile in a single pass.

The rivals are those of He's table 2: known networks on the same patches and labels.
They judge a patch as a whole and pool its average, where DelpNet pools its maximum.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.sections import Section
from rtfocus.training.layers import (
    DropMaps,
    TiledClassifier,
    fold_batch_norm,
    unfold_batch_norm,
)
from rtfocus.training.level_tiles import (
    GEOMETRY,
    LABELS,
    LEVEL_COUNT,
    NORMALISATION,
    Batches,
    Blurring,
    LevelRecipe,
    TileOptimiserRecipe,
    accuracies,
    loss_of,
)
from rtfocus.training.recipe import Fraction
from rtfocus.training.scenes import load_fields
from rtfocus.training.task import (
    BatchSource,
    Graph,
    Task,
    Tensors,
    background_rule,
    frames_graph,
    grid_input,
    optics_range,
)

WIDTHS = (16, 32, 48, 96, 160, 400, 424)
_KERNELS = (5, 3, 3, 3, 3, 3, 3)
_STRIDES = (2, 2, 1, 3, 2, 1, 1)


class DelpNet(nn.Module):
    """Defocus classifier of He et al. 2020, fully convolutional.

    Parameters
    ----------
    dropout
        Probability of dropping a whole feature map after each inner layer.
    batch_norm_momentum
        Weight of the newest batch in the running statistics; 0.40 is the
        paper's 0.60 counted the other way round.
    labels
        Number of outputs; 12 with `bg`, 11 without (He 2020, table 1).

    References
    ----------
    .. [1] D. He et al., "Restoration of out-of-focus fluorescence microscopy
       images using learning-based depth-variant deconvolution", IEEE Photonics
       Journal 12 (2), 2020, section 2.2.
    """

    def __init__(
        self,
        *,
        dropout: float = 0.05,
        batch_norm_momentum: float = 0.40,
        labels: int = len(LABELS),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for place, width in enumerate(WIDTHS):
            kernel = _KERNELS[place]
            layers += [
                nn.Conv2d(
                    channels,
                    width,
                    kernel,
                    stride=_STRIDES[place],
                    padding=kernel // 2,
                    bias=False,
                ),
                nn.BatchNorm2d(width, momentum=batch_norm_momentum),
                nn.ReLU(inplace=True),
            ]
            # The first layer has too few maps to lose one of them.
            if place > 0:
                layers.append(DropMaps(dropout))
            channels = width
        self.features = nn.Sequential(*layers)
        self.dense = nn.Conv2d(channels, labels, 1)

    def forward(
        self, tiles: Tensor, stride_cells: int = GEOMETRY.stride_cells
    ) -> Tensor:
        """Return logits (N, label, row, column) of frames or patches (N, 1, H, W).

        The input is normalised (`rtfocus.optics.normalisation`). A patch of 84 or
        96 px gives one row and one column. `stride_cells` is the distance between
        neighbouring tiles; in training every position counts: more to learn per crop.
        """
        cells = self.features(tiles)
        pooled = nn.functional.max_pool2d(
            cells, GEOMETRY.tile_cells, stride=stride_cells
        )
        logits: Tensor = self.dense(pooled)
        return logits


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


class PatchNetwork(nn.Module):
    """A network that pools the average of its features; any number of labels."""

    features: nn.Sequential
    dense: nn.Linear

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits (N, labels) of patches (N, 1, H, W)."""
        logits: Tensor = self.dense(self.features(patches).mean(dim=(2, 3)))
        return logits


class MobileNetV2(PatchNetwork):
    """MobileNet v2 of width 1; one input channel.

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


class ResNet18(PatchNetwork):
    """The 18-layer residual network; one input channel.

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


# Optics drawn in training lie within these factors of the reference sampling.
_SAMPLING_RANGE = (0.7, 1.5)
_UNFOLDING_BATCHES = 12
L = TypeVar("L", bound=LevelRecipe)


class LevelTask(Task[L]):
    """Cross-entropy over the labels of tiles, plus an ordinal term."""

    statistics_of = ("crops",)
    labels: tuple[int | str, ...] = LABELS
    """Of the network's outputs, background last where it has one."""

    def make_source(self) -> BatchSource:
        """Read the sharp images of the recipe."""
        fields = load_fields(self.recipe)
        blurring = Blurring(self.recipe, fields, validation=False)
        return Batches(self.recipe, blurring, background=self.labels == LABELS)

    def logits(self, crops: Tensor) -> Tensor:
        """Return logits (N, label, row, column) of every tile that has a label."""
        logits: Tensor = self.network(crops)[:, :, None, None]
        return logits

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `loss_of` over the tiles."""
        logits, labels = self.logits(tensors["crops"]).float(), tensors["labels"]
        loss = loss_of(logits, labels, self.recipe.optimiser.ordinal_weight)
        return loss, accuracies(logits, labels)

    def level_card(self, description: str, grid: Mapping[str, Any]) -> dict[str, Any]:
        """Return the card of a network that looks at tiles on a grid."""
        blur = self.recipe.blur
        return {
            "kind": "classifier",
            "implementation": "onnx",
            "description": description,
            "input": dict(grid),
            "output": {"name": "logits", "labels": list(self.labels)},
            "levels": {
                "step_um": blur.level_step_um,
                "count": LEVEL_COUNT,
                "signed": False,
            },
            "normalisation": {"name": "local_standardisation", **asdict(NORMALISATION)},
            "background": background_rule(),
            "optics": optics_range(blur.reference, _SAMPLING_RANGE),
        }


class DelpNetSection(Section):
    """Switches of DelpNet."""

    dropout: Fraction = 0.02
    """Probability of dropping a value after each inner layer."""
    batch_norm_momentum: Fraction = 0.40
    """PyTorch's sense: 0.40 is the paper's 0.60."""
    background: bool = True
    """Twelfth label for empty tiles (He 2020, table 1)."""


class DelpNetRecipe(LevelRecipe):
    """A training run of DelpNet."""

    name: str = "delpnet"
    network: Literal["delpnet"] = "delpnet"
    delpnet: DelpNetSection = DelpNetSection()


class DelpNetTask(LevelTask[DelpNetRecipe]):
    """The loss over tiles at every cell, more than inference looks at."""

    network: DelpNet

    def __init__(self, recipe: DelpNetRecipe) -> None:
        super().__init__(recipe)
        switches = recipe.delpnet
        self.labels = LABELS if switches.background else LABELS[:LEVEL_COUNT]
        self.network = DelpNet(
            dropout=switches.dropout,
            batch_norm_momentum=switches.batch_norm_momentum,
            labels=len(self.labels),
        )

    def logits(self, crops: Tensor) -> Tensor:
        """Return logits (N, label, row, column), one tile at every cell."""
        logits: Tensor = self.network(crops, stride_cells=1)
        return logits

    def take_exported(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of an engine, whose convolutions hold their BatchNorm.

        What that measured is taken anew over first batches of the training.
        """
        folded = fold_batch_norm(self.network)
        own = dict(folded.named_parameters())
        for name, parameter in own.items():
            if weights[name].shape != parameter.shape:
                msg = f"'{name}' is {tuple(weights[name].shape)}"
                raise RuntimeError(msg)
        convolutions = [
            (weights[name], weights[name.replace(".weight", ".bias")])
            for name in own
            if name.startswith("features.") and name.endswith(".weight")
        ]
        batches = [
            torch.from_numpy(self.batch(0, draw)["crops"])
            for draw in range(1, _UNFOLDING_BATCHES + 1)
        ]
        unfold_batch_norm(self.network.features, convolutions, batches)
        with torch.no_grad():
            for name, parameter in self.network.dense.named_parameters():
                parameter.copy_(weights[f"dense.{name}"])

    def graph(self, network: nn.Module) -> Graph:
        """Return the network with its BatchNorm folded into the convolutions."""
        # In int8 the finer features change four labels of a hundred, these one of 160.
        ends = (4, 1)
        network = fold_batch_norm(network)
        return frames_graph(network, (144, 192), ("logits",), float_ends=ends)

    def card(self) -> dict[str, Any]:
        """Return the card of a DelpNet engine."""
        return self.level_card(
            "Defocus level of patches, He et al. 2020 (DelpNet).",
            grid_input(GEOMETRY.tile_px, GEOMETRY.stride_px, GEOMETRY.centre_px),
        )


_RIVALS: dict[str, type[PatchNetwork]] = {
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


class RivalTask(LevelTask[RivalRecipe]):
    """DelpNet's loss on single tiles."""

    statistics_batches = 20

    def __init__(self, recipe: RivalRecipe) -> None:
        super().__init__(recipe)
        self.network = _RIVALS[recipe.network](labels=len(LABELS))

    def graph(self, network: nn.Module) -> Graph:
        """Return the network over whole frames, one label per tile."""
        side = GEOMETRY.tile_px
        whole = TiledClassifier(fold_batch_norm(network), side)
        return frames_graph(whole, (2 * side, 3 * side), ("logits",))

    def card(self) -> dict[str, Any]:
        """Return the card: DelpNet's, with tiles side by side."""
        side = GEOMETRY.tile_px
        return self.level_card(
            f"Defocus level of patches, {self.recipe.network}.",
            grid_input(side, side, side // 2),
        )


NETWORKS = {
    "delpnet": (DelpNetRecipe, DelpNetTask),
    **dict.fromkeys(_RIVALS, (RivalRecipe, RivalTask)),
}
