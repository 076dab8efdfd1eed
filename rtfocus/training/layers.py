"""Layers: what several networks share: exact BatchNorm, tiles, Charbonnier loss."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Of the variance that tiles are divided by.
_LEAST_POWER = 1e-4
# Of counts: a channel without contrast is not blown up to noise of deviation 1.
_LEAST_DEVIATION = 1e-4
# Share of a patch that is no background, from which on its defocus can be found.
_LEAST_SPECIMEN = 0.25
_CHANCE: ContextVar[torch.Generator | None] = ContextVar("chance", default=None)
L = TypeVar("L", bound=nn.Module)


@contextmanager
def chance_from(seed: int) -> Iterator[None]:
    """Let what networks draw in training, in this thread, begin from a seed."""
    mark = _CHANCE.set(torch.Generator().manual_seed(seed))
    try:
        yield
    finally:
        _CHANCE.reset(mark)


def chance() -> torch.Generator | None:
    """Return where networks draw from; None: torch's own source, of all threads."""
    return _CHANCE.get()


class DropMaps(nn.Dropout2d):
    """Dropout of whole maps whose draws belong to the thread, see `chance_from`."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (N, C, H, W), some of them 0 and the others larger."""
        if not self.training or self.p == 0:
            return maps
        mask = torch.empty(maps.shape[:2]).bernoulli_(1 - self.p, generator=chance())
        return maps * (mask / (1 - self.p)).to(maps)[:, :, None, None]


def encoder_sizes(weights: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    """Return channels, then number of residual blocks, on every scale of an encoder."""
    ways = [name.split(".") for name in weights if name.startswith("encoder.")]
    scales = range(1 + max((int(scale) for _, scale, *_ in ways), default=0))
    widths = [len(weights[f"encoder.{scale}.0.layers.0.weight"]) for scale in scales]
    depths = [len({way[2] for way in ways if way[1] == str(n)}) for n in scales]
    return tuple(widths), tuple(depths)


@torch.no_grad()
def recalibrate(
    network: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]
) -> None:
    """Replace the running statistics by exact means over `batches`.

    A batch is the argument of the network, or a tuple of several.

    A momentum of 0.40 remembers two batches only, and the statistics of training
    were taken under dropout; inference has neither excuse.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean over the batches
        norm.train()
    for batch in batches:
        network(*batch) if isinstance(batch, tuple) else network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy whose convolutions hold their BatchNorm; Dropout is gone.

    Only inside `nn.Sequential`, where a BatchNorm follows its convolution.
    """
    folded = copy.deepcopy(network).eval()
    for parent in list(folded.modules()):
        if not isinstance(parent, nn.Sequential):
            continue
        layers: list[nn.Module] = []
        for layer in parent:
            if isinstance(layer, nn.BatchNorm2d):
                layers.append(fuse_conv_bn_eval(layers.pop(), layer))  # type: ignore[type-var]
            elif not isinstance(layer, nn.Dropout2d):
                layers.append(layer)
        del parent[:]
        parent.extend(layers)
    return folded


@torch.no_grad()
def unfold_batch_norm(
    layers: nn.Sequential,
    folded: Sequence[tuple[Tensor, Tensor]],
    batches: Sequence[Tensor],
) -> None:
    """Load folded convolutions so that training can go on from them.

    A folded convolution has lost what its BatchNorm measured. Taken anew over
    batches, layer by layer: with mean m and deviation s of a convolution's output,
    BatchNorm with gain s and shift (bias + m) computes what the folded one did, and
    in training goes on from there. Weights shrink to the size they are initialised
    with, and the gain takes the rest: after a BatchNorm the size of the weights
    only decides how fast they turn.

    Parameters
    ----------
    layers
        Convolutions, each followed by its BatchNorm, and layers without weights.
    folded
        Weight and bias of every convolution, in their order.
    batches
        Inputs like those of training; in evaluation mode the result is the same
        for any.
    """
    layers.eval()
    maps = list(batches)
    remaining = iter(folded)
    scale, bias = torch.ones(1), torch.zeros(1)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            weight, bias = next(remaining)
            length = weight.flatten(1).norm(dim=1).clamp_min(1e-6)
            # Rows as nn.Conv2d draws them have a length of 1 / sqrt(3).
            scale = length * math.sqrt(3)
            layer.weight.copy_(weight / scale[:, None, None, None])
        elif isinstance(layer, nn.BatchNorm2d):
            flat = torch.cat([m.transpose(0, 1).flatten(1) for m in maps], dim=1)
            mean, variance = flat.mean(dim=1), flat.var(dim=1, correction=0)
            layer.running_mean = mean
            layer.running_var = variance
            layer.weight.copy_(scale * torch.sqrt(variance + layer.eps))
            layer.bias.copy_(bias + scale * mean)
        maps = [layer(m) for m in maps]


def zeroed(layer: L) -> L:
    """Return a layer whose weights and bias begin at zero, and so its result."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a short cut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape."""
        result: Tensor = features + self.layers(features)
        return result


