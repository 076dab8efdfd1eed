"""Tasks of COMI and RRDB: data, steps of several optimisers, export."""

from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage

from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.training.feed import load_checkpoint, save_checkpoint
from rtfocus.training.kernel_pairs import KernelPairs, gaussian_kernels
from rtfocus.training.networks.blind_restorers import (
    KernelsSection,
    RrdbRecipe,
    RrdbSection,
    RrdbTask,
)
from rtfocus.training.networks.comi import ComiTask
from rtfocus.training.networks.comi_networks import ComiRecipe, ComiSection, LossSection
from rtfocus.training.onnx_forms import write_onnx
from rtfocus.training.recipe import (
    OptimiserRecipe,
    PairsRecipe,
    PoolRecipe,
    RealPairsRecipe,
    SourceRecipe,
    load_recipe,
)
from rtfocus.training.trainer import Trainer

CONFIGS = resource_folder("configs")
PAIRS = PairsRecipe(
    reference=OpticalSystem(0.36, 451.0, 0.65),
    patch_px=96,
    batch_patches=2,
    planes=4,
    reference_share=1.0,
    near_share=0.0,
    varying_share=0.0,
)
POOL = PoolRecipe(entries=2, side_px=216, refresh_steps=4)


def comi_recipe(folder: Path, **settings) -> ComiRecipe:
    return ComiRecipe(
        checkpoints=folder,
        pairs=PAIRS,
        pool=POOL,
        comi=ComiSection(
            **{
                "width": 4,
                "residual_blocks": 1,
                "discriminator_width": 4,
                "discriminator_layers": 1,
                **settings,
            }
        ),
        optimiser=OptimiserRecipe(
            steps=4, rate=1e-3, warmup_steps=1, decay="linear", betas=(0.5, 0.99)
        ),
    )


def rrdb_recipe(folder: Path) -> RrdbRecipe:
    return RrdbRecipe(
        checkpoints=folder,
        pairs=PAIRS,
        pool=POOL,
        rrdb=RrdbSection(blocks=1, width=4, phases=2),
        optimiser=OptimiserRecipe(steps=4, rate=1e-3, warmup_steps=1),
    )


@pytest.mark.parametrize(
    "name",
    [
        "rrdb",
        "rrdb_paper",
        "rrdb_fine",
        "comi",
        "comi_short",
        "comi_transposed",
        "comi_unpaired",
        "comi_paper",
    ],
)
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(CONFIGS / f"train_{name}.yaml")
    assert recipe.name == name
    assert recipe.sources[0].validation


def test_shipped_recipe_keeps_the_papers_weights():
    weights = load_recipe(CONFIGS / "train_comi.yaml").comi.weights
    assert (weights.adversarial, weights.content, weights.cycle) == (1, 1, 0.001)


def changed(before: dict, module: torch.nn.Module) -> bool:
    after = module.state_dict()
    return any(not torch.equal(before[name], after[name]) for name in before)


def snapshot(trainer: Trainer) -> dict:
    return {
        name: {k: v.clone() for k, v in module.state_dict().items()}
        for name, module in trainer.task.modules().items()
    }


def test_adversarial_step_trains_all_four_networks(tmp_path):
    trainer = Trainer(comi_recipe(tmp_path))
    before = snapshot(trainer)
    shown = [trainer.train_step() for _ in range(2)]
    for name, module in trainer.task.modules().items():
        assert changed(before[name], module), name
    assert shown[0]["adversarial"] > 0
    assert list(shown[0]) == list(shown[1])


@pytest.mark.parametrize("multiplies", [False, True])
def test_all_steps_round_only_where_the_processor_multiplies_bf16(
    tmp_path, monkeypatch, multiplies
):
    monkeypatch.setattr("rtfocus.training.task.multiplies_bf16", lambda: multiplies)
    trainer = Trainer(comi_recipe(tmp_path, restoring_steps=1))
    made = []
    for network in trainer.task.modules().values():
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(lambda _, __, maps: made.append(maps.dtype))
    for _ in range(2):
        trainer.train_step()
        assert set(made) == {torch.bfloat16 if multiplies else torch.float32}
        made.clear()


