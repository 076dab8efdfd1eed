"""COMI: generators, discriminators and each term of the loss."""

from math import log
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.training.networks.comi import (
    Vgg19Features,
    adversarial_loss,
    classifier_features,
    content_loss,
    cycle_loss,
    discriminator_loss,
    log_probability,
    vgg19_features,
)
from rtfocus.training.networks.comi_networks import Generator, PatchDiscriminator

DELPNET = resource_folder("engines") / "delpnet" / "model.fp32.onnx"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("norm", ["none", "instance"])
@pytest.mark.parametrize("upsampling", ["resize", "transposed"])
def test_generator_keeps_the_shape_and_starts_as_the_identity(upsampling, norm):
    network = Generator(width=4, residual_blocks=2, upsampling=upsampling, norm=norm)
    x = torch.randn(2, 1, 16, 24)
    assert torch.equal(network(x), x)
    nn.init.normal_(network.output.weight)
    assert network(x).shape == x.shape


@pytest.mark.parametrize("upsampling", ["resize", "transposed"])
def test_generator_of_the_papers_size_has_eleven_million_parameters(upsampling):
    network = Generator(width=64, residual_blocks=9, upsampling=upsampling)
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_365_633


def test_generator_has_two_strided_nine_residual_and_two_upsampling_blocks():
    network = Generator(width=4, upsampling="transposed")
    kinds = [type(module).__name__ for module in network.body]
    assert kinds.count("IdentityBlock") == 9
    assert kinds.count("ConvTranspose2d") == 2
    strides = [m.stride for m in network.body if isinstance(m, nn.Conv2d)]
    assert strides == [(1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("strided", "side_px", "map_side"), [(3, 256, 30), (2, 64, 14), (1, 64, 30)]
)
def test_patch_gan_gives_its_map(strided, side_px, map_side):
    """256 px to 30 x 30 judgements: Isola et al. 2017."""
    network = PatchDiscriminator(width=4, strided=strided)
    judged = network(torch.zeros(1, 1, side_px, side_px))
    assert judged.shape == (1, 1, map_side, map_side)


def test_probability_is_the_average_over_the_map():
    logits = torch.tensor([[[[0.0, 2.0], [-1.0, 5.0]]]])
    mean = logits.sigmoid().mean()
    torch.testing.assert_close(log_probability(logits, real=True)[0], mean.log())
    torch.testing.assert_close(log_probability(logits, real=False)[0], (1 - mean).log())


def test_probability_stays_finite_where_the_discriminator_is_sure():
    logits = torch.full((1, 1, 3, 3), -200.0)
    assert float(log_probability(logits, real=True)) == pytest.approx(-200.0, rel=1e-5)


def test_undecided_discriminator_costs_log_two_per_image():
    undecided = torch.zeros(2, 1, 4, 4)
    assert float(discriminator_loss(undecided, undecided)) == pytest.approx(2 * log(2))
    assert float(adversarial_loss(undecided)) == pytest.approx(log(2))


def test_cycle_loss_adds_the_mean_absolute_errors_of_both_ways():
    s = torch.tensor([[0.0, 1.0]])
    t = torch.tensor([[2.0, 4.0]])
    loss = cycle_loss(s, s + torch.tensor([[0.5, -1.5]]), t, t - 3.0)
    assert float(loss) == pytest.approx(1.0 + 3.0)


def test_content_loss_is_the_mean_squared_distance_of_standardised_features():
    """One difference filter as features, by hand."""
    features = nn.Conv2d(1, 1, (1, 2), bias=False)
    features.weight.data = torch.tensor([[[[-1.0, 1.0]]]])
    wanted = torch.tensor([[[[0.0, 1.0, 3.0]]]])
    made = torch.tensor([[[[0.0, 2.0, 2.0]]]])
    spread = wanted.std()
    # Differences 1, 2 against 2, 0, in units of the wanted image's deviation.
    expected = ((1 - 2) ** 2 + (2 - 0) ** 2) / 2 / spread**2
    torch.testing.assert_close(content_loss(features, wanted, made), expected)


def test_content_loss_does_not_depend_on_gain_and_offset():
    features = classifier_features(DELPNET, 2)
    wanted, made = torch.rand(2, 2, 1, 48, 48)
    once = content_loss(features, wanted, made)
    again = content_loss(features, 7 * wanted - 3, 7 * made - 3)
    torch.testing.assert_close(once, again, rtol=1e-3, atol=0)


def test_classifier_features_are_what_its_engine_computes(tmp_path):
    """All seven convolutions plus the engine's own head give the engine's logits."""
    import onnx
    import onnxruntime

    from rtfocus.training.onnx_forms import float_weights

    features = classifier_features(DELPNET, 7)
    assert not any(p.requires_grad for p in features.parameters())
    graph = onnx.load(str(DELPNET)).graph
    values = float_weights(graph)
    head = [node for node in graph.node if node.op_type == "Conv"][7]
    tiles = torch.rand(1, 1, 96, 96)
    pooled = functional.max_pool2d(features(tiles), 4, stride=2)
    weight, offset = (values[name] for name in head.input[1:])
    logits = functional.conv2d(pooled, weight, offset)
    session = onnxruntime.InferenceSession(str(DELPNET))
    expected = session.run(None, {"tiles": tiles.numpy()})[0]
    torch.testing.assert_close(logits, torch.from_numpy(expected), rtol=1e-3, atol=1e-3)


def test_missing_classifier_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"name the model\.fp32\.onnx"):
        classifier_features(tmp_path / "none.onnx", 2)


def test_too_many_layers_are_refused():
    with pytest.raises(ConfigError, match="lower 'layers'"):
        classifier_features(DELPNET, 20)


def test_vgg19_takes_a_weight_file_of_torchvisions_names(tmp_path: Path):
    whole = Vgg19Features(4)
    path = tmp_path / "vgg19.pth"
    torch.save({**whole.state_dict(), "classifier.0.weight": torch.zeros(1)}, path)
    loaded = vgg19_features(path, 3)
    # Two convolutions, a pool, the third: places 0, 2 and 5 of torchvision's list.
    assert set(loaded.state_dict()) == {
        f"features.{place}.{kind}" for place in (0, 2, 5) for kind in ("weight", "bias")
    }
    assert loaded(torch.zeros(1, 1, 32, 32)).shape == (1, 128, 16, 16)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_vgg19_has_sixteen_convolutions():
    convolutions = [m for m in Vgg19Features(16).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 16
    assert convolutions[-1].out_channels == 512


def test_wrong_vgg19_file_says_what_to_do(tmp_path: Path):
    path = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="use the defocus classifier"):
        vgg19_features(path, 3)


@pytest.mark.parametrize("upsampling", ["resize", "transposed"])
def test_generator_overfits_one_blurred_batch(upsampling):
    sharp = functional.avg_pool2d(torch.rand(4, 1, 26, 26), 3, stride=1)
    blurred = functional.avg_pool2d(sharp, 5, stride=1, padding=2)
    network = Generator(width=8, residual_blocks=2, upsampling=upsampling)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    start = float(functional.mse_loss(blurred, sharp))
    for _ in range(300):
        loss = functional.mse_loss(network(blurred), sharp)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < start / 2