class Modulation(nn.Module):
    """Scale and shift of features by the condition (FiLM); begins as the identity."""

    def __init__(self, hidden: int, channels: int) -> None:
        super().__init__()
        self.dense = zeroed(nn.Linear(hidden, 2 * channels))

    def forward(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Return ``features * (1 + scale) + shift``, per channel."""
        scale, shift = self.dense(hidden)[:, :, None, None].chunk(2, dim=1)
        result: Tensor = features * (1 + scale) + shift
        return result


def around(cells: Tensor) -> Tensor:
    """Return the mean over the 80 px around each cell, cut at the frame's edge."""
    return functional.avg_pool2d(cells, 5, stride=1, padding=2, count_include_pad=False)


def double(features: Tensor) -> Tensor:
    """Return maps of twice the size, each pixel four times."""
    return functional.interpolate(features, scale_factor=2.0, mode="nearest")


def local_contrast(tiles: Tensor, cell_px: int) -> Tensor:
    """Divide tiles by the deviation around: dim objects tell as much as bright.

    The deviation from the mean over 5 x 5 cells, blended over cells.
    """
    cells = functional.avg_pool2d(torch.cat([tiles, tiles.square()], 1), cell_px)
    mean, square = around(cells).chunk(2, dim=1)
    deviation = ((square - mean.square()).clamp(min=0) + _LEAST_POWER).sqrt()
    both = torch.cat([mean, 1 / deviation], dim=1)
    mean, scale = functional.interpolate(
        both, scale_factor=cell_px, mode="bilinear"
    ).chunk(2, dim=1)
    return (tiles - mean) * scale


class ChannelAttention(nn.Module):
    """Squeeze and excitation: weigh channels by what the whole patch shows.

    ``U * sigmoid(W2 relu(W1 mean(U)))`` with the mean over the patch (Wei 2024,
    figure 6). The paper does not give the inner width; here an eighth.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 4)
        self.squeeze = nn.Linear(channels, inner)
        self.excite = nn.Linear(inner, channels)
        # Begins nearly open: four times one half would leave a sixteenth.
        nn.init.constant_(self.excite.bias, 2.0)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape (N, C, H, W)."""
        mean = features.mean(dim=(2, 3))
        weights = self.excite(functional.relu(self.squeeze(mean))).sigmoid()
        weighed: Tensor = features * weights[:, :, None, None]
        return weighed


def normalise_channels(patches: Tensor) -> Tensor:
    """Bring every channel of every patch to mean 0 and deviation 1.

    In float32 whatever surrounds it: bfloat16 would round counts before their
    mean is gone. A channel without contrast becomes 0.
    """
    with torch.autocast(patches.device.type, enabled=False):
        patches = patches.float()
        patches = patches - patches.mean(dim=(2, 3), keepdim=True)
        power = patches.square().mean(dim=(2, 3), keepdim=True)
        return patches / power.sqrt().clamp_min(_LEAST_DEVIATION)


def exchange_channels(patches: Tensor, orders: Tensor) -> Tensor:
    """Reorder the colours of every patch: the colour changes, the blur does not.

    Parameters
    ----------
    patches
        Shape (N, C, H, W).
    orders
        A permutation of the channels per patch, shape (N, C).
    """
    places = orders[:, :, None, None].expand_as(patches)
    return patches.gather(1, places)


class TiledClassifier(nn.Module):
    """A patch classifier over whole frames: one label per patch, side by side.

    Attention, pooling and dense layers look at a patch as a whole, so a frame
    cannot pass through the convolutions at once: it is cut into patches that do not
    overlap.

    Parameters
    ----------
    patch_network
        Takes patches (N, channels, side, side), returns logits (N, labels).
    patch_px
        Side of the patches.
    """

    def __init__(self, patch_network: nn.Module, patch_px: int) -> None:
        super().__init__()
        self.patch_network = patch_network
        self.patch_px = patch_px

    def forward(self, tiles: Tensor) -> Tensor:
        """Return logits (N, labels, rows, columns) of frames (N, channels, H, W).

        What lies behind the last whole patch is not looked at.
        """
        number, channels, height, width = tiles.shape
        side = self.patch_px
        rows, columns = height // side, width // side
        cut = tiles[:, :, : rows * side, : columns * side]
        grid = cut.reshape(number, channels, rows, side, columns, side)
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)
        logits: Tensor = self.patch_network(patches)
        return logits.reshape(number, rows, columns, -1).permute(0, 3, 1, 2)


def charbonnier(error: Tensor, bend: float) -> Tensor:
    """Return the mean of ``sqrt(error^2 + bend^2) - bend``."""
    return (error.square() + bend**2).sqrt().mean() - bend


