"""Library: those that share one API, each with the reason why not.

``tensorrt`` tunes a plan on the GPU at hand; ``tensorrt_rtx`` (TensorRT for RTX)
builds it without one and compiles its kernels on the card at the first start.
"""

import logging
from collections import deque
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
        "pip install rtfocus[gpu]; its libraries come from NVIDIA: "
        "https://docs.nvidia.com/deeplearning/tensorrt"
    ),
    "tensorrt_rtx": "pip install rtfocus[rtx]",
}
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


def why_unsupported(library: TensorRt, capability: tuple[int, int]) -> str | None:
    """Return why a library does not serve a GPU of a compute capability."""
    found = f"compute capability {capability[0]}.{capability[1]}"
    if capability < _OLDEST_CAPABILITY:
        return f"{found} is older than 7.5, the first that TensorRT serves"
    if not library.is_rtx:
        return None
    listed = listed_capabilities(library)
    if capability in listed or capability > max(listed):
        return None
    names = ", ".join(f"{major}.{minor}" for major, minor in listed)
    return (
        f"{library.name} {library.release} serves {names}, this GPU has {found}; "
        "data-centre cards are served by tensorrt"
    )


def listed_capabilities(library: TensorRt) -> list[tuple[int, int]]:
    """Return the compute capabilities a release of TensorRT for RTX builds for."""
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