def test_restoring_steps_train_the_restoring_generator_alone(tmp_path):
    trainer = Trainer(comi_recipe(tmp_path, restoring_steps=1))
    before = snapshot(trainer)
    first = trainer.train_step()
    moved = {
        name for name, m in trainer.task.modules().items() if changed(before[name], m)
    }
    assert moved == {"network"}
    assert first["judges"] == 0
    second = trainer.train_step()
    assert second["judges"] > 0
    assert list(first) == list(second)


def test_first_loss_is_the_weighted_sum_of_its_terms(tmp_path):
    weights = LossSection(adversarial=2.0, content=3.0, cycle=5.0, pixel=7.0)
    shown = Trainer(comi_recipe(tmp_path, weights=weights)).train_step()
    expected = (
        2 * shown["adversarial"]
        + 3 * shown["content"]
        + 5 * shown["cycle"]
        + 7 * shown["pixel"]
    )
    assert shown["loss"] == pytest.approx(expected, rel=1e-5)


def test_unpaired_training_compares_with_no_truth(tmp_path):
    weights = LossSection(content=0.0, pixel=0.0, cycle=10.0)
    recipe = comi_recipe(tmp_path, paired=False, weights=weights)
    paired = ComiTask(comi_recipe(tmp_path)).batch(0)
    unpaired = ComiTask(recipe).batch(0)
    np.testing.assert_array_equal(unpaired["blurred"], paired["blurred"])
    np.testing.assert_array_equal(unpaired["sharp"][1], paired["sharp"][0])
    shown = Trainer(recipe).train_step()
    assert shown["content"] == shown["pixel"] == 0
    with pytest.raises(ValidationError, match="no image to compare with"):
        comi_recipe(tmp_path, paired=False)


def test_vgg19_without_weights_says_what_is_missing(tmp_path):
    with pytest.raises(ValidationError, match="give 'weights'"):
        comi_recipe(tmp_path, features={"network": "vgg19"})


def test_resumed_adversarial_run_ends_with_the_same_weights(tmp_path):
    """Two steps, a checkpoint, two more: as four steps in one go."""
    recipe = comi_recipe(tmp_path, restoring_steps=1)
    whole = Trainer(recipe)
    for _ in range(4):
        whole.train_step()
    first = Trainer(recipe)
    for _ in range(2):
        first.train_step()
    save_checkpoint(tmp_path / "last.pt", recipe, first.state())
    second = Trainer(recipe)
    second.load_state(load_checkpoint(tmp_path / "last.pt")[1])
    for _ in range(2):
        second.train_step()
    for name, module in whole.task.modules().items():
        resumed = second.task.modules()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, resumed[key]), f"{name}.{key}"


def test_gaussians_are_as_wide_as_they_say():
    kernels = gaussian_kernels((1.0, 25.0), 5)
    for kernel, sigma in zip(kernels, (1, 7, 13, 19, 25), strict=True):
        along = np.arange(kernel.shape[0]) - kernel.shape[0] // 2
        spread = np.sqrt((kernel.sum(axis=0) * along**2).sum())
        # Cut at three deviations, a Gaussian is 1.4 % narrower.
        assert spread == pytest.approx(sigma, rel=0.05)
        assert kernel.sum() == pytest.approx(1, abs=1e-5)


def test_kernel_pairs_are_blurred_by_the_kernel_alone(tmp_path):
    """At many photons the blurred patch is the sharp one, averaged by a box."""
    import tifffile

    rng = np.random.default_rng(0)
    field = (rng.random((200, 200)) * 60_000).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", field)
    recipe = RrdbRecipe(
        data_folder=tmp_path,
        sources=(SourceRecipe(kind="noise", files=["a.tif"]),),
        specimens=None,
        pairs=PAIRS.model_copy(update={"photons": (1e7, 1e7), "batch_patches": 1}),
    )
    box = np.full((3, 3), 1 / 9, np.float32)
    batches = KernelPairs(recipe, [box])
    made, again = batches.batch(3), batches.batch(3)
    np.testing.assert_array_equal(made["blurred"], again["blurred"])
    sharp, blurred = made["sharp"][0, 0], made["blurred"][0, 0]
    views = np.lib.stride_tricks.sliding_window_view(sharp, (3, 3))
    np.testing.assert_allclose(views.mean(axis=(2, 3)), blurred[1:-1, 1:-1], atol=0.02)


