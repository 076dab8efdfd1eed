"""COMI: the generators and discriminators of Zhang et al. 2022.

Two generators of the style-transfer type translate defocused into sharp images and
back; two PatchGAN discriminators tell real from generated ones. The paper reports
checkerboards and blames its transposed convolutions: both ways of upsampling are
here, to be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rtfocus.config.sections import Section
from rtfocus.training.layers import zeroed
from rtfocus.training.recipe import Count, OptimiserRecipe, PairRecipe

Upsampling = Literal["resize", "transposed"]
Norm = Literal["none", "instance"]

_DISCRIMINATOR_KERNEL = 4
_SLOPE = 0.2
# A step of Adam moves all 49 weights per map of the last convolution at once: unscaled,
# that is more than the whole blur, and training swings instead of learning.
_OUTPUT_SCALE = 0.1


class IdentityBlock(nn.Module):
    """Two 3 x 3 convolutions, plus the input: begins as the identity."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        # Nine of another kind in a row, without a norm, would multiply what one step
        # of the optimiser changes.
        second = zeroed(nn.Conv2d(width, width, 3, padding=1))
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            *_norm(norm, width),
            nn.LeakyReLU(_SLOPE, inplace=True),
            second,
            *_norm(norm, width),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the shape of the input, (N, width, H, W)."""
        residual: Tensor = self.body(maps)
        return maps + residual


class Generator(nn.Module):
    """Two strided convolutions, residual blocks, two upsampling blocks.

    Parameters
    ----------
    width
        Maps at full resolution; the residual blocks have four times as many: 64 and
        256 in style transfer. The paper does not state its own.
    residual_blocks
        9 in the paper.
    upsampling
        ``transposed`` convolutions as in the paper, or nearest-neighbour ``resize``
        followed by a convolution.
    norm
        ``instance`` as in style transfer, or ``none``: then a pixel's result does
        not depend on the rest of its tile, and tiles join without seams.

    Notes
    -----
    The global skip adds the image itself to the result. The last convolution
    starts at zero, so that training starts from the identity. Leaky ReLU instead of
    ReLU: without a norm, the few maps before the last convolution died within the
    first hundred steps, and the identity stayed.

    References
    ----------
    .. [1] C. Zhang et al., "Correction of out-of-focus microscopic images by deep
       learning", Computational and Structural Biotechnology Journal 20, 2022,
       section 3.1.
    .. [2] J. Johnson et al., "Perceptual losses for real-time style transfer and
       super-resolution", ECCV 2016.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        residual_blocks: int = 9,
        upsampling: Upsampling = "resize",
        norm: Norm = "none",
    ) -> None:
        super().__init__()
        deepest = 4 * width
        layers: list[nn.Module] = [
            *_convolution(1, width, 7, 1, norm),
            *_convolution(width, 2 * width, 3, 2, norm),
            *_convolution(2 * width, deepest, 3, 2, norm),
            *(IdentityBlock(deepest, norm) for _ in range(residual_blocks)),
            *_upsampling(deepest, 2 * width, upsampling, norm),
            *_upsampling(2 * width, width, upsampling, norm),
        ]
        self.body = nn.Sequential(*layers)
        self.output = zeroed(nn.Conv2d(width, 1, 7, padding=3))

    def forward(self, tiles: Tensor) -> Tensor:
        """Return translated tiles (N, 1, H, W); H and W are multiples of 4."""
        drawn: Tensor = self.output(self.body(tiles))
        return tiles + _OUTPUT_SCALE * drawn


