"""Plan errors: what TensorRT says about a network it cannot build, with a remedy.

It names the node in the parser's errors, and in the log's for those of the build.
"""

import re
from collections.abc import Sequence
from typing import Any

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.seam import GpuRequest
from rtfocus.processing.gpu.tensorrt_import import TensorRt

_ELSEWHERE = "or run it with processing.backend torch-cuda or on the CPU"
_TOO_BIG = "lower the tiles per batch, use --precision fp16, or raise the workspace"
_WRONG_SIDES = (
    "the sides of the tiles do not suit the network: correct input.multiple_px in "
    "the engine's card"
)

# Words of TensorRT to what the user can do; the first that is found counts.
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        "FP32 GEMM is not supported",
        "cards of compute capability 7.5 need the fp16 weights: use --precision "
        "fp16, or with fp32 another backend",
    ),
    (
        "Int32 but must have type",
        "biases must not be quantised: write the int8 file with QuantizeBias off",
    ),
    ("OutOfMemory", _TOO_BIG),
    ("workspace limit", _TOO_BIG),
    (
        "out of memory",
        "lower the tiles per batch, use --precision fp16, or close other programs "
        "that use the GPU",
    ),
    (
        "driver version is insufficient",
        "install or update the NVIDIA driver (rtfocus doctor tells which is there)",
    ),
    (
        "Cuda Runtime",
        "check that the NVIDIA driver works and is new enough (rtfocus doctor)",
    ),
    (
        "OLD_CUDA_DRIVER",
        "update the NVIDIA driver (rtfocus doctor tells which is there)",
    ),
    (
        "INSUFFICIENT_GPU_MEMORY",
        "close other programs that use the GPU, or lower the frames in flight",
    ),
    ("violate shape constraints", _WRONG_SIDES),
    ("dimensions must be equal", _WRONG_SIDES),
    (
        "cannot be negative",
        "the tiles are too small for the network: correct input.tile_px in the "
        "engine's card",
    ),
    (
        "Dimension mismatch for tensor",
        "the card's input does not suit the file: correct the card or export again",
    ),
    (
        "MIN<=OPT<=MAX",
        "the smallest shape must not exceed the usual one nor that the largest",
    ),
)


class UnusablePlanError(EngineError):
    """The plan itself is at fault: built again from its network it may load."""


_INVALID = {
    "VERSION_MISMATCH": "it was built by another release",
    "UNSUPPORTED_CC": "it was built for another compute capability",
    "OLD_CUDA_DRIVER": "the driver is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little free memory",
    "MALFORMED_ENGINE": "it is damaged",
}
"""Reasons of TensorRT for RTX in words."""

_PLANS_FAULT = {"VERSION_MISMATCH", "UNSUPPORTED_CC", "MALFORMED_ENGINE"}


def parse_error(
    library: TensorRt, request: GpuRequest, faults: Sequence[Any]
) -> EngineError:
    """Translate the parser's errors about an ONNX file; the first names the cause."""
    where = f"engine '{request.name}': {library.name} {library.release}"
    if not faults:
        return EngineError(f"{where} cannot read '{request.model}': {_said(library)}")
    fault, code = faults[0], faults[0].code().name
    if code == "MODEL_DESERIALIZE_FAILED":
        return EngineError(
            f"{where} cannot read '{request.model}': the file is damaged or no ONNX "
            "file; copy the engine again or export it from its checkpoint"
        )
    node = f"node '{fault.node_name()}' ({fault.node_operator()})"
    if code.startswith("UNSUPPORTED"):
        return EngineError(
            f"{where} does not know the operator of {node} in '{request.model}'; "
            f"export the network without it, {_ELSEWHERE}"
        )
    reason = fault.desc().strip()
    remedy = _remedy(reason) or f"export the network without it, {_ELSEWHERE}"
    return EngineError(
        f"{where} refuses {node} of '{request.model}': {_short(reason)}; {remedy}"
    )


def build_error(library: TensorRt, request: GpuRequest) -> EngineError:
    """Translate the log of a build that gave no plan."""
    said = _said(library)
    shapes = ", ".join(
        f"{name} {shape.smallest} to {shape.largest}"
        for name, shape in request.inputs.items()
    )
    remedy = _remedy(said) or f"see the log with --verbose, {_ELSEWHERE}"
    return EngineError(
        f"engine '{request.name}': {library.name} {library.release} cannot build "
        f"'{request.model}' for {shapes}: {_short(said)}; {remedy}"
    )


def load_error(
    library: TensorRt, engine: str, runtime: Any, plan: bytes
) -> EngineError:
    """Explain why a plan was not loaded; TensorRT for RTX names the reasons itself."""
    said = _said(library)
    reasons: set[str] = set()
    if library.is_rtx:
        _, found = runtime.get_engine_validity(plan)
        known = library.api.EngineInvalidityDiagnostics.__members__
        reasons = {name for name, flag in known.items() if int(flag) & int(found)}
    explained = [words for name, words in _INVALID.items() if name in reasons]
    where = f"engine '{engine}': {library.name} {library.release} cannot load its plan"
    what = f"{', '.join(explained) or _short(said)}"
    # Otherwise it is the driver or the memory, and a new plan would fail likewise.
    if reasons & _PLANS_FAULT or "Serialization" in said:
        return UnusablePlanError(
            f"{where}: {what}; build it again: rtfocus engines build {engine}"
        )
    remedy = _remedy(" ".join((said, *reasons))) or "see the log with --verbose"
    return EngineError(f"{where}: {what}; {remedy}")


def _said(library: TensorRt) -> str:
    """Return the first error of the log: what follows are its consequences."""
    errors = library.logger.errors
    return str(errors[0]) if errors else "it gives no reason"


def _remedy(said: str) -> str | None:
    return next((remedy for words, remedy in _REMEDIES if words in said), None)


def _short(said: str) -> str:
    """Cut TensorRT's own source places and everything after the first sentence."""
    first = said.split("\n")
    # The parser repeats the node's name in a line of its own before the reason.
    line = first[1] if first[0].startswith("Invalid Node") and first[1:] else first[0]
    line = re.sub(r"^\S+::\S+: Error Code \d+: ", "", line)
    line = re.sub(r" ?In \w+(\(\))? at /[^\s)]+", "", line)
    return line.replace("( (", "(").replace("))", ")").replace(" ()", "").strip()