def test_pairs_without_a_kernel_are_refused(tmp_path):
    recipe = RrdbRecipe(
        pairs=PAIRS, data_folder=tmp_path, kernels=KernelsSection(family="estimated")
    )
    with pytest.raises(ConfigError, match="0 real pairs give no kernel"):
        RrdbTask(recipe).batch(0)


def test_estimated_kernels_come_from_the_training_pairs(tmp_path):
    """A disc of 13 px, estimated from one pair, blurs the batches."""
    import tifffile

    rng = np.random.default_rng(0)
    sharp = ndimage.gaussian_filter(rng.random((140, 140)), 0.8)
    y, x = np.mgrid[-6:7, -6:7]
    disc = (y**2 + x**2 <= 36) / (y**2 + x**2 <= 36).sum()
    blurred = ndimage.convolve(sharp, disc)
    for folder, image in (("sharp", sharp), ("far", blurred)):
        (tmp_path / folder).mkdir()
        counts = (image * 60_000).astype(np.uint16)
        tifffile.imwrite(tmp_path / folder / "a.tif", counts)
    real = RealPairsRecipe(sharp="sharp/*.tif", blurred="far")
    recipe = RrdbRecipe(
        data_folder=tmp_path,
        sources=(SourceRecipe(kind="noise", files=["sharp/a.tif"]),),
        specimens=None,
        pairs=PAIRS.model_copy(update={"real": (real,), "photons": (1e6, 1e6)}),
        kernels=KernelsSection(family="estimated"),
    )
    made = RrdbTask(recipe).batch(0)
    for blurred_patch, sharp_patch in zip(made["blurred"], made["sharp"], strict=True):
        inner = ndimage.convolve(sharp_patch[0], disc)[8:-8, 8:-8]
        error = np.abs(blurred_patch[0, 8:-8, 8:-8] - inner).mean()
        assert error < 0.1 * inner.std()


@pytest.mark.parametrize("make", [rrdb_recipe, comi_recipe])
def test_exported_graph_agrees_in_torch_onnx_runtime_and_openvino(make, tmp_path):
    trainer = Trainer(make(tmp_path))
    torch.manual_seed(1)
    torch.nn.init.normal_(trainer.average.output.weight, std=0.5)
    trainer.finish_average()
    path = tmp_path / "model.onnx"
    write_onnx(trainer.task.graph(trainer.average), path)
    tiles = np.random.default_rng(0).random((3, 1, 48, 80)).astype(np.float32)
    with torch.no_grad():
        expected = trainer.average(torch.from_numpy(tiles)).numpy()
    assert np.abs(expected - tiles).max() > 0.01
    session = onnxruntime.InferenceSession(str(path))
    np.testing.assert_allclose(
        session.run(["restored"], {"tiles": tiles})[0], expected, atol=1e-4
    )
    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", exact)
    np.testing.assert_allclose(
        compiled({"tiles": tiles})["restored"], expected, atol=1e-4
    )


def test_cards_state_tiles_and_their_overlap(tmp_path):
    rrdb = RrdbTask(rrdb_recipe(tmp_path)).card()["input"]
    # Patches of 64 px, every 32: a halo of 16 on both sides.
    assert (rrdb["tile_px"], rrdb["tile_px"] - 2 * rrdb["halo_px"]) == (64, 32)
    comi = ComiTask(comi_recipe(tmp_path)).card()["input"]
    assert comi["tile_px"] % comi["multiple_px"] == 0


def test_recipe_that_is_its_own_base_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: a.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="its own base"):
        load_recipe(path)
