"""ONNX file: what a network says of itself, read off the file's own fields.

The ``onnx`` package is not needed to run an engine, nor to look at one. An ONNX file
is a protobuf message; the numbers below are those of its fields.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from rtfocus.errors import EngineError

_MODEL, _GRAPH, _NODE, _FUNCTION = "model", "graph", "node", "function"
_ATTRIBUTE, _SPARSE, _TENSOR = "attribute", "sparse", "tensor"
_TRAINING = "training"
_HOLDS = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {
        **{5: _TENSOR, 10: _TENSOR, 22: _SPARSE, 23: _SPARSE},
        **{6: _GRAPH, 11: _GRAPH},
    },
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}
"""By kind of message: its fields in which tensors may lie, and what those are."""
_MODEL_GRAPH, _MODEL_OPSETS = 7, 8
_GRAPH_WEIGHTS, _GRAPH_INPUTS, _GRAPH_OUTPUTS = 5, 11, 12
_TENSOR_NAME, _TENSOR_VALUES, _TENSOR_ENTRIES, _TENSOR_PLACE = 8, 9, 13, 14
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
    return OnnxFile(
        opset=opset_of(model),
        inputs=tuple(tensor for tensor in inputs if tensor.name not in given),
        outputs=tuple(map(_tensor, _messages(graph, _GRAPH_OUTPUTS))),
        is_whole=all(map(_lies_here, _tensors(message, _MODEL))),
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


def _tensors(message: memoryview, kind: str, depth: int = 0) -> Iterator[memoryview]:
    """Yield every tensor that a message holds, however deep."""
    if kind == _TENSOR:
        yield message
        return
    _refuse_depth(depth)
    for number, value in _fields(message):
        inner = _HOLDS[kind].get(number)
        if inner is not None and isinstance(value, memoryview):
            yield from _tensors(value, inner, depth + 1)


def _refuse_depth(depth: int) -> None:
    if depth > _MOST_NESTED:
        msg = "the ONNX file is nested too deeply to be meant; export it again"
        raise EngineError(msg)


def _lies_here(tensor: memoryview) -> bool:
    return (_TENSOR_PLACE, _ELSEWHERE) not in _fields(tensor)


def with_weights_inside(
    model: bytes, read: Callable[[str], bytes], most_bytes: int
) -> bytes:
    """Return an ONNX file that holds the weights which it keeps in other files.

    Parameters
    ----------
    model
        The file; one that is whole is returned as it is.
    read
        Gives what a file holds by the path that the ONNX file says, which may lead
        anywhere: refusing is up to it.
    most_bytes
        What all weights from other files may have.

    Raises
    ------
    EngineError
        What goes on after the model's name, if they are not all there.
    """
    if read_onnx(model).is_whole:
        return model
    return _rewritten(memoryview(model), _MODEL, _Outside(read, most_bytes))


class _Outside:
    """Weights in other files."""

    def __init__(self, read: Callable[[str], bytes], most_bytes: int) -> None:
        self._read = cache(read)
        self._left = most_bytes

    def data(self, tensor: memoryview) -> memoryview:
        """Return the values of a tensor that are not in the ONNX file."""
        said = dict(map(_entry, _messages(tensor, _TENSOR_ENTRIES)))
        name = _text(tensor, _TENSOR_NAME)
        location = said.get("location", "")
        whole = memoryview(self._read(location))
        try:
            start = int(said.get("offset", "0"))
            length = int(said.get("length", str(len(whole) - start)))
        except ValueError as error:
            msg = f"has weights '{name}' at no place of '{location}': {error}"
            raise EngineError(msg) from error
        if min(start, length) < 0 or start + length > len(whole):
            msg = (
                f"has weights '{name}' at bytes {start} to {start + length} of "
                f"'{location}', which has {len(whole)}; get the whole package again"
            )
            raise EngineError(msg)
        self._left -= length
        if self._left < 0:
            msg = "has more weights in other files than can be meant; it is not read"
            raise EngineError(msg)
        return whole[start : start + length]


def _entry(message: memoryview) -> tuple[str, str]:
    return _text(message, 1), _text(message, 2)


def _rewritten(
    message: memoryview, kind: str, outside: _Outside, depth: int = 0
) -> bytes:
    """Return a message in which every tensor holds its values."""
    _refuse_depth(depth)
    if kind == _TENSOR:
        return bytes(message) if _lies_here(message) else _filled(message, outside)
    parts: list[bytes | memoryview] = []
    for number, value, written in _written(message):
        inner = _HOLDS[kind].get(number)
        if inner is None or not isinstance(value, memoryview):
            parts.append(written)
        else:
            new = _rewritten(value, inner, outside, depth + 1)
            parts += _delimited(number, new)
    return b"".join(parts)


def _filled(tensor: memoryview, outside: _Outside) -> bytes:
    """Return a tensor that holds its values itself."""
    rest = [
        written
        for number, _, written in _written(tensor)
        if number not in (_TENSOR_ENTRIES, _TENSOR_PLACE, _TENSOR_VALUES)
    ]
    return b"".join([*rest, *_delimited(_TENSOR_VALUES, outside.data(tensor))])


def _delimited(number: int, value: bytes | memoryview) -> list[bytes | memoryview]:
    return [_as_varint(number << 3 | 2), _as_varint(len(value)), value]


def _as_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


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
    for number, value, _ in _written(message):
        yield number, value


def _written(
    message: memoryview,
) -> Iterator[tuple[int, int | memoryview, memoryview]]:
    """Yield number and value of the fields of a message, and how both are written."""
    place = 0
    while place < len(message):
        begin = place
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield key >> 3, value, message[begin:place]
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
        content = message[place : place + length]
        place += length
        yield key >> 3, content, message[begin:place]


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
