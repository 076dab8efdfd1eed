"""The fp16 form of a network: same tensors outside, 16 bits inside, near in value."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from network_kit import CONDITION_ENTRIES, relative_l2, write_restorer
from onnx import TensorProto, helper, numpy_helper

from rtfocus.errors import EngineError
from rtfocus.training.onnx_forms import write_half_network


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the first output of a network."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    return np.asarray(session.run(None, inputs)[0])


def write(path: Path, nodes: list[onnx.NodeProto], **constants: np.ndarray) -> Path:
    """Write a network of `tiles` to `restored`."""
    graph = helper.make_graph(
        nodes,
        "nodes",
        [helper.make_tensor_value_info("tiles", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [helper.make_tensor_value_info("restored", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    path.write_bytes(model.SerializeToString())
    return path


def test_a_restorer_in_16_bits_is_near_and_half_as_large(tmp_path: Path) -> None:
    source = write_restorer(tmp_path / "model.fp32.onnx")
    path = tmp_path / "model.fp16.onnx"
    write_half_network(source, path)
    rng = np.random.default_rng(2)
    inputs = {
        "tiles": rng.random((3, 1, 64, 96), np.float32),
        "condition": rng.random((3, CONDITION_ENTRIES), np.float32),
    }
    wanted, found = run(source, inputs), run(path, inputs)
    assert found.dtype == np.float32
    # Below 1e-6 nothing would have been rounded to 16 bits.
    assert 1e-6 < relative_l2(found, wanted) < 5e-3
    weights = onnx.load(str(path)).graph.initializer
    single = {w.name for w in weights if w.data_type == TensorProto.FLOAT}
    assert single == {"scales"}  # by definition of the operator
    assert path.stat().st_size < 0.75 * source.stat().st_size


def test_sums_over_a_tile_do_not_overflow(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceSumSquare", ["tiles", "axes"], ["power"]),
        helper.make_node("Sqrt", ["power"], ["norm"]),
        helper.make_node("Div", ["tiles", "norm"], ["restored"]),
    ]
    source = write(tmp_path / "a", nodes, axes=np.array([2, 3], np.int64))
    write_half_network(source, tmp_path / "b")
    # 64 x 64 values of 8 squared are 262144; 16 bits end at 65504.
    tiles = np.full((1, 1, 64, 64), 8.0, np.float32)
    found = run(tmp_path / "b", {"tiles": tiles})
    np.testing.assert_allclose(found, run(source, {"tiles": tiles}), rtol=1e-3)


def test_small_divisors_do_not_become_zero(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["tiles", "nothing"], ["zero"]),
        helper.make_node("Add", ["zero", "epsilon"], ["divisor"]),
        helper.make_node("Div", ["zero", "divisor"], ["restored"]),
    ]
    source = write(
        tmp_path / "a",
        nodes,
        nothing=np.zeros(1, np.float32),
        epsilon=np.full(1, 1e-12, np.float32),
    )
    write_half_network(source, tmp_path / "b")
    tiles = np.ones((1, 1, 4, 4), np.float32)
    assert not run(tmp_path / "b", {"tiles": tiles}).any()


def test_values_too_large_stay_finite(tmp_path: Path) -> None:
    nodes = [helper.make_node("Min", ["tiles", "limit"], ["restored"])]
    source = write(tmp_path / "a", nodes, limit=np.full(1, 1e30, np.float32))
    write_half_network(source, tmp_path / "b")
    tiles = np.full((1, 1, 2, 2), 9.0, np.float32)
    assert (run(tmp_path / "b", {"tiles": tiles}) == 9.0).all()


def test_constants_and_casts_within_become_half_too(tmp_path: Path) -> None:
    whole = numpy_helper.from_array(np.array([3], np.int64))
    nodes = [
        helper.make_node("Constant", [], ["three"], value=whole),
        helper.make_node("Cast", ["three"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["tiles", "factor"], ["restored"]),
    ]
    source = write(tmp_path / "a", nodes)
    write_half_network(source, tmp_path / "b")
    tiles = np.full((1, 1, 2, 2), 2.0, np.float32)
    assert (run(tmp_path / "b", {"tiles": tiles}) == 6.0).all()


def test_a_network_with_branches_is_refused_by_name(tmp_path: Path) -> None:
    value = numpy_helper.from_array(np.ones(1, np.float32))
    made = helper.make_tensor_value_info("one", TensorProto.FLOAT, [1])
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["one"], value=value)], "branch", [], [made]
    )
    always = numpy_helper.from_array(np.array(True))
    nodes = [
        helper.make_node("Constant", [], ["always"], value=always),
        helper.make_node(
            "If",
            ["always"],
            ["restored"],
            name="fork",
            then_branch=branch,
            else_branch=branch,
        ),
    ]
    source = write(tmp_path / "a", nodes)
    with pytest.raises(EngineError, match=r"node 'fork' \(If\)"):
        write_half_network(source, tmp_path / "b")
