"""Wei's classifier: what the paper fixes, its equations, and its classes."""

import numpy as np
import onnxruntime
import openvino
import pytest
import torch

from bench.signed_classes import held_out_patches, shifted_optics, stain_otherwise
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.optics.psf import compute_psf
from rtfocus.training.layers import (
    ChannelAttention,
    TiledClassifier,
    exchange_channels,
    normalise_channels,
)
from rtfocus.training.networks.wei_classifier import (
    LABELS,
    PATCH_PX,
    WIDTHS,
    SignedPatches,
    WeiClassifier,
    WeiClassifierRecipe,
    WeiClassifierTask,
    WeiSection,
    class_of,
    plane_places_um,
)
from rtfocus.training.onnx_forms import write_onnx
from rtfocus.training.recipe import (
    PatchOptimiserRecipe,
    PoolRecipe,
    SignedRecipe,
    SpecimenRecipe,
)
from rtfocus.training.trainer import Trainer

OPTICS = OpticalSystem(
    0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.38)
)
PAPER = OpticalSystem(
    0.75, 550.0, 0.1725, aberrations=Aberrations(spherical_waves=-0.38)
)


def small_recipe(folder, *, colour: bool = False, **wei) -> WeiClassifierRecipe:
    """Specimens drawn, nothing read: runs anywhere."""
    return WeiClassifierRecipe(
        name="small",
        checkpoints=folder,
        signed=SignedRecipe(
            reference=OPTICS,
            colour=colour,
            step_um=5.5,
            inner_um=11,
            farthest_um=22,
            reference_share=1.0,
        ),
        specimens=SpecimenRecipe(kinds=("nuclei",)),
        pool=PoolRecipe(entries=2, side_px=240, refresh_steps=1000),
        wei=WeiSection(**wei),
        optimiser=PatchOptimiserRecipe(
            steps=60, warmup_steps=5, rate=3e-3, batch_patches=8, weight_decay=0
        ),
    )


def test_features_of_a_patch_are_the_papers_7_by_7_by_128():
    torch.manual_seed(0)
    network = WeiClassifier()
    patches = torch.randn(2, 3, PATCH_PX, PATCH_PX)
    with torch.no_grad():
        features = network.features(patches)
        assert features.shape == (2, 128, 7, 7)
        assert network.fuse(features).shape == (2, 32, 7, 7)
        assert network(patches).shape == (2, 5)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_parameters_are_those_of_the_layers(attention, batch_norm):
    inputs = (3, *WIDTHS[:-1])
    # A gain and a shift per map, or a bias.
    extra = 2 if batch_norm else 1
    count = sum(
        25 * cin * cout + extra * cout for cin, cout in zip(inputs, WIDTHS, strict=True)
    )
    if attention:
        for width, inner in zip(WIDTHS, (4, 4, 8, 16), strict=True):
            count += width * inner + inner + inner * width + width
    count += 128 * 32 + 32 + 32 * 49 * 128 + 128 + 128 * 5 + 5
    network = WeiClassifier(attention=attention, batch_norm=batch_norm)
    assert sum(p.numel() for p in network.parameters()) == count


def test_attention_is_squeeze_excitation_and_scale():
    """Against the equation in NumPy."""
    torch.manual_seed(1)
    attention = ChannelAttention(16)
    features = torch.randn(3, 16, 5, 7)
    w1, b1, w2, b2 = (p.detach().numpy() for p in attention.parameters())
    squeezed = features.numpy().mean(axis=(2, 3))
    hidden = np.maximum(squeezed @ w1.T + b1, 0)
    weights = 1 / (1 + np.exp(-(hidden @ w2.T + b2)))
    wanted = features.numpy() * weights[:, :, None, None]
    found = attention(features).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_normalised_channels_have_mean_0_and_deviation_1():
    torch.manual_seed(2)
    counts = torch.rand(2, 3, 32, 32) * torch.tensor([10.0, 500, 60_000]).view(
        1, 3, 1, 1
    )
    counts = counts + 300
    normalised = normalise_channels(counts)
    torch.testing.assert_close(
        normalised.mean(dim=(2, 3)), torch.zeros(2, 3), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        normalised.std(dim=(2, 3), correction=0), torch.ones(2, 3), atol=1e-4, rtol=0
    )
    assert normalise_channels(torch.full((1, 1, 8, 8), 7.0)).abs().max() == 0


def test_only_channel_normalisation_makes_labels_independent_of_the_camera():
    torch.manual_seed(3)
    patches = torch.rand(2, 1, PATCH_PX, PATCH_PX)
    with torch.no_grad():
        kept = WeiClassifier(channels=1).eval()
        torch.testing.assert_close(
            kept(patches), kept(200 * patches + 40), atol=1e-3, rtol=1e-3
        )
        bare = WeiClassifier(channels=1, channel_normalisation=False).eval()
        assert not torch.allclose(bare(patches), bare(2 * patches), atol=1e-3)


def test_exchange_gives_every_patch_its_own_order_of_colours():
    patches = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 2, 2)
    orders = torch.tensor([[2, 0, 1], [0, 2, 1]])
    exchanged = exchange_channels(patches, orders)
    torch.testing.assert_close(exchanged[0], patches[0, [2, 0, 1]])
    torch.testing.assert_close(exchanged[1], patches[1, [0, 2, 1]])


