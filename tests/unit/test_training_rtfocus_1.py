"""rtfocus-1: shapes, cost, what it begins as, and its losses by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from rtfocus.training.layers import Modulation, charbonnier, label_loss
from rtfocus.training.networks.rtfocus import CONDITION, LABELS, Rtfocus1
from rtfocus.training.pairs import tile_levels

FOCUS = LABELS.index(0)


def random_network(seed: int = 0) -> Rtfocus1:
    """All weights random: a fresh network is the identity and hides mistakes."""
    torch.manual_seed(seed)
    network = Rtfocus1((8, 8, 8, 8), (1, 1, 1, 1)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    return network


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [((144, 192), (2, 3)), ((96, 96), (1, 1)), ((528, 528), (10, 10))],
)
def test_one_label_per_tile_of_96_px_every_48(shape, tiles):
    network = random_network()
    logits, restored = network(torch.randn(1, 1, *shape), torch.zeros(1, 5))
    assert logits.shape == (1, len(LABELS), *tiles)
    assert restored.shape == (1, 1, *shape)


def test_a_fresh_network_returns_its_input():
    torch.manual_seed(1)
    network = Rtfocus1()
    tiles = torch.randn(2, 1, 96, 96)
    _, restored = network(tiles, torch.rand(2, len(CONDITION)))
    assert torch.equal(restored, tiles)


def test_what_is_surely_in_focus_passes_through():
    network = random_network()
    tiles = torch.randn(1, 1, 96, 96)
    _, changed = network(tiles, torch.zeros(1, 5))
    assert not torch.allclose(changed, tiles, atol=1e-2)
    with torch.no_grad():
        network.label.weight.zero_()
        network.label.bias.zero_()
        network.label.bias[FOCUS] = 60.0
    _, restored = network(tiles, torch.zeros(1, 5))
    assert torch.allclose(restored, tiles, atol=1e-5)


def test_the_shipped_size_costs_less_than_50_000_multiply_adds_per_pixel():
    network = Rtfocus1()
    total = 0

    def count(layer: nn.Conv2d, _: object, out: torch.Tensor) -> None:
        nonlocal total
        kernel = math.prod(layer.kernel_size) * layer.in_channels
        total += out.shape[-1] * out.shape[-2] * layer.out_channels * kernel

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    network(torch.zeros(1, 1, 480, 480), torch.zeros(1, 5))
    per_pixel = total / 480**2
    # By hand, per pixel: a 3 x 3 block of c channels at 1/s takes 2 * 9 c^2 / s^2.
    blocks = 2 * sum(18 * c**2 / s**2 for c, s in ((32, 2), (64, 4), (128, 8)))
    blocks += 2 * 18 * 192**2 / 16**2
    assert blocks < per_pixel < 1.25 * blocks
    assert per_pixel < 50_000


def test_modulation_scales_and_shifts_each_channel():
    modulation = Modulation(2, 3)
    features, hidden = torch.randn(1, 3, 4, 4), torch.tensor([[1.0, 2.0]])
    assert torch.equal(modulation(features, hidden), features)
    with torch.no_grad():
        modulation.dense.weight[1] = torch.tensor([0.5, 0.0])  # scale of channel 1
        modulation.dense.weight[3] = torch.tensor([0.0, 1.0])  # shift of channel 0
    changed = modulation(features, hidden)
    torch.testing.assert_close(changed[:, 0], features[:, 0] + 2)
    torch.testing.assert_close(changed[:, 1], features[:, 1] * 1.5)
    torch.testing.assert_close(changed[:, 2], features[:, 2])


def test_the_condition_reaches_image_and_labels():
    network = random_network()
    tiles = torch.randn(1, 1, 96, 96)
    blind = network(tiles, torch.zeros(1, 5))
    told = network(tiles, torch.tensor([[0.5, -0.4, 1.0, 3.0, 1.0]]))
    for before, after in zip(blind, told, strict=True):
        assert not torch.allclose(before, after)


def test_charbonnier_is_quadratic_below_its_bend_and_linear_above():
    error = torch.tensor([3.0, -4.0])
    by_hand = ((9 + 1) ** 0.5 + (16 + 1) ** 0.5) / 2 - 1
    assert charbonnier(error, 1.0).item() == pytest.approx(by_hand)
    small = torch.tensor([1e-3])
    assert charbonnier(small, 1.0).item() == pytest.approx(0.5e-6, rel=0.15)


def test_a_defocus_between_two_levels_asks_for_both():
    logits = torch.randn(1, len(LABELS), 1, 2)
    levels = torch.tensor([[[2.25, float("nan")]]])
    empty = torch.zeros(1, 1, 2, dtype=torch.bool)
    shares = logits.log_softmax(dim=1)[0, :, 0, 0]
    by_hand = -(0.75 * shares[FOCUS + 2] + 0.25 * shares[FOCUS + 3])
    assert label_loss(logits, levels, empty).item() == pytest.approx(by_hand.item())
    empty[0, 0, 0] = True
    background = -shares[-1].item()
    assert label_loss(logits, levels, empty).item() == pytest.approx(background)
    unknown = torch.full_like(levels, float("nan"))
    assert label_loss(logits, unknown, empty).item() == 0


@pytest.mark.parametrize("level", [-12.0, -10.0, 0.0, 10.0, 12.0])
def test_levels_at_and_beyond_the_ends_ask_for_one_label(level):
    logits = torch.randn(1, len(LABELS), 1, 1)
    found = label_loss(
        logits, torch.tensor([[[level]]]), torch.zeros(1, 1, 1, dtype=torch.bool)
    )
    label = FOCUS + int(np.clip(level, -10, 10))
    by_hand = -logits.log_softmax(dim=1)[0, label, 0, 0]
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_level_of_a_tile_is_the_mean_of_its_cells():
    cells = np.arange(81, dtype=np.float32).reshape(1, 9, 9)
    tiles = tile_levels(cells)
    assert tiles.shape == (1, 2, 2)
    assert tiles[0, 1, 0] == pytest.approx(cells[0, 3:9, 0:6].mean())
