"""Small real networks of the engines' form, written node by node, without torch."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CONDITION_ENTRIES = 5
_WIDTH = 8


def write_restorer(path: Path, *, half: bool = False) -> Path:
    """Write a U-Net of one step whose features a condition scales and shifts.

    Convolutions, resize instead of a transposed convolution, one skip: `tiles`
    (N, 1, H, W) and `condition` (N, 5) to `restored` (N, 1, H, W). With `half` it
    computes in float16 between float32 tensors.
    """
    dtype = np.float16 if half else np.float32
    nodes = [
        helper.make_node("Cast", [name], [f"{name}_in"], to=_onnx_type(dtype))
        for name in ("tiles", "condition")
    ]
    nodes += _restorer_nodes()
    nodes.append(helper.make_node("Cast", ["sum"], ["restored"], to=TensorProto.FLOAT))
    constants = {
        **{name: value.astype(dtype) for name, value in _weights().items()},
        "axes": np.array([2, 3], np.int64),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "restorer",
        [
            float_tensor("tiles", ["n", 1, "height", "width"]),
            float_tensor("condition", ["n", CONDITION_ENTRIES]),
        ],
        [float_tensor("restored", ["n", 1, "height", "width"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return _save(graph, path)


def write_with_operator(path: Path, operator: str, node_name: str) -> Path:
    """Write a network whose only node is an operator, under a name."""
    node = helper.make_node(operator, ["tiles"], ["restored"], name=node_name)
    graph = helper.make_graph(
        [node],
        "odd",
        [float_tensor("tiles", ["n", 1, "height", "width"])],
        [float_tensor("restored", ["n", 1, "height", "width"])],
    )
    return _save(graph, path, check=False)


def quantise(source: Path, path: Path, *, quantise_bias: bool = False) -> Path:
    """Write the int8 form of a restorer, Q/DQ around every convolution."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        source,
        path,
        _Calibration(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
        # TensorRT knows neither zero points nor quantised biases.
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": quantise_bias,
        },
    )
    return path


class _Calibration:
    """Two batches of noise, as ONNX Runtime's calibration asks for them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self._batches = iter(
            {
                "tiles": rng.random((2, 1, 32, 32), np.float32),
                "condition": rng.random((2, CONDITION_ENTRIES), np.float32),
            }
            for _ in range(2)
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)


def _restorer_nodes() -> list[onnx.NodeProto]:
    node = helper.make_node
    same = [1, 1, 1, 1]
    return [
        node("Conv", ["tiles_in", "w1", "b1"], ["e1"], pads=same, name="encode"),
        node("Relu", ["e1"], ["r1"]),
        node(
            "Conv", ["r1", "w2", "b2"], ["e2"], pads=same, strides=[2, 2], name="down"
        ),
        node("Gemm", ["condition_in", "w_film", "b_film"], ["film"], name="film"),
        node("Split", ["film"], ["scale2", "shift2"], axis=1, num_outputs=2),
        node("Unsqueeze", ["scale2", "axes"], ["scale"]),
        node("Unsqueeze", ["shift2", "axes"], ["shift"]),
        node("Mul", ["e2", "scale"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["shifted"]),
        node("Relu", ["shifted"], ["r2"]),
        node(
            "Resize",
            ["r2", "", "scales"],
            ["up"],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        node("Conv", ["up", "w3", "b3"], ["d1"], pads=same, name="decode"),
        node("Concat", ["d1", "r1"], ["both"], axis=1, name="skip"),
        node("Conv", ["both", "w4", "b4"], ["change"], pads=same, name="head"),
        node("Add", ["change", "tiles_in"], ["sum"]),
    ]


def _weights() -> dict[str, NDArray[np.float64]]:
    rng = np.random.default_rng(3)
    wide, wider = _WIDTH, 2 * _WIDTH
    shapes = {
        "w1": (wide, 1, 3, 3),
        "w2": (wider, wide, 3, 3),
        "w3": (wide, wider, 3, 3),
        "w4": (1, wider, 3, 3),
        "w_film": (CONDITION_ENTRIES, 2 * wider),
        "b1": (wide,),
        "b2": (wider,),
        "b3": (wide,),
        "b4": (1,),
        "b_film": (2 * wider,),
    }
    return {
        name: rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        for name, shape in shapes.items()
    }


def _onnx_type(dtype: type) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def float_tensor(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _save(graph: onnx.GraphProto, path: Path, *, check: bool = True) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    if check:
        onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def relative_l2(found: NDArray[np.generic], wanted: NDArray[np.generic]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
