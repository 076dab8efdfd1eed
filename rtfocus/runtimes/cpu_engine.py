"""Engine: a network ready to run on the CPU, by OpenVINO or ONNX Runtime.

OpenVINO is the default, compiled for one input shape; ONNX Runtime is the reference
in f32 and the fallback.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfocus.engines.card import Precision
from rtfocus.errors import EngineError
from rtfocus.machine import processor_flags

Outputs = Mapping[str, NDArray[np.float32]]
"""Output tensors of a network by name."""
Shape = tuple[int, ...]
"""Of the pixels: (N, C, H, W), or in the order of the network's own axes."""
CpuPrecision = Literal["auto", "f32", "bf16"]
"""What the CPU is to compute in; ``auto``: bf16 where it can."""

AXES = "bcyx"
"""Batch or tile, channel, y, x: the order of all tensors but those of a network."""


def arrange(array: NDArray[Any], axes: str) -> NDArray[Any]:
    """Return an array of `AXES` in another order; what `axes` lacks has length 1."""
    left_out = tuple(AXES.index(axis) for axis in AXES if axis not in axes)
    present = [axis for axis in AXES if axis in axes]
    return array.squeeze(left_out).transpose([present.index(axis) for axis in axes])


def arranged_shape(shape: Shape, axes: str) -> Shape:
    """Return a shape of `AXES` in another order; those that `axes` lacks drop out."""
    return tuple(shape[AXES.index(axis)] for axis in axes)


def straighten(array: NDArray[Any], axes: str, engine: str) -> NDArray[Any]:
    """Undo `arrange`.

    Raises
    ------
    EngineError
        If the array has not as many axes as its card says.
    """
    if array.ndim != len(axes):
        msg = (
            f"engine '{engine}': its output is {array.shape}, its card names the axes "
            f"'{axes}'; correct its steps"
        )
        raise EngineError(msg)
    present = [axis for axis in AXES if axis in axes]
    ordered = array.transpose([axes.index(axis) for axis in present])
    lacking = tuple(AXES.index(axis) for axis in AXES if axis not in axes)
    return np.expand_dims(ordered, lacking)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input tensors an engine was opened for."""

    engine: str
    """Name of the engine, for messages."""
    tiles: str
    """Tensor of the pixels."""
    shape: Shape
    """(N, C, H, W)."""
    condition: str | None = None
    """Tensor of what is known beside the pixels; None: there is none."""
    entries: int = 0
    """Columns of the condition."""

    def check(
        self, tiles: NDArray[np.float32], condition: NDArray[np.float32] | None
    ) -> None:
        """Refuse what the network was not opened for; EngineError names the tensor."""
        if tiles.dtype != np.float32 or tiles.ndim != len(self.shape):
            msg = (
                f"engine '{self.engine}': input '{self.tiles}' must be float32 "
                f"(N, C, H, W), got {tiles.dtype} {tiles.shape}"
            )
            raise EngineError(msg)
        if tiles.shape != self.shape:
            msg = (
                f"engine '{self.engine}': input '{self.tiles}' has shape "
                f"{tiles.shape}, but the engine was opened for {self.shape}; open it "
                "again for this shape"
            )
            raise EngineError(msg)
        self._check_condition(len(tiles), condition)

    def _check_condition(
        self, number: int, condition: NDArray[np.float32] | None
    ) -> None:
        if self.condition is None:
            if condition is not None:
                msg = (
                    f"engine '{self.engine}' takes no condition; its only input is "
                    f"'{self.tiles}'"
                )
                raise EngineError(msg)
            return
        shape = (number, self.entries)
        if condition is None:
            msg = f"engine '{self.engine}' needs its input '{self.condition}' {shape}"
            raise EngineError(msg)
        if condition.dtype != np.float32 or condition.shape != shape:
            msg = (
                f"engine '{self.engine}': input '{self.condition}' must be float32 "
                f"{shape}, got {condition.dtype} {condition.shape}"
            )
            raise EngineError(msg)


@dataclass(frozen=True, slots=True)
class CpuRequest:
    """Everything that makes an engine ready."""

    model: Path
    """ONNX file, already verified."""
    inputs: Inputs
    """Its input tensors."""
    outputs: tuple[str, ...]
    """Output tensors that are wanted."""
    precision: CpuPrecision = "auto"
    threads: int = 1
    weights: Precision = "fp32"
    """What `model` holds."""
    measured: str = ""
    """Times that led to the precision; empty: it was asked for, or the only one."""
    axes: tuple[str, str] = (AXES, AXES)
    """Order of the network's input and output; what is missing has length 1."""


