"""BatchNorm: exact statistics, folding into convolutions, and back."""

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


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
