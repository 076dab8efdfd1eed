"""Start: a run goes on from a checkpoint, or from an engine without one."""

import copy
import hashlib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from torch import nn

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.training.feed import engine_folder, read_weights, start_from
from rtfocus.training.layers import (
    fold_batch_norm,
    recalibrate,
    unfold_batch_norm,
)
from rtfocus.training.level_tiles import BlurRecipe, TileOptimiserRecipe
from rtfocus.training.networks.delpnet import DelpNetRecipe, DelpNetTask
from rtfocus.training.networks.wei_classifier import (
    WeiClassifierRecipe,
    WeiClassifierTask,
)
from rtfocus.training.onnx_forms import halve_weights
from rtfocus.training.recipe import PoolRecipe, SignedRecipe, SpecimenRecipe

SHIPPED = Path("engines/delpnet")
OPTICS = OpticalSystem(
    0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.38)
)


def small_task() -> DelpNetTask:
    return DelpNetTask(
        DelpNetRecipe(
            blur=BlurRecipe(reference=OPTICS, reference_share=1.0, near_share=0.0),
            specimens=SpecimenRecipe(kinds=("nuclei",)),
            pool=PoolRecipe(entries=2, side_px=220),
            optimiser=TileOptimiserRecipe(batch_tiles=8),
        )
    )


@pytest.fixture(scope="module")
def started() -> DelpNetTask:
    task = small_task()
    start_from(task, SHIPPED)
    return task


@pytest.fixture
def engine(tmp_path) -> Path:
    """A copy of the shipped engine."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (resource_folder("engines") / "delpnet").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_an_unfolded_engine_computes_what_it_did(started):
    """Weights out of the ONNX file, BatchNorm taken anew over other images."""
    torch.manual_seed(0)
    tiles = torch.randn(2, 1, 144, 192)
    path = resource_folder("engines") / "delpnet" / "model.fp32.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"tiles": tiles.numpy()})
    with torch.no_grad():
        found = started.network.eval()(tiles).numpy()
        folded = fold_batch_norm(started.network)(tiles).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(folded, wanted, atol=2e-3, rtol=1e-3)


def test_training_goes_on_with_what_the_folded_network_computed():
    """On the batch whose statistics were taken, training mode computes the same."""
    torch.manual_seed(1)
    kept = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4),
    )
    recalibrate(kept, [3 * torch.randn(4, 1, 12, 12) + 1])
    folded = fold_batch_norm(kept)
    weights = [
        (layer.weight, layer.bias) for layer in folded if isinstance(layer, nn.Conv2d)
    ]
    layers = nn.Sequential(*(copy.deepcopy(layer) for layer in kept))
    batch = torch.randn(8, 1, 12, 12)
    unfold_batch_norm(layers, weights, [batch])
    with torch.no_grad():
        wanted = folded(batch)
        torch.testing.assert_close(layers(batch), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layers.train()(batch), wanted, atol=1e-4, rtol=1e-3)
    lengths = layers[3].weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((4,), 3**-0.5))


def test_weights_stored_in_16_bits_are_found_by_name(engine):
    plain = read_weights(engine)
    path = engine / "model.fp32.onnx"
    halve_weights(path)
    card = yaml.safe_load((engine / "engine.yaml").read_text(encoding="utf-8"))
    card["sha256"]["fp32"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (engine / "engine.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    halved = read_weights(engine)
    assert halved.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(halved[name], weight, rtol=1e-3, atol=1e-6)


def test_a_shipped_engine_is_found_by_name_and_a_file_is_none(tmp_path):
    found = engine_folder(SHIPPED)
    assert found is not None
    assert found.resolve() == (resource_folder("engines") / "delpnet").resolve()
    assert engine_folder(tmp_path / "last.pt") is None
    assert engine_folder(Path("engines/nothing")) is None


def test_weights_that_are_not_the_cards_are_refused(engine):
    path = engine / "model.fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match=r"have sha256 \w+, the card says"):
        start_from(small_task(), engine)


def test_a_folder_without_card_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.yaml"):
        start_from(small_task(), tmp_path)


def test_an_engine_of_another_network_is_refused(engine_folder):
    with pytest.raises(ConfigError, match="network 'delpnet'"):
        start_from(small_task(), engine_folder / "sharpness")


def test_a_network_whose_exported_form_is_another_says_so():
    """Folded copies would take the weights and be thrown away."""
    signed = SignedRecipe(reference=OPTICS, inner_um=11, farthest_um=22, step_um=2.2)
    task = WeiClassifierTask(WeiClassifierRecipe(signed=signed))
    module = task.graph(task.network).module
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(RuntimeError, match="other weights"):
        task.take_exported(weights)
