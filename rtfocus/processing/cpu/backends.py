"""Backends: the CPU runtimes a network can run on, in order, and how it is opened."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from rtfocus.config.processor import ProcessingConfig
from rtfocus.errors import EngineError
from rtfocus.machine import adds_int8_in_16_bits, usable
from rtfocus.processing.cpu.engine import (
    Engine,
    Inputs,
    OnnxRuntimeEngine,
    OpenVinoEngine,
    Shape,
    import_openvino,
)
from rtfocus.processing.engines.card import (
    EngineCard,
    Precision,
    input_of,
    verified_file,
)
from rtfocus.processing.engines.registry import FoundEngine

logger = logging.getLogger(__name__)


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


_WHERE = {"openvino": "openvino", "onnxruntime": "'rtfocus[onnxruntime]'"}


def _why_not_importable(module: str, load: Callable[[], object]) -> str | None:
    try:
        load()
    except ImportError as error:
        return f"{module} cannot be imported ({error}); pip install {_WHERE[module]}"
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


def open_engine(
    found: FoundEngine,
    settings: ProcessingConfig,
    *,
    shape: Shape | None,
    outputs: tuple[str, ...],
    threads: int = 1,
) -> Engine:
    """Open an engine on the backend and in the precision of the config.

    Parameters
    ----------
    found
        Engine with its card.
    settings
        ``backend`` and ``precision`` count here.
    shape
        (N, C, H, W) of the tiles; None: any, slower.
    outputs
        Output tensors that are wanted.
    threads
        Of the network.

    Raises
    ------
    EngineError
        If it is no network, its weights are damaged, or it cannot be loaded.
    """
    card = found.card
    tiles = input_of(card)
    condition = card.condition
    weights, precision = choose_weights(card, settings.precision)
    return choose_backend(settings.backend).open_engine(
        Request(
            model=verified_file(found.folder, card, weights),
            inputs=Inputs(
                engine=found.name,
                tiles=tiles.name,
                shape=shape,
                condition=None if condition is None else condition.name,
                entries=0 if condition is None else len(condition.entries),
            ),
            outputs=outputs,
            precision=precision,
            threads=threads,
        )
    )


def choose_weights(card: EngineCard, wanted: str) -> tuple[Precision, CpuPrecision]:
    """Return the weights file to run and what to compute in.

    Parameters
    ----------
    card
        Of the engine; where it lacks the file that is wanted, fp32 runs instead.
    wanted
        ``processing.precision``.
    """
    files: dict[str, Precision] = {"fp16": "fp16", "int8": "int8"}
    if wanted in files:
        if files[wanted] in card.files:
            if wanted == "int8" and adds_int8_in_16_bits():
                logger.warning(
                    "engine '%s': int8 is less accurate on this processor, which has "
                    "no VNNI; set processing.precision to auto",
                    card.name,
                )
            return files[wanted], "auto"
        logger.warning("engine '%s' has no %s weights: fp32 runs", card.name, wanted)
    computed: dict[str, CpuPrecision] = {"f32": "f32", "bf16": "bf16"}
    return "fp32", computed.get(wanted, "auto")


def runs_on(card: EngineCard, engine: Engine, wanted: str) -> str:
    """Say what a network runs on, e.g. ``openvino bf16`` or ``openvino int8 bf16``.

    Parameters
    ----------
    card, engine
        Of the network.
    wanted
        ``processing.precision`` it was opened with.
    """
    weights, _ = choose_weights(card, wanted)
    parts = [engine.backend, weights, engine.precision]
    return " ".join(part for part in parts if part != "fp32")
