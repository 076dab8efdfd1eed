"""Networks run by torch equal ONNX Runtime, operator by operator and as a whole."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from network_kit import (
    CONDITION_ENTRIES,
    quantise,
    relative_l2,
    write_restorer,
    write_with_operator,
)
from onnx import TensorProto, helper, numpy_helper

from rtfocus.engines.registry import list_engines
from rtfocus.errors import EngineError
from rtfocus.runtimes.gpu import Gpu, GpuRequest, ShapeRange
from rtfocus.runtimes.torch_engine import (
    OPERATORS,
    TorchEngine,
    TorchNetwork,
    why_unavailable,
)
from rtfocus.training.onnx_forms import write_half_network

Array = np.ndarray[Any, np.dtype[Any]]
CPU = torch.device("cpu")


def reference(path: Path, inputs: dict[str, Array]) -> list[Array]:
    """Return what ONNX Runtime computes, nothing fused."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    off = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.graph_optimization_level = off
    session = onnxruntime.InferenceSession(str(path), options)
    return [np.asarray(output) for output in session.run(None, inputs)]


def by_torch(path: Path, inputs: dict[str, Array]) -> list[Array]:
    """Return what our network computes, its shapes checked against `meta`."""
    network = TorchNetwork("network", path, CPU)
    given = {name: torch.from_numpy(values) for name, values in inputs.items()}
    outputs = network.run(given)
    shapes = TorchNetwork("network", path, torch.device("meta")).run(
        {name: values.to("meta") for name, values in given.items()}
    )
    for name, output in outputs.items():
        assert output.shape == shapes[name].shape
    return [output.numpy() for output in outputs.values()]


# Operator, shape of the input, attributes, constant inputs after the first.
F = np.float32
RNG = np.random.default_rng(4)


