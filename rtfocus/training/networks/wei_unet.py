"""Wei's kernel-guided U-Net, and both of Wei's networks as one restorer.

Every convolution's result is scaled and shifted by what three fully connected
layers make of the blurring kernel (Wei et al. 2024, section 3.3, eq. 6). Resize and
convolution instead of transposed convolution: no checkerboard.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.sections import Section
from rtfocus.training.layers import double, zeroed
from rtfocus.training.networks.wei_kernel import (
    UNKNOWN_CLASS,
    WeiKernelNet,
    reblur_error,
)
from rtfocus.training.pairs import PairBatches
from rtfocus.training.recipe import Count, Fraction, PairRecipe, Positive
from rtfocus.training.task import (
    Arrays,
    BatchSource,
    Graph,
    RestorerTask,
    Tensors,
    frames_graph,
    gain_db,
)

CONDITION = ("defocus_levels", "defocus_known")
"""Entries of the condition vector, see the engine card."""

_FEWEST_SCALES = 2
# Added to the kernel before the root, whose slope at zero is infinite.
_LEAST_SHARE = 1e-6


class KernelGuide(nn.Module):
    """Scale and shift of features by the kernel (eq. 6); begins as the identity.

    Parameters
    ----------
    kernel_px
        Side of the kernel.
    hidden
        Width of the first two of the three fully connected layers.
    channels
        Channels of the features.
    """

    def __init__(self, kernel_px: int, hidden: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(kernel_px**2, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = zeroed(nn.Linear(hidden, 2 * channels))

    def forward(self, features: Tensor, flat: Tensor) -> Tensor:
        """Return ``r (1 + x(k)) + b(k)``, one weight and bias per channel."""
        hidden = functional.relu(self.second(functional.relu(self.first(flat))))
        scale, shift = self.last(hidden)[:, :, None, None].chunk(2, dim=1)
        result: Tensor = features * (1 + scale) + shift
        return result


class GuidedConvolution(nn.Module):
    """A 3 x 3 convolution, the kernel's guidance, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_px: int, hidden: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        # No layer normalises or short-cuts: features must keep their size by
        # themselves through a dozen layers.
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu")
        self.guide = KernelGuide(kernel_px, hidden, outputs)

    def forward(self, features: Tensor, flat: Tensor) -> Tensor:
        """Return features with `outputs` channels."""
        return functional.relu(self.guide(self.convolution(features), flat))


class WeiUNet(nn.Module):
    """Blurred tile and kernel to restored tile.

    Parameters
    ----------
    kernel_px
        Side of the kernel.
    widths
        Channels per scale, finest first; 128 everywhere in the paper.
    hidden
        Width of the fully connected layers of a guide.
    phases
        1: the finest scale is the full resolution (paper); 2: half of it, on four
        interleaved sub-images, and a narrow layer at full resolution at the end.
    residual_output
        Add the result to the input and start as the identity; false in the paper.
    """

    def __init__(
        self,
        kernel_px: int = 33,
        widths: Sequence[int] = (128, 128, 128, 128),
        hidden: int = 128,
        *,
        phases: int = 1,
        residual_output: bool = False,
    ) -> None:
        super().__init__()
        if len(widths) < _FEWEST_SCALES:
            msg = f"U-Net of {len(widths)} scale: give at least two widths"
            raise ValueError(msg)
        self.phases, self.residual_output = phases, residual_output

        def guided(inputs: int, outputs: int) -> GuidedConvolution:
            return GuidedConvolution(inputs, outputs, kernel_px, hidden)

        before = (phases**2, *widths[:-1])
        self.encoder = nn.ModuleList(
            nn.ModuleList([guided(a, b), guided(b, b)])
            for a, b in zip(before, widths, strict=True)
        )
        steps = list(pairwise(widths))
        self.enlarge = nn.ModuleList(guided(b, a) for a, b in steps)
        # The enlarged features beside those of the encoder: twice the channels.
        self.decoder = nn.ModuleList(guided(2 * a, a) for a, _ in steps)
        head = widths[0] // phases**2
        self.head = guided(widths[0], head) if phases > 1 else None
        self.output = nn.Conv2d(head, 1, 3, padding=1)
        if residual_output:
            zeroed(self.output)

    def forward(self, tiles: Tensor, kernel: Tensor) -> Tensor:
        """Restore tiles.

        Parameters
        ----------
        tiles
            Shape (N, 1, y, x), sides multiples of ``phases * 2 ** (scales - 1)``.
        kernel
            Shape (N, side, side), sum 1.
        """
        # As square roots the entries have length 1 together, narrow or wide; as
        # shares of light, those of a wide kernel would hardly be seen.
        flat = (kernel.flatten(1) + _LEAST_SHARE).sqrt()
        features = functional.pixel_unshuffle(tiles, self.phases)
        skips: list[Tensor] = []
        for place, pair in enumerate(self.encoder):
            if place:
                features = functional.max_pool2d(features, 2)
            for layer in pair:  # type: ignore[attr-defined]
                features = layer(features, flat)
            skips.append(features)
        for place in reversed(range(len(self.enlarge))):
            features = self.enlarge[place](double(features), flat)
            features = torch.cat([features, skips[place]], dim=1)
            features = self.decoder[place](features, flat)
        if self.head is not None:
            features = self.head(double(features), flat)
        result: Tensor = self.output(features)
        return tiles + result if self.residual_output else result


