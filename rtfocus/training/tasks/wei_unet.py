"""Task of Wei's kernel network and kernel-guided U-Net: three stages, one engine.

First each network alone on its own loss, then both end to end on the restored image
only (Wei et al. 2024, section 3.3). Every stage is a recipe that starts from the
checkpoint of the one before it.
"""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from rtfocus.config.section import Section
from rtfocus.training.data.pair_recipe import PairRecipe
from rtfocus.training.data.pairs import PairBatches
from rtfocus.training.losses.reblur import reblur_error
from rtfocus.training.networks.wei_kernel import WeiKernelNet
from rtfocus.training.networks.wei_unet import CONDITION, WeiRestorer, WeiUNet
from rtfocus.training.recipe import Count, Fraction, Positive
from rtfocus.training.task import Arrays, Graph, Task, Tensors
from rtfocus.training.tasks.restorer import gain_db, restorer_card

_TILE_PX = 256
_HALO_PX = 32
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
    """Share of drawn patches whose defocus class the kernel network is told."""
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


class WeiUNetTask(Task[WeiUNetRecipe]):
    """Re-blur loss or image loss, as the stage asks for."""

    network: WeiRestorer

    def __init__(self, recipe: WeiUNetRecipe) -> None:
        super().__init__(recipe)
        kernel, unet = recipe.wei_kernel, recipe.wei_unet
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
        self._batches: PairBatches | None = None

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make pairs, what is told of their class, and whose true PSF is shown."""
        if self._batches is None:
            # Made when first needed: an export needs no images.
            size_px = self.recipe.wei_kernel.size_px
            pairs = self.recipe.pairs.model_copy(update={"psf_px": size_px})
            self._batches = PairBatches(self.recipe.model_copy(update={"pairs": pairs}))
        made = self._batches.batch(step, draw)
        rng = np.random.default_rng([self.recipe.seed, 8, step, draw])
        middle, flat = _defocus(made["levels"])
        stage = self.recipe.stage
        told = flat & (rng.random(len(middle)) < stage.known_class_share)
        shown = flat & (np.abs(middle) > _BLURRED_LEVELS)
        shown &= rng.random(len(middle)) < stage.true_kernel_share
        return {
            "blurred": made["blurred"],
            "sharp": made["sharp"],
            "psf": made["psf"],
            "real": made["real"],
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
        multiple = self._multiple_px()
        frame = {0: "number", 2: "height", 3: "width"}
        return Graph(
            network,
            {
                "tiles": torch.zeros(2, 1, 6 * multiple, 8 * multiple),
                "condition": torch.zeros(2, len(CONDITION)),
            },
            ("restored", "kernel"),
            {"tiles": frame, "condition": {0: "number"}},
        )

    def card(self) -> dict[str, Any]:
        """Return the card of a wei_unet engine."""
        card = restorer_card(
            self.recipe.pairs,
            "Kernel extraction and kernel-guided U-Net (Wei et al. 2024).",
            tile_px=_TILE_PX,
            halo_px=_HALO_PX,
            multiple_px=self._multiple_px(),
        )
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

    def _multiple_px(self) -> int:
        unet = self.recipe.wei_unet
        # The kernel network pools three times.
        return max(unet.phases << (len(unet.widths) - 1), 8)


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


RECIPE = WeiUNetRecipe
TASK = WeiUNetTask
