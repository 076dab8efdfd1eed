"""RRDB: chain of residual-in-residual dense blocks, as the EPFL cornea report uses it.

One first convolution, the chain, upsampling by two, a convolution, a 2 x 2 max
pool back to the size of the input, one output convolution. The report's network
did not improve its input; three switches that it lacks let this one train:
residuals are scaled, the network adds to its input instead of drawing it anew
(the output convolution starts at zero, so that it starts as the identity), and it
may work on the phases of the image (`phases`), which makes every layer see twice
as far at a quarter of the cost.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.sections import Section
from rtfocus.errors import ConfigError
from rtfocus.training.kernel_pairs import (
    KernelPairs,
    estimated_kernels,
    gaussian_kernels,
)
from rtfocus.training.pairs import load_real_pairs
from rtfocus.training.recipe import Count, PairRecipe, Positive
from rtfocus.training.scenes import data_folder
from rtfocus.training.task import (
    Graph,
    PairTask,
    Source,
    Tensors,
    gain_db,
    restorer_card,
    restorer_graph,
)

_SLOPE = 0.2
_CONVOLUTIONS = 5
_BLOCKS_IN_RESIDUAL = 3


class ResidualDenseBlock(nn.Module):
    """Five 3 x 3 convolutions, each fed everything before it; plus the input.

    Parameters
    ----------
    width
        Maps of the input and of every convolution.
    scale
        Factor of the fifth convolution's result before the input is added; the
        report has 1.
    """

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.convolutions = nn.ModuleList(
            nn.Conv2d(place * width, width, 3, padding=1)
            for place in range(1, _CONVOLUTIONS + 1)
        )
        self.activation = nn.LeakyReLU(_SLOPE)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the shape of the input, (N, width, H, W)."""
        dense = [maps]
        for convolution in self.convolutions[:-1]:
            dense.append(self.activation(convolution(torch.cat(dense, dim=1))))
        last: Tensor = self.convolutions[-1](torch.cat(dense, dim=1))
        return maps + self.scale * last


class ResidualInResidualBlock(nn.Module):
    """Three residual dense blocks in series, plus the input: one RRDB."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.blocks = nn.Sequential(
            *(ResidualDenseBlock(width, scale) for _ in range(_BLOCKS_IN_RESIDUAL))
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the shape of the input, (N, width, H, W)."""
        inner: Tensor = self.blocks(maps)
        return maps + self.scale * inner


class RrdbNet(nn.Module):
    """Restoration of one-channel patches by a chain of RRDBs.

    Parameters
    ----------
    blocks
        RRDBs in the chain: 4, 8 and 12 in the report.
    width
        Maps of every convolution; 64 in the report.
    phases
        Work on the phases x phases interleaved sub-images as channels; 1 is the
        report's network. Sides of the input must be multiples of it.
    residual_scale
        Factor of every residual; 1 in the report, 0.2 in ESRGAN.
    residual_output
        Add the result to the input, and start at zero; False in the report.

    References
    ----------
    .. [1] T. Cardot, P. Marxer and I. Snozzi, "Deep learning for cornea microscopy
       blind deblurring", project report, EPFL, sections 3.3 to 3.5.
    .. [2] X. Wang et al., "ESRGAN", ECCV workshops 2018: the scaled residuals.
    """

    def __init__(
        self,
        *,
        blocks: int = 4,
        width: int = 64,
        phases: int = 1,
        residual_scale: float = 0.2,
        residual_output: bool = True,
    ) -> None:
        super().__init__()
        self.residual_output = residual_output
        self.split = nn.PixelUnshuffle(phases)
        self.first = nn.Conv2d(phases**2, width, 3, padding=1)
        self.chain = nn.Sequential(
            *(ResidualInResidualBlock(width, residual_scale) for _ in range(blocks))
        )
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.fine = nn.Conv2d(width, width, 3, padding=1)
        self.activation = nn.LeakyReLU(_SLOPE)
        self.pool = nn.MaxPool2d(2)
        self.output = nn.Conv2d(width, phases**2, 3, padding=1)
        self.join = nn.PixelShuffle(phases)
        if residual_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, tiles: Tensor) -> Tensor:
        """Return restored tiles of the shape of the input, (N, 1, H, W)."""
        maps = self.chain(self.first(self.split(tiles)))
        maps = self.pool(self.activation(self.fine(self.upsample(maps))))
        drawn: Tensor = self.join(self.output(maps))
        return tiles + drawn if self.residual_output else drawn


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


class RrdbTask(PairTask[RrdbRecipe]):
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

    def make_source(self) -> Source:
        """Read the sharp images, and make or estimate the kernels that blur them."""
        recipe, settings = self.recipe, self.recipe.kernels
        if settings.family == "pupil":
            return super().make_source()
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
                f"kernels.family is estimated, but {len(pairs)} real pairs give no "
                "kernel of 11 px or more; name blurred ones in pairs.real, or choose "
                "pupil"
            )
            raise ConfigError(msg)
        return KernelPairs(recipe, kernels)

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


NETWORKS = {"rrdb": (RrdbRecipe, RrdbTask)}
