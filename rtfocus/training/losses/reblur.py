"""Re-blur loss: how far the estimated kernel is from blurring sharp into blurred.

Needs no true kernel (Wei et al. 2024, eq. 7).
"""

import torch
from torch import Tensor

# Share of the range's square below which a patch is flat and its gain unknown.
_LEAST_VARIANCE = 1e-4


def reblur(sharp: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every image with its own kernel, where no border is needed.

    Parameters
    ----------
    sharp
        Shape (N, 1, y, x).
    kernel
        Shape (N, side, side), side odd and below y and x.

    Returns
    -------
    Tensor
        Shape (N, 1, y - side + 1, x - side + 1); float32, also under autocast.
    """
    side = kernel.shape[-1]
    rows, columns = sharp.shape[-2:]
    # Periodic convolution by FFT: the rows and columns that would wrap are left
    # out, the rest is exact.
    spectrum = torch.fft.rfft2(kernel.float()[:, None], (rows, columns))
    blurred: Tensor = torch.fft.irfft2(
        torch.fft.rfft2(sharp.float()) * spectrum, (rows, columns)
    )
    return blurred[..., side - 1 :, side - 1 :]


def inner_part(image: Tensor, side: int) -> Tensor:
    """Return the part of an image that `reblur` gives for kernels of `side`."""
    half = side // 2
    return image[..., half:-half, half:-half] if half else image


def match_intensity(image: Tensor, wanted: Tensor) -> Tensor:
    """Return `image` with the gain and offset per sample that come nearest `wanted`.

    For real pairs: lamp and camera differ between the two exposures, and light from
    beyond the patch adds up. Flat images keep their gain.
    """
    mean, goal = (x.mean(dim=(2, 3), keepdim=True) for x in (image, wanted))
    contrast = image - mean
    variance = contrast.square().mean(dim=(2, 3), keepdim=True)
    shared = (contrast * (wanted - goal)).mean(dim=(2, 3), keepdim=True)
    gain = (shared + _LEAST_VARIANCE) / (variance + _LEAST_VARIANCE)
    return gain.detach() * contrast + goal


def reblur_error(
    blurred: Tensor, sharp: Tensor, kernel: Tensor, matched: Tensor
) -> Tensor:
    """Return ``mean |I * K - B|`` per sample (eq. 7), borders left out.

    Parameters
    ----------
    blurred, sharp
        Shape (N, 1, y, x).
    kernel
        Shape (N, side, side).
    matched
        Shape (N,): samples whose intensity is matched before the difference.
    """
    wanted = inner_part(blurred.float(), kernel.shape[-1])
    found = reblur(sharp, kernel)
    found = torch.where(
        matched[:, None, None, None], match_intensity(found, wanted), found
    )
    return (found - wanted).abs().mean(dim=(1, 2, 3))
