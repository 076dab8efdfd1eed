"""Torch engine: a network run node by node by torch, on streams of others.

For machines that TensorRT does not serve, and a second opinion on its numbers. This
file and the operators beside it are all outside `rtfocus.training` that knows torch.
Operators of ONNX with windows (convolutions, pooling, resizing, normalisation) stand
here as well.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from rtfocus.engines.card import Precision
from rtfocus.errors import EngineError
from rtfocus.runtimes.gpu import Gpu, GpuRequest, IoTensor, Shape
from rtfocus.runtimes.torch_operators import (
    ARITHMETIC,
    SHAPING,
    Inputs,
    Node,
    Operator,
    given,
    listed,
    needed,
)


def _padded(node: Node, image: Tensor, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """Return the image and the padding left to the operator, equal on both sides.

    ONNX pads each side by itself; what torch cannot is padded beforehand.
    """
    if node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        msg = f"auto_pad {node.get('auto_pad', '')} is not written out"
        raise NotImplementedError(msg)
    pads = node.get("pads", [0, 0, 0, 0])
    begin, end = pads[:2], pads[2:]
    if begin == end:
        return image, begin
    sides = [begin[1], end[1], begin[0], end[0]]
    return functional.pad(image, sides, value=value), [0, 0]


def _convolve(node: Node, inputs: Inputs) -> Tensor:
    image, padding = _padded(node, needed(inputs))
    return functional.conv2d(
        image,
        needed(inputs, 1),
        given(inputs, 2),
        stride=node.get("strides", [1, 1]),
        padding=padding,
        dilation=node.get("dilations", [1, 1]),
        groups=node.get("group", 1),
    )


def _equal_pads(node: Node) -> list[int]:
    """Return the padding of either side; torch takes no two."""
    pads: list[int] = node.get("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:]:
        msg = f"pads {pads} differ between the sides"
        raise NotImplementedError(msg)
    return pads[:2]


def _convolve_transposed(node: Node, inputs: Inputs) -> Tensor:
    return functional.conv_transpose2d(
        needed(inputs),
        needed(inputs, 1),
        given(inputs, 2),
        stride=node.get("strides", [1, 1]),
        padding=_equal_pads(node),
        output_padding=node.get("output_padding", [0, 0]),
        groups=node.get("group", 1),
        dilation=node.get("dilations", [1, 1]),
    )


def _largest(node: Node, inputs: Inputs) -> Tensor:
    image, padding = _padded(node, needed(inputs), value=-torch.inf)
    return functional.max_pool2d(
        image,
        node.get("kernel_shape", []),
        stride=node.get("strides", [1, 1]),
        padding=padding,
        dilation=node.get("dilations", [1, 1]),
        ceil_mode=bool(node.get("ceil_mode")),
    )


def _average(node: Node, inputs: Inputs) -> Tensor:
    return functional.avg_pool2d(
        needed(inputs),
        node.get("kernel_shape", []),
        stride=node.get("strides", [1, 1]),
        padding=_equal_pads(node),
        ceil_mode=bool(node.get("ceil_mode")),
        count_include_pad=bool(node.get("count_include_pad")),
    )


def _resize(node: Node, inputs: Inputs) -> Tensor:
    image = needed(inputs)
    if given(inputs, 3) is not None:
        size = listed(inputs, 3)[-2:]
    else:
        factors = needed(inputs, 2).flatten().tolist()[-2:]
        size = [int(n * f) for n, f in zip(image.shape[-2:], factors, strict=True)]
    mode = node.get("mode", "nearest")
    place = node.get("coordinate_transformation_mode", "half_pixel")
    if (mode, place) == ("nearest", "asymmetric"):
        # As ONNX: the pixel whose corner is nearest below.
        return functional.interpolate(image, size, mode="nearest")
    if mode == "linear" and place in ("half_pixel", "align_corners"):
        return functional.interpolate(
            image, size, mode="bilinear", align_corners=place == "align_corners"
        )
    msg = f"resize mode '{mode}' with coordinates '{place}'"
    raise NotImplementedError(msg)


def _normalise_instance(node: Node, inputs: Inputs) -> Tensor:
    return functional.instance_norm(
        needed(inputs),
        weight=needed(inputs, 1),
        bias=needed(inputs, 2),
        eps=node.get("epsilon", 1e-5),
    )


def _depth_to_space(node: Node, inputs: Inputs) -> Tensor:
    image, side = needed(inputs), node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(image, side)
    number, depth, height, width = image.shape
    blocks = image.reshape(number, side, side, depth // side**2, height, width)
    spread = blocks.permute(0, 3, 4, 1, 5, 2)
    return spread.reshape(number, depth // side**2, height * side, width * side)


OPERATORS: Mapping[str, Operator] = {
    **ARITHMETIC,
    **SHAPING,
    "AveragePool": _average,
    "Conv": _convolve,
    "ConvTranspose": _convolve_transposed,
    "DepthToSpace": _depth_to_space,
    "GlobalAveragePool": lambda _, x: needed(x).mean((2, 3), keepdim=True),
    "InstanceNormalization": _normalise_instance,
    "MaxPool": _largest,
    "Resize": _resize,
}
"""What a network may be made of, by ONNX name."""

_HOST_INPUTS = {"Resize": (1, 2), "Pad": (2,)}
"""Real numbers that say what to do, not what to compute with."""


class TorchNetwork:
    """A network's nodes with its weights on a device.

    Parameters
    ----------
    device
        Where weights lie and nodes run; ``meta`` computes shapes alone.

    Raises
    ------
    EngineError
        If the file cannot be read or has an operator that is not written here.
    """

    def __init__(self, name: str, model: Path, device: torch.device) -> None:
        self.name = name
        self.device = device
        try:
            graph = onnx.load(str(model)).graph
        except Exception as error:  # protobuf's errors share no base class with ours
            msg = (
                f"engine '{name}': '{model}' cannot be read as ONNX: {error}; "
                "export or add the engine again"
            )
            raise EngineError(msg) from error
        self.inputs = [value.name for value in graph.input]
        self.outputs = [value.name for value in graph.output]
        self._read_on_host = {
            proto.input[place]
            for proto in graph.node
            for place in _HOST_INPUTS.get(proto.op_type, ())
            if place < len(proto.input)
        }
        self._constants = {t.name: self._constant(t, t.name) for t in graph.initializer}
        self._nodes: list[Node] = []
        for proto in graph.node:
            self._add(proto)
        self._last_use = _last_uses(self._nodes, self.outputs)

    def _add(self, proto: Any) -> None:
        attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        texts = {n: v.decode() for n, v in attributes.items() if isinstance(v, bytes)}
        attributes |= texts
        if proto.op_type == "Constant" and (stored := _stored(attributes)) is not None:
            self._constants[proto.output[0]] = self._constant(stored, proto.output[0])
            return
        if proto.op_type not in OPERATORS:
            msg = (
                f"engine '{self.name}': torch-cuda does not know the operator of node "
                f"'{proto.name}' ({proto.op_type}); use TensorRT or the CPU"
            )
            raise EngineError(msg)
        inputs, outputs = tuple(proto.input), tuple(proto.output)
        self._nodes.append(Node(proto.op_type, proto.name, inputs, outputs, attributes))

    def _constant(self, stored: Any, name: str) -> Tensor:
        values = torch.from_numpy(numpy_helper.to_array(stored).copy())
        # Axes and sizes stay on the host, where they are read.
        if values.dtype == torch.int64 or name in self._read_on_host:
            return values
        if values.ndim == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        return values.to(self.device)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute every output.

        Parameters
        ----------
        inputs
            Tensors on the network's device by name.

        Raises
        ------
        EngineError
            Names the node that failed, and why.
        """
        values: dict[str, Tensor] = dict(inputs)
        for place, node in enumerate(self._nodes):
            given = [
                values[name] if name in values else self._constants.get(name)
                for name in node.inputs
            ]
            try:
                outputs = OPERATORS[node.operator](node, given)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                msg = (
                    f"engine '{self.name}': node '{node.name}' ({node.operator}) "
                    f"failed in torch: {error}; use TensorRT or the CPU"
                )
                raise EngineError(msg) from error
            results = outputs if isinstance(outputs, tuple) else (outputs,)
            values.update(zip(node.outputs, results, strict=False))
            for name in self._last_use.get(place, ()):
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}


