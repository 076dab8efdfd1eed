"""ONNX file: what a network says of itself, read off the file's own fields.

The ``onnx`` package is not needed to run an engine, nor to look at one. An ONNX file
is a protobuf message; the numbers below are those of its fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rtfocus.errors import EngineError

_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_FUNCTIONS = 7, 8, 25
_GRAPH_NODES, _GRAPH_WEIGHTS, _GRAPH_SPARSE = 1, 5, 15
_GRAPH_INPUTS, _GRAPH_OUTPUTS = 11, 12
_NODE_ATTRIBUTES, _FUNCTION_NODES = 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_TENSOR_NAME, _TENSOR_PLACE = 8, 14
_ELSEWHERE = 1
_MOST_NESTED = 50
_TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
}


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """An input or output of a network."""

    name: str
    dtype: str
    """NumPy's name of the element type; ``unknown`` for those it has none for."""
    shape: tuple[int | None, ...]
    """None: any length."""


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """What the file holds, as far as it concerns whoever runs it."""

    opset: int
    """Version of the standard operators."""
    inputs: tuple[OnnxTensor, ...]
    """Without those that the file itself gives a value."""
    outputs: tuple[OnnxTensor, ...]
    is_whole: bool
    """False: weights lie in other files, by a path that may lead anywhere."""


def read_onnx(model: bytes) -> OnnxFile:
    """Read what an ONNX file says of itself.

    Raises
    ------
    EngineError
        If it is no ONNX file, or is damaged.
    """
    message = memoryview(model)
    graphs = list(_messages(message, _MODEL_GRAPH))
    if len(graphs) != 1:
        msg = "the ONNX file holds no network; export it again"
        raise EngineError(msg)
    (graph,) = graphs
    given = {_text(weight, _TENSOR_NAME) for weight in _messages(graph, _GRAPH_WEIGHTS)}
    inputs = map(_tensor, _messages(graph, _GRAPH_INPUTS))
    functions = _messages(message, _MODEL_FUNCTIONS)
    return OnnxFile(
        opset=opset_of(model),
        inputs=tuple(tensor for tensor in inputs if tensor.name not in given),
        outputs=tuple(map(_tensor, _messages(graph, _GRAPH_OUTPUTS))),
        is_whole=_graph_is_whole(graph, 0)
        and all(_nodes_are_whole(f, _FUNCTION_NODES, 0) for f in functions),
    )


def opset_of(model: bytes) -> int:
    """Return the version of the standard operators that an ONNX file uses.

    Raises
    ------
    EngineError
        If the file does not say.
    """
    for value in _messages(memoryview(model), _MODEL_OPSETS):
        opset = dict(_fields(value))
        version = opset.get(2)
        if not opset.get(1) and isinstance(version, int):
            return version
    msg = "the ONNX file names no version of its operators; export the network again"
    raise EngineError(msg)


def _tensor(message: memoryview) -> OnnxTensor:
    """Read a ``ValueInfoProto``."""
    dtype = "unknown"
    shape: tuple[int | None, ...] = ()
    for kind in _messages(message, 2):
        for tensor in _messages(kind, 1):
            number = dict(_fields(tensor)).get(1)
            if isinstance(number, int):
                dtype = _TYPES.get(number, dtype)
            shape = tuple(
                _length(dim)
                for part in _messages(tensor, 2)
                for dim in _messages(part, 1)
            )
    return OnnxTensor(_text(message, 1), dtype, shape)


def _length(dimension: memoryview) -> int | None:
    value = dict(_fields(dimension)).get(1)
    return value if isinstance(value, int) and value > 0 else None


def _graph_is_whole(graph: memoryview, depth: int) -> bool:
    sparse = [
        tensor
        for weight in _messages(graph, _GRAPH_SPARSE)
        for tensor in _parts_of_sparse(weight)
    ]
    weights = [*_messages(graph, _GRAPH_WEIGHTS), *sparse]
    return all(map(_lies_here, weights)) and _nodes_are_whole(
        graph, _GRAPH_NODES, depth
    )


def _nodes_are_whole(message: memoryview, field: int, depth: int) -> bool:
    if depth > _MOST_NESTED:
        msg = "the ONNX file is nested too deeply to be meant; export it again"
        raise EngineError(msg)
    return all(
        _attribute_is_whole(attribute, depth)
        for node in _messages(message, field)
        for attribute in _messages(node, _NODE_ATTRIBUTES)
    )


def _attribute_is_whole(attribute: memoryview, depth: int) -> bool:
    sparse = [
        tensor
        for weight in _messages(attribute, *_ATTRIBUTE_SPARSE)
        for tensor in _parts_of_sparse(weight)
    ]
    tensors = [*_messages(attribute, *_ATTRIBUTE_TENSORS), *sparse]
    return all(map(_lies_here, tensors)) and all(
        _graph_is_whole(graph, depth + 1)
        for graph in _messages(attribute, *_ATTRIBUTE_GRAPHS)
    )


def _parts_of_sparse(message: memoryview) -> Iterator[memoryview]:
    """Yield values and indices of a ``SparseTensorProto``."""
    return _messages(message, 1, 2)


def _lies_here(tensor: memoryview) -> bool:
    return (_TENSOR_PLACE, _ELSEWHERE) not in _fields(tensor)


def _messages(message: memoryview, *numbers: int) -> Iterator[memoryview]:
    """Yield the values of the fields of some numbers that are messages."""
    for number, value in _fields(message):
        if number in numbers and isinstance(value, memoryview):
            yield value


def _text(message: memoryview, number: int) -> str:
    found = [bytes(value) for value in _messages(message, number)]
    return found[-1].decode("utf-8", errors="replace") if found else ""


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of the fields of a protobuf message."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            msg = "the ONNX file is damaged: no protobuf message; export it again"
            raise EngineError(msg)
        length = {1: 8, 5: 4}.get(kind)
        if length is None:
            length, place = _varint(message, place)
        if place + length > len(message):
            msg = "the ONNX file ends in the middle; get it again"
            raise EngineError(msg)
        yield key >> 3, message[place : place + length]
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7
    msg = "the ONNX file ends in the middle; get it again"
    raise EngineError(msg)
