"""ONNX Runtime: the reference in f32, and the fallback."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.processing.cpu.engine import Inputs, Outputs


class OnnxRuntimeEngine:
    """A network run by ONNX Runtime on the CPU, always in f32."""

    backend = "onnxruntime"
    precision = "f32"

    def __init__(
        self,
        model: Path,
        inputs: Inputs,
        outputs: tuple[str, ...],
        *,
        threads: int = 1,
    ) -> None:
        self.name = inputs.engine
        self._inputs = inputs
        self._outputs = outputs
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads would take the cores restoration needs between frames.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session: Any = runtime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors share no base class but Exception
            msg = f"engine '{self.name}': ONNX Runtime cannot load '{model}': {error}"
            raise EngineError(msg) from error
        self._check_names(model)

    def _check_names(self, model: Path) -> None:
        """Compare the card's tensor names with the file's."""
        inputs = [tensor.name for tensor in self._session.get_inputs()]
        outputs = [tensor.name for tensor in self._session.get_outputs()]
        wanted = {self._inputs.tiles, self._inputs.condition} - {None}
        if set(inputs) != wanted or not set(self._outputs) <= set(outputs):
            ours = " and ".join(f"'{name}'" for name in sorted(map(str, wanted)))
            names = ", ".join(f"'{name}'" for name in self._outputs)
            msg = (
                f"engine '{self.name}': the card says input {ours} and output {names}, "
                f"'{model}' has {inputs} and {outputs}"
            )
            raise EngineError(msg)

    def infer(
        self, tiles: NDArray[np.float32], condition: NDArray[np.float32] | None = None
    ) -> Outputs:
        """Run the network, see `rtfocus.processing.cpu.engine.Engine.infer`."""
        self._inputs.check(tiles, condition)
        if self._session is None:
            msg = f"engine '{self.name}' is closed"
            raise EngineError(msg)
        tensors = {self._inputs.tiles: tiles}
        if condition is not None:
            tensors[str(self._inputs.condition)] = condition
        try:
            found = self._session.run(list(self._outputs), tensors)
        except Exception as error:  # its errors share no base class but Exception
            msg = f"engine '{self.name}' failed on '{self._inputs.tiles}': {error}"
            raise EngineError(msg) from error
        return {
            name: np.asarray(array)
            for name, array in zip(self._outputs, found, strict=True)
        }

    def close(self) -> None:
        """Free the session."""
        self._session = None
