"""Task of Wei's classifier: five signed classes of patches, Wei et al. 2024."""

from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rtfocus.config.section import Section
from rtfocus.errors import ConfigError
from rtfocus.optics.normalisation import ContrastToNoise, PercentileRange
from rtfocus.training.data.signed_patches import SignedPatches
from rtfocus.training.data.signed_recipe import SignedClassRecipe
from rtfocus.training.networks.batch_norm import fold_batch_norm, recalibrate
from rtfocus.training.networks.tiled import TiledClassifier
from rtfocus.training.networks.wei_classifier import (
    LABELS,
    PATCH_PX,
    WeiClassifier,
    exchange_channels,
)
from rtfocus.training.task import Arrays, Graph, Task, Tensors

# Optics for which the classes hold: training draws near the reference only.
_SAMPLING_RANGE = (0.85, 1.15)
# A class speaks for its middle; the inner ones for what is nearest to it.
_STEP_OF_INNER = 0.75
_CALIBRATION_BATCHES = 20


class WeiSection(Section):
    """Switches of Wei's classifier: the rows of the paper's table 1."""

    channel_normalisation: bool = True
    """Bring every channel of a patch to mean 0 and deviation 1."""
    channel_exchange: bool = True
    """Train on colours in every order; nothing to exchange in grey."""
    attention: bool = True
    """Weigh the channels of every block by what the patch shows."""
    batch_norm: bool = True
    """BatchNorm after every convolution; the paper mentions none."""


class WeiClassifierRecipe(SignedClassRecipe):
    """A training run of Wei's classifier."""

    name: str = "wei_classifier"
    network: Literal["wei_classifier"] = "wei_classifier"
    wei: WeiSection = WeiSection()


class WeiClassifierTask(Task[WeiClassifierRecipe]):
    """Cross-entropy over five classes."""

    network: WeiClassifier

    def __init__(self, recipe: WeiClassifierRecipe) -> None:
        super().__init__(recipe)
        self._channels = 3 if recipe.signed.colour else 1
        self.network = WeiClassifier(
            channels=self._channels,
            channel_normalisation=recipe.wei.channel_normalisation,
            attention=recipe.wei.attention,
            batch_norm=recipe.wei.batch_norm,
        )
        self._patches: SignedPatches | None = None

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make patches and their classes."""
        if self._patches is None:
            # Made when first needed: an export needs no images.
            self._patches = SignedPatches(self.recipe)
        return self._patches.batch(step, draw)

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy and the share of right classes."""
        patches, labels = tensors["patches"], tensors["labels"]
        if self.recipe.wei.channel_exchange and self._channels > 1:
            patches = exchange_channels(patches, _random_orders(patches))
        logits = self.network(patches).float()
        loss = nn.functional.cross_entropy(logits, labels)
        right = (logits.detach().argmax(dim=1) == labels).float().mean()
        return loss, {"accuracy": right}

    def finish_average(self, average: nn.Module, batches: Iterable[Tensors]) -> None:
        """Give the averaged weights exact batch statistics of their own."""
        patches = (b["patches"] for b in islice(batches, _CALIBRATION_BATCHES))
        recalibrate(average, patches)

    def graph(self, network: nn.Module) -> Graph:
        """Return the network over whole frames, one label per patch.

        Raises
        ------
        ConfigError
            Without channel normalisation: then counts would have to come on the
            scale of the training's cameras.
        """
        if not self.recipe.wei.channel_normalisation:
            msg = (
                "wei.channel_normalisation is off: such a network depends on the "
                "camera's scale and is for comparisons only; train with it to export"
            )
            raise ConfigError(msg)
        example = torch.zeros(2, self._channels, 2 * PATCH_PX, 3 * PATCH_PX)
        return Graph(
            TiledClassifier(fold_batch_norm(network), PATCH_PX),
            {"tiles": example},
            ("logits",),
            {"tiles": {0: "number", 2: "height", 3: "width"}},
        )

    def card(self) -> dict[str, Any]:
        """Return the card of a Wei engine."""
        signed = self.recipe.signed
        low, high = (f * signed.reference.sampling for f in _SAMPLING_RANGE)
        rule = asdict(ContrastToNoise())
        # The step between values belongs to the camera, not to the engine.
        del rule["quantum"]
        background = {} if signed.colour else {"name": "contrast_to_noise", **rule}
        return {
            "kind": "classifier",
            "implementation": "onnx",
            "description": "Signed defocus class of patches, Wei et al. 2024.",
            "input": {
                "name": "tiles",
                "channels": self._channels,
                "tile_px": PATCH_PX,
                "stride_px": PATCH_PX,
                "origin_px": (PATCH_PX - 1) / 2,
                "multiple_px": PATCH_PX,
            },
            "output": {"name": "logits", "labels": list(LABELS)},
            "levels": {
                "step_um": _STEP_OF_INNER * signed.inner_um,
                "count": len(LABELS) // 2 + 1,
                "signed": True,
            },
            "normalisation": {"name": "percentile_range", **asdict(PercentileRange())},
            "background": background,
            "optics": {
                "sampling_min": round(low, 3),
                "sampling_max": round(high, 3),
                "reference": asdict(signed.reference),
            },
        }


def _random_orders(patches: Tensor) -> Tensor:
    """Draw a permutation of the channels per patch."""
    number, channels = patches.shape[:2]
    return torch.rand(number, channels, device=patches.device).argsort(dim=1)


RECIPE = WeiClassifierRecipe
TASK = WeiClassifierTask
