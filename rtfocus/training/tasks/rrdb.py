"""RRDB's task: mean squared error of restored patches, EPFL cornea report."""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.section import Section
from rtfocus.errors import ConfigError
from rtfocus.training.data.fields import data_folder
from rtfocus.training.data.kernel_pairs import (
    KernelPairs,
    estimated_kernels,
    gaussian_kernels,
)
from rtfocus.training.data.pair_recipe import PairRecipe
from rtfocus.training.data.pairs import PairBatches
from rtfocus.training.data.real_pairs import load_real_pairs
from rtfocus.training.networks.rrdb import RrdbNet
from rtfocus.training.recipe import Count, Positive
from rtfocus.training.task import Arrays, Graph, Task, Tensors
from rtfocus.training.tasks.restorer import gain_db, restorer_card, restorer_graph

# The report: patches of 64 px every 32, overlaps blended.
_TILE_PX = 64
_HALO_PX = 16


class KernelsSection(Section):
    """What the sharp images of an RRDB run are blurred with."""

    family: Literal["pupil", "gaussian", "estimated"] = "pupil"
    """``pupil``: the PSFs of the section ``pairs``. ``gaussian`` and ``estimated``:
    the report's two training sets."""
    sigma_px: tuple[Positive, Positive] = (1.0, 25.0)
    """Smallest and largest deviation of the Gaussians."""
    gaussians: Count = 50
    """Number of Gaussians."""
    estimated_pairs: Count = 2
    """Real pairs of the training side whose kernels are estimated; up to ten each."""


class RrdbSection(Section):
    """Switches of the network; see `rtfocus.training.networks.rrdb.RrdbNet`."""

    blocks: Count = 4
    """Blocks in the chain; 4, 8 and 12 in the report."""
    width: Count = 64
    """Maps of every convolution."""
    phases: Count = 1
    """Interleaved sub-images, along each axis, that the chain works on."""
    residual_scale: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Factor of every residual; 1 in the report."""
    residual_output: bool = True
    """Add the result to the input and start as the identity; false in the report."""


class RrdbRecipe(PairRecipe):
    """A training run of RRDB."""

    name: str = "rrdb"
    network: Literal["rrdb"] = "rrdb"
    rrdb: RrdbSection = RrdbSection()
    kernels: KernelsSection = KernelsSection()


class RrdbTask(Task[RrdbRecipe]):
    """Mean squared error between restored and sharp patches."""

    network: RrdbNet

    def __init__(self, recipe: RrdbRecipe) -> None:
        super().__init__(recipe)
        settings = recipe.rrdb
        self.network = RrdbNet(
            blocks=settings.blocks,
            width=settings.width,
            phases=settings.phases,
            residual_scale=settings.residual_scale,
            residual_output=settings.residual_output,
        )
        self._batches: PairBatches | KernelPairs | None = None

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make blurred and sharp patches."""
        if self._batches is None:
            # Made when first needed: an export needs no images.
            self._batches = _make_batches(self.recipe)
        made = self._batches.batch(step, draw)
        return {"blurred": made["blurred"], "sharp": made["sharp"]}

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error."""
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        restored = self.network(blurred).float()
        loss = functional.mse_loss(restored, sharp)
        return loss, {"gain_db": gain_db(blurred, restored, sharp)}

    def graph(self, network: nn.Module) -> Graph:
        """Return the network as it is."""
        return restorer_graph(network, self.recipe.rrdb.phases)

    def card(self) -> dict[str, Any]:
        """Return the card of an RRDB engine."""
        return restorer_card(
            self.recipe.pairs,
            "Restoration by residual-in-residual dense blocks (EPFL cornea report).",
            tile_px=_TILE_PX,
            halo_px=_HALO_PX,
            multiple_px=self.recipe.rrdb.phases,
        )


def _make_batches(recipe: RrdbRecipe) -> PairBatches | KernelPairs:
    settings = recipe.kernels
    if settings.family == "pupil":
        return PairBatches(recipe)
    if settings.family == "gaussian":
        kernels = gaussian_kernels(settings.sigma_px, settings.gaussians)
        return KernelPairs(recipe, kernels)
    folder = data_folder(recipe)
    pairs = [
        pair
        for wanted in recipe.pairs.real
        for pair in load_real_pairs(wanted, folder, validation=False)
    ]
    kernels = estimated_kernels(pairs[: settings.estimated_pairs])
    if not kernels:
        msg = (
            f"kernels.family is estimated, but {len(pairs)} real pairs give no kernel "
            "of 11 px or more; name blurred ones in pairs.real, or choose pupil"
        )
        raise ConfigError(msg)
    return KernelPairs(recipe, kernels)


RECIPE = RrdbRecipe
TASK = RrdbTask