class Engine(ABC):
    """A network ready to run on batches of tiles.

    Not for use from several threads at once.
    """

    backend: str
    """Runtime, e.g. ``openvino``."""
    precision: str
    """Numbers it computes in: ``f32`` or ``bf16``."""

    def __init__(self, request: CpuRequest) -> None:
        self.name = request.inputs.engine
        """Folder name in ``engines/``."""
        self.request = request
        """What it was opened with."""
        self._is_open = True

    def infer(
        self, tiles: NDArray[np.float32], condition: NDArray[np.float32] | None = None
    ) -> Outputs:
        """Run the network.

        Parameters
        ----------
        tiles
            Axes (N, C, H, W), in the units the engine's card asks for.
        condition
            Axes (N, entries); None: the engine has no such input.

        Returns
        -------
        Outputs
            New arrays, by the names the engine was opened with.

        Raises
        ------
        EngineError
            If a tensor is not what the engine was opened for; names it.
        """
        inputs, (given, gives) = self.request.inputs, self.request.axes
        in_order = given == gives == AXES
        if not in_order:
            tiles = arrange(tiles, given)
        inputs.check(tiles, condition)
        if not self._is_open:
            msg = f"engine '{self.name}' is closed"
            raise EngineError(msg)
        tensors = {inputs.tiles: np.ascontiguousarray(tiles)}
        if condition is not None:
            tensors[str(inputs.condition)] = np.ascontiguousarray(condition)
        try:
            outputs = self._run(tensors)
        except Exception as error:  # runtimes' errors share no other base class
            msg = f"engine '{self.name}' failed on '{inputs.tiles}': {error}"
            raise EngineError(msg) from error
        if in_order:
            return outputs
        return {n: straighten(array, gives, self.name) for n, array in outputs.items()}

    @abstractmethod
    def _run(self, tensors: Outputs) -> Outputs:
        """Run the network on contiguous inputs by name."""

    def close(self) -> None:
        """Free the runtime; called twice does nothing."""
        self._is_open = False


