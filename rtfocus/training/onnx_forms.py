"""ONNX forms: a network as a file, and in smaller numbers: 16 bits, 8 bits.

An ONNX file takes any number and size of frames and holds its weights itself.

*Half network*: convolutions and products, all the cost, compute in 16 bits; what adds
up many values or divides by small ones stays in 32, inputs and outputs too. GPUs run
it several times faster, and cards of compute capability 7.5 multiply matrices in no
other form. *Half weights*: large weights are stored in 16 bits and cast back to float32
before they are used, which runtimes do once, while loading.

*int8*: every convolution gets a quantise and a dequantise node before it (Q/DQ), ranges
measured on training data, weights in one scale per output channel, features in one
scale per tensor, zero in the middle: what TensorRT, OpenVINO and ONNX Runtime all read.
A range holds all features but one in ten thousand: the largest are up to ten times as
large, and steps that reach them are too coarse for the rest. The first convolution and
the last before each output stay in float: there the image itself, or the evidence for a
label, would be rounded to 256 steps. A network may ask for more to stay so.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from rtfocus.errors import EngineError
from rtfocus.training.task import Graph, Task

Inputs = Mapping[str, NDArray[np.float32]]
"""A network's inputs by name."""


@contextmanager
def _errors_only(logger: logging.Logger) -> Iterator[None]:
    """Let a logger tell nothing but errors."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# Biases and shapes stay as they are: they are small, and a bias may be large.
_LEAST_VALUES = 256


def halve_weights(path: Path) -> None:
    """Store the large float32 weights of an ONNX file as float16, in place."""
    model = onnx.load(str(path))
    graph = model.graph
    kept, casts = [], []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _LEAST_VALUES:
            kept.append(weight)
            continue
        half = f"{weight.name}_half"
        kept.append(numpy_helper.from_array(values.astype(np.float16), half))
        casts.append(
            helper.make_node("Cast", [half], [weight.name], to=TensorProto.FLOAT)
        )
    del graph.initializer[:]
    graph.initializer.extend(kept)
    # Casts come first: nodes of a graph stand in the order they run.
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def float_weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Return the weights of a graph by name in float32, however they are stored."""
    # Weights stored in 16 bits pass through a cast that has the weight's own name.
    names = {n.input[0]: n.output[0] for n in graph.node if n.op_type == "Cast"}
    return {
        names.get(weight.name, weight.name): torch.tensor(
            numpy_helper.to_array(weight)
        ).float()
        for weight in graph.initializer
    }


# Sums over whole tiles, roots and exponentials leave the range of 16 bits; Resize
# wants its scales in float32.
_SENSITIVE = frozenset(
    {
        "Exp",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "Log",
        "LogSoftmax",
        "Pow",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
        "Resize",
        "Softmax",
        "Sqrt",
    }
)
_SMALLEST = 6e-8
"""Least value above 0 that 16 bits tell from 0."""
_LARGEST = 65504.0


