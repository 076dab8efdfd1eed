"""Library: those that share one API, each with the reason why not, and its errors.

``tensorrt`` (10.8 to 11) tunes a plan on the GPU at hand; ``tensorrt_rtx`` (TensorRT
for RTX, 1.4 to 1.7) builds it without one and compiles its kernels on the card at the
first start. What only the latter has is asked for here, and its kernels are kept by
`rtfocus.runtimes.tensorrt.engine.KernelCache`.
"""

import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

from rtfocus.errors import EngineError
from rtfocus.runtimes.gpu import GpuRequest

LibraryName = Literal["tensorrt", "tensorrt_rtx"]
# ORDER MATTERS: what is tuned on the card first.
LIBRARIES: tuple[LibraryName, ...] = ("tensorrt", "tensorrt_rtx")

_INSTALL: dict[LibraryName, str] = {
    "tensorrt": (
        'pip install "rtfocus[gpu]"; its libraries come from NVIDIA: '
        "https://docs.nvidia.com/deeplearning/tensorrt"
    ),
    "tensorrt_rtx": 'pip install "rtfocus[rtx]"',
}
Capability = tuple[int, int]
"""Major and minor, e.g. (8, 6)."""

_OLDEST_CAPABILITY = (7, 5)


@dataclass(frozen=True, slots=True)
class TensorRt:
    """A TensorRT library, imported."""

    name: LibraryName
    release: str
    """E.g. ``10.13.3``; a plan runs on the release that built it only."""
    api: Any
    """The module."""
    logger: Any
    """The process's only logger of this library, see `make_logger`."""

    @property
    def is_rtx(self) -> bool:
        """Whether plans are built without a GPU and compiled on the card."""
        return self.name == "tensorrt_rtx"


@cache
def import_tensorrt(name: LibraryName) -> TensorRt:
    """Import a library by name.

    Raises
    ------
    EngineError
        With the reason and the remedy.
    """
    try:
        api = import_module(name)
    # The bindings without the libraries raise either, depending on the system.
    except (ImportError, OSError) as error:
        msg = f"{name} cannot be imported ({error}); {_INSTALL[name]}"
        raise EngineError(msg) from error
    return TensorRt(name, str(api.__version__), api, make_logger(api, name))


def why_not_importable(name: LibraryName) -> str | None:
    """Return why a library cannot be used on this machine; None: it can."""
    try:
        import_tensorrt(name)
    except EngineError as error:
        return str(error)
    return None


def why_unsupported(capability: Capability) -> str | None:
    """Return why no library serves a GPU at hand; None: the runtime is to be asked.

    A release may run on cards it does not list: TensorRT for RTX 1.4 lists no Hopper
    and runs there.
    """
    if capability >= _OLDEST_CAPABILITY:
        return None
    return (
        f"compute capability {capability[0]}.{capability[1]} is older than 7.5, the "
        "first that TensorRT serves"
    )


def why_invalid(library: TensorRt, runtime: Any, plan: bytes) -> set[str]:
    """Return why a runtime refuses a plan, as it names its reasons; none: unknown."""
    if not library.is_rtx:
        return set()
    _, validity = runtime.get_engine_validity(plan)
    known = library.api.EngineInvalidityDiagnostics.__members__
    return {name for name, flag in known.items() if int(flag) & int(validity)}


def name_capabilities(
    library: TensorRt, config: Any, capabilities: Sequence[Capability]
) -> None:
    """Name the capabilities a plan is built for; none: every card from 8.0 on.

    Raises
    ------
    EngineError
        If the release does not know one.
    """
    if not library.is_rtx or not capabilities:
        return
    config.num_compute_capabilities = len(capabilities)
    for index, (major, minor) in enumerate(capabilities):
        known = getattr(library.api.ComputeCapability, f"SM{major}{minor}", None)
        if known is None or not config.set_compute_capability(known, index):
            msg = (
                f"this release of TensorRT-RTX ({library.release}) builds no plans for "
                f"compute capability {major}.{minor}; install a later one"
            )
            raise EngineError(msg)