def test_a_frame_is_labelled_patch_by_patch():
    torch.manual_seed(4)
    network = WeiClassifier(channels=1).eval()
    frame = torch.randn(1, 1, 2 * PATCH_PX + 10, 3 * PATCH_PX)
    with torch.no_grad():
        logits = TiledClassifier(network, PATCH_PX)(frame)
        patch = frame[:, :, PATCH_PX : 2 * PATCH_PX, 2 * PATCH_PX :]
        alone = network(patch)
    assert logits.shape == (1, len(LABELS), 2, 3)
    torch.testing.assert_close(logits[:, :, 1, 2], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("defocus_um", "label"),
    [
        (-10.0, -2),
        (-6.0, -2),
        (-5.5, -1),
        (-0.5, -1),
        (-0.24, 0),
        (0.0, 0),
        (0.24, 0),
        (0.5, 1),
        (11 * 0.5, 1),
        (6.0, 2),
        (10.0, 2),
    ],
)
def test_classes_end_where_the_paper_says(defocus_um, label):
    assert LABELS[class_of(defocus_um, SignedRecipe(reference=PAPER))] == label


def test_planes_are_the_papers_41():
    places = plane_places_um(SignedRecipe(reference=PAPER))
    assert len(places) == 41
    assert (places[0], places[20], places[-1]) == (-10.0, 0.0, 10.0)


def test_the_shifted_objective_still_tells_the_sides_of_focus_apart():
    optics = shifted_optics(OPTICS)
    assert optics.aberrations.spherical_waves < 0
    near, far = (compute_psf(optics, z) for z in (-8.0, 8.0))
    half = min(len(near), len(far)) // 2
    near, far = (p[len(p) // 2 - half :][: 2 * half + 1] for p in (near, far))
    near, far = (p[:, p.shape[1] // 2 - half :][:, : 2 * half + 1] for p in (near, far))
    assert np.abs(near - far).sum() / 2 > 0.1


def test_other_dyes_change_colours_and_leave_glass_white():
    glass = np.ones((4, 4, 3), dtype=np.float32)
    np.testing.assert_allclose(stain_otherwise(glass), glass, atol=1e-6)
    violet = glass * np.array([0.3, 0.2, 0.6], dtype=np.float32)
    changed = stain_otherwise(violet)[0, 0]
    assert np.abs(changed - violet[0, 0]).max() > 0.05


@pytest.mark.parametrize("colour", [False, True])
def test_batches_depend_on_seed_and_number_alone(tmp_path, colour):
    recipe = small_recipe(tmp_path, colour=colour)
    straight = SignedPatches(recipe)
    batches = [straight.batch(step) for step in range(3)]
    again = SignedPatches(recipe).batch(2)
    channels = 3 if colour else 1
    assert batches[2]["patches"].shape == (8, channels, PATCH_PX, PATCH_PX)
    for name, array in again.items():
        np.testing.assert_array_equal(array, batches[2][name])
    assert not np.array_equal(batches[1]["patches"], batches[2]["patches"])


def test_a_scene_smaller_than_a_patch_is_mirrored_at_its_edges(tmp_path):
    recipe = small_recipe(tmp_path)
    pool = recipe.pool.model_copy(update={"side_px": 200})
    made = SignedPatches(recipe.model_copy(update={"pool": pool})).batch(0)
    assert made["patches"].shape == (8, 1, PATCH_PX, PATCH_PX)


def test_test_patches_cover_all_classes_and_leave_out_empty_ones(tmp_path):
    recipe = small_recipe(tmp_path)
    found = [
        p for name in ("same", "shifted") for p in held_out_patches(recipe, name, 1)
    ]
    assert len(found) == 2
    for patches in found:
        assert set(patches.labels) == set(range(len(LABELS)))
        assert len(patches.patches) <= 9
    assert not np.array_equal(found[0].patches[0], found[1].patches[0])


def test_a_network_that_depends_on_the_camera_is_not_exported(tmp_path):
    task = WeiClassifierTask(small_recipe(tmp_path, channel_normalisation=False))
    with pytest.raises(ConfigError, match="channel_normalisation"):
        task.graph(task.network)


def test_two_scenes_are_learnt_by_heart(tmp_path):
    """Five classes by chance are 1.6 nats and a fifth right."""
    trainer = Trainer(small_recipe(tmp_path))
    measured = [trainer.train_step() for _ in range(60)]
    assert np.mean([m["loss"] for m in measured[-10:]]) < 1.3
    assert np.mean([m["accuracy"] for m in measured[-20:]]) > 0.35


def test_an_exported_network_labels_frames_alike_everywhere(tmp_path):
    """torch, ONNX Runtime and OpenVINO, on a size other than the example's."""
    recipe = small_recipe(tmp_path)
    trainer = Trainer(recipe)
    trainer.train_step()
    trainer.finish_average()
    path = tmp_path / "model.onnx"
    write_onnx(trainer.task.graph(trainer.average), path)
    rng = np.random.default_rng(0)
    frames = rng.random((1, 1, 2 * PATCH_PX, PATCH_PX), dtype=np.float32)
    with torch.no_grad():
        wanted = TiledClassifier(trainer.average, PATCH_PX)(
            torch.from_numpy(frames)
        ).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (by_onnxruntime,) = session.run(None, {"tiles": frames})
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    by_openvino = compiled(frames)[0]
    assert wanted.shape == (1, len(LABELS), 2, 1)
    np.testing.assert_allclose(by_onnxruntime, wanted, atol=1e-4)
    np.testing.assert_allclose(by_openvino, wanted, atol=1e-4)
