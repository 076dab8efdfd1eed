"""rtfocus-1 and rtfocus-2: defocus per tile and the restored image in one pass.

A residual U-Net on four scales below half resolution, enlarged without checkerboard by
resize and convolution. For many objectives, and safe on what is sharp already:

- *local contrast*: beside the frame the network sees it divided by its local
  deviation, so a dim cell is as clear as a bright one.
- *condition*: what is known of the optics (and, where the caller knows it, of the
  defocus) scales and shifts the deep features; unknown entries are zero.
- *labels*: evidence for signed defocus levels is gathered over 6 x 6 cells.
- *gate*: the correction is multiplied by the probability that there is anything to
  correct, so focus and background pass through.

rtfocus-2, for microscopes with unknown optics, goes on from weights of the first:

- *sampling may be hidden*: a flag says whether it is given. Where it is not, levels are
  those of the reference optics that blur over as many pixels: all that an image tells.
- *doubt*: how much is applied is learned from the restoration, beside the labels.
- *no BatchNorm*: unlike kinds in a batch would spoil its statistics.
- *decibels*: sharp stays so to a thousandth, dim images weigh as much as bright ones.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.sections import Section
from rtfocus.training.feed import copy_of
from rtfocus.training.layers import (
    Modulation,
    ResidualBlock,
    around,
    charbonnier,
    double,
    encoder_sizes,
    fold_batch_norm,
    label_loss,
    learned,
    local_contrast,
    second_look,
    zeroed,
)
from rtfocus.training.pairs import CELL_PX, TILE_PX, TILE_STRIDE_PX, tile_levels
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

Floats = NDArray[np.float32]
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
"""Channels that the labels are read from."""
LABELS: tuple[int | str, ...] = (*range(-FARTHEST, FARTHEST + 1), "bg")
"""Label of every output: signed defocus levels, then background."""

_HIDDEN, _HEAD = 64, 12


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
        self.correction = zeroed(nn.Conv2d(_HEAD + 1, 1, 3, padding=1))

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
        stacked = torch.cat([tiles, local_contrast(tiles, CELL_PX)], dim=1)
        features = functional.relu(self.stem(functional.pixel_unshuffle(stacked, 2)))
        skips: list[Tensor] = []
        for place, blocks in enumerate(self.encoder):
            if place:
                features = functional.relu(self.down[place - 1](features))
            features = blocks(self.modulate_down[place](features, hidden))
            skips.append(features)
        evidence = functional.relu(self.evidence(features))
        tiled = functional.avg_pool2d(
            evidence, TILE_PX // CELL_PX, stride=TILE_STRIDE_PX // CELL_PX
        )
        logits = self.label(tiled)
        gate = self.gate(features, evidence)
        for place in reversed(range(len(self.up))):
            features = double(self.up[place](features)) + skips[place]
            features = self.modulate_up[place](features, hidden)
            features = self.decoder[place](features)
        fine = functional.relu(self.head(double(features)))
        correction = self.correction(torch.cat([fine, tiles], dim=1))
        wide = functional.interpolate(gate, scale_factor=CELL_PX, mode="bilinear")
        return logits, tiles + wide * correction

    def gate(self, features: Tensor, evidence: Tensor) -> Tensor:
        """Return by how much the correction is applied, (N, 1, row, column), 0 to 1.

        Here the probability of neither focus nor background around each cell. Deepest
        features and evidence for labels made of them are (N, channel, row, column).
        """
        del features
        logits = self.label(around(evidence))
        shares: Tensor = logits.float().softmax(dim=1)
        idle = shares[:, LABELS.index(0)] + shares[:, -1]
        return (1 - idle)[:, None].to(logits.dtype)


def _blocks(channels: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(depth)))


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
    """Share of patches whose optics the network does not get."""
    defocus_share: Fraction = 0.2
    """Share of patches whose defocus the network gets."""


class Rtfocus1Recipe(PairRecipe):
    """A training run of the flagship."""

    name: str = "rtfocus_1"
    network: Literal["rtfocus_1"] = "rtfocus_1"
    rtfocus_1: Rtfocus1Section = Rtfocus1Section()


class Rtfocus1Task(PairTask[PairRecipe]):
    """Charbonnier loss of the image plus cross-entropy of the tiles' labels."""

    network: Rtfocus1
    settings: Rtfocus1Section
    network_class: type[Rtfocus1] = Rtfocus1
    statistics_of: tuple[str, ...] = ("blurred", "condition")

    def __init__(self, recipe: PairRecipe) -> None:
        super().__init__(recipe)
        self.settings = getattr(recipe, recipe.network)
        self.network = self.network_class(self.settings.widths, self.settings.depths)

    def take_size(self, weights: Mapping[str, Tensor]) -> None:
        """Become as wide and deep as weights are."""
        self.network = self.network_class(*encoder_sizes(weights))

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make pairs, with labels per tile and a condition that hides at random."""
        data = self.source.batch(step, draw)
        rng = np.random.default_rng([self.recipe.seed, 7, step, draw])
        condition, levels = self.told(data["optics"], tile_levels(data["levels"]), rng)
        batch = {name: data[name] for name in ("blurred", "sharp", "empty")}
        return {**batch, "levels": levels, "condition": condition}

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Charbonnier of the image plus weighted soft cross-entropy."""
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        logits, restored = self.network(blurred, tensors["condition"])
        image = self.image_loss(restored.float() - sharp)
        labels = self.labels_loss(logits.float(), tensors)
        gained = gain_db(blurred, restored.float(), sharp)
        loss = image + self.settings.label_weight * labels
        return loss, {"image": image, "labels": labels, "gain_db": gained}

    def image_loss(self, error: Tensor) -> Tensor:
        """Return what errors of shape (N, 1, y, x) cost."""
        return charbonnier(error, self.settings.charbonnier)

    def labels_loss(self, logits: Tensor, tensors: Tensors) -> Tensor:
        """Return what labels of shape (N, label, row, column) cost."""
        return label_loss(logits, tensors["levels"], tensors["empty"])

    def graph(self, network: nn.Module) -> Graph:
        """Return the network with its BatchNorm folded into the convolutions."""
        return frames_graph(
            fold_batch_norm(network),
            (144, 192),
            ("logits", "restored"),
            entries=len(self.network.condition),
            float_ends=(3, 4),  # the finest features: in int8 they cost 0.3 dB
            exact_output="logits",
        )

    def card(self) -> dict[str, Any]:
        """Return the card of an rtfocus-1 engine."""
        pairs = self.recipe.pairs
        step_um = pairs.level_step_um
        return {
            "kind": "joint",
            "implementation": "onnx",
            "description": "Signed defocus per tile and the restored frame, one pass.",
            "input": grid_input(TILE_PX, TILE_STRIDE_PX, (TILE_PX - 1) / 2),
            "condition": {"name": "condition", "entries": list(self.network.condition)},
            "output": {"name": "logits", "labels": list(LABELS)},
            "restored": {"name": "restored"},
            "levels": {"step_um": step_um, "count": FARTHEST + 1, "signed": True},
            "normalisation": pair_normalisation(),
            "background": background_rule(),
            "optics": pair_optics(pairs),
        }

    def told(
        self, optics: NDArray[np.generic], levels: Floats, rng: np.random.Generator
    ) -> tuple[Floats, Floats]:
        """Choose what the network gets beside patches, and what it is to answer.

        `optics` are sampling and spherical aberration in waves, shape (N, 2), `levels`
        the defocus of every tile, (N, row, column), NaN: not known. `rng` decides what
        is hidden; the sampling never is. Returns the condition, (N, entry), and levels.
        """
        number = len(optics)
        is_told = rng.random(number) >= self.settings.blind_share
        middle = levels.mean(axis=(1, 2))
        # One defocus for a whole patch is only true where the patch is flat.
        flat = np.ptp(levels, axis=(1, 2)) < 0.5
        given = (rng.random(number) < self.settings.defocus_share) & flat
        # Callers know it from a classifier or a calibration, never exactly.
        middle = np.where(given, middle + rng.normal(0, 0.15, number), 0)
        columns = (optics[:, 0], optics[:, 1] * is_told, is_told, middle, given)
        return np.stack(columns, axis=1).astype(np.float32), levels