class PatchDiscriminator(nn.Module):
    """PatchGAN: a map of judgements, each on one patch of the image.

    Kernels of 4 px: `strided` layers of stride 2, one of stride 1, one that judges.

    Parameters
    ----------
    width
        Maps of the first layer, doubled by every further one up to eight times.
    strided
        Layers of stride 2; 3 give judgements on patches of 70 px.
    """

    def __init__(self, *, width: int, strided: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for place in range(strided + 1):
            maps = width * 2 ** min(place, 3)
            stride = 2 if place < strided else 1
            layers.append(
                nn.Conv2d(channels, maps, _DISCRIMINATOR_KERNEL, stride, padding=1)
            )
            # The first layer and the last judge intensities: no norm there.
            if place > 0:
                layers.append(nn.InstanceNorm2d(maps))
            layers.append(nn.LeakyReLU(_SLOPE, inplace=True))
            channels = maps
        layers.append(nn.Conv2d(channels, 1, _DISCRIMINATOR_KERNEL, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return logits of being real, (N, 1, n, n), of tiles (N, 1, H, W)."""
        logits: Tensor = self.layers(tiles)
        return logits


def _norm(norm: Norm, width: int) -> list[nn.Module]:
    return [nn.InstanceNorm2d(width)] if norm == "instance" else []


def _convolution(
    channels: int, width: int, kernel: int, stride: int, norm: Norm
) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2),
        *_norm(norm, width),
        nn.LeakyReLU(_SLOPE, inplace=True),
    ]


def _upsampling(
    channels: int, width: int, kind: Upsampling, norm: Norm
) -> list[nn.Module]:
    """Double the sides; both kinds have the same number of weights."""
    double: list[nn.Module]
    if kind == "transposed":
        double = [
            nn.ConvTranspose2d(
                channels, width, 3, stride=2, padding=1, output_padding=1
            )
        ]
    else:
        double = [
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(channels, width, 3, padding=1),
        ]
    return [*double, *_norm(norm, width), nn.LeakyReLU(_SLOPE, inplace=True)]


Weight = Annotated[float, Field(ge=0)]


class FeaturesSection(Section):
    """Network whose features the content loss compares."""

    network: Literal["classifier", "vgg19"] = "classifier"
    """``classifier``: convolutions of a defocus engine, in-domain. ``vgg19``: the
    paper's; needs its weights."""
    weights: Path | None = None
    """Weight file; None: that of the shipped engine ``delpnet``."""
    layers: Count = 2
    """Convolutions up to the features that are compared."""

    @model_validator(mode="after")
    def _vgg_needs_weights(self) -> Self:
        if self.network == "vgg19" and self.weights is None:
            msg = "vgg19 is not part of rtfocus; give 'weights', torchvision's file"
            raise ValueError(msg)
        return self


class LossSection(Section):
    """Weights of the terms of equation 10; `pixel` is ours."""

    adversarial: Weight = 1.0
    content: Weight = 1.0
    cycle: Weight = 0.001
    pixel: Weight = 0.0
    """Of the mean absolute error between generated and wanted images, both ways."""


class ComiSection(Section):
    """Switches of COMI."""

    width: Count = 64
    """Maps of the generators at full resolution; a quarter of the deepest."""
    residual_blocks: Count = 9
    """Residual blocks of each generator."""
    upsampling: Upsampling = "resize"
    """``transposed`` convolutions as in the paper, or ``resize`` and convolution."""
    norm: Norm = "none"
    """Norm of the generators."""
    discriminator_width: Count = 64
    """Maps of the discriminators' first layer."""
    discriminator_layers: Count = 3
    """Strided layers of the discriminators; 3 judge patches of 70 px."""
    paired: bool = True
    """False: sharp images of other fields; only adversarial and cycle terms apply."""
    restoring_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the start in which the restoring generator learns alone, from the
    content and pixel terms."""
    features: FeaturesSection = FeaturesSection()
    weights: LossSection = LossSection()

    @model_validator(mode="after")
    def _unpaired_has_no_truth(self) -> Self:
        weights = self.weights
        if not self.paired and (
            weights.content or weights.pixel or self.restoring_steps
        ):
            msg = (
                "unpaired training has no image to compare with; set restoring_steps, "
                "weights.content and weights.pixel to 0"
            )
            raise ValueError(msg)
        return self


class ComiRecipe(PairRecipe):
    """A training run of COMI."""

    name: str = "comi"
    network: Literal["comi"] = "comi"
    comi: ComiSection = ComiSection()


@dataclass(frozen=True, slots=True)
class ComiNetworks:
    """All that is trained; G_s, the restoring generator, is what is exported."""

    restoring: Generator
    """G_s, from defocused to sharp."""
    blurring: Generator
    """G_t, from sharp to defocused."""
    judge_sharp: PatchDiscriminator
    """D_t, which tells sharp images from made ones."""
    judge_blurred: PatchDiscriminator
    """D_s, which tells defocused images from made ones."""

    @classmethod
    def made(cls, settings: ComiSection) -> Self:
        """Make all four, freshly initialised; generators draw first."""
        restoring, blurring = (
            Generator(
                width=settings.width,
                residual_blocks=settings.residual_blocks,
                upsampling=settings.upsampling,
                norm=settings.norm,
            )
            for _ in range(2)
        )
        judge_sharp, judge_blurred = (
            PatchDiscriminator(
                width=settings.discriminator_width,
                strided=settings.discriminator_layers,
            )
            for _ in range(2)
        )
        return cls(restoring, blurring, judge_sharp, judge_blurred)

    def modules(self) -> dict[str, nn.Module]:
        """Return them by the names that checkpoints have."""
        return {
            "network": self.restoring,
            "blurring": self.blurring,
            "judge_sharp": self.judge_sharp,
            "judge_blurred": self.judge_blurred,
        }

    def optimisers(self, settings: OptimiserRecipe) -> dict[str, torch.optim.Optimizer]:
        """Return Adam for the restoring, the blurring and the judging networks."""
        owners = {
            "network": self.restoring,
            "blurring": self.blurring,
            "judges": nn.ModuleList([self.judge_sharp, self.judge_blurred]),
        }
        return {
            name: torch.optim.Adam(
                owner.parameters(), lr=settings.rate, betas=settings.betas, fused=True
            )
            for name, owner in owners.items()
        }


def descend(loss: Tensor, optimisers: Sequence[torch.optim.Optimizer]) -> None:
    """Take one step with these optimisers; other networks get no gradient."""
    parameters = [
        parameter
        for optimiser in optimisers
        for group in optimiser.param_groups
        for parameter in group["params"]
    ]
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss, inputs=parameters)
    for optimiser in optimisers:
        optimiser.step()
