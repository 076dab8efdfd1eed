"""Select: which frame processor runs a config, from an ordered list with reasons."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.processing.cpu import CpuProcessor
from rtfocus.processing.fallback import FallbackProcessor
from rtfocus.processing.gpu.devices import why_no_gpu
from rtfocus.processing.gpu.native_library import NVRTC, why_not_loadable
from rtfocus.processing.gpu.processor import GpuProcessor
from rtfocus.processing.seam import FrameProcessor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessorKind:
    """A processor: whether this machine can run it, and how it is opened."""

    name: str
    why_unavailable: Callable[[], str | None]
    """Reason why not, with the remedy; None: available."""
    open_processor: Callable[[Config], FrameProcessor]


def _why_no_gpu() -> str | None:
    return why_no_gpu() or why_not_loadable(NVRTC)


# ORDER MATTERS for "auto": fastest first.
PROCESSORS: tuple[ProcessorKind, ...] = (
    ProcessorKind("gpu", _why_no_gpu, GpuProcessor),
    ProcessorKind("cpu", lambda: None, CpuProcessor),
)


def open_processor(config: Config) -> FrameProcessor:
    """Open the processor of ``processing.device``; for ``auto`` the best there is.

    For ``auto`` a GPU that cannot run a series leaves it to the CPU, and says so.

    Raises
    ------
    EngineError
        If the device that is asked for is unavailable; says what is missing.
    """
    wanted = config.processing.device
    reasons: list[str] = []
    for kind in PROCESSORS:
        if wanted not in ("auto", kind.name):
            continue
        why = kind.why_unavailable()
        if why is None:
            passed_over = f" (not {'; '.join(reasons)})" if reasons else ""
            logger.info("frame processor: %s%s", kind.name, passed_over)
            if wanted == "auto" and kind.open_processor is not CpuProcessor:
                return FallbackProcessor(
                    kind.open_processor(config), CpuProcessor(config)
                )
            return kind.open_processor(config)
        reasons.append(f"{kind.name}: {why}")
    msg = (
        f"no frame processor for processing.device '{wanted}': {'; '.join(reasons)}; "
        "or set processing.device to cpu or auto"
    )
    raise EngineError(msg)