_LOOK, _DOUBT = 64, 32
_TOLD = CONDITION.index("optics_known")
_FOUND = CONDITION.index("defocus_levels"), CONDITION.index("defocus_known")
# Least probability that a label leaves to its opposite before doubt is heard.
_LEAST_SHARE = 1e-3
_GATE = ("look.", "doubt.", "trust")
_IMAGE = ("up.", "modulate_up.", "decoder.", "head.", "correction.")
_TRAINED = {"all": ("",), "gate": _GATE, "image": _IMAGE, "both": _GATE + _IMAGE}
# Squared error, as a share of the range, below which decibels do not count: 50 dB.
_ENOUGH = 1e-5


class Rtfocus2(Rtfocus1):
    """Defocus and restoration in one pass, see `Rtfocus1` for the parameters."""

    condition = (*CONDITION, "sampling_known")

    def __init__(self, *sizes: tuple[int, ...]) -> None:
        super().__init__(*sizes)
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                (folded,) = fold_batch_norm(nn.Sequential(block.layers)).children()
                block.layers = cast("nn.Sequential", folded.train())
        self.trust = nn.Parameter(torch.ones(1))
        self.look = nn.Conv2d(self.evidence.in_channels, _LOOK, 1)
        last = zeroed(nn.Conv2d(_DOUBT, 1, 1))
        self.doubt = nn.Sequential(nn.Conv2d(_LOOK, _DOUBT, 1), nn.ReLU(), last)

    def gate(self, features: Tensor, evidence: Tensor) -> Tensor:
        """Return the share of the correction per cell: the labels' odds, and doubt."""
        busy = super().gate(features, evidence).float()  # bfloat16 has no 0.999
        busy = busy.clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
        doubt = self.doubt(around(functional.relu(self.look(features))))
        return torch.sigmoid(self.trust * torch.log(busy / (1 - busy)) + doubt)