def compile_ahead(library: TensorRt, config: Any, *, graphs: bool) -> None:
    """Have kernels compiled at the warm-up, not beside frames, and recorded.

    Parameters
    ----------
    config
        ``IRuntimeConfig`` of TensorRT for RTX.
    graphs
        Whether the library records them as a CUDA graph of its own.
    """
    api = library.api
    config.dynamic_shapes_kernel_specialization_strategy = (
        api.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    if graphs:
        config.cuda_graph_strategy = api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def why_not_capturable(library: TensorRt, context: Any, stream: int) -> str | None:
    """Return why an execution context may not be recorded from outside; None: may."""
    if not library.is_rtx:
        return None
    strategy = context.get_runtime_config().cuda_graph_strategy
    if strategy != library.api.CudaGraphStrategy.DISABLED:
        return "TensorRT for RTX records a CUDA graph of its own"
    if not context.is_stream_capturable(stream):
        return "this network needs the host between its kernels"
    return None


def listed_capabilities(library: TensorRt) -> list[Capability]:
    """Return the compute capabilities a release of TensorRT for RTX can name."""
    members = library.api.ComputeCapability.__members__
    digits = (name.removeprefix("SM") for name in members if name.startswith("SM"))
    return sorted((int(text[:-1]), int(text[-1])) for text in digits)


# What TensorRT says when it looks for a GPU to clean up on where there is none;
# it follows every error on such a machine and explains nothing.
_ECHO = "catchCudaError"


def make_logger(api: Any, name: str) -> Any:
    """Return a logger of a library whose ``errors`` holds what went wrong last."""
    logger = logging.getLogger(f"rtfocus.{name}")
    severity = api.ILogger.Severity
    # An error of TensorRT reaches the user as our error, with a remedy: it is not
    # reported twice.
    levels = {
        severity.INTERNAL_ERROR: logging.INFO,
        severity.ERROR: logging.INFO,
        severity.WARNING: logging.INFO,
    }
    serious = (severity.INTERNAL_ERROR, severity.ERROR)

    class TensorRtLogger(api.ILogger):  # type: ignore[misc]
        """Receives messages from every thread of TensorRT."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=50)

        def log(self, severity: Any, message: str) -> None:
            logger.log(levels.get(severity, logging.DEBUG), "%s", message)
            if severity in serious and _ECHO not in message:
                self.errors.append(message)

    return TensorRtLogger()


Progress = Callable[[str, int, int], bool]
"""Called with the phase's name, steps done and steps of the phase; False cancels.
TensorRT calls from threads of its own."""


def make_monitor(api: Any, progress: Progress) -> Any:
    """Return a progress monitor of a TensorRT library.

    Its ``cancelled`` says whether `progress` asked to stop.
    """

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        """Phases nest; each is reported on its own."""

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
        return EngineError(
            f"{where} cannot read '{request.model}': {_first_error(library)}"
        )
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
        f"{where} refuses {node} of '{request.model}': {_reason_in(reason)}; {remedy}"
    )


def build_error(library: TensorRt, request: GpuRequest) -> EngineError:
    """Translate the log of a build that gave no plan."""
    message = _first_error(library)
    shapes = ", ".join(
        f"{name} {shape.smallest} to {shape.largest}"
        for name, shape in request.inputs.items()
    )
    remedy = _remedy(message) or f"see the log with --verbose, {_ELSEWHERE}"
    return EngineError(
        f"engine '{request.name}': {library.name} {library.release} cannot build "
        f"'{request.model}' for {shapes}: {_reason_in(message)}; {remedy}"
    )


def load_error(
    library: TensorRt, engine: str, runtime: Any, plan: bytes
) -> EngineError:
    """Explain why a plan was not loaded; TensorRT for RTX names the reasons itself."""
    message = _first_error(library)
    reasons = why_invalid(library, runtime, plan)
    explained = [words for name, words in _INVALID.items() if name in reasons]
    where = f"engine '{engine}': {library.name} {library.release} cannot load its plan"
    cause = f"{', '.join(explained) or _reason_in(message)}"
    # Otherwise it is the driver or the memory, and a new plan would fail likewise.
    if reasons & _PLANS_FAULT or "Serialization" in message:
        return UnusablePlanError(
            f"{where}: {cause}; build it again: rtfocus engines build {engine}"
        )
    remedy = _remedy(" ".join((message, *reasons))) or "see the log with --verbose"
    return EngineError(f"{where}: {cause}; {remedy}")


def _first_error(library: TensorRt) -> str:
    """Return the first error of the log: what follows are its consequences."""
    errors = library.logger.errors
    return str(errors[0]) if errors else "it gives no reason"


def _remedy(message: str) -> str | None:
    return next((remedy for words, remedy in _REMEDIES if words in message), None)


def _reason_in(message: str) -> str:
    """Cut TensorRT's own source places and everything after the first sentence."""
    first = message.split("\n")
    # The parser repeats the node's name in a line of its own before the reason.
    line = first[1] if first[0].startswith("Invalid Node") and first[1:] else first[0]
    line = re.sub(r"^\S+::\S+: Error Code \d+: ", "", line)
    line = re.sub(r" ?In \w+(\(\))? at /[^\s)]+", "", line)
    return line.replace("( (", "(").replace("))", ")").replace(" ()", "").strip()