def write_half_network(source: Path, path: Path) -> None:
    """Write the fp16 form of a float32 network.

    Parameters
    ----------
    source
        ONNX file of a network without branches or loops.
    path
        File to write; same tensor names, shapes and float32 inputs and outputs.

    Raises
    ------
    EngineError
        If the network has branches or loops; names the node.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(str(source)))
    graph = model.graph
    types = _tensor_types(graph)
    outputs = {value.name for value in graph.output}
    # What sensitive nodes alone read, such as scales, stays as it is.
    single = _read_in_single(graph)
    weights = [t if t.name in single else _halve(t) for t in graph.initializer]
    nodes = [
        _cast(value.name, f"{value.name}__half", half=True)
        for value in graph.input
        if types[value.name] == TensorProto.FLOAT
    ]
    wide = {name: name for name in single}
    entering = {node.input[0]: node.output[0] for node in nodes}
    for node in graph.node:
        _rename(node, entering, outputs, types)
        nodes.extend(_convert(node, types, wide))
    nodes.extend(
        _cast(f"{name}__half", name, half=False)
        for name in sorted(outputs)
        if types[name] == TensorProto.FLOAT
    )
    del graph.initializer[:], graph.node[:], graph.value_info[:]
    graph.initializer.extend(weights)
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def _tensor_types(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the element type of every tensor by name."""
    types = {tensor.name: int(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = int(value.type.tensor_type.elem_type)
    for node in graph.node:
        if any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute):
            msg = (
                f"node '{node.name}' ({node.op_type}) branches; only networks without "
                "branches and loops have an fp16 form: export it as fp32"
            )
            raise EngineError(msg)
    return types


def _read_in_single(graph: onnx.GraphProto) -> set[str]:
    """Return the float32 weights that no node reads in 16 bits."""
    stored = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    halved = {
        name
        for node in graph.node
        if node.op_type not in _SENSITIVE
        for name in node.input
    }
    return stored - halved


def _rename(
    node: onnx.NodeProto,
    entering: dict[str, str],
    outputs: Iterable[str],
    types: dict[str, int],
) -> None:
    """Let a node read and write the half forms of the network's own tensors."""
    leaving = {n: f"{n}__half" for n in outputs if types[n] == TensorProto.FLOAT}
    names = {**leaving, **entering}
    for name, half in names.items():
        types[half] = types[name]
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]


def _convert(
    node: onnx.NodeProto, types: dict[str, int], wide: dict[str, str]
) -> Iterator[onnx.NodeProto]:
    """Yield what a node becomes: itself in 16 bits, or itself between two casts.

    `wide` holds the float32 form of tensors by name: sensitive nodes that follow one
    another hand it on, for a sum that is rooted next need not fit in 16 bits.
    """
    _halve_attributes(node)
    if node.op_type not in _SENSITIVE:
        yield node
        return
    for place, name in enumerate(node.input):
        if types.get(name) != TensorProto.FLOAT:
            continue
        if name not in wide:
            wide[name] = f"{name}__single"
            yield _cast(name, wide[name], half=False)
        node.input[place] = wide[name]
    returned = [n for n in node.output if types.get(n) == TensorProto.FLOAT]
    wide.update({name: f"{name}__single" for name in returned})
    node.output[:] = [wide.get(name, name) for name in node.output]
    yield node
    for name in returned:
        yield _cast(wide[name], name, half=True)


def _halve_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to":
            if attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
        elif attribute.type == onnx.AttributeProto.TENSOR:
            attribute.t.CopyFrom(_halve(attribute.t))


def _halve(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return a tensor in 16 bits if it is float32, else itself."""
    if tensor.data_type != TensorProto.FLOAT:
        return tensor
    return numpy_helper.from_array(_to_half(numpy_helper.to_array(tensor)), tensor.name)


def _to_half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Round to 16 bits; what is not 0 stays so, what is too large stays finite."""
    clipped = np.clip(values, -_LARGEST, _LARGEST)
    tiny = (clipped != 0) & (np.abs(clipped) < _SMALLEST)
    return np.where(tiny, np.copysign(_SMALLEST, clipped), clipped).astype(np.float16)


def _cast(source: str, target: str, *, half: bool) -> onnx.NodeProto:
    to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)


_CONVOLUTION = "Conv"
_IN_RANGE_PERCENT = 99.99


def quantise(
    source: Path,
    target: Path,
    batches: Iterable[Inputs],
    inner: Sequence[str],
) -> Path:
    """Write the int8 form of a float32 ONNX file.

    Parameters
    ----------
    source
        Weights in float32, stored as such.
    target
        File to write.
    batches
        Inputs by tensor name, as the network meets them; a few dozen patches.
    inner
        Names of the convolutions that become int8, see `inner_convolutions`.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    EngineError
        If no convolution becomes int8.
    """
    # Slow to import, and only exports need it.
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    if not inner:
        msg = (
            f"'{source}' has no convolution between its ends; export it as fp32 or fp16"
        )
        raise EngineError(msg)
    # It recommends pre-processing, which the exporter of torch has done.
    with _errors_only(logging.getLogger()):
        quantize_static(
            source,
            target,
            _Calibration(iter(_of_one_shape([*batches]))),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=[_CONVOLUTION],
            nodes_to_quantize=[*inner],
            calibrate_method=CalibrationMethod.Percentile,
            # TensorRT knows neither zero points nor quantised biases.
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "CalibPercentile": _IN_RANGE_PERCENT,
            },
        )
    return target


