"""torch-cuda engine: a network run by torch on CUDA streams and buffers of others."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtfocus.errors import EngineError
from rtfocus.processing.engines.card_sections import Precision
from rtfocus.processing.gpu.seam import GpuDevice, GpuRequest, IoTensor, Shape
from rtfocus.processing.gpu.torch_backend.network import TorchNetwork

BACKEND = f"torch-cuda {torch.__version__}"
_FLOAT = np.dtype(np.float32)


def why_unavailable(device: GpuDevice | None) -> str | None:
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


def open_engine(request: GpuRequest, device: GpuDevice) -> "TorchEngine":
    """Load a network; EngineError where an operator is unknown."""
    place = torch.device("cuda", device.gpu_index)
    torch.cuda.set_device(place)
    return TorchEngine(request, place)


class TorchEngine:
    """A network on a device; implements `rtfocus.processing.gpu.seam.GpuEngine`.

    TensorFloat-32 is a switch of the whole process in torch: one engine that asks
    for exact products turns it off for all.

    Parameters
    ----------
    request
        Weights, shapes and options.
    place
        Where it runs.
    """

    def __init__(self, request: GpuRequest, place: torch.device) -> None:
        self.name = request.name
        self.backend = BACKEND
        self.precision: Precision = request.precision
        self.context_bytes = 0
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
        if self._network is None:
            msg = f"engine '{self.name}' is closed"
            raise EngineError(msg)
        return TorchContext(self._network, self)

    def close(self) -> None:
        """Free the weights."""
        self._network = None


class TorchContext:
    """Implements `rtfocus.processing.gpu.seam.GpuContext`."""

    def __init__(self, network: TorchNetwork, engine: TorchEngine) -> None:
        self._network = network
        self._engine = engine
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
            name: _view(buffers[name], shape, self._network.device)
            for name, shape in shapes.items()
        }
        self._inputs = {name: tensors[name] for name in self._network.inputs}
        self._outputs = {name: tensors[name] for name in self._network.outputs}

    def enqueue(self, cuda_stream: int) -> None:
        """Launch the network on a CUDA stream."""
        place = self._network.device
        stream = torch.cuda.ExternalStream(cuda_stream, place)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            self.run()

    def run(self) -> None:
        """Compute the bound outputs from the bound inputs on torch's own stream."""
        for name, result in self._network.run(self._inputs).items():
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
