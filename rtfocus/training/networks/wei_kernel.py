"""Wei's kernel extraction network: from a blurred tile to the kernel that blurred it.

Features on three scales, their cross-correlations over the shifts a kernel can
span, and a reconstruction from coarse to fine (Wei et al. 2024, section 3.2).

Where the paper is silent, chosen here: correlations are taken within a scale,
between features free of their mean, and divided by the features' variance, so
neither the tile's size nor its contrast matters; the kernel is a softmax over
pixels, beside learned logits of the mean kernel; the defocus class enters as a
learned embedding added to the correlation features.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from scipy.fft import next_fast_len
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.errors import ConfigError

SCALES = 3
CLASSES = 5
"""Near and far defocus in two grades each, and focus between them."""
UNKNOWN_CLASS = CLASSES
"""Index of the embedding that says nothing about the defocus."""

_RECONSTRUCTION = (24, 16, 8)
# Of the mean kernel before training, in pixels.
_FIRST_SIGMA_PX = 4.0
# Variance of features below which a tile counts as empty.
_LEAST_VARIANCE = 1e-6


class FeatureScale(nn.Module):
    """Two 3 x 3 convolutions, pooling, and a 1 x 1 convolution to fewer channels.

    Parameters
    ----------
    inputs, width, reduced
        Channels that come in, of the convolutions, and of the result.
    pool
        Halve the resolution; off only where the input is at half resolution already.
    """

    def __init__(self, inputs: int, width: int, reduced: int, *, pool: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.reduce = nn.Conv2d(width, reduced, 1)
        self.pool = pool

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the next scale works on, and what is correlated."""
        inner = functional.relu(self.first(features))
        inner = functional.relu(self.second(inner))
        if self.pool:
            inner = functional.max_pool2d(inner, 2)
        return inner, self.reduce(inner)


