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

import torch
from torch import Tensor, nn
from torch.nn import functional

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
LABELS: tuple[int | str, ...] = (*range(-FARTHEST, FARTHEST + 1), "bg")
"""Label of every output: signed defocus levels, then background."""

_FOCUS = LABELS.index(0)
_BACKGROUND = len(LABELS) - 1
_HIDDEN = 64
_EVIDENCE = 128
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
            nn.Linear(len(CONDITION), _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
        )
        self.modulate_down = nn.ModuleList(Modulation(_HIDDEN, c) for c in widths)
        self.modulate_up = nn.ModuleList(Modulation(_HIDDEN, c) for c in widths[:-1])
        self.evidence = nn.Conv2d(widths[-1], _EVIDENCE, 1)
        self.label = nn.Conv2d(_EVIDENCE, len(LABELS), 1)
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
            Shape (N, 5), see `CONDITION`.

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
        around = functional.avg_pool2d(
            evidence, 5, stride=1, padding=2, count_include_pad=False
        )
        gate = _something_to_correct(self.label(around))
        for place in reversed(range(len(self.up))):
            features = _double(self.up[place](features)) + skips[place]
            features = self.modulate_up[place](features, hidden)
            features = self.decoder[place](features)
        fine = functional.relu(self.head(_double(features)))
        correction = self.correction(torch.cat([fine, tiles], dim=1))
        wide = functional.interpolate(gate, scale_factor=CELL_PX, mode="bilinear")
        return logits, tiles + wide * correction


def _blocks(channels: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(depth)))


def _double(features: Tensor) -> Tensor:
    return functional.interpolate(features, scale_factor=2.0, mode="nearest")


def _local_contrast(tiles: Tensor) -> Tensor:
    """Divide by the deviation of the surroundings: dim objects tell as much as bright.

    The deviation from the mean over 80 px, blended over cells of 16 px.
    """
    cells = functional.avg_pool2d(torch.cat([tiles, tiles.square()], 1), CELL_PX)
    mean, square = functional.avg_pool2d(
        cells, 5, stride=1, padding=2, count_include_pad=False
    ).chunk(2, dim=1)
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
