"""Wei's three stages, from recipes to an engine folder that other runtimes agree on."""

import numpy as np
import onnxruntime
import openvino
import pytest
import torch

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.engines.card import read_card, verified_file
from rtfocus.training.commands import export_engine, trained
from rtfocus.training.feed import load_checkpoint
from rtfocus.training.networks.wei_unet import (
    WeiKernelSection,
    WeiStageSection,
    WeiUNetRecipe,
    WeiUNetSection,
)
from rtfocus.training.recipe import OptimiserRecipe, PairsRecipe, PoolRecipe
from rtfocus.training.trainer import Trainer, train

REFERENCE = OpticalSystem(
    0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.38)
)
SIZE_PX = 17


def small_recipe(
    folder, stage, start_from=None, widths=(16, 16, 16), **optimiser
) -> WeiUNetRecipe:
    """Specimens drawn, nothing read: runs anywhere."""
    return WeiUNetRecipe(
        name=f"wei_{stage}",
        checkpoints=folder,
        start_from=start_from,
        pairs=PairsRecipe(
            reference=REFERENCE,
            patch_px=48,
            batch_patches=4,
            planes=3,
            farthest_level=4,
            sharp_share=0,
            varying_share=0,
            photons=(10_000, 20_000),
        ),
        pool=PoolRecipe(entries=2, side_px=128, refresh_steps=2),
        wei_kernel=WeiKernelSection(
            size_px=SIZE_PX, width=8, correlated=3, rebuilt=8, phases=2
        ),
        wei_unet=WeiUNetSection(
            widths=widths, hidden=8, phases=2, residual_output=True
        ),
        stage=WeiStageSection(train=stage),
        optimiser=OptimiserRecipe(**{"warmup_steps": 2, "weight_decay": 0} | optimiser),
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Checkpoints of the three stages of three steps each, in the paper's order.

    Of two scales, each step between scales once: an export takes as long as the
    network has layers.
    """
    folder = tmp_path_factory.mktemp("run")
    found, newest = {}, None
    for stage in ("kernel", "unet", "end_to_end"):
        recipe = small_recipe(folder, stage, newest, (16, 16), steps=3, rate=1e-2)
        found[stage] = newest = train(recipe, device="cpu", show_progress=False)
    return found


@pytest.fixture(scope="module")
def engine(chain, tmp_path_factory):
    """Engine folder of the last stage, weights stored in 16 bits."""
    folder = tmp_path_factory.mktemp("engine")
    export_engine(chain["end_to_end"], folder, half_weights=True)
    return folder


def weights(checkpoint, part) -> dict[str, torch.Tensor]:
    _, state = load_checkpoint(checkpoint)
    return {k: v for k, v in state["average"].items() if k.startswith(part)}


def are_equal(first, second) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_each_stage_trains_its_part_and_goes_on_from_the_one_before(chain):
    for part, kept in (("kernel_net", True), ("unet", False)):
        before, after = weights(chain["kernel"], part), weights(chain["unet"], part)
        assert are_equal(before, after) is kept
    for part in ("kernel_net", "unet"):
        before = weights(chain["unet"], part)
        assert not are_equal(before, weights(chain["end_to_end"], part))


@pytest.mark.parametrize("stage", ["kernel", "unet", "end_to_end"])
def test_each_stage_learns_a_batch_by_heart(tmp_path, stage):
    trainer = Trainer(small_recipe(tmp_path, stage, steps=500, rate=1e-3))
    batch = trainer.task.batch(0)
    trainer.task.batch = lambda step, draw=0: batch
    first = trainer.train_step()
    for _ in range(60):
        last = trainer.train_step()
    assert last["loss"] < 0.8 * first["loss"]


def test_unknown_defocus_is_not_told(tmp_path):
    """Tilted patches have no class, and no PSF that would be true for all of them."""
    recipe = small_recipe(tmp_path, "unet", steps=1)
    varying = recipe.pairs.model_copy(update={"varying_share": 1.0, "planes": 8})
    task = Trainer(recipe.model_copy(update={"pairs": varying})).task
    batch = task.batch(0)
    steep = np.ptp(task.source.batch(0)["levels"], axis=(1, 2)) > 0.5
    assert steep.any()
    assert not batch["condition"][steep].any()
    assert not batch["shown"][steep].any()


@pytest.mark.parametrize("shape", [(1, 48, 48), (3, 96, 64)])
def test_torch_onnx_runtime_and_openvino_agree(chain, engine, shape):
    _, network = trained(*load_checkpoint(chain["end_to_end"]))
    for weight in network.parameters():
        if weight.numel() >= 256:
            weight.data = weight.data.half().float()
    number, height, width = shape
    rng = np.random.default_rng(2)
    tiles = rng.random((number, 1, height, width), dtype=np.float32)
    told = np.array([[3.0, 1], [0, 0], [-1, 1]], np.float32)[:number]
    with torch.no_grad():
        expected = network(torch.from_numpy(tiles), torch.from_numpy(told))
    path = verified_file(engine, read_card(engine))
    given = {"tiles": tiles, "condition": told}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    by_onnx_runtime = session.run(["restored", "kernel"], given)
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    by_openvino = compiled(given)
    for place, wanted in enumerate(expected):
        np.testing.assert_allclose(by_onnx_runtime[place], wanted.numpy(), atol=1e-5)
        np.testing.assert_allclose(by_openvino[place], wanted.numpy(), atol=1e-5)


def test_the_card_names_the_kernel(engine):
    card = read_card(engine)
    assert card.kind == "restorer"
    assert card.kernel_output is not None
    assert card.kernel_output.size_px == SIZE_PX
    assert card.input.multiple_px == 8
    path = verified_file(engine, card)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["tiles", "condition"]
    assert [o.name for o in session.get_outputs()] == ["restored", "kernel"]
