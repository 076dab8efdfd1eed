"""OpenVINO: the default runtime, compiled for one input shape."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.processing.cpu.engine import Inputs, Outputs, Shape


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
        """Run the network, see `rtfocus.processing.cpu.engine.Engine.infer`."""
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


def import_openvino() -> Any:  # noqa: ANN401
    """Return the module ``openvino``; ImportError where it is not installed."""
    if "openvino" not in sys.modules:
        # None makes Python answer an import with ImportError.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module("openvino")


_LEVELS = 256


def use_unsigned_features(openvino: Any, network: Any) -> None:  # noqa: ANN401
    """Rewrite every quantised feature map of a network in place.

    Parameters
    ----------
    openvino
        The module.
    network
        Model as read from an ONNX file; one without such features stays as it is.
    """
    for node in network.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            _rewrite(openvino, node)


def _rewrite(openvino: Any, quantise: Any) -> None:  # noqa: ANN401
    """Turn quantise, to int8, to float into quantise, to uint8, to float, - 128."""
    consumers = _consumers(quantise)
    if len(consumers) != 1 or not _converts(consumers[0], openvino.Type.i8):
        return
    back = _consumers(consumers[0])
    if not all(_converts(node, openvino.Type.f32) for node in back):
        return
    make = openvino.opset13
    data, low, high = (quantise.input_value(index) for index in range(3))
    shifted = make.fake_quantize(
        data,
        low,
        high,
        make.constant(np.float32(0)),
        make.constant(np.float32(_LEVELS - 1)),
        _LEVELS,
    )
    as_float = make.convert(make.convert(shifted, "u8"), "f32")
    centred = make.subtract(as_float, make.constant(np.float32(_LEVELS // 2)))
    for node in back:
        node.output(0).replace(centred.output(0))


def _consumers(node: Any) -> list[Any]:  # noqa: ANN401
    return [target.get_node() for target in node.output(0).get_target_inputs()]


def _converts(node: Any, to: Any) -> bool:  # noqa: ANN401
    return bool(node.get_type_name() == "Convert" and node.get_element_type() == to)
