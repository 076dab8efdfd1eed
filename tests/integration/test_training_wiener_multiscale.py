"""Learned Wiener and multiscale: from a recipe to an engine that restores."""

from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.engines.card import read_card, verified_file
from rtfocus.files import resource_folder
from rtfocus.training.commands import export_engine, trained
from rtfocus.training.feed import load_checkpoint, save_checkpoint
from rtfocus.training.networks.blind_restorers import (
    MultiScaleRecipe,
    MultiScaleSection,
)
from rtfocus.training.networks.learned_wiener import (
    LearnedWienerRecipe,
    LearnedWienerSection,
)
from rtfocus.training.recipe import (
    OptimiserRecipe,
    PairsRecipe,
    PoolRecipe,
    load_recipe,
)
from rtfocus.training.trainer import Trainer

CONFIGS = resource_folder("configs")
OPTICS = OpticalSystem(0.36, 451.0, 0.65, aberrations=Aberrations(-0.38))


def small(folder: Path, network: str):
    """Specimens drawn, nothing read: runs anywhere."""
    shared = {
        "checkpoints": folder,
        "pairs": PairsRecipe(
            reference=OPTICS,
            patch_px=144,
            batch_patches=2,
            planes=4,
            reference_share=1.0,
            near_share=0.0,
            varying_share=0.0,
        ),
        "pool": PoolRecipe(entries=2, side_px=216, refresh_steps=4),
        "optimiser": OptimiserRecipe(steps=2, rate=1e-2, warmup_steps=1),
    }
    if network == "multiscale":
        size = MultiScaleSection(fine=4, coarse=4, blocks=1)
        return MultiScaleRecipe(multiscale=size, **shared)
    return LearnedWienerRecipe(learned_wiener=LearnedWienerSection(filters=4), **shared)


@pytest.fixture(scope="module", params=["learned_wiener", "multiscale"])
def engine(request, tmp_path_factory):
    """Checkpoint and engine folder of two steps of training."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = Trainer(small(folder, request.param))
    begun = [p.detach().clone() for p in trainer.average.parameters()]
    shown = [trainer.train_step() for _ in range(2)]
    assert all(np.isfinite(list(step.values())).all() for step in shown)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(begun, trainer.average.parameters(), strict=True)
    )
    trainer.finish_average()
    checkpoint = folder / "last.pt"
    save_checkpoint(checkpoint, trainer.recipe, trainer.state())
    export_engine(checkpoint, folder / request.param, half_weights=True)
    return checkpoint, folder / request.param


def test_torch_onnx_runtime_and_openvino_agree(engine):
    checkpoint, folder = engine
    card = read_card(folder)
    _, network = trained(*load_checkpoint(checkpoint))
    rng = np.random.default_rng(4)
    with torch.no_grad():
        for weight in network.parameters():
            # The large weights of the file are rounded to 16 bits; so are these.
            if weight.numel() >= 256:
                weight.copy_(weight.half())
    inputs = {"tiles": rng.random((3, 1, 144, 144), np.float32)}
    if card.condition is not None:
        inputs["condition"] = rng.random((3, len(card.condition.entries)), np.float32)
    with torch.no_grad():
        expected = network(*map(torch.from_numpy, inputs.values())).numpy()
    assert card.output is not None
    path = verified_file(folder, card)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run([card.output.name], inputs)[0]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    np.testing.assert_allclose(compiled(inputs)[0], expected, atol=2e-4)


@pytest.mark.parametrize("name", ["learned_wiener", "multiscale"])
def test_shipped_recipes_keep_the_validation_rows_out(name):
    recipe = load_recipe(CONFIGS / f"train_{name}.yaml")
    assert recipe.name == name
    assert recipe.sources[0].validation == ("a19*", "a2*")
    assert recipe.pairs.real[0].validation == ("a19*", "a2*")


def test_batches_are_told_whole_levels_and_get_their_psf(tmp_path):
    trainer = Trainer(small(tmp_path, "learned_wiener"))
    batch = trainer.task.batch(3)
    levels = batch["condition"][:, 2]
    np.testing.assert_array_equal(levels, np.rint(levels))
    assert (levels != 0).all()
    np.testing.assert_allclose(batch["condition"][:, 0], OPTICS.sampling, rtol=1e-6)
    np.testing.assert_allclose(batch["psf"].sum(axis=(1, 2)), 1, rtol=1e-5)
    again = trainer.task.batch(3)
    np.testing.assert_array_equal(batch["psf"], again["psf"])