class Rtfocus2Section(Rtfocus1Section):
    """Size of the network, what its losses weigh and what is hidden from it."""

    hidden_sampling_share: Fraction = 0.5
    """Share of patches whose sampling, and so everything, the network is not told."""
    trained: Literal["all", "gate", "image", "both"] = "all"
    """``gate``: how much is corrected, ``image``: by what, or both; labels stay."""
    decibel_weight: Annotated[float, Field(ge=0)] = 0.02
    """Weight of the logarithm of each patch's squared error."""
    second_look_share: Fraction = 0.0
    """Share of patches seen twice: the second time told the defocus found first."""
    orientations: Annotated[int, Field(ge=0, le=8)] = 0
    """Not 0: not the truth is learned, but what a network makes in their mean."""
    learned_from: Path | tuple[Path, ...] | None = None
    """Checkpoints or engines, of any size, in turns; None: ``start_from``."""
    learned_looks: Annotated[int, Field(ge=1, le=2)] = 1
    """2: those see a patch twice, see ``second_look_share``."""
    told_from: tuple[Path, ...] = ()
    """The same for patches whose optics are told, seen once; none: as the others."""


class Rtfocus2Recipe(PairRecipe):
    """A training run of the flagship for unknown optics."""

    name: str = "rtfocus_2"
    network: Literal["rtfocus_2"] = "rtfocus_2"
    rtfocus_2: Rtfocus2Section = Rtfocus2Section()


