"""Library: those that share one API, each with the reason why not.

``tensorrt`` (10.8 to 11) tunes a plan on the GPU at hand; ``tensorrt_rtx`` (TensorRT
for RTX, 1.4 to 1.7) builds it without one and compiles its kernels on the card at the
first start. What only the latter has is asked for here, and its kernels are kept by
`rtfocus.runtimes.tensorrt.engine.KernelCache`.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

from rtfocus.errors import EngineError

LibraryName = Literal["tensorrt", "tensorrt_rtx"]
# ORDER MATTERS: what is tuned on the card first.
LIBRARIES: tuple[LibraryName, ...] = ("tensorrt", "tensorrt_rtx")

_REMEDIES: dict[LibraryName, str] = {
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
    """The process's only logger of this library, see `tensorrt_log`."""

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
        msg = f"{name} cannot be imported ({error}); {_REMEDIES[name]}"
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
    """Return why a runtime refuses a plan, as it names its reasons; none: not told."""
    if not library.is_rtx:
        return set()
    _, found = runtime.get_engine_validity(plan)
    known = library.api.EngineInvalidityDiagnostics.__members__
    return {name for name, flag in known.items() if int(flag) & int(found)}


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
            msg = f"this release builds no plans for compute capability {major}.{minor}"
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
    """Return a logger of a library whose ``errors`` holds what went wrong last.

    Parameters
    ----------
    api
        Module ``tensorrt`` or ``tensorrt_rtx``.
    name
        Of the library, for `logging`.
    """
    logger = logging.getLogger(f"rtfocus.{name}")
    severity = api.ILogger.Severity
    # An error of TensorRT reaches the user as our error, with a remedy: it is not
    # told twice.
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
