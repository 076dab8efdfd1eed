"""rtfocus-1's task: restored patches and signed defocus labels together."""

from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.section import Section
from rtfocus.optics.normalisation import ContrastToNoise, PercentileRange
from rtfocus.training.data.pair_recipe import PairRecipe
from rtfocus.training.data.pairs import TILE_PX, TILE_STRIDE_PX, PairBatches
from rtfocus.training.losses.charbonnier import charbonnier
from rtfocus.training.networks.batch_norm import fold_batch_norm, recalibrate
from rtfocus.training.networks.rtfocus_1 import (
    CONDITION,
    FARTHEST,
    LABELS,
    STRIDE_CELLS,
    TILE_CELLS,
    Rtfocus1,
)
from rtfocus.training.recipe import Count, Fraction, Positive
from rtfocus.training.task import Arrays, Graph, Task, Tensors

# Optics drawn in training lie within these factors of the reference sampling.
_SAMPLING_RANGE = (0.6, 1.6)
_CALIBRATION_BATCHES = 40


class Rtfocus1Section(Section):
    """Size of the network and what its losses weigh."""

    widths: tuple[Count, Count, Count, Count] = (32, 64, 128, 192)
    """Channels at 1/2, 1/4, 1/8 and 1/16 of the resolution."""
    depths: tuple[Count, Count, Count, Count] = (1, 1, 1, 2)
    """Residual blocks on each scale."""
    charbonnier: Positive = 0.01
    """Error, as a share of the frame's range, from which on the loss is linear."""
    label_weight: Annotated[float, Field(ge=0)] = 0.03
    """Weight of the labels' cross-entropy beside the restoration."""
    blind_share: Fraction = 0.6
    """Share of patches whose optics the network is not told."""
    defocus_share: Fraction = 0.2
    """Share of patches whose defocus the network is told."""


class Rtfocus1Recipe(PairRecipe):
    """A training run of the flagship."""

    name: str = "rtfocus_1"
    network: Literal["rtfocus_1"] = "rtfocus_1"
    rtfocus_1: Rtfocus1Section = Rtfocus1Section()