class WeiRestorer(nn.Module):
    """Kernel extraction and kernel-guided restoration in one pass.

    Parameters
    ----------
    kernel_net, unet
        The two networks; the U-Net takes kernels of the first one's size.
    class_edges
        Defocus in levels up to which a tile is in focus, and from which on it
        belongs to the far classes.
    """

    def __init__(
        self,
        kernel_net: WeiKernelNet,
        unet: WeiUNet,
        class_edges: tuple[float, float] = (0.5, 2.5),
    ) -> None:
        super().__init__()
        self.kernel_net = kernel_net
        self.unet = unet
        self.class_edges = class_edges

    def forward(self, tiles: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Restore tiles.

        Parameters
        ----------
        tiles
            Shape (N, 1, y, x), 0 and 1 at the frame's dark and bright percentile.
        condition
            Shape (N, 2), see `CONDITION`.

        Returns
        -------
        tuple
            Restored tiles, shape of `tiles`; kernels (N, side, side).
        """
        kernel = self.kernel_net(tiles, self.classes(condition))
        return self.unet(tiles, kernel), kernel

    def classes(self, condition: Tensor) -> Tensor:
        """Return the defocus classes that a condition vector tells."""
        return defocus_classes(condition[:, 0], condition[:, 1], self.class_edges)


def defocus_classes(
    levels: Tensor, known: Tensor, edges: tuple[float, float]
) -> Tensor:
    """Return Wei's class of a signed defocus: 0 to 4 from near to far, 2 in focus.

    Where `known` is not positive, the class is `UNKNOWN_CLASS`.
    """
    inner, outer = edges
    classes = sum(
        (levels > edge).long() for edge in (-outer, -inner, inner, outer)
    ) + torch.zeros_like(levels, dtype=torch.long)
    unknown = torch.full_like(classes, UNKNOWN_CLASS)
    return torch.where(known > 0, classes, unknown)


# Levels across a patch up to which one kernel describes it.
_FLAT_LEVELS = 0.5
# Below it the target is in part the input itself, which the PSF does not explain.
_BLURRED_LEVELS = 0.8


class WeiKernelSection(Section):
    """Size of the kernel network; see `WeiKernelNet`."""

    size_px: Count = 33
    """Side of the kernel, one more than a multiple of 16."""
    width: Count = 64
    """Channels of its convolutions."""
    correlated: Count = 32
    """Channels that are correlated pair by pair."""
    rebuilt: Count = 32
    """Channels of its reconstruction."""
    phases: Literal[1, 2] = 1
    """2: the finest scale works at half resolution."""
    class_embedding: bool = True
    """Tell it the defocus class; off for the ablation."""


class WeiUNetSection(Section):
    """Size of the U-Net; see `WeiUNet`."""

    widths: Annotated[tuple[Count, ...], Field(min_length=2)] = (128, 128, 128, 128)
    """Channels per scale."""
    hidden: Count = 128
    """Width of the fully connected layers that guide each convolution."""
    phases: Literal[1, 2] = 1
    """2: the finest scale works at half resolution."""
    residual_output: bool = False
    """Add the result to the input and start as the identity."""


class WeiStageSection(Section):
    """What one stage of the training does."""

    train: Literal["kernel", "unet", "end_to_end"] = "end_to_end"
    """``kernel``: eq. 7 only; ``unet``: eq. 8, kernel network fixed;
    ``end_to_end``: eq. 8 through both networks."""
    true_kernel_share: Fraction = 0.5
    """Stage ``unet``: share of drawn patches guided by their true PSF instead of an
    estimate; 1: the kernel network needs no training before."""
    known_class_share: Fraction = 0.5
    """Share of drawn patches whose defocus class the kernel network gets."""
    bend: Annotated[float, Field(ge=0)] = 0.0
    """Error from which on the loss of the image is linear (Charbonnier); 0: mean
    squared error everywhere, as in the paper."""
    class_edges: tuple[Positive, Positive] = (0.5, 2.5)
    """Defocus in levels where focus ends and where the far classes begin."""


class WeiUNetRecipe(PairRecipe):
    """One stage of the training of Wei's networks."""

    name: str = "wei_end_to_end"
    network: Literal["wei_unet"] = "wei_unet"
    wei_kernel: WeiKernelSection = WeiKernelSection()
    wei_unet: WeiUNetSection = WeiUNetSection()
    stage: WeiStageSection = WeiStageSection()


class WeiUNetTask(RestorerTask[WeiUNetRecipe]):
    """Re-blur loss or image loss, as the stage asks for."""

    network: WeiRestorer
    description = "Kernel extraction and kernel-guided U-Net (Wei et al. 2024)."

    def __init__(self, recipe: WeiUNetRecipe) -> None:
        super().__init__(recipe)
        kernel, unet = recipe.wei_kernel, recipe.wei_unet
        # The kernel network pools three times.
        self.multiple_px = max(unet.phases << (len(unet.widths) - 1), 8)
        self.network = WeiRestorer(
            WeiKernelNet(
                kernel.size_px,
                kernel.width,
                (kernel.correlated, kernel.rebuilt),
                phases=kernel.phases,
                class_embedding=kernel.class_embedding,
            ),
            WeiUNet(
                kernel.size_px,
                unet.widths,
                unet.hidden,
                phases=unet.phases,
                residual_output=unet.residual_output,
            ),
            recipe.stage.class_edges,
        )
        stage = recipe.stage.train
        self.network.kernel_net.requires_grad_(stage != "unet")
        self.network.unet.requires_grad_(stage != "kernel")

    def make_source(self) -> BatchSource:
        """Read the images of the recipe; pairs come with their PSFs."""
        size_px = self.recipe.wei_kernel.size_px
        pairs = self.recipe.pairs.model_copy(update={"psf_px": size_px})
        return PairBatches(self.recipe.model_copy(update={"pairs": pairs}))

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make pairs, which classes are known, and whose true PSF is shown."""
        batch = self.source.batch(step, draw)
        rng = np.random.default_rng([self.recipe.seed, 8, step, draw])
        middle, flat = _defocus(batch["levels"])
        stage = self.recipe.stage
        told = flat & (rng.random(len(middle)) < stage.known_class_share)
        shown = flat & (np.abs(middle) > _BLURRED_LEVELS)
        shown &= rng.random(len(middle)) < stage.true_kernel_share
        return {
            "blurred": batch["blurred"],
            "sharp": batch["sharp"],
            "psf": batch["psf"],
            "real": batch["real"],
            "condition": np.stack([middle * told, told], axis=1).astype(np.float32),
            "shown": shown,
        }

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the stage; curves show the re-blur or the gain."""
        if self.recipe.stage.train == "kernel":
            return self._kernel_loss(tensors)
        return self._image_loss(tensors)

    def graph(self, network: nn.Module) -> Graph:
        """Return both networks as one graph, whichever stage was trained last."""
        sides_px = (6 * self.multiple_px, 8 * self.multiple_px)
        outputs = ("restored", "kernel")
        return frames_graph(network, sides_px, outputs, entries=len(CONDITION))

    def card(self) -> dict[str, Any]:
        """Return the card of a wei_unet engine."""
        card = super().card()
        farthest = round(self.recipe.pairs.farthest_level)
        card["levels"]["count"] = farthest + 1
        card["condition"] = {"name": "condition", "entries": list(CONDITION)}
        card["kernel_output"] = {
            "name": "kernel",
            "size_px": self.recipe.wei_kernel.size_px,
        }
        return card

    def _kernel_loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        classes = self.network.classes(tensors["condition"])
        kernel = self.network.kernel_net(tensors["blurred"], classes)
        errors = reblur_error(
            tensors["blurred"], tensors["sharp"], kernel, tensors["real"]
        )
        point = torch.zeros_like(kernel)
        centre = kernel.shape[-1] // 2
        point[:, centre, centre] = 1
        unblurred = reblur_error(
            tensors["blurred"], tensors["sharp"], point, tensors["real"]
        )
        return errors.mean(), {"unblurred": unblurred.mean()}

    def _image_loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        stage = self.recipe.stage
        classes = self.network.classes(tensors["condition"])
        with torch.set_grad_enabled(stage.train == "end_to_end"):
            kernel = self.network.kernel_net(blurred, classes)
        if stage.train == "unet":
            shown = tensors["shown"][:, None, None]
            kernel = torch.where(shown, tensors["psf"][:, 0], kernel)
        restored = self.network.unet(blurred, kernel).float()
        error = (restored - sharp).square()
        if stage.bend:
            error = 2 * stage.bend * ((error + stage.bend**2).sqrt() - stage.bend)
        return error.mean(), {"gain_db": gain_db(blurred, restored, sharp)}


def _defocus(
    levels: NDArray[np.generic],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the mean defocus of patches and where one defocus describes them all.

    Cells of real pairs are NaN: their defocus is not known, and given as 0.
    """
    low, high = levels.min(axis=(1, 2)), levels.max(axis=(1, 2))
    flat = np.asarray(high - low < _FLAT_LEVELS)
    middle = np.where(flat, levels.mean(axis=(1, 2)), 0)
    return middle.astype(np.float32), flat


NETWORKS = {"wei_unet": (WeiUNetRecipe, WeiUNetTask)}
