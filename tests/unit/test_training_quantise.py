"""The int8 form of a network, and the files of an export by precision."""

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

from rtfocus.errors import ConfigError, EngineError
from rtfocus.runtimes.cpu_engine import adds_int8_exactly
from rtfocus.training.onnx_forms import inner_convolutions, quantise, write_onnx
from rtfocus.training.recipe import parse_precisions
from rtfocus.training.task import Graph


class Residual(nn.Module):
    """A small restorer: four convolutions beside a short cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 1, 3, padding=1),
        )

    def forward(self, tiles):
        return tiles + self.layers(tiles)


def batches(seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(3):
        yield {"tiles": rng.random((2, 1, 32, 48), np.float32)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same network in float32 and in int8."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("precisions")
    graph = Graph(
        Residual().eval(),
        {"tiles": torch.zeros(2, 1, 32, 48)},
        ("restored",),
        {"tiles": {0: "number", 2: "height", 3: "width"}},
    )
    write_onnx(graph, folder / "model.fp32.onnx")
    quantised(folder / "model.fp32.onnx", folder / "model.int8.onnx", batches())
    return folder


def quantised(source, target, batches):
    return quantise(source, target, batches, inner_convolutions(source))


def run(path, tiles):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    return session.run(["restored"], {"tiles": tiles})[0]


def test_only_inner_convolutions_are_quantised(files):
    graph = onnx.load(files / "model.int8.onnx").graph
    inner = inner_convolutions(files / "model.fp32.onnx")
    assert len(inner) == 2
    makers = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            fed_by = {makers.get(name) for name in node.input[:2]}
            assert (fed_by == {"DequantizeLinear"}) == (node.name in inner)


def test_ranges_are_symmetric_and_weights_have_one_scale_per_channel(files):
    graph = onnx.load(files / "model.int8.onnx").graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    nodes = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    scales = [values[n.input[1]] for n in nodes]
    assert sorted(s.size for s in scales if s.size > 1) == [8, 12]
    for node in nodes:
        assert not values[node.input[2]].any()


@pytest.mark.skipif(
    not adds_int8_exactly(), reason="no VNNI: sums of int8 products are cut off here"
)
def test_int8_stays_close_to_float(files):
    tiles = np.random.default_rng(9).random((3, 1, 64, 80), np.float32)
    exact = run(files / "model.fp32.onnx", tiles)
    rounded = run(files / "model.int8.onnx", tiles)
    # Root mean squares of the rounding error and of what the network changes.
    error, change = (np.sqrt(np.mean(d**2)) for d in (rounded - exact, exact - tiles))
    assert 0 < error < 0.02 * change


def test_onnx_runtime_and_openvino_agree_on_int8(files):
    tiles = np.random.default_rng(9).random((3, 1, 64, 80), np.float32)
    path = files / "model.int8.onnx"
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    expected = run(path, tiles)
    change = np.abs(expected - tiles).max()
    np.testing.assert_allclose(compiled(tiles)[0], expected, atol=0.02 * change)


def test_the_same_data_make_the_same_file(files, tmp_path):
    again = quantised(files / "model.fp32.onnx", tmp_path / "again.onnx", batches())
    assert again.read_bytes() == (files / "model.int8.onnx").read_bytes()


def test_more_convolutions_at_the_ends_may_stay_in_float(files):
    source = files / "model.fp32.onnx"
    names = [n.name for n in onnx.load(source).graph.node if n.op_type == "Conv"]
    assert inner_convolutions(source, (2, 1)) == names[2:-1]
    assert inner_convolutions(source, (1, 2)) == names[1:-2]
    assert inner_convolutions(source, (2, 2)) == []


class Shortened(nn.Module):
    """Two outputs, each by way of a convolution behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.deeper, self.finer = (
            nn.Conv2d(a, 8, 3, padding=1) for a in (1, 8, 8, 8)
        )
        self.label = nn.Conv2d(8, 3, 1)
        self.image = nn.Conv2d(8, 1, 1)

    def forward(self, tiles):
        features = torch.relu(self.first(tiles))
        total = features + self.block(features)
        return self.label(torch.relu(self.deeper(total))), self.image(self.finer(total))


def test_on_the_way_to_an_exact_output_int8_takes_only_what_is_behind_a_relu(tmp_path):
    example = {"tiles": torch.zeros(2, 1, 32, 48)}
    path = tmp_path / "two.onnx"
    write_onnx(Graph(Shortened().eval(), example, ("logits", "restored"), {}), path)
    _, block, deeper, finer = inner_convolutions(path, (0, 1))
    assert inner_convolutions(path) == [block, deeper, finer]
    assert inner_convolutions(path, exact_output="logits") == [block, finer]
    assert inner_convolutions(path, exact_output="restored") == [block, deeper]


def test_a_bright_speck_does_not_make_the_steps_coarse(files, tmp_path):
    def steps(speck):
        tiles = np.random.default_rng(3).random((1, 1, 640, 640), np.float32)
        tiles[0, 0, 5, 7] = speck
        path = quantised(
            files / "model.fp32.onnx", tmp_path / f"{speck}.onnx", [{"tiles": tiles}]
        )
        graph = onnx.load(path).graph
        values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        nodes = [n for n in graph.node if n.op_type == "QuantizeLinear"]
        return [float(values[node.input[1]]) for node in nodes]

    assert max(steps(speck=100)) < 2 * max(steps(speck=1))


def test_batches_may_differ_in_number_and_size(files, tmp_path):
    sizes = [(2, 1, 32, 48), (1, 1, 64, 32), (2, 1, 48, 48)]
    rng = np.random.default_rng(0)
    made = ({"tiles": rng.random(size, np.float32)} for size in sizes)
    path = quantised(files / "model.fp32.onnx", tmp_path / "int8.onnx", made)
    tiles = rng.random((1, 1, 64, 80), np.float32)
    exact = run(files / "model.fp32.onnx", tiles)
    assert np.abs(run(path, tiles) - exact).max() < 0.1 * np.abs(exact - tiles).max()


def test_a_network_without_inner_convolutions_is_refused(tmp_path):
    graph = Graph(
        nn.Conv2d(1, 1, 3, padding=1),
        {"tiles": torch.zeros(2, 1, 32, 48)},
        ("restored",),
        {},
    )
    write_onnx(graph, tmp_path / "one.onnx")
    with pytest.raises(EngineError, match="export it as fp32 or fp16"):
        quantised(tmp_path / "one.onnx", tmp_path / "int8.onnx", batches())


def test_fp32_is_always_written_and_order_does_not_matter():
    assert parse_precisions("int8, fp16") == ("fp32", "fp16", "int8")
    assert parse_precisions("fp32") == ("fp32",)
    with pytest.raises(ConfigError, match="'int4' is unknown; choose of fp32"):
        parse_precisions("fp32,int4")
