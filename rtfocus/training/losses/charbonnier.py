"""Charbonnier: quadratic for small errors, as PSNR asks for, linear for large ones."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def charbonnier(error: Tensor, bend: float) -> Tensor:
    """Return the mean of ``sqrt(error^2 + bend^2) - bend``."""
    return (error.square() + bend**2).sqrt().mean() - bend


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
    wanted = sharp
    total = charbonnier(restored[-1].float() - wanted, bend)
    for found in restored[-2::-1]:
        wanted = functional.avg_pool2d(wanted, 2)
        total = total + charbonnier(found.float() - wanted, bend)
    return total / len(restored)
