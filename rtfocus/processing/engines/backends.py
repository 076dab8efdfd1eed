"""Backends: the CPU runtimes a network can run on, in order of preference."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from rtfocus.errors import EngineError
from rtfocus.processing.choice import usable
from rtfocus.processing.engines.inputs import Inputs
from rtfocus.processing.engines.onnxruntime_backend import OnnxRuntimeEngine
from rtfocus.processing.engines.openvino_backend import OpenVinoEngine
from rtfocus.processing.engines.openvino_import import import_openvino
from rtfocus.processing.engines.seam import Engine

CpuPrecision = Literal["auto", "f32", "bf16"]
"""What the CPU is to compute in; ``auto``: bf16 where it can."""


@dataclass(frozen=True, slots=True)
class Request:
    """Everything a backend needs to make an engine ready."""

    model: Path
    """ONNX file, already verified."""
    inputs: Inputs
    """Its input tensors; a fixed shape is faster than any."""
    outputs: tuple[str, ...]
    """Output tensors that are wanted."""
    precision: CpuPrecision = "auto"
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Backend:
    """A runtime: whether it can be used, and how an engine is opened on it."""

    name: str
    why_unavailable: Callable[[], str | None]
    """Reason why not, with the remedy; None: available."""
    open_engine: Callable[[Request], Engine]


def _why_no_openvino() -> str | None:
    return _why_not_importable("openvino", import_openvino)


def _why_no_onnxruntime() -> str | None:
    return _why_not_importable("onnxruntime", lambda: import_module("onnxruntime"))


def _why_not_importable(module: str, load: Callable[[], object]) -> str | None:
    try:
        load()
    except ImportError as error:
        return f"{module} cannot be imported ({error}); pip install {module}"
    return None


def _open_openvino(request: Request) -> Engine:
    return OpenVinoEngine(
        request.model,
        request.inputs,
        request.outputs,
        precision=request.precision,
        threads=request.threads,
    )


def _open_onnxruntime(request: Request) -> Engine:
    if request.precision == "bf16":
        msg = (
            f"engine '{request.inputs.engine}': ONNX Runtime computes in f32 on a CPU; "
            "set processing.precision to f32 or auto, or processing.backend to openvino"
        )
        raise EngineError(msg)
    return OnnxRuntimeEngine(
        request.model, request.inputs, request.outputs, threads=request.threads
    )


# ORDER MATTERS for "auto": fastest first, the reference last.
BACKENDS: tuple[Backend, ...] = (
    Backend("openvino", _why_no_openvino, _open_openvino),
    Backend("onnxruntime", _why_no_onnxruntime, _open_onnxruntime),
)


def choose_backend(wanted: str) -> Backend:
    """Return the backend of a name, or for ``auto`` the first that is available.

    Raises
    ------
    EngineError
        If the wanted one, or every one, is unavailable; says why.
    """
    return next(
        usable("network backend", wanted, BACKENDS, lambda b: b.why_unavailable())
    )
