"""OpenVINO backend: the default runtime, compiled for one frame shape."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.processing.engines.inputs import check_input
from rtfocus.processing.engines.openvino_import import import_openvino


class OpenVinoEngine:
    """A network compiled by OpenVINO for the CPU.

    Not for use from several threads at once: it holds one infer request, whose
    input tensor is the caller's array (no copy) and whose output is copied out.
    """

    backend = "openvino"

    def __init__(
        self,
        name: str,
        model: Path,
        *,
        input_name: str,
        output_name: str,
        shape: tuple[int, int, int, int] | None,
        precision: Literal["auto", "f32", "bf16"] = "auto",
        threads: int = 1,
    ) -> None:
        self.name = name
        self.shape = shape
        self._input = input_name
        self._openvino: Any = import_openvino()
        try:
            core = self._openvino.Core()
            capable = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            self.precision = _resolve(list(capable), name, precision)
            network = core.read_model(model)
            if shape is not None:
                network.reshape({input_name: list(shape)})
            compiled = core.compile_model(network, "CPU", self._options(threads))
            self._request = compiled.create_infer_request()
            self._output = compiled.output(output_name)
        except RuntimeError as error:
            msg = (
                f"engine '{name}': OpenVINO cannot load '{model}' with input "
                f"'{input_name}' {shape} and output '{output_name}': {error}"
            )
            raise EngineError(msg) from error

    def _options(self, threads: int) -> dict[str, Any]:
        """One stream: a frame at a time, on exactly the threads it was given."""
        return {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }

    def infer(
        self, tiles: NDArray[np.float32], condition: NDArray[np.float32] | None = None
    ) -> NDArray[Any]:
        """Map (N, C, H, W) float32 tiles to the network's output, a new array.

        Raises
        ------
        EngineError
            If the shape is not the compiled one; names the tensor.
        """
        check_input(self.name, self._input, self.shape, tiles, condition)
        if self._request is None:
            msg = f"engine '{self.name}' is closed"
            raise EngineError(msg)
        tensor = self._openvino.Tensor(np.ascontiguousarray(tiles), shared_memory=True)
        try:
            self._request.infer({self._input: tensor}, share_inputs=True)
        except RuntimeError as error:
            msg = f"engine '{self.name}' failed on '{self._input}': {error}"
            raise EngineError(msg) from error
        return np.array(self._request.get_tensor(self._output).data)

    def close(self) -> None:
        """Free the compiled network."""
        self._request = None
        self._output = None


def _resolve(capabilities: list[str], name: str, precision: str) -> str:
    """Turn ``auto`` into bf16 where the CPU computes in it, else f32."""
    capable = "BF16" in capabilities
    if precision == "bf16" and not capable:
        msg = (
            f"engine '{name}': this CPU does not compute in bf16; set "
            "processing.precision to f32 or auto"
        )
        raise EngineError(msg)
    if precision == "auto":
        return "bf16" if capable else "f32"
    return precision
