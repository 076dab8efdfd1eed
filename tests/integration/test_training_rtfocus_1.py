"""rtfocus-1 from its recipe to an engine folder that other runtimes agree on."""

import numpy as np
import onnxruntime
import openvino
import pytest
import torch

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.engines.card import read_card, verified_file
from rtfocus.training.commands import export_engine, trained
from rtfocus.training.feed import load_checkpoint
from rtfocus.training.networks.rtfocus import (
    CONDITION,
    LABELS,
    Rtfocus1Recipe,
    Rtfocus1Section,
)
from rtfocus.training.recipe import OptimiserRecipe, PairsRecipe, PoolRecipe
from rtfocus.training.trainer import Trainer, train

REFERENCE = OpticalSystem(
    0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.38)
)


def small_recipe(folder, **optimiser) -> Rtfocus1Recipe:
    """Specimens drawn, nothing read: runs anywhere."""
    return Rtfocus1Recipe(
        checkpoints=folder,
        pairs=PairsRecipe(
            reference=REFERENCE, patch_px=96, batch_patches=4, planes=3, sharp_share=0
        ),
        pool=PoolRecipe(entries=2, side_px=216, refresh_steps=2),
        rtfocus_1=Rtfocus1Section(
            widths=(8, 16, 16, 16), depths=(1, 1, 1, 1), label_weight=0.02
        ),
        optimiser=OptimiserRecipe(**{"warmup_steps": 2, **optimiser}),
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Checkpoint and engine folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = train(small_recipe(folder, steps=4), device="cpu", show_progress=False)
    export_engine(checkpoint, folder / "engine")
    return checkpoint, folder / "engine"


def test_image_and_labels_can_be_learned_by_heart(tmp_path):
    trainer = Trainer(small_recipe(tmp_path, steps=400, rate=5e-3))
    batch = trainer.task.batch(0)
    trainer.task.batch = lambda step, draw=0: batch
    first = trainer.train_step()
    for _ in range(50):
        last = trainer.train_step()
    assert last["labels"] < 0.5 * first["labels"]
    assert last["image"] < 0.8 * first["image"]
    assert last["gain_db"] > first["gain_db"] + 1


@pytest.mark.parametrize("shape", [(1, 96, 96), (3, 144, 240)])
def test_torch_onnx_runtime_and_openvino_agree(exported, shape):
    checkpoint, engine = exported
    _, network = trained(*load_checkpoint(checkpoint))
    number, height, width = shape
    rng = np.random.default_rng(2)
    tiles = rng.random((number, 1, height, width), dtype=np.float32)
    condition = rng.random((number, len(CONDITION)), dtype=np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(tiles), torch.from_numpy(condition))
    given = {"tiles": tiles, "condition": condition}
    path = engine / "model.fp32.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    by_onnx_runtime = session.run(["logits", "restored"], given)
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    by_openvino = compiled(given)
    for place, wanted in enumerate(expected):
        np.testing.assert_allclose(by_onnx_runtime[place], wanted.numpy(), atol=1e-4)
        np.testing.assert_allclose(by_openvino[place], wanted.numpy(), atol=1e-4)


def test_the_card_and_the_file_agree(exported):
    _, folder = exported
    card = read_card(folder)
    assert card.kind == "joint"
    path = verified_file(folder, card)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == {"tiles", "condition"}
    assert [o.name for o in session.get_outputs()] == ["logits", "restored"]
    assert card.output is not None
    assert tuple(card.output.labels) == LABELS
