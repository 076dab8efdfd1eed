"""RRDB: the report's architecture, layer by layer."""

import pytest
import torch
from torch.nn import functional

from rtfocus.training.networks.blind_restorers import (
    ResidualDenseBlock,
    ResidualInResidualBlock,
    RrdbNet,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_dense_block_feeds_each_convolution_all_before_it(scale):
    """Against the five convolutions written out."""
    block = ResidualDenseBlock(4, scale)
    c1, c2, c3, c4, c5 = block.convolutions
    x = torch.randn(2, 4, 9, 7)
    y1 = functional.leaky_relu(c1(x), 0.2)
    y2 = functional.leaky_relu(c2(torch.cat([x, y1], 1)), 0.2)
    y3 = functional.leaky_relu(c3(torch.cat([x, y1, y2], 1)), 0.2)
    y4 = functional.leaky_relu(c4(torch.cat([x, y1, y2, y3], 1)), 0.2)
    y5 = c5(torch.cat([x, y1, y2, y3, y4], 1))
    torch.testing.assert_close(block(x), x + scale * y5)


def test_rrdb_is_three_dense_blocks_plus_the_input():
    block = ResidualInResidualBlock(4, 0.2)
    x = torch.randn(1, 4, 8, 8)
    first, second, third = block.blocks
    torch.testing.assert_close(block(x), x + 0.2 * third(second(first(x))))


def test_network_upsamples_convolves_and_pools_back():
    """The whole forward pass against the report's order of layers."""
    network = RrdbNet(blocks=1, width=4, residual_output=False)
    x = torch.randn(1, 1, 8, 8)
    maps = network.chain(network.first(x))
    large = maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    fine = functional.leaky_relu(network.fine(large), 0.2)
    expected = network.output(functional.max_pool2d(fine, 2))
    assert fine.shape[-2:] == (16, 16)
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("blocks", [4, 8, 12])
@pytest.mark.parametrize("phases", [1, 2])
def test_parameters_by_hand(blocks, phases):
    """A dense block has 9 w^2 (1 + 2 + 3 + 4 + 5) weights and 5 w offsets."""
    w = 8
    network = RrdbNet(blocks=blocks, width=w, phases=phases)
    chain = blocks * 3 * (9 * w**2 * 15 + 5 * w)
    ends = 9 * w * phases**2 * 2 + w + phases**2
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert counted == chain + 9 * w**2 + w + ends


def test_paper_width_is_64():
    network = RrdbNet()
    assert {
        m.out_channels for m in network.chain.modules() if hasattr(m, "stride")
    } == {64}
    assert sum(p.numel() for p in network.parameters()) == 6_677_505


@pytest.mark.parametrize("phases", [1, 2])
def test_untrained_network_with_residual_output_is_the_identity(phases):
    network = RrdbNet(blocks=1, width=4, phases=phases)
    x = torch.randn(2, 1, 12, 16)
    assert torch.equal(network(x), x)


def test_overfits_one_blurred_batch():
    """Gradients reach every layer, although the output starts at zero."""
    sharp = functional.avg_pool2d(torch.rand(2, 1, 26, 26), 3, stride=1)
    blurred = functional.avg_pool2d(sharp, 5, stride=1, padding=2)
    network = RrdbNet(blocks=1, width=8)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    start = float(functional.mse_loss(blurred, sharp))
    for _ in range(200):
        loss = functional.mse_loss(network(blurred), sharp)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < start / 4
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters()
    )
