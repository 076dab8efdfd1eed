"""rtfocus-1: defocus per tile and the restored image in one pass.

A residual U-Net on four scales below half resolution. What makes it one network
for many objectives and safe on what is sharp already:

- *local contrast*: beside the frame the network sees it divided by its local
  deviation, so a dim cell is as clear as a bright one.
- *condition*: what is known of the optics (and, where the caller knows it, of the
  defocus) scales and shifts the deep features; unknown entries are zero.
- *labels*: evidence for signed defocus levels is gathered over 6 x 6 cells.
- *gate*: the correction is multiplied by the probability that there is anything to
  correct, so focus and background pass through.

Resize and convolution, no transposed convolution: no checkerboard.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.sections import Section
from rtfocus.training.layers import charbonnier, fold_batch_norm
from rtfocus.training.pairs import TILE_PX, TILE_STRIDE_PX
from rtfocus.training.recipe import Count, Fraction, PairRecipe, Positive
from rtfocus.training.task import (
    Arrays,
    Graph,
    PairTask,
    Tensors,
    background_rule,
    frames_graph,
    gain_db,
    grid_input,
    pair_normalisation,
    pair_optics,
)

CELL_PX = 16
"""Pixels per cell of the deepest features."""
TILE_CELLS = 6
STRIDE_CELLS = 3
CONDITION = (
    "sampling",
    "spherical_waves",
    "optics_known",
    "defocus_levels",
    "defocus_known",
)
"""Entries of the condition vector, see the engine card."""
FARTHEST = 10
EVIDENCE = 128
"""Channels that the labels are told from."""
LABELS: tuple[int | str, ...] = (*range(-FARTHEST, FARTHEST + 1), "bg")
"""Label of every output: signed defocus levels, then background."""

_FOCUS = LABELS.index(0)
_BACKGROUND = len(LABELS) - 1
_HIDDEN = 64
_HEAD = 12
_LEAST_POWER = 1e-4


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a short cut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape."""
        result: Tensor = features + self.layers(features)
        return result


class Modulation(nn.Module):
    """Scale and shift of features by the condition (FiLM); begins as the identity."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, 2 * channels)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Return ``features * (1 + scale) + shift``, per channel."""
        scale, shift = self.dense(hidden)[:, :, None, None].chunk(2, dim=1)
        result: Tensor = features * (1 + scale) + shift
        return result