def label_loss(logits: Tensor, levels: Tensor, empty: Tensor) -> Tensor:
    """Return the cross-entropy of tiles against their level.

    A defocus between two levels asks for both, each by its nearness.

    Parameters
    ----------
    logits
        Shape (N, label, row, column): levels from -n to n, then background.
    levels
        Signed defocus in levels, shape (N, row, column); NaN: not counted.
    empty
        Background tiles, same shape.
    """
    known = ~levels.isnan()
    if not known.any():
        return logits.sum() * 0
    count = logits.shape[1]
    highest = count - 2
    place = (levels[known] + highest / 2).clamp(0, highest)
    lower = place.floor().clamp(max=highest - 1)
    share = place - lower
    target = functional.one_hot(lower.long(), count) * (1 - share)[:, None]
    target = target + functional.one_hot(lower.long() + 1, count) * share[:, None]
    background = torch.zeros_like(target)
    background[:, -1] = 1
    target = torch.where(empty[known][:, None], background, target)
    log_likelihood = logits.permute(0, 2, 3, 1)[known].log_softmax(dim=1)
    return -(target * log_likelihood).sum(dim=1).mean()


def found_level(logits: Tensor) -> Tensor:
    """Return the defocus that the labels of a patch's tiles tell together.

    Parameters
    ----------
    logits
        Shape (N, label, row, column): levels from -n to n, then background.

    Returns
    -------
    Tensor
        Mean distance from focus, in levels, with the sign of the mean level, shape
        (N,); NaN where hardly anything but background is seen.
    """
    shares = logits.softmax(dim=1).mean(dim=(2, 3))
    specimen = shares[:, :-1].sum(dim=1)
    farthest = logits.shape[1] // 2 - 1
    levels = torch.arange(-farthest, farthest + 1).to(shares)
    side = torch.sign(shares[:, :-1] @ levels)
    distance = shares[:, :-1] @ levels.abs() / specimen
    return torch.where(specimen > _LEAST_SPECIMEN, side * distance, torch.nan)


@torch.no_grad()
def second_look(
    network: nn.Module, tensors: Mapping[str, Tensor], found: tuple[int, int]
) -> Tensor:
    """Return the condition with the defocus that a first look at patches finds.

    Of those marked in ``twice``, shape (N,). `found` are the entries that tell a
    defocus, and that it is known.
    """
    twice, condition = tensors["twice"].bool(), tensors["condition"].clone()
    if twice.any():
        logits, _ = network(tensors["blurred"][twice], condition[twice])
        level = found_level(logits.float())
        condition[twice, found[0]] = level.nan_to_num().to(condition)
        condition[twice, found[1]] = (~level.isnan()).to(condition)
    return condition


def oriented(images: Tensor, number: int, *, back: bool = False) -> Tensor:
    """Return square images in one of eight orientations, 0 to 7; `back` undoes it."""
    axes = [axis for bit, axis in ((1, -1), (2, -2)) if number & bit]
    if back:
        images = images.flip(axes)
    if number & 4:
        images = images.transpose(-1, -2)
    return images if back else images.flip(axes)


@torch.no_grad()
def in_the_mean(
    networks: Sequence[nn.Module],
    tensors: Mapping[str, Tensor],
    orientations: int,
    found: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Return what networks make of patches in the mean over orientations of them.

    Parameters
    ----------
    networks
        Give logits and restored patches; they take turns, from one drawn by chance.
    tensors
        ``blurred``, shape (N, 1, y, x), square, and their ``condition``, (N, entry).
    orientations
        How many of the eight, drawn by chance.
    found
        None: networks look once; else twice where optics are hidden, see `second_look`.

    Returns
    -------
    dict
        ``sharp``, shape of ``blurred``, and ``shares``, probabilities of the labels,
        (N, label, row, column).
    """
    images, shares = [], []
    drawn = torch.randperm(8, generator=chance())[:orientations].tolist()
    first = int(torch.randint(len(networks), (), generator=chance()))
    for turn, number in enumerate(drawn, first):
        network = networks[turn % len(networks)]
        turned = {**tensors, "blurred": oriented(tensors["blurred"], number)}
        if found:
            turned["twice"] = turned["condition"][:, found[1]] == 0
            turned["condition"] = second_look(network, turned, found)
        logits, restored = network(turned["blurred"], turned["condition"])
        images.append(oriented(restored.float(), number, back=True))
        shares.append(oriented(logits.float().softmax(dim=1), number, back=True))
    return {
        "sharp": torch.stack(images).mean(dim=0),
        "shares": torch.stack(shares).mean(dim=0),
    }


def learned(
    groups: Sequence[tuple[Tensor, Sequence[nn.Module], tuple[int, int] | None]],
    tensors: Mapping[str, Tensor],
    orientations: int,
) -> dict[str, Tensor]:
    """Return what each group of networks makes of its patches, see `in_the_mean`.

    A group has a mask of its patches, (N,), its networks, and `found`.
    """
    whole: dict[str, Tensor] = {}
    for mask, networks, found in groups:
        if mask.any():
            part = {name: tensors[name][mask] for name in ("blurred", "condition")}
            for name, made in in_the_mean(networks, part, orientations, found).items():
                empty = made.new_empty(len(mask), *made.shape[1:])
                whole.setdefault(name, empty)[mask] = made
    return whole
