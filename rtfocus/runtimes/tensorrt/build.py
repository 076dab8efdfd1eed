"""Build: ONNX file to TensorRT plan, through the API all its releases share.

Networks are strongly typed, so the weights file alone decides the arithmetic;
int8 comes as Q/DQ nodes. No timing cache is set: with it TensorRT for RTX would
need a GPU to build.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from rtfocus.errors import EngineError
from rtfocus.runtimes.gpu import GpuRequest
from rtfocus.runtimes.tensorrt.library import (
    Capability,
    TensorRt,
    name_capabilities,
    why_invalid,
)

Progress = Callable[[str, int, int], bool]
"""Called with the phase's name, steps done and steps of the phase; False cancels.
TensorRT calls from threads of its own."""


def make_monitor(api: Any, progress: Progress) -> Any:
    """Return a progress monitor of a TensorRT library.

    Its ``cancelled`` says whether `progress` asked to stop.
    """

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        """Phases nest; each is told by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False
            self._steps: dict[str, int] = {}
            self._failure: BaseException | None = None

        def phase_start(
            self, phase_name: str, parent_phase: str | None, num_steps: int
        ) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.cancelled

        def _tell(self, phase: str, done: int) -> None:
            # An exception must not unwind through TensorRT: kept, raised after.
            try:
                if not progress(phase, done, self._steps.get(phase, done)):
                    self.cancelled = True
            except BaseException as error:
                self._failure, self.cancelled = error, True

        def raise_failure(self) -> None:
            """Raise what `progress` raised, if it did."""
            if self._failure is not None:
                raise self._failure

    return Monitor()


_ELSEWHERE = "or run it with processing.backend torch-cuda or on the CPU"
_TOO_BIG = (
    "lower processing.gpu.tiles_per_batch, use --precision fp16, or raise the workspace"
)
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
        # What releases before 1.7 say of a convolution of int8 numbers.
        "dtype == myelinTypeFP8E4M3",
        'int8 needs tensorrt_rtx 1.7 or later: pip install -U "tensorrt_rtx>=1.7", or '
        "use --precision fp16",
    ),
    (
        "Int32 but must have type",
        "biases must not be quantised: write the int8 file with QuantizeBias off",
    ),
    ("OutOfMemory", _TOO_BIG),
    ("workspace limit", _TOO_BIG),
    (
        "out of memory",
        "lower processing.gpu.tiles_per_batch, use --precision fp16, or close other "
        "programs that use the GPU",
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
        "OLD_CUDA_",
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
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
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
    reasons = why_invalid(library, runtime, plan)
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


def build_plan(
    library: TensorRt,
    request: GpuRequest,
    capabilities: Sequence[Capability] = (),
    progress: Progress | None = None,
) -> bytes:
    """Build the plan of a network.

    Parameters
    ----------
    library
        TensorRT, which tunes on the current GPU, or TensorRT for RTX.
    request
        Names the weights, the shapes and the options.
    capabilities
        TensorRT for RTX only: compute capabilities the plan is for; none: every
        card from 8.0 on.
    progress
        Told of every step; what it returns says whether to go on.

    Raises
    ------
    EngineError
        Names the node or the tensor, and the remedy; also after a cancellation.
    """
    library.logger.errors.clear()
    builder = library.api.Builder(library.logger)
    # The network refers to weights that the parser owns: both must live until built.
    network, parser = _parse(library, builder, request)
    _check_inputs(request, network)
    config = _configure(library, builder, request, capabilities)
    monitor = make_monitor(library.api, progress) if progress else None
    if monitor is not None:
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    del parser
    if monitor is not None:
        monitor.raise_failure()
        if monitor.cancelled:
            msg = f"engine '{request.name}': building its plan was cancelled"
            raise EngineError(msg)
    if plan is None:
        raise build_error(library, request)
    return bytes(plan)


def _parse(library: TensorRt, builder: Any, request: GpuRequest) -> tuple[Any, Any]:
    api = library.api
    flags = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # Releases without the flag know nothing but strongly typed networks.
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = api.OnnxParser(network, library.logger)
    try:
        model = request.model.read_bytes()
    except OSError as error:
        msg = f"weights '{request.model}' cannot be read: {error.strerror}"
        raise EngineError(msg) from error
    if not parser.parse(model):
        faults = [parser.get_error(index) for index in range(parser.num_errors)]
        raise parse_error(library, request, faults)
    if network.num_outputs == 0:
        # An empty file and some other files pass for a network without nodes.
        msg = (
            f"engine '{request.name}': '{request.model}' holds no network; "
            "copy the engine again or export it from its checkpoint"
        )
        raise EngineError(msg)
    return network, parser


def _check_inputs(request: GpuRequest, network: Any) -> None:
    """Compare names: TensorRT ignores a shape for an input that is not there."""
    there = {network.get_input(index).name for index in range(network.num_inputs)}
    if there != set(request.inputs):
        msg = (
            f"engine '{request.name}': the card names the inputs "
            f"{sorted(request.inputs)}, '{request.model}' has {sorted(there)}; "
            "correct the card or export the engine again"
        )
        raise EngineError(msg)


def _configure(
    library: TensorRt,
    builder: Any,
    request: GpuRequest,
    capabilities: Sequence[Capability],
) -> Any:
    api = library.api
    config = builder.create_builder_config()
    if not request.tf32:
        config.clear_flag(api.BuilderFlag.TF32)
    if request.workspace_bytes is not None:
        pool = api.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, request.workspace_bytes)
    name_capabilities(library, config, capabilities)
    profile = builder.create_optimization_profile()
    for name, shapes in request.inputs.items():
        profile.set_shape(name, shapes.smallest, shapes.usual, shapes.largest)
    if config.add_optimization_profile(profile) < 0:
        raise build_error(library, request)
    return config