_NUMBERS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def _stored(attributes: Mapping[str, Any]) -> Any | None:
    """Return the tensor of a node ``Constant``; None: it holds no numbers."""
    ((kind, value),) = attributes.items()
    if kind in _NUMBERS:
        return numpy_helper.from_array(np.array(value, _NUMBERS[kind]))
    return value if kind == "value" else None


def _last_uses(nodes: list[Node], outputs: list[str]) -> dict[int, list[str]]:
    """Return, by node, the tensors that no later one reads: their memory is free."""
    last = {name: place for place, node in enumerate(nodes) for name in node.inputs}
    freed: dict[int, list[str]] = {}
    for name, place in last.items():
        if name not in outputs:
            freed.setdefault(place, []).append(name)
    return freed


BACKEND = f"torch-cuda {torch.__version__}"
_FLOAT = np.dtype(np.float32)


def why_unavailable(device: Gpu | None) -> str | None:
    """Return why torch cannot run networks on a GPU; None: it can."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built for the CPU; install one built for "
            "CUDA: https://pytorch.org/get-started"
        )
    if device is None:
        return None
    if not torch.cuda.is_available():
        return "torch finds no usable GPU; update the NVIDIA driver"
    architectures = torch.cuda.get_arch_list()
    major, minor = device.compute_capability
    # A card runs what was compiled for an older one of the same major number.
    served = any(
        name == f"sm_{major}{lower}"
        for name in architectures
        for lower in range(minor + 1)
    )
    if not served:
        return (
            f"torch {torch.__version__} is compiled for {', '.join(architectures)}, "
            f"this GPU has compute capability {major}.{minor}"
        )
    return None


def open_engine(request: GpuRequest, device: Gpu) -> "TorchEngine":
    """Load a network; EngineError where an operator is unknown."""
    place = torch.device("cuda", device.gpu_index)
    torch.cuda.set_device(place)
    return TorchEngine(request, place)


class TorchEngine:
    """A network on a device; implements `rtfocus.runtimes.gpu.GpuEngine`.

    TensorFloat-32 is a switch of the whole process in torch: one engine that asks
    for exact products turns it off for all.
    """

    def __init__(self, request: GpuRequest, place: torch.device) -> None:
        self.name = request.name
        self.backend = BACKEND
        self.precision: Precision = request.precision
        self.context_bytes = 0
        self._place = place
        torch.backends.cudnn.allow_tf32 = request.tf32
        torch.backends.cuda.matmul.allow_tf32 = request.tf32
        self._network: TorchNetwork | None = TorchNetwork(
            request.name, request.model, place
        )
        self._shapes = TorchNetwork(request.name, request.model, torch.device("meta"))
        self.tensors: Mapping[str, IoTensor] = {
            name: IoTensor(name, _FLOAT, is_input=name in self._network.inputs)
            for name in (*self._network.inputs, *self._network.outputs)
        }

    def output_shapes(self, input_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shape of every output for these inputs."""
        inputs = {
            name: torch.empty(shape, device="meta")
            for name, shape in input_shapes.items()
        }
        outputs = self._shapes.run(inputs)
        return {name: tuple(tensor.shape) for name, tensor in outputs.items()}

    def open_context(self) -> "TorchContext":
        """Make one more context; torch allocates what it needs at the first run."""
        return TorchContext(self)

    @property
    def network(self) -> TorchNetwork:
        """Nodes and weights; EngineError once it is closed."""
        if self._network is None:
            msg = f"engine '{self.name}' is closed"
            raise EngineError(msg)
        return self._network

    def close(self) -> None:
        """Free the weights, and give the card back what torch kept for later.

        Torch keeps memory by CUDA stream: every series would leave its own.
        """
        self._network = None
        if self._place.type == "cuda":
            torch.cuda.empty_cache()


