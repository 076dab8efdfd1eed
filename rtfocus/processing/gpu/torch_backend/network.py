"""Network: an ONNX file run by torch, node by node, on any device torch has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.torch_backend.arithmetic import ARITHMETIC
from rtfocus.processing.gpu.torch_backend.filters import FILTERS
from rtfocus.processing.gpu.torch_backend.node import Node, Operator
from rtfocus.processing.gpu.torch_backend.shaping import SHAPING

OPERATORS: Mapping[str, Operator] = {**FILTERS, **ARITHMETIC, **SHAPING}
"""What a network may be made of, by ONNX name."""

_HOST_INPUTS = {"Resize": (1, 2), "Pad": (2,)}
"""Real numbers that say what to do, not what to compute with."""


class TorchNetwork:
    """A network's nodes with its weights on a device.

    Parameters
    ----------
    name
        Of the engine, for messages.
    model
        ONNX file.
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
            msg = f"engine '{name}': '{model}' cannot be read as ONNX: {error}"
            raise EngineError(msg) from error
        self.inputs = [value.name for value in graph.input]
        self.outputs = [value.name for value in graph.output]
        self._read_on_host = {
            proto.input[place]
            for proto in graph.node
            for place in _HOST_INPUTS.get(proto.op_type, ())
            if place < len(proto.input)
        }
        self._constants = {t.name: self._constant(t) for t in graph.initializer}
        self._nodes: list[Node] = []
        for proto in graph.node:
            self._add(proto)
        self._last_use = _last_uses(self._nodes, self.outputs)

    def _add(self, proto: Any) -> None:
        attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        if proto.op_type == "Constant":
            self._constants[proto.output[0]] = self._constant(attributes["value"])
            return
        if proto.op_type not in OPERATORS:
            msg = (
                f"engine '{self.name}': torch-cuda does not know the operator of node "
                f"'{proto.name}' ({proto.op_type}); use TensorRT or the CPU"
            )
            raise EngineError(msg)
        inputs, outputs = tuple(proto.input), tuple(proto.output)
        self._nodes.append(Node(proto.op_type, proto.name, inputs, outputs, attributes))

    def _constant(self, stored: Any) -> Tensor:
        values = torch.from_numpy(numpy_helper.to_array(stored).copy())
        # Axes and sizes stay on the host, where they are read.
        if values.dtype == torch.int64 or stored.name in self._read_on_host:
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
                made = OPERATORS[node.operator](node, given)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                msg = (
                    f"engine '{self.name}': node '{node.name}' ({node.operator}) "
                    f"failed in torch: {error}"
                )
                raise EngineError(msg) from error
            results = made if isinstance(made, tuple) else (made,)
            values.update(zip(node.outputs, results, strict=False))
            for name in self._last_use.get(place, ()):
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}


def _last_uses(nodes: list[Node], outputs: list[str]) -> dict[int, list[str]]:
    """Return, by node, the tensors that no later one reads: their memory is free."""
    last = {name: place for place, node in enumerate(nodes) for name in node.inputs}
    freed: dict[int, list[str]] = {}
    for name, place in last.items():
        if name not in outputs:
            freed.setdefault(place, []).append(name)
    return freed