class CorrelationLayer(nn.Module):
    """Cross-correlations of all pairs of channels (eq. 5), reduced by 1 x 1.

    Parameters
    ----------
    channels
        Channels that come in; 32 in the paper, which makes 32 * 31 = 992 pairs.
    reach
        Largest shift along either axis, in pixels of this scale.
    width
        Channels of the result.
    """

    def __init__(self, channels: int, reach: int, width: int) -> None:
        super().__init__()
        self.reach = reach
        self.reduce = nn.Conv2d(channels * (channels - 1), width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return shape (N, width, 2 reach + 1, 2 reach + 1)."""
        features = features - features.mean(dim=(2, 3), keepdim=True)
        variance = features.square().mean(dim=(1, 2, 3), keepdim=True)
        features = features * (variance + _LEAST_VARIANCE).rsqrt()
        # The same sums: by FFT their gradient is far cheaper, but runtimes of
        # exported graphs rarely have one.
        form = correlate_by_fft if self.training else correlate
        result: Tensor = self.reduce(form(features, self.reach))
        return result


def correlate(features: Tensor, reach: int) -> Tensor:
    """Cross-correlate every channel with every other (Wei eq. 5).

    Parameters
    ----------
    features
        Shape (N, C, y, x), zero beyond the border.
    reach
        Largest shift along either axis.

    Returns
    -------
    Tensor
        Shape (N, C (C - 1), 2 reach + 1, 2 reach + 1), pairs (i, j) in the order of
        `channel_pairs`. At row ``s + reach`` and column ``t + reach``: the mean over
        x, y of ``F_i(x - t, y - s) F_j(x, y)``, the paper's sum per pixel.
    """
    number, channels, rows, columns = features.shape
    count = 2 * reach + 1
    padded = functional.pad(features, (reach, reach, reach, reach))
    # F_i at x - t: the larger the shift, the farther to the left it is read. Only
    # the shifts along x are laid out in memory; those along y are views of it.
    shifts = torch.arange(2 * reach, -1, -1, device=features.device)
    places = shifts[:, None] + torch.arange(columns, device=features.device)
    beside = padded[..., places].transpose(2, 3)
    fixed = features.reshape(number, channels, rows * columns).transpose(1, 2)
    shifted = (
        beside[..., 2 * reach - s : 2 * reach - s + rows, :] for s in range(count)
    )
    # Every product: (N, i and shift along x, pixel) times (N, pixel, j).
    products = [
        torch.matmul(part.reshape(number, channels * count, rows * columns), fixed)
        for part in shifted
    ]
    stacked = torch.stack(products, dim=1) / (rows * columns)
    ordered = stacked.reshape(number, count, channels, count, channels)
    all_pairs = ordered.permute(0, 2, 4, 1, 3).reshape(number, -1, count, count)
    first, second = channel_pairs(channels, features.device)
    return all_pairs.index_select(1, first * channels + second)


def correlate_by_fft(features: Tensor, reach: int) -> Tensor:
    """Return what `correlate` does, in float32, by way of the spectra."""
    rows, columns = features.shape[-2:]
    # As many zeros beside the features that no shift within reach wraps around.
    sides = [next_fast_len(side + reach, real=True) for side in (rows, columns)]
    spectrum = torch.fft.rfft2(features.float(), sides)
    first, second = channel_pairs(features.shape[1], features.device)
    half = len(first) // 2
    cross = spectrum[:, first[:half]].conj() * spectrum[:, second[:half]]
    whole = torch.fft.irfft2(cross, sides) / (rows * columns)
    shifts = torch.arange(-reach, reach + 1, device=features.device)
    found = whole[..., shifts % sides[0], :][..., shifts % sides[1]]
    # Exchanging two channels turns their correlation around.
    return torch.cat([found, found.flip(2, 3)], dim=1)


def channel_pairs(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the channels of all ordered pairs: those with i < j, then with i > j."""
    lower, upper = torch.triu_indices(channels, channels, 1, device=device)
    return torch.cat([lower, upper]), torch.cat([upper, lower])


class WeiKernelNet(nn.Module):
    """Blurred tile to blurring kernel.

    Parameters
    ----------
    size_px
        Side of the kernel, one more than a multiple of 16 (m + 1 in the paper's
        letters, so that the kernel has a centre).
    width
        Channels of the feature convolutions; 64 in the paper.
    reduced
        Channels that are correlated and channels of the reconstruction; 32 and 32
        in the paper.
    phases
        1: full resolution enters the first scale and is pooled there (paper);
        2: its four interleaved sub-images do, at a quarter of the cost.
    class_embedding
        Tell the network the defocus class (paper); off for the ablation.

    Raises
    ------
    ConfigError
        If `size_px` is not one more than a multiple of 16, or `phases` not 1 or 2.
    """

    def __init__(
        self,
        size_px: int = 33,
        width: int = 64,
        reduced: Sequence[int] = (32, 32),
        *,
        phases: int = 1,
        class_embedding: bool = True,
    ) -> None:
        super().__init__()
        if size_px < 17 or (size_px - 1) % 16:
            msg = (
                f"kernel side {size_px} px: must be one more than a multiple of 16, "
                "for three scales; choose 17, 33 or 49"
            )
            raise ConfigError(msg)
        if phases not in (1, 2):
            msg = f"phases {phases}: must be 1 (full resolution) or 2 (sub-images)"
            raise ConfigError(msg)
        self.size_px, self.phases = size_px, phases
        correlated, rebuilt = reduced
        inputs = (phases**2, width, width)
        self.features = nn.ModuleList(
            FeatureScale(n, width, correlated, pool=place > 0 or phases == 1)
            for place, n in enumerate(inputs)
        )
        self.correlations = nn.ModuleList(
            CorrelationLayer(correlated, (size_px - 1) >> (place + 2), rebuilt)
            for place in range(SCALES)
        )
        self.embedding = (
            nn.Embedding(CLASSES + 1, SCALES * rebuilt) if class_embedding else None
        )
        self.enlarge = nn.ModuleList(
            nn.Conv2d(rebuilt, rebuilt, 3, padding=1) for _ in range(SCALES)
        )
        self.merge = nn.ModuleList(
            nn.Conv2d(2 * rebuilt, rebuilt, 1) for _ in range(SCALES - 1)
        )
        steps = (rebuilt, *_RECONSTRUCTION)
        self.rebuild = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(steps)
        )
        self.output = nn.Conv2d(_RECONSTRUCTION[-1], 1, 3, padding=1)
        self.mean_logits = nn.Parameter(_gaussian_logits(size_px))

    def forward(self, tiles: Tensor, classes: Tensor) -> Tensor:
        """Estimate the kernel of every tile.

        Parameters
        ----------
        tiles
            Shape (N, 1, y, x), sides multiples of 8.
        classes
            Index of the defocus class per tile, 0 to 4, or `UNKNOWN_CLASS`.

        Returns
        -------
        Tensor
            Shape (N, size_px, size_px), non-negative, sum 1 (eq. 2).
        """
        features = functional.pixel_unshuffle(tiles, self.phases)
        kernels = []
        for scale, correlation in zip(self.features, self.correlations, strict=True):
            features, reduced = scale(features)
            kernels.append(correlation(reduced))
        if self.embedding is not None:
            known = self.embedding(classes)[:, :, None, None].chunk(SCALES, dim=1)
            kernels = [f + k.to(f.dtype) for f, k in zip(kernels, known, strict=True)]
        inner = functional.relu(kernels[-1])
        for place in reversed(range(SCALES - 1)):
            inner = functional.relu(self.enlarge[place + 1](_double(inner)))
            both = torch.cat([inner, functional.relu(kernels[place])], dim=1)
            inner = functional.relu(self.merge[place](both))
        inner = functional.relu(self.enlarge[0](_double(inner)))
        for convolution in self.rebuild:
            inner = functional.relu(convolution(inner))
        logits = self.output(inner).float() + self.mean_logits
        shares: Tensor = logits.flatten(1).softmax(dim=1)
        return shares.reshape(-1, self.size_px, self.size_px)