def inner_convolutions(
    path: Path, float_ends: tuple[int, int] = (1, 1), exact_output: str | None = None
) -> list[str]:
    """Return the names of all convolutions that int8 may take.

    The first and the last ones are not among them. A last one is any that reaches an
    output without another convolution: a network with two outputs has two of them.

    Parameters
    ----------
    path
        ONNX file.
    float_ends
        How many of the first and of the last convolutions, in the order of the
        graph, do not count as inner ones.
    exact_output
        Of the convolutions that this output is computed by, only those behind a ReLU
        count: sums with a short cut have larger outliers, and both signs.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    outputs = [value.name for value in graph.output]
    kept = {node.name for node in _convolutions_before(outputs, makers, last=True)}
    for node in _convolutions_before([exact_output or ""], makers):
        maker = makers.get(node.input[0])
        if maker is None or maker.op_type != "Relu":
            kept.add(node.name)
    convolutions = [node.name for node in graph.node if node.op_type == _CONVOLUTION]
    first, final = float_ends
    between = convolutions[first : len(convolutions) - final]
    return [name for name in between if name not in kept]


def _convolutions_before(
    names: Sequence[str], makers: Mapping[str, onnx.NodeProto], *, last: bool = False
) -> Iterator[onnx.NodeProto]:
    """Yield the convolutions that tensors are computed by, or the last of them alone.

    `makers` are the nodes of the graph by what they put out.
    """
    reached: set[str] = set()
    left = [*names]
    while left:
        node = makers.get(left.pop())
        if node is None or node.name in reached:
            continue
        reached.add(node.name)
        if node.op_type == _CONVOLUTION:
            yield node
            if last:
                continue
        left.extend(node.input)


def _of_one_shape(batches: Sequence[Inputs]) -> list[Inputs]:
    """Cut all inputs to the shape of the smallest: histograms are made of one array."""
    shapes = {n: np.min([one[n].shape for one in batches], axis=0) for n in batches[0]}
    return [{n: b[n][tuple(map(slice, shapes[n]))] for n in shapes} for b in batches]


class _Calibration:
    """Hands out batches one by one, as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterator[Inputs]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else dict(batch)


_OPSET = 18


def write_onnx(graph: Graph, path: Path) -> None:
    """Write a graph; EngineError where torch cannot trace it."""
    # Names, not `torch.export.Dim`s: torch would trace a network twice whose sides are
    # multiples of a number, which it finds out.
    shapes = tuple(dict(graph.dynamic.get(name, {})) for name in graph.inputs)
    with _errors_only(logging.getLogger("torch.onnx")), warnings.catch_warnings():
        # The exporter warns about its own libraries' deprecated calls.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=_OPSET,
            verbose=False,
        )
    if program is None:
        msg = (
            f"torch wrote no ONNX program for '{path}'; use torch 2.13 (rtfocus[train])"
        )
        raise EngineError(msg)
    model = program.model_proto
    # Every node carries the exporter's stack trace, with the paths of this machine.
    for part in (model.graph, model, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")
    path.write_bytes(model.SerializeToString())


_CALIBRATION_BATCHES = 8
# What batches call the network's input `tiles`.
_TILES = ("blurred", "crops", "patches")


def calibration_inputs(task: Task[Any], names: tuple[str, ...]) -> Iterator[Inputs]:
    """Make a graph's inputs by name from training batches, always the same ones."""
    for draw in range(1, _CALIBRATION_BATCHES + 1):
        batch = task.batch(0, draw)
        (tiles,) = (entry for entry in _TILES if entry in batch)
        inputs = {name: batch[tiles if name == "tiles" else name] for name in names}
        yield {name: np.asarray(v, dtype=np.float32) for name, v in inputs.items()}
