"""TensorRT context: one concurrent inference on addresses the caller owns."""

from collections.abc import Mapping
from typing import Any

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.seam import Shape
from rtfocus.processing.gpu.tensorrt_import import TensorRt


class TensorRtContext:
    """An execution context; implements `rtfocus.processing.gpu.seam.GpuContext`.

    Parameters
    ----------
    name
        Of the engine, for messages.
    library
        That made `context`.
    context
        ``IExecutionContext``.
    """

    def __init__(self, name: str, library: TensorRt, context: Any) -> None:
        self._name = name
        self._library = library
        self._context: Any = context
        self._shapes: dict[str, Shape] = {}

    def bind(
        self, buffers: Mapping[str, int], input_shapes: Mapping[str, Shape]
    ) -> None:
        """Set addresses and shapes for all following `enqueue`."""
        self._library.logger.errors.clear()
        for tensor, shape in input_shapes.items():
            if not self._context.set_input_shape(tensor, shape):
                msg = f"input '{tensor}' cannot have the shape {shape}"
                raise self._error(msg)
        for tensor, address in buffers.items():
            if not self._context.set_tensor_address(tensor, address):
                msg = f"there is no tensor '{tensor}' to bind"
                raise self._error(msg)
        lacking = self._context.infer_shapes()
        if lacking:
            msg = f"the shapes of {lacking} are not set"
            raise self._error(msg)
        self._shapes = dict(input_shapes)

    def enqueue(self, cuda_stream: int) -> None:
        """Launch the network on a CUDA stream."""
        if not self._context.execute_async_v3(cuda_stream):
            msg = f"the launch with {self._shapes} was refused"
            raise self._error(msg)

    def why_not_capturable(self, cuda_stream: int) -> str | None:
        """Return why `enqueue` may not be captured in a CUDA graph; None: it may."""
        if not self._library.is_rtx:
            return None
        if self._records_itself():
            return "TensorRT for RTX records a CUDA graph of its own"
        if not self._context.is_stream_capturable(cuda_stream):
            return "this network needs the host between its kernels"
        return None

    def close(self) -> None:
        """Free the context."""
        self._context = None

    def _records_itself(self) -> bool:
        disabled = self._library.api.CudaGraphStrategy.DISABLED
        strategy = self._context.get_runtime_config().cuda_graph_strategy
        return bool(strategy != disabled)

    def _error(self, what: str) -> EngineError:
        errors = self._library.logger.errors
        reason = f": {errors[0]}" if errors else ""
        return EngineError(f"engine '{self._name}': {what}{reason}")
