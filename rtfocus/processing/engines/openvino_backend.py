"""OpenVINO backend: the default runtime, compiled for one input shape."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.processing.engines.inputs import Inputs, Shape
from rtfocus.processing.engines.openvino_import import import_openvino
from rtfocus.processing.engines.openvino_int8 import use_unsigned_features
from rtfocus.processing.engines.seam import Outputs


class OpenVinoEngine:
    """A network compiled by OpenVINO for the CPU.

    Not for use from several threads at once: it holds one infer request, whose
    input tensors are the caller's arrays (no copy) and whose outputs are copied out.
    """

    backend = "openvino"

    def __init__(
        self,
        model: Path,
        inputs: Inputs,
        outputs: tuple[str, ...],
        *,
        precision: Literal["auto", "f32", "bf16"] = "auto",
        threads: int = 1,
    ) -> None:
        self.name = inputs.engine
        self._inputs = inputs
        self._openvino: Any = import_openvino()
        try:
            core = self._openvino.Core()
            capable = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            self.precision = _resolve(list(capable), self.name, precision)
            network = core.read_model(model)
            use_unsigned_features(self._openvino, network)
            if inputs.shape is not None:
                network.reshape(_shapes(inputs, inputs.shape))
            compiled = core.compile_model(network, "CPU", self._options(threads))
            self._request = compiled.create_infer_request()
            self._outputs = {name: compiled.output(name) for name in outputs}
        except RuntimeError as error:
            names = ", ".join(f"'{name}'" for name in outputs)
            msg = (
                f"engine '{self.name}': OpenVINO cannot load '{model}' with input "
                f"'{inputs.tiles}' {inputs.shape} and output {names}: {error}"
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
    ) -> Outputs:
        """Run the network, see `rtfocus.processing.engines.seam.Engine.infer`."""
        self._inputs.check(tiles, condition)
        if self._request is None:
            msg = f"engine '{self.name}' is closed"
            raise EngineError(msg)
        tensors = {self._inputs.tiles: self._tensor(tiles)}
        if condition is not None:
            tensors[str(self._inputs.condition)] = self._tensor(condition)
        try:
            self._request.infer(tensors, share_inputs=True)
        except RuntimeError as error:
            msg = f"engine '{self.name}' failed on '{self._inputs.tiles}': {error}"
            raise EngineError(msg) from error
        return {
            name: np.array(self._request.get_tensor(output).data)
            for name, output in self._outputs.items()
        }

    def _tensor(self, array: NDArray[np.float32]) -> Any:  # noqa: ANN401
        return self._openvino.Tensor(np.ascontiguousarray(array), shared_memory=True)

    def close(self) -> None:
        """Free the compiled network."""
        self._request = None
        self._outputs = {}


def _shapes(inputs: Inputs, tiles: Shape) -> dict[str, list[int]]:
    """Return the shape of every input."""
    shapes = {inputs.tiles: list(tiles)}
    if inputs.condition is not None:
        shapes[inputs.condition] = [tiles[0], inputs.entries]
    return shapes


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
