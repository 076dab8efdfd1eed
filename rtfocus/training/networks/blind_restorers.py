"""Blind restorers: RRDB and multiscale, networks that see nothing but a tile.

*RRDB*, a chain of residual-in-residual dense blocks as the EPFL cornea report uses it:
one first convolution, the chain, upsampling by two, a convolution, a 2 x 2 max pool
back to the size of the input, one output convolution. The report's network did not
improve its input; three switches that it lacks let this one train: scaled residuals,
adding to the input (the output convolution starts at zero) instead of drawing it anew,
and `phases`: layers on the image's phases see twice as far at a quarter of the cost.

*Multiscale*, one encoder-decoder used again on every scale of the image, after the
scale-recurrent network (Tao et al. 2018) and the review's map (Makarkin et al.,
multiscale learning): the image is restored at a quarter of its size, then at half, then
in full, each time by the same weights, which see the blurred image of that scale beside
the enlarged correction of the scale below, and add to it.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

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
from rtfocus.training.layers import charbonnier, double, zeroed
from rtfocus.training.recipe import Count, PairRecipe, Positive
from rtfocus.training.scenes import data_folder, load_real_pairs
from rtfocus.training.task import (
    BatchSource,
    RestorerTask,
    Tensors,
    gain_db,
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

    def __init__(self, width: int, scale: float) -> None:
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

    def __init__(self, width: int, scale: float) -> None:
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
            zeroed(self.output)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return restored tiles of the shape of the input, (N, 1, H, W)."""
        maps = self.chain(self.first(self.split(tiles)))
        maps = self.pool(self.activation(self.fine(self.upsample(maps))))
        drawn: Tensor = self.join(self.output(maps))
        return tiles + drawn if self.residual_output else drawn


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
    """Switches of the network; see `RrdbNet`."""

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


class RrdbTask(RestorerTask[RrdbRecipe]):
    """Mean squared error between restored and sharp patches."""

    network: RrdbNet
    description = (
        "Restoration by residual-in-residual dense blocks (EPFL cornea report)."
    )
    # The report: patches of 64 px every 32, overlaps blended.
    tile_px = 64
    halo_px = 16
    any_size = True

    def __init__(self, recipe: RrdbRecipe) -> None:
        super().__init__(recipe)
        self.multiple_px = recipe.rrdb.phases
        self.network = RrdbNet(**recipe.rrdb.model_dump())

    def make_source(self) -> BatchSource:
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
            for real in recipe.pairs.real
            for pair in load_real_pairs(real, folder, validation=False)
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


MULTIPLE_PX = 16
"""Sides of a tile must be multiples of it."""

_SCALES = 3
_UNSHUFFLED = 4
_HEAD = 8
_RESIDUAL = 0.2
"""Factor of every residual, as in RRDB; without it the recursion diverges."""

_BEGIN = 0.05
"""Factor of the first weights of the correction: begins close to the identity."""


class ScaledResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, scaled down, beside a short cut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape."""
        inner = functional.leaky_relu(self.first(features), _SLOPE)
        result: Tensor = features + _RESIDUAL * self.second(inner)
        return result


class ScaleNetwork(nn.Module):
    """The encoder-decoder of one scale: features at 1/2 and 1/4 of that scale.

    Parameters
    ----------
    fine
        Channels at half resolution.
    coarse
        Channels at a quarter.
    blocks
        Residual blocks at a quarter.
    """

    def __init__(self, fine: int, coarse: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2 * _UNSHUFFLED, fine, 3, padding=1)
        self.encoder = ScaledResidualBlock(fine)
        self.down = nn.Conv2d(fine, coarse, 2, stride=2)
        self.middle = nn.Sequential(
            *(ScaledResidualBlock(coarse) for _ in range(blocks))
        )
        self.up = nn.Conv2d(coarse, fine, 1)
        self.decoder = ScaledResidualBlock(fine)
        self.head = nn.Conv2d(fine, _HEAD, 3, padding=1)
        self.correction = nn.Conv2d(_HEAD + 2, 1, 3, padding=1)
        with torch.no_grad():
            for parameter in self.correction.parameters():
                parameter.mul_(_BEGIN)

    def forward(self, blurred: Tensor, carried: Tensor) -> Tensor:
        """Return what must be added to the blurred image of a scale.

        Parameters
        ----------
        blurred
            Shape (N, 1, y, x), sides multiples of 4.
        carried
            Correction of the scale below, enlarged to the same shape.
        """
        stacked = torch.cat([blurred, carried], dim=1)
        fine = self.encoder(self.stem(functional.pixel_unshuffle(stacked, 2)))
        coarse = self.middle(self.down(fine))
        fine = self.decoder(fine + double(self.up(coarse)))
        detail = functional.leaky_relu(self.head(double(fine)), _SLOPE)
        result: Tensor = carried + self.correction(torch.cat([detail, stacked], dim=1))
        return result


class MultiScale(nn.Module):
    """Restores tiles on three scales with one set of weights.

    Wide blur is removed where it is narrow, and one set of weights learns from all
    sizes of detail. Units are leaky and no weights begin at zero: with ReLUs before an
    output that began at zero, all of these were dead after a hundred steps and nothing
    was learned. Resize and convolution, no transposed convolution: no checkerboard.

    Parameters
    ----------
    fine, coarse, blocks
        Size of the network that all scales share, see `ScaleNetwork`.
    """

    def __init__(self, fine: int = 32, coarse: int = 96, blocks: int = 3) -> None:
        super().__init__()
        self.shared = ScaleNetwork(fine, coarse, blocks)

    def scales(self, tiles: Tensor) -> list[Tensor]:
        """Return the restored image of every scale, coarsest first.

        Parameters
        ----------
        tiles
            Shape (N, 1, y, x), sides multiples of `MULTIPLE_PX`, 0 and 1 at the
            frame's dark and bright percentile.
        """
        blurred = image_pyramid(tiles)
        carried = torch.zeros_like(blurred[0])
        restored: list[Tensor] = []
        for place, image in enumerate(blurred):
            if place:
                carried = functional.interpolate(
                    carried, scale_factor=2.0, mode="bilinear"
                )
            carried = self.shared(image, carried)
            restored.append(image + carried)
        return restored

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the restored tiles, shape of `tiles`."""
        return self.scales(tiles)[-1]


def image_pyramid(images: Tensor) -> list[Tensor]:
    """Return images at 1/4, 1/2 and 1 of their size, by means of 2 x 2 pixels."""
    sizes = [images]
    for _ in range(_SCALES - 1):
        sizes.append(functional.avg_pool2d(sizes[-1], 2))
    return sizes[::-1]


class MultiScaleSection(Section):
    """Size of the shared network and what its loss looks like."""

    fine: Count = 32
    """Channels at half the resolution of a scale."""
    coarse: Count = 96
    """Channels at a quarter of it."""
    blocks: Count = 3
    """Residual blocks at a quarter."""
    charbonnier: Positive = 0.01
    """Error, as a share of the frame's range, from which on the loss is linear."""


class MultiScaleRecipe(PairRecipe):
    """A training run of the multiscale network."""

    name: str = "multiscale"
    network: Literal["multiscale"] = "multiscale"
    multiscale: MultiScaleSection = MultiScaleSection()


class MultiScaleTask(RestorerTask[MultiScaleRecipe]):
    """Restoration, compared with the sharp image on all scales."""

    network: MultiScale
    description = "Restoration on three scales by one encoder-decoder, weights shared."
    multiple_px = MULTIPLE_PX

    def __init__(self, recipe: MultiScaleRecipe) -> None:
        super().__init__(recipe)
        settings = recipe.multiscale
        self.network = MultiScale(settings.fine, settings.coarse, settings.blocks)

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean Charbonnier loss of the scales."""
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        restored = self.network.scales(blurred)
        loss = scales_loss(restored, sharp, self.recipe.multiscale.charbonnier)
        return loss, {"gain_db": gain_db(blurred, restored[-1].float(), sharp)}


def scales_loss(restored: Sequence[Tensor], sharp: Tensor, bend: float) -> Tensor:
    """Return the mean over scales of the Charbonnier loss.

    Parameters
    ----------
    restored
        Result per scale, coarsest first, each twice the size of the one before and
        the last of the shape of `sharp`.
    sharp
        Wanted image (N, C, H, W); averaged over 2 x 2 pixels for every step down.
    bend
        See `charbonnier`.
    """
    target = sharp
    total = charbonnier(restored[-1].float() - target, bend)
    for output in restored[-2::-1]:
        target = functional.avg_pool2d(target, 2)
        total = total + charbonnier(output.float() - target, bend)
    return total / len(restored)


NETWORKS = {
    "multiscale": (MultiScaleRecipe, MultiScaleTask),
    "rrdb": (RrdbRecipe, RrdbTask),
}