class Rtfocus1(nn.Module):
    """Defocus and restoration in one pass.

    Parameters
    ----------
    widths
        Channels at 1/2, 1/4, 1/8 and 1/16 of the resolution.
    depths
        Residual blocks on each of these scales, on the way down and (but for the
        deepest) again on the way up.
    """

    condition: tuple[str, ...] = CONDITION
    """What the entries of the condition vector are."""

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128, 192),
        depths: tuple[int, ...] = (1, 1, 1, 2),
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(map(_blocks, widths, depths))
        steps = list(pairwise(widths))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in steps)
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in steps)
        self.decoder = nn.ModuleList(map(_blocks, widths[:-1], depths[:-1]))
        self.embedding = nn.Sequential(
            nn.Linear(len(self.condition), _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
        )
        self.modulate_down = nn.ModuleList(Modulation(_HIDDEN, c) for c in widths)
        self.modulate_up = nn.ModuleList(Modulation(_HIDDEN, c) for c in widths[:-1])
        self.evidence = nn.Conv2d(widths[-1], EVIDENCE, 1)
        self.label = nn.Conv2d(EVIDENCE, len(LABELS), 1)
        self.head = nn.Conv2d(widths[0], _HEAD, 3, padding=1)
        self.correction = nn.Conv2d(_HEAD + 1, 1, 3, padding=1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)  # type: ignore[arg-type]

    def forward(self, tiles: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Restore frames or patches.

        Parameters
        ----------
        tiles
            Shape (N, 1, y, x), sides multiples of 48, 0 and 1 at the frame's dark
            and bright percentile.
        condition
            Shape (N, entry), see `condition`.

        Returns
        -------
        tuple
            Logits (N, label, row, column), one tile of 96 px every 48 px; and the
            restored tiles, shape of `tiles`.
        """
        hidden = self.embedding(condition)
        seen = torch.cat([tiles, _local_contrast(tiles)], dim=1)
        features = functional.relu(self.stem(functional.pixel_unshuffle(seen, 2)))
        skips: list[Tensor] = []
        for place, blocks in enumerate(self.encoder):
            if place:
                features = functional.relu(self.down[place - 1](features))
            features = blocks(self.modulate_down[place](features, hidden))
            skips.append(features)
        evidence = functional.relu(self.evidence(features))
        logits = self.label(
            functional.avg_pool2d(evidence, TILE_CELLS, stride=STRIDE_CELLS)
        )
        gate = self.gate(features, evidence)
        for place in reversed(range(len(self.up))):
            features = _double(self.up[place](features)) + skips[place]
            features = self.modulate_up[place](features, hidden)
            features = self.decoder[place](features)
        fine = functional.relu(self.head(_double(features)))
        correction = self.correction(torch.cat([fine, tiles], dim=1))
        wide = functional.interpolate(gate, scale_factor=CELL_PX, mode="bilinear")
        return logits, tiles + wide * correction

    def gate(self, features: Tensor, evidence: Tensor) -> Tensor:
        """Return by how much, per cell, the correction is applied.

        Parameters
        ----------
        features
            The deepest ones, shape (N, channel, row, column).
        evidence
            Made of them for the labels, shape (N, 128, row, column).

        Returns
        -------
        Tensor
            Shape (N, 1, row, column), between 0 and 1: here the probability, around
            each cell, of neither focus nor background.
        """
        del features
        return _something_to_correct(self.label(around(evidence)))


def around(cells: Tensor) -> Tensor:
    """Return the mean over the 80 px around each cell, cut at the frame's edge."""
    return functional.avg_pool2d(cells, 5, stride=1, padding=2, count_include_pad=False)


def _blocks(channels: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(depth)))


def _double(features: Tensor) -> Tensor:
    return functional.interpolate(features, scale_factor=2.0, mode="nearest")


def _local_contrast(tiles: Tensor) -> Tensor:
    """Divide by the deviation of the surroundings: dim objects tell as much as bright.

    The deviation from the mean over 80 px, blended over cells of 16 px.
    """
    cells = functional.avg_pool2d(torch.cat([tiles, tiles.square()], 1), CELL_PX)
    mean, square = around(cells).chunk(2, dim=1)
    deviation = ((square - mean.square()).clamp(min=0) + _LEAST_POWER).sqrt()
    both = torch.cat([mean, 1 / deviation], dim=1)
    mean, scale = functional.interpolate(
        both, scale_factor=CELL_PX, mode="bilinear"
    ).chunk(2, dim=1)
    return (tiles - mean) * scale


def _something_to_correct(logits: Tensor) -> Tensor:
    """Return the probability, per cell, of neither focus nor background."""
    shares = logits.float().softmax(dim=1)
    idle = shares[:, _FOCUS] + shares[:, _BACKGROUND]
    return (1 - idle)[:, None].to(logits.dtype)


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


class Rtfocus1Task(PairTask[Rtfocus1Recipe]):
    """Charbonnier loss of the image plus cross-entropy of the tiles' labels."""

    network: Rtfocus1
    network_class: type[Rtfocus1] = Rtfocus1
    statistics_of: tuple[str, ...] = ("blurred", "condition")

    def __init__(self, recipe: Rtfocus1Recipe) -> None:
        super().__init__(recipe)
        settings = recipe.rtfocus_1
        self.network = self.network_class(settings.widths, settings.depths)

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make pairs, with labels per tile and a condition that hides at random."""
        made = self.source.batch(step, draw)
        rng = np.random.default_rng([self.recipe.seed, 7, step, draw])
        condition, levels = self.told(made["optics"], tile_levels(made["levels"]), rng)
        return {
            "blurred": made["blurred"],
            "sharp": made["sharp"],
            "levels": levels,
            "empty": made["empty"],
            "condition": condition,
        }

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Charbonnier of the image plus weighted soft cross-entropy."""
        settings = self.recipe.rtfocus_1
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        logits, restored = self.network(blurred, tensors["condition"])
        error = restored.float() - sharp
        image = self.image_loss(error)
        labels = label_loss(logits.float(), tensors["levels"], tensors["empty"])
        shown = {
            "image": image,
            "labels": labels,
            "gain_db": gain_db(blurred, restored.float(), sharp),
        }
        return image + settings.label_weight * labels, shown

    def image_loss(self, error: Tensor) -> Tensor:
        """Return what errors of shape (N, 1, y, x) cost."""
        return charbonnier(error, self.recipe.rtfocus_1.charbonnier)

    def graph(self, network: nn.Module) -> Graph:
        """Return the network with its BatchNorm folded into the convolutions."""
        return frames_graph(
            fold_batch_norm(network),
            (144, 192),
            ("logits", "restored"),
            entries=len(self.network.condition),
            # Both blocks on the finest features: in int8 they cost 0.3 dB.
            float_ends=(3, 4),
        )

    def card(self) -> dict[str, Any]:
        """Return the card of an rtfocus-1 engine."""
        pairs = self.recipe.pairs
        return {
            "kind": "joint",
            "implementation": "onnx",
            "description": "Signed defocus per tile and the restored frame, one pass.",
            "input": grid_input(TILE_PX, TILE_STRIDE_PX, (TILE_PX - 1) / 2),
            "condition": {"name": "condition", "entries": list(self.network.condition)},
            "output": {"name": "logits", "labels": list(LABELS)},
            "restored": {"name": "restored"},
            "levels": {
                "step_um": pairs.level_step_um,
                "count": FARTHEST + 1,
                "signed": True,
            },
            "normalisation": pair_normalisation(),
            "background": background_rule(),
            "optics": pair_optics(pairs),
        }

    def told(
        self,
        optics: NDArray[np.generic],
        levels: NDArray[np.float32],
        rng: np.random.Generator,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Choose what the network is told of patches, and what it is to answer.

        Parameters
        ----------
        optics
            Sampling and spherical aberration in waves, shape (N, 2).
        levels
            Defocus of every tile in levels, shape (N, row, column); NaN: not known.
        rng
            Decides what is hidden; the sampling never is.

        Returns
        -------
        tuple
            Condition, shape (N, entry), and levels, shape of `levels`.
        """
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
        return np.stack(columns, axis=1).astype(np.float32), levels


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


NETWORKS = {"rtfocus_1": (Rtfocus1Recipe, Rtfocus1Task)}
