"""Multiscale: shapes, shared weights, loss by hand, and that it learns."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from rtfocus.training.layers import charbonnier
from rtfocus.training.networks.blind_restorers import (
    MULTIPLE_PX,
    MultiScale,
    image_pyramid,
    scales_loss,
)


def random_network(seed: int = 0) -> MultiScale:
    """All weights random: a fresh network is almost the identity, which hides much."""
    torch.manual_seed(seed)
    network = MultiScale(8, 8, 1).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    return network


@pytest.mark.parametrize("shape", [(96, 96), (64, 144), (MULTIPLE_PX, 32)])
def test_three_scales_each_twice_the_one_before(shape):
    restored = random_network().scales(torch.rand(2, 1, *shape))
    sizes = [tuple(image.shape) for image in restored]
    height, width = shape
    assert sizes == [(2, 1, height // f, width // f) for f in (4, 2, 1)]


def test_a_fresh_network_changes_little_and_learns_everywhere():
    torch.manual_seed(1)
    tiles = torch.rand(2, 1, 96, 96)
    network = MultiScale()
    restored = network(tiles)
    assert 0 < (restored - tiles).square().mean() < 0.05 * tiles.var()
    restored.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_parameters_by_hand():
    fine, coarse, blocks = 32, 96, 3
    stem = 8 * fine * 9 + fine
    residual = [2 * (c * c * 9 + c) for c in (fine, coarse)]
    between = fine * coarse * 4 + coarse + coarse * fine + fine
    head = fine * 8 * 9 + 8 + 10 * 9 + 1
    expected = stem + 2 * residual[0] + blocks * residual[1] + between + head
    network = MultiScale(fine, coarse, blocks)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_every_scale_uses_the_same_weights():
    """A scale alone, run on its own input, gives what the whole gives there."""
    network = random_network()
    tiles = torch.rand(1, 1, 64, 64)
    quarter, half, full = network.scales(tiles)
    blurred = image_pyramid(tiles)
    added = network.shared(blurred[0], torch.zeros_like(blurred[0]))
    assert torch.allclose(blurred[0] + added, quarter)
    wide = functional.interpolate(added, scale_factor=2.0, mode="bilinear")
    added = network.shared(blurred[1], wide)
    assert torch.allclose(blurred[1] + added, half)
    wide = functional.interpolate(added, scale_factor=2.0, mode="bilinear")
    assert torch.allclose(tiles + network.shared(tiles, wide), full)


def test_the_coarsest_scale_alone_teaches_all_weights():
    network = random_network()
    network.scales(torch.rand(1, 1, 64, 64))[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_the_coarse_result_reaches_the_fine_one():
    network = random_network()
    tiles = torch.rand(1, 1, 64, 64)
    carried = torch.zeros(1, 1, 64, 64, requires_grad=True)
    (slope,) = torch.autograd.grad(network.shared(tiles, carried).sum(), carried)
    assert slope.abs().sum() > 0


def test_pyramid_averages_two_by_two():
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    sizes = image_pyramid(images)
    assert sizes[-1] is images
    assert sizes[1].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert sizes[0].item() == 7.5


def test_charbonnier_by_hand():
    error = torch.tensor([0.0, 0.3, -0.4])
    expected = (math.hypot(0.3, 0.1) + math.hypot(0.4, 0.1) + 0.1) / 3 - 0.1
    assert float(charbonnier(error, 0.1)) == pytest.approx(expected, rel=1e-5)


def test_scales_loss_by_hand():
    sharp = torch.tensor([[1.0, 3.0], [5.0, 7.0]])[None, None]
    restored = [torch.full((1, 1, 1, 1), 4.5), sharp + 0.2]
    expected = (math.hypot(0.5, 0.1) + math.hypot(0.2, 0.1) - 0.2) / 2
    assert float(scales_loss(restored, sharp, 0.1)) == pytest.approx(expected, rel=1e-5)


def test_overfits_a_pair():
    torch.manual_seed(0)
    squares = (torch.rand(1, 1, 12, 12) > 0.7).float()
    sharp = functional.interpolate(squares, scale_factor=4.0, mode="nearest")
    blurred = functional.avg_pool2d(
        sharp, 5, stride=1, padding=2, count_include_pad=False
    )
    network = MultiScale(8, 16, 1)
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(80):
        loss = scales_loss(network.scales(blurred), sharp, 0.01)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
    before = (blurred - sharp).square().mean()
    with torch.no_grad():
        after = (network(blurred) - sharp).square().mean()
    assert 10 * math.log10(float(before / after)) > 6
