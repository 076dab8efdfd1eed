"""Wei's networks: every equation against a hand-written form."""

import pytest
import torch
from torch.nn import functional

from rtfocus.errors import ConfigError
from rtfocus.training.networks.wei_kernel import (
    UNKNOWN_CLASS,
    WeiKernelNet,
    channel_pairs,
    correlate,
    correlate_by_fft,
    inner_part,
    match_intensity,
    reblur,
    reblur_error,
)
from rtfocus.training.networks.wei_unet import (
    GuidedConvolution,
    KernelGuide,
    WeiRestorer,
    WeiUNet,
    defocus_classes,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def small_kernel_net(**switches) -> WeiKernelNet:
    return WeiKernelNet(17, 4, (3, 4), **switches)


def small_unet(**switches) -> WeiUNet:
    return WeiUNet(17, (8, 8, 8), 6, **switches)


@pytest.mark.parametrize("form", [correlate, correlate_by_fft])
def test_correlation_is_the_sum_of_equation_5(form):
    """Against four loops over pair, shifts and pixels."""
    channels, rows, columns, reach = 3, 6, 5, 2
    features = torch.randn(2, channels, rows, columns)
    first, second = channel_pairs(channels, features.device)
    expected = torch.zeros(2, len(first), 5, 5)
    for pair, (i, j) in enumerate(zip(first, second, strict=True)):
        for s in range(-reach, reach + 1):
            for t in range(-reach, reach + 1):
                total = torch.zeros(2)
                for y in range(rows):
                    for x in range(columns):
                        if 0 <= y - s < rows and 0 <= x - t < columns:
                            total += features[:, i, y - s, x - t] * features[:, j, y, x]
                expected[:, pair, s + reach, t + reach] = total / (rows * columns)
    torch.testing.assert_close(form(features, reach), expected)


def test_paper_has_992_pairs_of_channels():
    first, second = channel_pairs(32, torch.device("cpu"))
    assert len(first) == len(second) == 992
    assert not (first == second).any()
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 992


@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("size", [17, 33])
def test_kernels_are_non_negative_and_sum_to_one(size, phases):
    """Equation 2, for tiles of any size."""
    network = WeiKernelNet(size, 4, (3, 4), phases=phases)
    for side in (48, 64):
        kernel = network(torch.randn(2, 1, side, 96), torch.tensor([0, UNKNOWN_CLASS]))
        assert kernel.shape == (2, size, size)
        assert (kernel >= 0).all()
        torch.testing.assert_close(kernel.sum(dim=(1, 2)), torch.ones(2))


def test_correlation_maps_have_the_sizes_of_the_paper():
    """(2^-i m + 1)^2 for m = 32: 17, 9, 5; from 32 channels, 992 of them."""
    network = WeiKernelNet(33)
    maps = [layer(torch.randn(1, 32, 24, 24)) for layer in network.correlations]
    assert [m.shape[-1] for m in maps] == [17, 9, 5]
    assert [layer.reduce.in_channels for layer in network.correlations] == [992] * 3


def test_kernel_does_not_depend_on_contrast_or_size_in_training_or_use():
    network = small_kernel_net(phases=2)
    tiles, unknown = torch.rand(1, 1, 48, 48), torch.tensor([UNKNOWN_CLASS])
    torch.testing.assert_close(
        network.train()(tiles, unknown), network.eval()(tiles, unknown)
    )


def test_class_changes_the_kernel_only_with_the_embedding():
    tiles = torch.rand(2, 1, 48, 48)[:1].repeat(2, 1, 1, 1)
    classes = torch.tensor([0, 4])
    near, far = small_kernel_net()(tiles, classes)
    assert not torch.allclose(near, far)
    near, far = small_kernel_net(class_embedding=False)(tiles, classes)
    torch.testing.assert_close(near, far)


@pytest.mark.parametrize(
    ("kernel_px", "switches"), [(32, {}), (9, {}), (17, {"phases": 3})]
)
def test_impossible_kernel_networks_are_refused(kernel_px, switches):
    with pytest.raises(ConfigError, match=str(switches.get("phases", kernel_px))):
        WeiKernelNet(kernel_px, 4, (3, 4), **switches)


def test_guide_is_equation_6():
    """Three fully connected layers, ReLU after the first two, by hand."""
    guide = KernelGuide(3, 5, 4)
    torch.nn.init.normal_(guide.last.weight)
    features, flat = torch.randn(2, 4, 6, 7), torch.rand(2, 9)
    hidden = (flat @ guide.first.weight.T + guide.first.bias).clamp(min=0)
    hidden = (hidden @ guide.second.weight.T + guide.second.bias).clamp(min=0)
    both = hidden @ guide.last.weight.T + guide.last.bias
    weight, bias = both[:, :4, None, None], both[:, 4:, None, None]
    torch.testing.assert_close(guide(features, flat), features * (1 + weight) + bias)


def test_untrained_guide_changes_nothing():
    features = torch.randn(1, 4, 6, 7)
    torch.testing.assert_close(
        KernelGuide(3, 5, 4)(features, torch.rand(1, 9)), features
    )


def test_every_layer_of_the_unet_is_guided():
    network = WeiUNet(17, (8, 16, 24), 6, phases=2)
    guided = [m for m in network.modules() if isinstance(m, GuidedConvolution)]
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    # Two per scale, two per step up, the head; only the output is not guided.
    assert len(guided) == 6 + 4 + 1
    assert len(convolutions) == len(guided) + 1


def test_paper_unet_is_128_wide_and_256_after_the_skip():
    network = WeiUNet()
    inputs = {layer.convolution.in_channels for layer in network.decoder}
    outputs = {
        m.convolution.out_channels
        for m in network.modules()
        if isinstance(m, GuidedConvolution)
    }
    assert inputs == {256}
    assert outputs == {128}


def test_parameter_counts_by_hand():
    wide = 8
    guide = (289 * 6 + 6) + (6 * 6 + 6) + (6 * 16 + 16)
    layers = [(1, wide), (wide, wide)] + 2 * [(wide, wide), (wide, wide)]
    layers += 2 * [(wide, wide), (2 * wide, wide)]
    expected = sum(a * b * 9 + b + guide for a, b in layers) + wide * 9 + 1
    counted = sum(p.numel() for p in small_unet().parameters())
    assert counted == expected
    paper = sum(p.numel() for p in WeiKernelNet().parameters())
    scales = (9 * 64 + 64) + 2 * (64 * 64 * 9 + 64)
    scales += 3 * (64 * 64 * 9 + 64) + 3 * (64 * 32 + 32)
    rebuilt = 3 * (992 * 32 + 32) + 6 * 96 + 3 * (32 * 32 * 9 + 32) + 2 * (64 * 32 + 32)
    last = (32 * 24 + 24 * 16 + 16 * 8 + 8) * 9 + 24 + 16 + 8 + 1
    assert paper == scales + rebuilt + last + 33 * 33


def test_receptive_field_of_the_unet():
    """One pixel of the result sees as far as the layers reach, and no farther."""
    network = small_unet()
    tiles = torch.rand(1, 1, 64, 64, requires_grad=True)
    kernel = torch.full((1, 17, 17), 1 / 289)
    network(tiles, kernel)[0, 0, 32, 32].backward()
    seen = tiles.grad[0, 0].abs().amax(dim=0).nonzero()
    # 3 x 3 layers on the way down: 2, 2, 2; up: 2, 2; output 1, at scales 1, 2, 4.
    reach = 2 + 2 * 2 + 4 * 2 + 2 * 2 + 2 + 1
    pooled = 3
    width = int(seen.max() - seen.min()) + 1
    assert 2 * reach - 4 * pooled < width <= 2 * (reach + pooled) + 1


@pytest.mark.parametrize("phases", [1, 2])
def test_residual_unet_begins_as_the_identity(phases):
    tiles = torch.rand(2, 1, 16, 24)
    kernel = torch.rand(2, 17, 17)
    network = small_unet(phases=phases, residual_output=True)
    torch.testing.assert_close(network(tiles, kernel), tiles)


def test_reblur_by_hand():
    """Against the sum over shifts of the definition of a convolution."""
    sharp, kernel = torch.rand(2, 1, 7, 8), torch.rand(2, 3, 3)
    expected = torch.zeros(2, 1, 5, 6)
    for row in range(3):
        for column in range(3):
            part = sharp[:, :, 2 - row : 7 - row, 2 - column : 8 - column]
            expected += kernel[:, None, row : row + 1, column : column + 1] * part
    torch.testing.assert_close(reblur(sharp, kernel), expected)


def test_reblur_with_a_point_is_the_inner_part():
    sharp = torch.rand(1, 1, 9, 9)
    kernel = torch.zeros(1, 5, 5)
    kernel[0, 2, 2] = 1
    torch.testing.assert_close(reblur(sharp, kernel), inner_part(sharp, 5))


def test_reblur_error_is_the_mean_absolute_difference():
    sharp, blurred = torch.rand(2, 1, 9, 9), torch.rand(2, 1, 9, 9)
    kernel = torch.rand(2, 3, 3).flatten(1).softmax(1).unflatten(1, (3, 3))
    plain = reblur_error(blurred, sharp, kernel, torch.tensor([False, False]))
    difference = reblur(sharp, kernel) - blurred[..., 1:-1, 1:-1]
    torch.testing.assert_close(plain, difference.abs().mean(dim=(1, 2, 3)))
    matched = reblur_error(blurred, sharp, kernel, torch.tensor([True, False]))
    assert matched[0] != plain[0]
    assert matched[1] == plain[1]


def test_matched_intensity_undoes_gain_and_offset():
    image = torch.rand(2, 1, 16, 16)
    found = match_intensity(image, 3 * image + 0.5)
    torch.testing.assert_close(found, 3 * image + 0.5, rtol=0.01, atol=0.01)


def test_a_kernel_is_learnt_from_the_reblur_alone():
    """No true kernel is shown; what blurred the image is found (eq. 7)."""
    network = small_kernel_net(phases=2)
    scene = (torch.rand(1, 1, 64, 64) > 0.9).float()
    place = torch.arange(17) - 8
    true = (-(place[:, None] ** 2 + 0.2 * place[None] ** 2) / 4).exp()[None]
    true = true / true.sum()
    blurred = functional.pad(reblur(scene, true), (8, 8, 8, 8))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    classes, plain = torch.tensor([UNKNOWN_CLASS]), torch.tensor([False])
    for _ in range(150):
        kernel = network(blurred, classes)
        loss = reblur_error(blurred, scene, kernel, plain).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float((kernel.detach() - true).abs().sum()) < 0.25


def test_unet_learns_to_undo_a_blur():
    network = WeiUNet(17, (16, 16), 6, phases=2, residual_output=True)
    scene = torch.rand(1, 1, 48, 48)
    kernel = torch.full((1, 17, 17), 0.0)
    kernel[0, 7:10, 7:10] = 1 / 9
    sharp = scene[..., 8:-8, 8:-8]
    blurred = reblur(scene, kernel)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    before = functional.mse_loss(blurred, sharp)
    for _ in range(200):
        loss = functional.mse_loss(network(blurred, kernel), sharp)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < before / 4


def test_classes_of_signed_defocus():
    levels = torch.tensor([-5.0, -2.4, -0.6, -0.5, 0.0, 0.5, 0.6, 2.6, 5.0])
    found = defocus_classes(levels, torch.ones(9), (0.5, 2.5))
    assert found.tolist() == [0, 1, 1, 1, 2, 2, 3, 4, 4]
    assert defocus_classes(levels, torch.zeros(9), (0.5, 2.5)).eq(5).all()


def test_restorer_feeds_its_kernel_to_the_unet():
    network = WeiRestorer(small_kernel_net(phases=2), small_unet(phases=2))
    tiles, condition = torch.rand(2, 1, 48, 48), torch.tensor([[3.0, 1], [0, 0]])
    restored, kernel = network(tiles, condition)
    expected = network.kernel_net(tiles, torch.tensor([4, 5]))
    torch.testing.assert_close(kernel, expected)
    torch.testing.assert_close(restored, network.unet(tiles, expected))