class Rtfocus1Task(Task[Rtfocus1Recipe]):
    """Charbonnier loss of the image plus cross-entropy of the tiles' labels."""

    network: Rtfocus1

    def __init__(self, recipe: Rtfocus1Recipe) -> None:
        super().__init__(recipe)
        settings = recipe.rtfocus_1
        self.network = Rtfocus1(settings.widths, settings.depths)
        self._batches: PairBatches | None = None

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make pairs, with labels per tile and a condition that hides at random."""
        if self._batches is None:
            # Made when first needed: an export needs no images.
            self._batches = PairBatches(self.recipe)
        made = self._batches.batch(step, draw)
        levels = tile_levels(made["levels"])
        rng = np.random.default_rng([self.recipe.seed, 7, step, draw])
        return {
            "blurred": made["blurred"],
            "sharp": made["sharp"],
            "levels": levels,
            "empty": made["empty"],
            "condition": self._condition(made["optics"], levels, rng),
        }

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Charbonnier of the image plus weighted soft cross-entropy."""
        settings = self.recipe.rtfocus_1
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        logits, restored = self.network(blurred, tensors["condition"])
        error = restored.float() - sharp
        image = charbonnier(error, settings.charbonnier)
        labels = label_loss(logits.float(), tensors["levels"], tensors["empty"])
        gain = (blurred - sharp).square().mean() / error.square().mean()
        shown = {
            "image": image,
            "labels": labels,
            "gain_db": 10 * torch.log10(gain.detach() + 1e-9),
        }
        return image + settings.label_weight * labels, shown

    def finish_average(self, average: nn.Module, batches: Iterable[Tensors]) -> None:
        """Give the averaged weights exact batch statistics of their own."""
        shown = islice(batches, _CALIBRATION_BATCHES)
        recalibrate(average, ((b["blurred"], b["condition"]) for b in shown))

    def graph(self, network: nn.Module) -> Graph:
        """Return the network with its BatchNorm folded into the convolutions."""
        frame = {0: "number", 2: "height", 3: "width"}
        return Graph(
            fold_batch_norm(network),
            {
                "tiles": torch.zeros(2, 1, 144, 192),
                "condition": torch.zeros(2, len(CONDITION)),
            },
            ("logits", "restored"),
            {"tiles": frame, "condition": {0: "number"}},
            # Both blocks on the finest features: in int8 they cost 0.3 dB.
            float_ends=(3, 4),
        )

    def card(self) -> dict[str, Any]:
        """Return the card of an rtfocus-1 engine."""
        pairs = self.recipe.pairs
        low, high = (f * pairs.reference.sampling for f in _SAMPLING_RANGE)
        rule = asdict(ContrastToNoise())
        # The step between values belongs to the camera, not to the engine.
        del rule["quantum"]
        normalisation = asdict(PercentileRange())
        del normalisation["sample_px"]
        return {
            "kind": "joint",
            "implementation": "onnx",
            "description": "Signed defocus per tile and the restored frame, one pass.",
            "input": {
                "name": "tiles",
                "channels": 1,
                "tile_px": TILE_PX,
                "stride_px": TILE_STRIDE_PX,
                "origin_px": (TILE_PX - 1) / 2,
                "multiple_px": TILE_STRIDE_PX,
            },
            "condition": {"name": "condition", "entries": list(CONDITION)},
            "output": {"name": "logits", "labels": list(LABELS)},
            "restored": {"name": "restored"},
            "levels": {
                "step_um": pairs.level_step_um,
                "count": FARTHEST + 1,
                "signed": True,
            },
            "normalisation": {"name": "percentile_range", **normalisation},
            "background": {"name": "contrast_to_noise", **rule},
            "optics": {
                "sampling_min": round(low, 3),
                "sampling_max": round(high, 3),
                "reference": asdict(pairs.reference),
            },
        }

    def _condition(
        self,
        optics: NDArray[np.generic],
        levels: NDArray[np.float32],
        rng: np.random.Generator,
    ) -> NDArray[np.float32]:
        """Tell the network some of what is known; sampling always."""
        settings = self.recipe.rtfocus_1
        number = len(optics)
        told = rng.random(number) >= settings.blind_share
        middle = levels.mean(axis=(1, 2))
        # One defocus for a whole patch is only true where the patch is flat.
        flat = np.ptp(levels, axis=(1, 2)) < 0.5
        given = (rng.random(number) < settings.defocus_share) & flat
        # Callers know it from a classifier or a calibration, never exactly.
        middle = np.where(given, middle + rng.normal(0, 0.15, number), 0)
        columns = (optics[:, 0], optics[:, 1] * told, told, middle, given)
        return np.stack(columns, axis=1).astype(np.float32)


def tile_levels(cells: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the mean defocus of every tile from that of its cells."""
    size = TILE_CELLS
    windows = np.lib.stride_tricks.sliding_window_view(cells, (size, size), (1, 2))
    tiles = windows[:, ::STRIDE_CELLS, ::STRIDE_CELLS].mean(axis=(3, 4))
    return np.asarray(tiles, dtype=np.float32)


def label_loss(logits: Tensor, levels: Tensor, empty: Tensor) -> Tensor:
    """Return the cross-entropy of tiles against their level.

    A defocus between two levels asks for both, each by its nearness.

    Parameters
    ----------
    logits
        Shape (N, label, row, column), background last.
    levels
        Signed defocus in levels, shape (N, row, column); NaN: not counted.
    empty
        Background tiles, same shape.
    """
    known = ~levels.isnan()
    if not known.any():
        return logits.sum() * 0
    place = (levels[known] + FARTHEST).clamp(0, 2 * FARTHEST)
    lower = place.floor().clamp(max=2 * FARTHEST - 1)
    share = place - lower
    wanted = functional.one_hot(lower.long(), len(LABELS)) * (1 - share)[:, None]
    wanted = wanted + functional.one_hot(lower.long() + 1, len(LABELS)) * share[:, None]
    background = torch.zeros_like(wanted)
    background[:, -1] = 1
    wanted = torch.where(empty[known][:, None], background, wanted)
    found = logits.permute(0, 2, 3, 1)[known].log_softmax(dim=1)
    return -(wanted * found).sum(dim=1).mean()


RECIPE = Rtfocus1Recipe
TASK = Rtfocus1Task
