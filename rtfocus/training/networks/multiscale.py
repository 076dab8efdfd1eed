"""Multiscale: one encoder-decoder, used again on every scale of the image.

After the scale-recurrent network (Tao et al. 2018) and the review's map (Makarkin
et al., multiscale learning): the image is restored at a quarter of its size, then
at half, then in full, each time by the same weights, which see the blurred image
of that scale beside the enlarged result of the scale below. Wide blur is removed
where it is narrow, and one set of weights learns from all sizes of detail.

Resize and convolution, no transposed convolution: no checkerboard.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

MULTIPLE_PX = 16
"""Sides of a tile must be multiples of it."""

_SCALES = 3
_UNSHUFFLED = 4
_HEAD = 8


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a short cut; begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape."""
        inner = functional.relu(self.first(features))
        result: Tensor = features + self.second(inner)
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
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)  # type: ignore[arg-type]

    def forward(self, blurred: Tensor, coarser: Tensor) -> Tensor:
        """Return the restored image of a scale.

        Parameters
        ----------
        blurred
            Shape (N, 1, y, x), sides multiples of 4.
        coarser
            Result of the scale below, enlarged to the same shape.
        """
        seen = torch.cat([blurred, coarser], dim=1)
        fine = self.encoder(self.stem(functional.pixel_unshuffle(seen, 2)))
        coarse = self.middle(self.down(fine))
        fine = self.decoder(fine + _double(self.up(coarse)))
        detail = functional.relu(self.head(_double(fine)))
        correction = self.correction(torch.cat([detail, seen], dim=1))
        result: Tensor = blurred + correction
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
        coarser = blurred[0]
        restored: list[Tensor] = []
        for place, image in enumerate(blurred):
            if place:
                coarser = functional.interpolate(
                    restored[-1], scale_factor=2.0, mode="bilinear"
                )
            restored.append(self.shared(image, coarser))
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
