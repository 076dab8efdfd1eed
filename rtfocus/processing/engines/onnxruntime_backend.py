"""ONNX Runtime backend: the reference in f32, and the fallback."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.processing.engines.inputs import check_input


class OnnxRuntimeEngine:
    """A network run by ONNX Runtime on the CPU, always in f32."""

    backend = "onnxruntime"
    precision = "f32"

    def __init__(
        self,
        name: str,
        model: Path,
        *,
        input_name: str,
        output_name: str,
        shape: tuple[int, int, int, int] | None,
        threads: int = 1,
    ) -> None:
        self.name = name
        self.shape = shape
        self._input = input_name
        self._output = output_name
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
            msg = f"engine '{name}': ONNX Runtime cannot load '{model}': {error}"
            raise EngineError(msg) from error
        self._check_names(model)

    def _check_names(self, model: Path) -> None:
        """Compare the card's tensor names with the file's."""
        inputs = [tensor.name for tensor in self._session.get_inputs()]
        outputs = [tensor.name for tensor in self._session.get_outputs()]
        if self._input not in inputs or self._output not in outputs:
            msg = (
                f"engine '{self.name}': the card says input '{self._input}' and output "
                f"'{self._output}', '{model}' has {inputs} and {outputs}"
            )
            raise EngineError(msg)

    def infer(
        self, tiles: NDArray[np.float32], condition: NDArray[np.float32] | None = None
    ) -> NDArray[Any]:
        """Map (N, C, H, W) float32 tiles to the network's output, a new array.

        Raises
        ------
        EngineError
            If the shape is not that it was opened for; names the tensor.
        """
        check_input(self.name, self._input, self.shape, tiles, condition)
        if self._session is None:
            msg = f"engine '{self.name}' is closed"
            raise EngineError(msg)
        try:
            outputs = self._session.run([self._output], {self._input: tiles})
        except Exception as error:  # its errors share no base class but Exception
            msg = f"engine '{self.name}' failed on '{self._input}': {error}"
            raise EngineError(msg) from error
        return np.asarray(outputs[0])

    def close(self) -> None:
        """Free the session."""
        self._session = None