def real(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(F)


def whole(*values: int) -> Array:
    return np.array(values, np.int64)


CASES: list[tuple[str, tuple[int, ...], dict[str, Any], list[Array | None]]] = [
    ("Conv", (2, 4, 9, 8), {"pads": [1, 1, 1, 1]}, [real(6, 4, 3, 3), real(6)]),
    ("Conv", (2, 4, 9, 8), {"strides": [2, 3], "group": 2}, [real(6, 2, 3, 3)]),
    ("Conv", (1, 1, 9, 8), {"pads": [0, 1, 2, 1]}, [real(3, 1, 3, 3)]),
    ("Conv", (1, 1, 9, 8), {"dilations": [2, 2]}, [real(3, 1, 3, 3), real(3)]),
    (
        "ConvTranspose",
        (2, 4, 5, 6),
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        [real(4, 3, 3, 3), real(3)],
    ),
    ("MaxPool", (2, 3, 9, 8), {"kernel_shape": [3, 2], "strides": [2, 2]}, []),
    ("MaxPool", (1, 1, 7, 7), {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, []),
    ("AveragePool", (1, 2, 8, 8), {"kernel_shape": [2, 2], "strides": [2, 2]}, []),
    ("AveragePool", (1, 2, 8, 8), {"kernel_shape": [5, 5], "pads": [2] * 4}, []),
    (
        "AveragePool",
        (1, 2, 8, 8),
        {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
        [],
    ),
    ("GlobalAveragePool", (2, 3, 5, 4), {}, []),
    (
        "Resize",
        (1, 2, 4, 5),
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
        [None, np.array([1, 1, 2, 2], F)],
    ),
    ("Resize", (1, 2, 4, 5), {"mode": "linear"}, [None, np.array([1, 1, 2, 3], F)]),
    ("Resize", (1, 2, 4, 6), {"mode": "linear"}, [None, None, whole(1, 2, 12, 9)]),
    (
        "Resize",
        (1, 2, 4, 5),
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        [None, None, whole(1, 2, 7, 9)],
    ),
    ("InstanceNormalization", (2, 3, 5, 4), {"epsilon": 1e-3}, [real(3), real(3)]),
    ("DepthToSpace", (1, 8, 3, 2), {"blocksize": 2, "mode": "CRD"}, []),
    ("DepthToSpace", (1, 8, 3, 2), {"blocksize": 2, "mode": "DCR"}, []),
    ("Gemm", (3, 4), {"transB": 1, "alpha": 0.5, "beta": 2.0}, [real(5, 4), real(5)]),
    ("Gemm", (4, 3), {"transA": 1}, [real(4, 5)]),
    ("MatMul", (2, 3, 4), {}, [real(4, 5)]),
    ("Add", (2, 3), {}, [real(3)]),
    ("Sub", (2, 3), {}, [real(1)]),
    ("Mul", (2, 3), {}, [real(2, 1)]),
    ("Div", (2, 3), {}, [real(3)]),
    ("Max", (2, 3), {}, [real(3), real(2, 1)]),
    ("Min", (2, 3), {}, [real(3)]),
    ("Clip", (2, 3), {}, [np.array(-0.1, F), np.array(0.2, F)]),
    ("Clip", (2, 3), {}, [None, np.array(0.2, F)]),
    ("Relu", (2, 3), {}, []),
    ("LeakyRelu", (2, 3), {"alpha": 0.2}, []),
    ("Sigmoid", (2, 3), {}, []),
    ("Tanh", (2, 3), {}, []),
    ("Exp", (2, 3), {}, []),
    ("Neg", (2, 3), {}, []),
    ("Abs", (2, 3), {}, []),
    ("Identity", (2, 3), {}, []),
    ("Reciprocal", (2, 3), {}, []),
    ("Softmax", (2, 3, 4), {"axis": 1}, []),
    ("Pow", (2, 3), {}, [np.array(2.0, F)]),
    ("ReduceMean", (2, 3, 4), {"keepdims": 0}, [whole(1, 2)]),
    ("ReduceMean", (2, 3, 4), {}, []),
    ("ReduceSum", (2, 3, 4), {}, [whole(-1)]),
    ("ReduceMax", (2, 3, 4), {}, [whole(0, 2)]),
    ("ReduceSumSquare", (2, 3, 4), {}, [whole(1)]),
    ("Reshape", (2, 3, 4), {}, [whole(0, -1)]),
    ("Flatten", (2, 3, 4), {"axis": 2}, []),
    ("Transpose", (2, 3, 4), {"perm": [2, 0, 1]}, []),
    ("Transpose", (2, 3, 4), {}, []),
    ("Squeeze", (2, 1, 4), {}, [whole(1)]),
    ("Squeeze", (1, 3, 1), {}, []),
    ("Unsqueeze", (2, 3), {}, [whole(0, -1)]),
    ("Expand", (2, 1, 3), {}, [whole(4, 1, 5, 1)]),
    ("Gather", (4, 3), {"axis": 0}, [whole(-1, 2)]),
    ("Gather", (4, 3), {"axis": 1}, [np.array(-1, np.int64)]),
    ("Gather", (4, 3), {"axis": 0}, [np.array([[0, 1], [3, 2]], np.int64)]),
    ("GatherND", (4, 3), {}, [np.array([[0, 1], [3, 2]], np.int64)]),
    ("GatherND", (4, 3), {}, [np.array([[2], [-1]], np.int64)]),
    ("Slice", (5, 6), {}, [whole(1, -4), whole(2**62, -1), whole(0, 1), whole(2, 1)]),
    ("Slice", (5, 6), {}, [whole(1), whole(4)]),
    ("Concat", (2, 3), {"axis": 1}, [real(2, 2)]),
    ("Pad", (1, 1, 3, 4), {}, [whole(0, 0, 1, 2, 0, 0, 3, 0), np.array(0.5, F)]),
]


CHAINS: dict[str, tuple[list[onnx.NodeProto], dict[str, Array]]] = {
    "a shape is a factor": (
        [
            helper.make_node("Shape", ["x"], ["sides"], start=1, end=2),
            helper.make_node("Cast", ["sides"], ["factor"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x", "factor"], ["y"]),
        ],
        {},
    ),
    "counted places are picked": (
        [
            helper.make_node("Range", ["first", "end", "step"], ["places"]),
            helper.make_node("Gather", ["x", "places"], ["y"], axis=1),
        ],
        {
            "first": np.array(0, np.int64),
            "end": np.array(3, np.int64),
            "step": np.array(2, np.int64),
        },
    ),
    "a condition chooses": (
        [
            helper.make_node("Greater", ["x", "limit"], ["above"]),
            helper.make_node("Where", ["above", "x", "limit"], ["y"]),
        ],
        {"limit": np.array(0.1, F)},
    ),
    "what is less or equal": (
        [
            helper.make_node("Less", ["x", "limit"], ["below"]),
            helper.make_node("Where", ["below", "x", "limit"], ["kept"]),
            helper.make_node("Equal", ["kept", "limit"], ["cut"]),
            helper.make_node("Cast", ["cut"], ["y"], to=TensorProto.FLOAT),
        ],
        {"limit": np.array(0.1, F)},
    ),
    "parts of unequal length": (
        [
            helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2),
            helper.make_node("Split", ["x", "sides"], ["c", "d"], axis=1),
            helper.make_node("Concat", ["b", "a", "d", "c"], ["y"], axis=1),
        ],
        {"sides": whole(1, 2)},
    ),
    "steps of one size": (
        [
            helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["steps"]),
            helper.make_node("DequantizeLinear", ["steps", "step", "zero"], ["y"]),
        ],
        {"step": np.array(0.01, F), "zero": np.array(0, np.int8)},
    ),
    "steps of a size per channel": (
        [
            helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"], axis=1),
            helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"], axis=1),
        ],
        {"step": np.array([0.01, 0.1, 0.02], F), "zero": np.array([3, 0, 9], np.uint8)},
    ),
    "roots and logarithms": (
        [
            helper.make_node("Abs", ["x"], ["size"]),
            helper.make_node("Sqrt", ["size"], ["root"]),
            helper.make_node("Log", ["root"], ["y"]),
        ],
        {},
    ),
    "a constant within": (
        [
            helper.make_node(
                "Constant", [], ["two"], value=numpy_helper.from_array(np.array(2, F))
            ),
            helper.make_node("Mul", ["x", "two"], ["y"]),
        ],
        {},
    ),
}


CHAINS |= {
    f"a constant of {kind}": (
        [
            helper.make_node("Constant", [], ["number"], **{kind: number}),
            helper.make_node("Cast", ["number"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x", "real"], ["y"]),
        ],
        {},
    )
    for kind, number in {
        "value_float": 0.3,
        "value_floats": [0.3, 2.0, -1.0, 4.0],
        "value_int": 3,
        "value_ints": [1, 2, 3, 4],
    }.items()
}


def write(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, Array]) -> Path:
    """Write a network from `x` to `y`."""
    graph = helper.make_graph(
        nodes,
        "nodes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("operator", "shape", "attributes", "others"),
    CASES,
    ids=[f"{case[0]}-{place}" for place, case in enumerate(CASES)],
)
def test_an_operator_equals_the_reference(
    tmp_path: Path,
    operator: str,
    shape: tuple[int, ...],
    attributes: dict[str, Any],
    others: list[Array | None],
) -> None:
    names = ["" if other is None else f"c{i}" for i, other in enumerate(others)]
    node = helper.make_node(operator, ["x", *names], ["y"], **attributes)
    given = {n: o for n, o in zip(names, others, strict=True) if o is not None}
    path = write(tmp_path / "one.onnx", [node], given)
    inputs = {"x": np.random.default_rng(8).standard_normal(shape).astype(F)}
    for found, wanted in zip(
        by_torch(path, inputs), reference(path, inputs), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_equals_the_reference(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "chain.onnx", *CHAINS[name])
    inputs = {"x": np.random.default_rng(8).standard_normal((2, 3, 4)).astype(F)}
    (found,), (wanted,) = by_torch(path, inputs), reference(path, inputs)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_no_operator_goes_untested() -> None:
    chained = {node.op_type for nodes, _ in CHAINS.values() for node in nodes}
    assert {case[0] for case in CASES} | chained - {"Constant"} == set(OPERATORS)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_restorer_equals_the_reference(tmp_path: Path, precision: str) -> None:
    path = source = write_restorer(tmp_path / "model.onnx")
    if precision == "fp16":
        path = tmp_path / "half.onnx"
        write_half_network(source, path)
    elif precision == "int8":
        path = quantise(source, tmp_path / "int8.onnx")
    rng = np.random.default_rng(1)
    inputs: dict[str, Array] = {
        "tiles": rng.random((2, 1, 32, 48), F),
        "condition": rng.random((2, CONDITION_ENTRIES), F),
    }
    (found,), (wanted,) = by_torch(path, inputs), reference(path, inputs)
    # A rounding that falls the other way is one step of 16 or 8 bits.
    limit = {"fp32": 1e-6, "fp16": 2e-3, "int8": 2e-2}[precision]
    assert relative_l2(found, wanted) < limit


@pytest.mark.parametrize(
    ("model", "channels", "entries"),
    [
        (
            found.folder / found.card.files["fp32"],
            found.card.input.channels,
            0 if found.card.condition is None else len(found.card.condition.entries),
        )
        for found in list_engines()
        if found.card.is_network and found.card.input is not None
    ],
    ids=lambda value: value.parent.name if isinstance(value, Path) else str(value),
)
def test_a_shipped_network_equals_the_reference(
    model: Path, channels: int, entries: int
) -> None:
    rng = np.random.default_rng(1)
    graph = onnx.load(str(model)).graph
    names = [value.name for value in graph.input]
    # 672 px are a multiple of what every network of ours asks for that takes any size.
    side = graph.input[0].type.tensor_type.shape.dim[2].dim_value or 672
    values = [rng.random((1, channels, side, side), F), rng.random((1, entries), F)]
    inputs = dict(zip(names, values, strict=False))
    found, wanted = by_torch(model, inputs), reference(model, inputs)
    assert len(found) == len(wanted) > 0
    assert max(map(relative_l2, found, wanted)) < 1e-4


def test_an_unknown_operator_is_told_with_its_node(tmp_path: Path) -> None:
    path = write_with_operator(tmp_path / "odd.onnx", "Unique", "rare_values")
    with pytest.raises(EngineError, match=r"node 'rare_values' \(Unique\)"):
        TorchNetwork("odd", path, CPU)


def test_a_constant_that_is_no_number_is_told_with_its_node(tmp_path: Path) -> None:
    word = helper.make_node("Constant", [], ["y"], "word", value_string="text")
    path = write(tmp_path / "word.onnx", [word], {})
    with pytest.raises(EngineError, match=r"node 'word' \(Constant\); use TensorRT"):
        TorchNetwork("network", path, CPU)


def test_a_node_that_fails_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "three"], ["y"], name="sum")
    path = write(tmp_path / "a.onnx", [node], {"three": np.zeros(3, F)})
    with pytest.raises(EngineError, match=r"node 'sum' \(Add\) failed"):
        TorchNetwork("odd", path, CPU).run({"x": torch.zeros(2, 4)})


def test_what_is_no_onnx_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"GIF89a" * 10)
    with pytest.raises(EngineError, match=r"a\.onnx.*cannot be read"):
        TorchNetwork("odd", tmp_path / "a.onnx", CPU)


def test_an_engine_tells_its_tensors_and_shapes(tmp_path: Path) -> None:
    model = write_restorer(tmp_path / "model.onnx")
    tiles = ShapeRange((1, 1, 32, 32), (4, 1, 32, 32), (4, 1, 32, 32))
    request = GpuRequest("restorer", model, "", "fp32", {"tiles": tiles})
    engine = TorchEngine(request, CPU)
    assert {name for name, tensor in engine.tensors.items() if tensor.is_input} == {
        "tiles",
        "condition",
    }
    shapes = {"tiles": (4, 1, 32, 48), "condition": (4, CONDITION_ENTRIES)}
    assert engine.output_shapes(shapes) == {"restored": (4, 1, 32, 48)}
    context = engine.open_context()
    with pytest.raises(EngineError, match="restored"):
        context.bind({"tiles": 1, "condition": 2}, shapes)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.open_context()


def test_a_closed_engine_keeps_no_weights_whoever_holds_a_context(
    tmp_path: Path,
) -> None:
    shapes = ShapeRange((1, 1, 64, 64), (1, 1, 64, 64), (1, 1, 64, 64))
    model = write_restorer(tmp_path / "model.onnx")
    request = GpuRequest("restorer", model, "00", "fp32", {"tiles": shapes})
    engine = TorchEngine(request, CPU)
    context = engine.open_context()
    weights = weakref.ref(engine.network)
    gc.disable()
    try:
        engine.close()
        assert weights() is None
    finally:
        gc.enable()
    with pytest.raises(EngineError, match="'restorer' is closed"):
        context.run()


def test_a_torch_without_cuda_is_told() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    card = Gpu(0, "NVIDIA RTX A4000", (8, 6), 16 << 30)
    for device in (None, card):
        assert "built for the CPU" in str(why_unavailable(device))
