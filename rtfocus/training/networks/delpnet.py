"""DelpNet: seven convolutions that tell the defocus level of a patch.

He et al. 2020 fix the layers' order, the number of labels and the parameter
count, not the widths and strides. Those here put the resolution into few early
channels and the parameters into the deep layers, so that a whole frame costs
5.7 k multiply-adds per pixel. The network is fully convolutional: global max
pooling becomes a max pool over one patch's cells, the dense layer a 1 x 1
convolution, and a frame gives one label per tile in a single pass.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtfocus.config.sections import Section
from rtfocus.optics.normalisation import ContrastToNoise
from rtfocus.training.layers import (
    DropMaps,
    fold_batch_norm,
    recalibrate,
    unfold_batch_norm,
)
from rtfocus.training.level_tiles import (
    GEOMETRY,
    LABELS,
    NORMALISATION,
    Batches,
    Blurring,
    LevelRecipe,
)
from rtfocus.training.recipe import Fraction
from rtfocus.training.scenes import load_fields
from rtfocus.training.task import Arrays, Graph, Task, Tensors

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


LEVEL_COUNT = 11
"""Labels that are levels; a further one is background."""


def loss_of(logits: Tensor, labels: Tensor, ordinal_weight: float) -> Tensor:
    """Return cross-entropy, plus a weight times the error of the mean level.

    Parameters
    ----------
    logits
        Shape (N, label, row, column), eleven levels, then background if there is one.
    labels
        Shape (N, row, column).
    ordinal_weight
        Weight of the smooth absolute error between the true level and the mean of
        the levels by their probabilities, over tiles with specimen. Cross-entropy
        alone (He 2020) does not know that level 4 is nearer to 5 than 9 is; 0
        leaves it at that.
    """
    entropy = nn.functional.cross_entropy(logits, labels)
    specimen = labels < LEVEL_COUNT
    if ordinal_weight == 0 or not specimen.any():
        return entropy
    levels = torch.arange(LEVEL_COUNT, dtype=logits.dtype, device=logits.device)
    shares = logits[:, :LEVEL_COUNT].softmax(dim=1)
    mean = torch.einsum("nlyx,l->nyx", shares, levels)
    error = nn.functional.smooth_l1_loss(
        mean[specimen], labels[specimen].to(mean.dtype)
    )
    return entropy + ordinal_weight * error


@torch.no_grad()
def accuracies(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the share of right labels, and of levels at most one off."""
    found = logits.argmax(dim=1)
    specimen = labels < LEVEL_COUNT
    close = ((found - labels).abs() <= 1) & (found < LEVEL_COUNT)
    within = close[specimen].float().mean() if specimen.any() else torch.tensor(1.0)
    return {"accuracy": (found == labels).float().mean(), "within_one": within}


# Optics drawn in training lie within these factors of the reference sampling.
_SAMPLING_RANGE = (0.7, 1.5)
_CALIBRATION_BATCHES = 40
_UNFOLDING_BATCHES = 12


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


class DelpNetTask(Task[DelpNetRecipe]):
    """Cross-entropy over the labels of tiles, plus an ordinal term."""

    network: DelpNet

    def __init__(self, recipe: DelpNetRecipe) -> None:
        super().__init__(recipe)
        switches = recipe.delpnet
        self.network = DelpNet(
            dropout=switches.dropout,
            batch_norm_momentum=switches.batch_norm_momentum,
            labels=len(labels_of(recipe)),
        )
        self._batches: Batches | None = None

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make crops of one size with a label per tile."""
        if self._batches is None:
            # Made when first needed: an export needs no images.
            fields = load_fields(self.recipe)
            blurring = Blurring(self.recipe, fields, validation=False)
            background = self.recipe.delpnet.background
            self._batches = Batches(self.recipe, blurring, background=background)
        made = self._batches.batch(step, draw)
        return {"crops": made.crops, "labels": made.labels}

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `loss_of` over tiles at every cell, more than inference looks at."""
        logits = self.network(tensors["crops"], stride_cells=1).float()
        labels = tensors["labels"]
        loss = loss_of(logits, labels, self.recipe.optimiser.ordinal_weight)
        return loss, accuracies(logits, labels)

    def finish_average(self, average: nn.Module, batches: Iterable[Tensors]) -> None:
        """Give the averaged weights exact batch statistics of their own."""
        crops = (batch["crops"] for batch in islice(batches, _CALIBRATION_BATCHES))
        recalibrate(average, crops)

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
        names = [n.removesuffix(".weight") for n in own if n.startswith("features.")]
        convolutions = [
            (weights[f"{name}.weight"], weights[f"{name}.bias"])
            for name in names
            if not name.endswith(".bias")
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
        return Graph(
            fold_batch_norm(network),
            {"tiles": torch.zeros(2, 1, 144, 192)},
            ("logits",),
            {"tiles": {0: "number", 2: "height", 3: "width"}},
        )

    def card(self) -> dict[str, Any]:
        """Return the card of a DelpNet engine."""
        return {
            "description": "Defocus level of patches, He et al. 2020 (DelpNet).",
            "input": {
                "name": "tiles",
                "channels": 1,
                "tile_px": GEOMETRY.tile_px,
                "stride_px": GEOMETRY.stride_px,
                "origin_px": GEOMETRY.centre_px,
                "multiple_px": GEOMETRY.stride_px,
            },
            "output": {"name": "logits", "labels": list(labels_of(self.recipe))},
            **level_card(self.recipe),
        }


def level_card(recipe: LevelRecipe) -> dict[str, Any]:
    """Return what the cards of all networks for unsigned levels have in common."""
    blur = recipe.blur
    low, high = (f * blur.reference.sampling for f in _SAMPLING_RANGE)
    rule = asdict(ContrastToNoise())
    # The step between values belongs to the camera, not to the engine.
    del rule["quantum"]
    return {
        "kind": "classifier",
        "implementation": "onnx",
        "levels": {
            "step_um": blur.level_step_um,
            "count": LEVEL_COUNT,
            "signed": False,
        },
        "normalisation": {"name": "local_standardisation", **asdict(NORMALISATION)},
        "background": {"name": "contrast_to_noise", **rule},
        "optics": {
            "sampling_min": round(low, 3),
            "sampling_max": round(high, 3),
            "reference": asdict(blur.reference),
        },
    }


def labels_of(recipe: DelpNetRecipe) -> tuple[int | str, ...]:
    """Return the labels of a recipe's network, background last where it has one."""
    return LABELS if recipe.delpnet.background else LABELS[:LEVEL_COUNT]


RECIPE = DelpNetRecipe
TASK = DelpNetTask