class TorchContext:
    """Implements `rtfocus.runtimes.gpu.GpuContext`.

    The weights are the engine's alone: a context that is still held keeps none.
    """

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self._place = engine.network.device
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def bind(
        self, buffers: Mapping[str, int], input_shapes: Mapping[str, Shape]
    ) -> None:
        """Set addresses and shapes for all following `enqueue`."""
        shapes = {**input_shapes, **self._engine.output_shapes(input_shapes)}
        lacking = sorted(set(self._engine.tensors) - set(buffers))
        if lacking:
            msg = f"engine '{self._engine.name}': tensors {lacking} have no buffer"
            raise EngineError(msg)
        tensors = {
            name: _view(buffers[name], shape, self._place)
            for name, shape in shapes.items()
        }
        self._inputs = {name: tensors[name] for name in self._engine.network.inputs}
        self._outputs = {name: tensors[name] for name in self._engine.network.outputs}

    def enqueue(self, cuda_stream: int) -> None:
        """Launch the network on a CUDA stream."""
        place = self._place
        stream = torch.cuda.ExternalStream(cuda_stream, place)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            self.run()

    def run(self) -> None:
        """Compute the bound outputs from the bound inputs on torch's own stream."""
        for name, result in self._engine.network.run(self._inputs).items():
            self._outputs[name].copy_(result, non_blocking=True)

    def why_not_capturable(self, cuda_stream: int) -> str | None:
        """Return why `enqueue` may not be captured in a CUDA graph."""
        return "torch allocates memory while a network runs"

    def close(self) -> None:
        """Let go of the buffers."""
        self._inputs, self._outputs = {}, {}


class _Foreign:
    """Memory of others as torch reads it: ``__cuda_array_interface__``."""

    def __init__(self, address: int, shape: Shape) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": shape,
            "typestr": "<f4",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _view(address: int, shape: Shape, place: torch.device) -> Tensor:
    """Return a tensor on memory of others, which they keep alive."""
    return torch.as_tensor(_Foreign(address, shape), device=place)