class Rtfocus2Task(Rtfocus1Task):
    """The losses of rtfocus-1, and decibels; sampling hidden at random."""

    network: Rtfocus2
    settings: Rtfocus2Section
    network_class = Rtfocus2
    statistics_of = ()

    def __init__(self, recipe: Rtfocus2Recipe) -> None:
        super().__init__(recipe)
        for name, weights in self.network.named_parameters():
            weights.requires_grad_(name.startswith(_TRAINED[self.settings.trained]))

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make pairs, and say which are looked at twice."""
        batch = dict(super().batch(step, draw))
        if share := self.settings.second_look_share:
            rng = np.random.default_rng([self.recipe.seed, 8, step, draw])
            batch["twice"] = rng.random(len(batch["condition"])) < share
        return batch

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, of the second look where there is one."""
        if "twice" in tensors:
            condition = second_look(self.network, tensors, _FOUND)
            tensors = {**tensors, "condition": condition}
        if number := self.settings.orientations:
            told = tensors["condition"][:, _TOLD].bool() & bool(self._told)
            found = _FOUND if self.settings.learned_looks == 2 else None
            groups = [(~told, self._known, found), (told, self._told, None)]
            tensors = {**tensors, **learned(groups, tensors, number)}
        return super().loss(tensors)

    def labels_loss(self, logits: Tensor, tensors: Tensors) -> Tensor:
        """Return the cross-entropy against the truth, or what is learned instead."""
        if "shares" not in tensors:
            return super().labels_loss(logits, tensors)
        return -(tensors["shares"] * logits.log_softmax(dim=1)).sum(dim=1).mean()

    def begin(self) -> None:
        """Keep the networks that are learned from, where there are some."""
        if self.settings.orientations:
            named = self.settings.learned_from or self.recipe.start_from
            sources = named if isinstance(named, tuple) else (named,)
            self._known = [copy_of(self, one).network for one in sources]
            self._told = [copy_of(self, one).network for one in self.settings.told_from]

    def image_loss(self, error: Tensor) -> Tensor:
        """Return Charbonnier plus the mean logarithm of each patch's squared error."""
        decibels = torch.log(error.square().mean(dim=(1, 2, 3)) / _ENOUGH + 1).mean()
        return super().image_loss(error) + self.settings.decibel_weight * decibels

    def told(
        self, optics: NDArray[np.generic], levels: Floats, rng: np.random.Generator
    ) -> tuple[Floats, Floats]:
        """Choose what is given; levels of hidden optics are those of the reference."""
        condition, levels = super().told(optics, levels, rng)
        hidden = rng.random(len(optics)) < self.settings.hidden_sampling_share
        flagged = np.column_stack([condition, np.ones(len(optics), np.float32)])
        flagged[hidden] = 0
        sampling = self.recipe.pairs.reference.sampling
        wider = np.where(hidden, sampling / np.asarray(optics[:, 0], np.float64), 1.0)
        return flagged, np.asarray(levels * wider[:, None, None], dtype=np.float32)

    @torch.no_grad()
    def take_state(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights of rtfocus-2, or of rtfocus-1 so that they do the same.

        Hidden sampling is taken for that of the reference then, and nothing doubted.
        """
        if "trust" in weights:
            self.network.load_state_dict(weights)
            return
        earlier = Rtfocus1(self.settings.widths, self.settings.depths)
        earlier.load_state_dict(weights)
        folded = fold_batch_norm(earlier).state_dict()
        first = folded["embedding.0.weight"]
        flag = first[:, :1] * self.recipe.pairs.reference.sampling
        folded["embedding.0.weight"] = torch.cat([first, -flag], dim=1)
        folded["embedding.0.bias"] += flag[:, 0]
        self.network.load_state_dict({**self.network.state_dict(), **folded})


NETWORKS = {
    "rtfocus_1": (Rtfocus1Recipe, Rtfocus1Task),
    "rtfocus_2": (Rtfocus2Recipe, Rtfocus2Task),
}
