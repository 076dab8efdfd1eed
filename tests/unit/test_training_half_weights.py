"""Half weights: half the file, the same engine up to the rounding."""

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

from rtfocus.training.networks.comi_networks import Generator
from rtfocus.training.onnx_forms import halve_weights, write_onnx
from rtfocus.training.task import frames_graph


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Bytes of a network's file; torch takes seconds to export one."""
    torch.manual_seed(0)
    network = Generator(width=8, residual_blocks=2)
    nn.init.normal_(network.output.weight, std=0.02)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    write_onnx(frames_graph(network, (64, 96), ("restored",)), path)
    return path.read_bytes()


def test_stored_weights_are_halved_and_the_result_stays(exported, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(exported)
    tiles = np.random.default_rng(0).random((2, 1, 48, 64)).astype(np.float32)
    before = onnxruntime.InferenceSession(str(path)).run(None, {"tiles": tiles})[0]
    whole = path.stat().st_size
    halve_weights(path)
    assert path.stat().st_size < 0.6 * whole
    after = onnxruntime.InferenceSession(str(path)).run(None, {"tiles": tiles})[0]
    assert after.dtype == np.float32
    change = np.abs(after - before).max()
    assert 0 < change < 2e-3 * np.abs(before - tiles).max()
    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", exact)
    np.testing.assert_allclose(compiled({"tiles": tiles})["restored"], after, atol=1e-4)


def test_halving_twice_changes_nothing(exported, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(exported)
    halve_weights(path)
    once = path.read_bytes()
    halve_weights(path)
    assert onnx.load_from_string(once) == onnx.load(str(path))
