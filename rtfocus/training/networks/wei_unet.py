"""Wei's kernel-guided U-Net, and both of Wei's networks as one restorer.

Every convolution's result is scaled and shifted by what three fully connected
layers make of the blurring kernel (Wei et al. 2024, section 3.3, eq. 6). Resize and
convolution instead of transposed convolution: no checkerboard.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.training.networks.wei_kernel import UNKNOWN_CLASS, WeiKernelNet

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
        self.last = nn.Linear(hidden, 2 * channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

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
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

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
            features = self.enlarge[place](_double(features), flat)
            features = torch.cat([features, skips[place]], dim=1)
            features = self.decoder[place](features, flat)
        if self.head is not None:
            features = self.head(_double(features), flat)
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


def _double(features: Tensor) -> Tensor:
    return functional.interpolate(features, scale_factor=2.0, mode="nearest")