class OpenVinoEngine(Engine):
    """A network compiled by OpenVINO for the CPU.

    It holds one infer request, whose input tensors are the caller's arrays (no copy)
    and whose outputs are copied out.
    """

    backend = "openvino"

    def __init__(self, request: CpuRequest) -> None:
        super().__init__(request)
        inputs = request.inputs
        self._openvino: Any = import_openvino()
        try:
            core = self._openvino.Core()
            self.precision = _resolve(self.name, request.precision)
            network = core.read_model(request.model)
            use_unsigned_features(self._openvino, network)
            network.reshape(_shapes(inputs))
            compiled = core.compile_model(
                network, "CPU", self._options(request.threads)
            )
            self._request = compiled.create_infer_request()
            self._outputs = {name: compiled.output(name) for name in request.outputs}
        except RuntimeError as error:
            names = ", ".join(f"'{name}'" for name in request.outputs)
            msg = (
                f"engine '{self.name}': OpenVINO cannot load '{request.model}' with "
                f"input '{inputs.tiles}' {inputs.shape} and output {names}; export or "
                f"add the engine again: {' '.join(str(error).split())}"
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

    def _run(self, tensors: Outputs) -> Outputs:
        shared = {
            name: self._openvino.Tensor(array, shared_memory=True)
            for name, array in tensors.items()
        }
        self._request.infer(shared, share_inputs=True)
        return {
            name: np.array(self._request.get_tensor(output).data)
            for name, output in self._outputs.items()
        }

    def close(self) -> None:
        """Free the compiled network."""
        super().close()
        self._request = None
        self._outputs = {}


def _shapes(inputs: Inputs) -> dict[str, list[int]]:
    """Return the shape of every input."""
    shapes = {inputs.tiles: list(inputs.shape)}
    if inputs.condition is not None:
        shapes[inputs.condition] = [inputs.shape[0], inputs.entries]
    return shapes


def _resolve(name: str, precision: str) -> str:
    """Turn ``auto`` into bf16 where the CPU computes in it, else f32."""
    possible = openvino_precisions()
    if precision == "auto":
        return possible[-1]
    if precision not in possible:
        msg = (
            f"engine '{name}': this CPU does not compute in bf16; set "
            "processing.precision to f32 or auto"
        )
        raise EngineError(msg)
    return precision


@cache
def openvino_precisions() -> tuple[str, ...]:
    """Return what OpenVINO computes fp32 weights in on this CPU, f32 first."""
    listed = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("f32", "bf16") if "BF16" in listed else ("f32",)


def import_openvino() -> Any:  # noqa: ANN401
    """Return the module ``openvino``; ImportError where it is not installed."""
    if "openvino" not in sys.modules:
        # None makes Python answer an import with ImportError.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module("openvino")


@cache
def adds_int8_exactly() -> bool:
    """Tell whether int8 networks are exact here.

    An x86 without VNNI cuts the sum of two products off at 16 bits. Linux says whether
    there is VNNI; elsewhere a convolution of large numbers shows it, in a tenth of a
    second. False without OpenVINO.
    """
    if flags := processor_flags():
        return any("vnni" in flag for flag in flags)
    try:
        return _sums_int8_exactly(import_openvino())
    except ImportError:
        return False


def _sums_int8_exactly(openvino: Any) -> bool:  # noqa: ANN401
    operators, rng = openvino.opset13, np.random.default_rng(0)
    shares = (0.9, 0.1)
    weights = rng.choice(np.array([127, -127], np.int8), (64, 64, 1, 1), p=shares)
    pixels = rng.choice(np.array([127, -128], np.float32), (1, 64, 16, 16), p=shares)
    given = operators.parameter([*pixels.shape], np.float32)
    ends = np.float32(-128), np.float32(127)
    features = operators.fake_quantize(given, *ends, *ends, _LEVELS)
    # Int8 weights are what is scaled right behind their conversion.
    kernel = operators.convert(operators.constant(weights), np.float32)
    kernel = operators.multiply(kernel, operators.constant(np.float32(1)))
    sums = operators.convolution(features, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    network = openvino.Model([sums], [given])
    compiled = openvino.Core().compile_model(network, "CPU", options)
    exact = np.einsum("ocij,nchw->nohw", weights.astype(np.int64), pixels)
    return bool(np.array_equal(compiled(pixels)[0], exact))


_LEVELS = 256


def use_unsigned_features(openvino: Any, network: Any) -> None:  # noqa: ANN401
    """Rewrite every quantised feature map of a network, as read, in place."""
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


class OnnxRuntimeEngine(Engine):
    """A network run by ONNX Runtime on the CPU, always in f32."""

    backend = "onnxruntime"
    precision = "f32"

    def __init__(self, request: CpuRequest) -> None:
        super().__init__(request)
        if request.precision == "bf16":
            msg = (
                f"engine '{self.name}': ONNX Runtime computes in f32 on a CPU; set "
                "processing.precision to f32 or auto, or processing.backend to openvino"
            )
            raise EngineError(msg)
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = request.threads
        options.inter_op_num_threads = 1
        # Spinning threads would take the cores restoration needs between frames.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        model = request.model
        try:
            self._session: Any = runtime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors share no base class but Exception
            msg = (
                f"engine '{self.name}': ONNX Runtime cannot load '{model}': {error}; "
                "export or add the engine again"
            )
            raise EngineError(msg) from error
        self._check_names(request)

    def _check_names(self, request: CpuRequest) -> None:
        """Compare the card's tensor names with the file's."""
        inputs = [tensor.name for tensor in self._session.get_inputs()]
        outputs = [tensor.name for tensor in self._session.get_outputs()]
        expected = {request.inputs.tiles, request.inputs.condition} - {None}
        if set(inputs) != expected or not set(request.outputs) <= set(outputs):
            ours = " and ".join(f"'{name}'" for name in sorted(map(str, expected)))
            names = ", ".join(f"'{name}'" for name in request.outputs)
            msg = (
                f"engine '{self.name}': the card says input {ours} and output {names}, "
                f"'{request.model}' has {inputs} and {outputs}; correct the card or "
                "export the engine again"
            )
            raise EngineError(msg)

    def _run(self, tensors: Outputs) -> Outputs:
        names = self.request.outputs
        arrays = self._session.run(list(names), tensors)
        return {
            name: np.asarray(array) for name, array in zip(names, arrays, strict=True)
        }

    def close(self) -> None:
        """Free the session."""
        super().close()
        self._session = None