def _double(features: Tensor) -> Tensor:
    """Resize n x n to 2 n - 1 x 2 n - 1: every old pixel keeps its place."""
    side = 2 * features.shape[-1] - 1
    larger: Tensor = functional.interpolate(
        features, size=(side, side), mode="bilinear", align_corners=True
    )
    return larger


def _gaussian_logits(side: int) -> Tensor:
    place = torch.arange(side) - side // 2
    square = (place[:, None] ** 2 + place[None] ** 2).float()
    logits: Tensor = -square / (2 * _FIRST_SIGMA_PX**2)
    return logits


# Share of the range's square below which a patch is flat and its gain unknown.
_LEAST_FIT_VARIANCE = 1e-4


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


def match_intensity(image: Tensor, target: Tensor) -> Tensor:
    """Return `image` with the gain and offset per sample that come nearest `target`.

    For real pairs: lamp and camera differ between the two exposures, and light from
    beyond the patch adds up. Flat images keep their gain.
    """
    mean, goal = (x.mean(dim=(2, 3), keepdim=True) for x in (image, target))
    contrast = image - mean
    variance = contrast.square().mean(dim=(2, 3), keepdim=True)
    shared = (contrast * (target - goal)).mean(dim=(2, 3), keepdim=True)
    gain = (shared + _LEAST_FIT_VARIANCE) / (variance + _LEAST_FIT_VARIANCE)
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
    target = inner_part(blurred.float(), kernel.shape[-1])
    reblurred = reblur(sharp, kernel)
    reblurred = torch.where(
        matched[:, None, None, None], match_intensity(reblurred, target), reblurred
    )
    return (reblurred - target).abs().mean(dim=(1, 2, 3))
