"""DelpNet: what the paper fixes, and what a frame shares with its patches."""

import pytest
import torch
from torch import nn

from rtfocus.training.layers import recalibrate
from rtfocus.training.level_tiles import GEOMETRY, LABELS
from rtfocus.training.networks.delpnet import DelpNet


@pytest.fixture(scope="module")
def network() -> DelpNet:
    torch.manual_seed(0)
    network = DelpNet()
    recalibrate(network, [torch.randn(8, 1, 144, 144)])
    return network


def test_parameters_are_the_papers_2_3_million(network):
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert counted == pytest.approx(2.3e6, rel=0.02)


def test_seven_convolutions_each_with_batch_norm_and_relu(network):
    layers = [m for m in network.features if not isinstance(m, nn.Dropout2d)]
    kinds = [type(layer) for layer in layers]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 7
    assert sum(isinstance(m, nn.Dropout2d) for m in network.features) == 6
    norms = [m for m in layers if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.40}


def test_labels_are_eleven_levels_and_background():
    assert LABELS == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, "bg")


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(84, 84, 1, 1), (96, 96, 1, 1), (144, 192, 2, 3), (528, 720, 10, 14)],
)
def test_every_size_gives_its_grid_of_tiles(network, height, width, rows, columns):
    assert (GEOMETRY.count(height), GEOMETRY.count(width)) == (rows, columns)
    with torch.no_grad():
        logits = network(torch.randn(2, 1, height, width))
    assert logits.shape == (2, 12, rows, columns)


def test_a_patch_is_max_pooled_over_all_of_it(network):
    """Global max pooling and a dense layer, as the paper has them."""
    patch = torch.randn(3, 1, 84, 84)
    with torch.no_grad():
        cells = network.features(patch)
        vector = cells.amax(dim=(2, 3))
        dense = vector @ network.dense.weight[:, :, 0, 0].T + network.dense.bias
        torch.testing.assert_close(network(patch)[:, :, 0, 0], dense)


def test_a_tile_of_a_frame_equals_a_patch_with_the_same_surroundings(network):
    """Cells further than the receptive field from a cut do not see the cut."""
    torch.manual_seed(1)
    frame = torch.randn(1, 1, 720, 720)
    with torch.no_grad():
        whole = network(frame)
        # Tile 6 starts at pixel 6 * 48; the cut begins 4 tiles earlier.
        part = network(frame[:, :, 96:624, 96:624])
    torch.testing.assert_close(whole[..., 6, 6], part[..., 4, 4])


def test_a_tile_sees_nothing_far_from_its_centre(network):
    frame = torch.randn(1, 1, 720, 720)
    changed = frame.clone()
    changed[..., 528:, :] += 5
    with torch.no_grad():
        before, after = network(frame), network(changed)
    torch.testing.assert_close(before[..., 5, :], after[..., 5, :])
    assert not torch.equal(before[..., 10, :], after[..., 10, :])


def test_recalibration_gives_the_exact_statistics_of_the_batches():
    torch.manual_seed(2)
    network = DelpNet()
    batches = [torch.randn(4, 1, 96, 96) * 3 + 1 for _ in range(3)]
    recalibrate(network, iter(batches))
    first = network.features[0]
    with torch.no_grad():
        values = [first(batch) for batch in batches]
    mean = torch.stack([v.mean(dim=(0, 2, 3)) for v in values]).mean(dim=0)
    torch.testing.assert_close(network.features[1].running_mean, mean)
    assert network.features[1].momentum == 0.40
    assert not network.training
