"""Multiscale: one encoder-decoder, used again on every scale of the image.

After the scale-recurrent network (Tao et al. 2018) and the review's map (Makarkin
et al., multiscale learning): the image is restored at a quarter of its size, then
at half, then in full, each time by the same weights, which see the blurred image
of that scale beside the enlarged correction of the scale below, and add to it.
Wide blur is removed where it is narrow, and one set of weights learns from all
sizes of detail.

Units are leaky and no weights begin at zero: with ReLUs before an output that
began at zero, all of these were dead after a hundred steps and nothing was learned.

Resize and convolution, no transposed convolution: no checkerboard.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.sections import Section
from rtfocus.training.layers import scales_loss
from rtfocus.training.recipe import Count, PairRecipe, Positive
from rtfocus.training.task import (
    Graph,
    PairTask,
    Tensors,
    gain_db,
    restorer_card,
    restorer_graph,
)

MULTIPLE_PX = 16
"""Sides of a tile must be multiples of it."""

_SCALES = 3
_UNSHUFFLED = 4
_HEAD = 8
_SLOPE = 0.2
_RESIDUAL = 0.2
"""Factor of every residual, as in RRDB; without it the recursion diverges."""

_BEGIN = 0.05
"""Factor of the first weights of the correction: begins close to the identity."""


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a short cut."""

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
        self.encoder = ResidualBlock(fine)
        self.down = nn.Conv2d(fine, coarse, 2, stride=2)
        self.middle = nn.Sequential(*(ResidualBlock(coarse) for _ in range(blocks)))
        self.up = nn.Conv2d(coarse, fine, 1)
        self.decoder = ResidualBlock(fine)
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
        seen = torch.cat([blurred, carried], dim=1)
        fine = self.encoder(self.stem(functional.pixel_unshuffle(seen, 2)))
        coarse = self.middle(self.down(fine))
        fine = self.decoder(fine + _double(self.up(coarse)))
        detail = functional.leaky_relu(self.head(_double(fine)), _SLOPE)
        result: Tensor = carried + self.correction(torch.cat([detail, seen], dim=1))
        return result


class MultiScale(nn.Module):
    """Restores tiles on three scales with one set of weights.

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


def _double(features: Tensor) -> Tensor:
    return functional.interpolate(features, scale_factor=2.0, mode="nearest")


_TILE_PX = 256
_HALO_PX = 32


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


class MultiScaleTask(PairTask[MultiScaleRecipe]):
    """Restoration, compared with the sharp image on all scales."""

    network: MultiScale

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

    def graph(self, network: nn.Module) -> Graph:
        """Return the network as it is."""
        return restorer_graph(network, MULTIPLE_PX)

    def card(self) -> dict[str, Any]:
        """Return the card of a multiscale engine."""
        return restorer_card(
            self.recipe.pairs,
            "Restoration on three scales by one encoder-decoder, weights shared.",
            tile_px=_TILE_PX,
            halo_px=_HALO_PX,
            multiple_px=MULTIPLE_PX,
        )


NETWORKS = {"multiscale": (MultiScaleRecipe, MultiScaleTask)}
