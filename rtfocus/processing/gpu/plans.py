"""Plans: from the cache, or built once, which the user is told."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.plan_build import Capability, build_plan
from rtfocus.processing.gpu.plan_cache import PlanCache, PlanKey
from rtfocus.processing.gpu.plan_progress import Progress
from rtfocus.processing.gpu.seam import GpuDevice, GpuRequest
from rtfocus.processing.gpu.tensorrt_import import (
    TensorRt,
    listed_capabilities,
    why_unsupported,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlanTarget:
    """The GPU a plan is for."""

    gpu: str
    """As in `PlanKey.gpu`."""
    capabilities: tuple[Capability, ...] = ()
    """TensorRT for RTX: those named to the builder; none: 8.0 and later."""


@dataclass(frozen=True, slots=True)
class ReadyPlan:
    """A plan and where it came from."""

    data: bytes
    key: PlanKey
    build_s: float | None
    """Seconds it took to build; None: it was in the cache."""


ANY_CARD = PlanTarget("8.0 and later")
"""TensorRT for RTX: every card it serves, those of 7.5 apart."""


def target_of(library: TensorRt, device: GpuDevice) -> PlanTarget:
    """Return the target of a library's plans for a GPU.

    Raises
    ------
    EngineError
        If the library does not serve it.
    """
    if library.is_rtx:
        return rtx_target(library, device.compute_capability)
    why = why_unsupported(library, device.compute_capability)
    if why is not None:
        raise EngineError(why)
    return PlanTarget(f"{device.name}, {_text(device.compute_capability)}")


def rtx_target(library: TensorRt, capability: Capability) -> PlanTarget:
    """Return the target of TensorRT for RTX for a compute capability.

    Cards newer than every one the release lists take the plan for any card.

    Raises
    ------
    EngineError
        If the release does not serve it.
    """
    why = why_unsupported(library, capability)
    if why is not None:
        raise EngineError(why)
    if capability not in listed_capabilities(library):
        return ANY_CARD
    return PlanTarget(_text(capability), (capability,))


def ready_plan(
    library: TensorRt,
    request: GpuRequest,
    target: PlanTarget,
    *,
    cache: PlanCache | None = None,
    progress: Progress | None = None,
    rebuild: bool = False,
) -> ReadyPlan:
    """Return the plan of a request, built and kept if the cache has none.

    Raises
    ------
    EngineError
        If it cannot be built.
    """
    cache = cache or PlanCache()
    key = PlanKey.of(
        request, library=library.name, release=library.release, gpu=target.gpu
    )
    found = None if rebuild else cache.find(key)
    if found is not None:
        return ReadyPlan(found, key, None)
    why = "asked for" if rebuild else cache.why_absent(key)
    logger.warning(
        "building the %s plan of engine '%s' with %s %s for %s (%s); %s",
        request.precision,
        request.name,
        library.name,
        library.release,
        target.gpu,
        why,
        "takes seconds" if library.is_rtx else "takes minutes, once",
    )
    start = time.monotonic()
    plan = build_plan(library, request, target.capabilities, progress)
    cache.keep(key, plan)
    return ReadyPlan(plan, key, time.monotonic() - start)


def _text(capability: Sequence[int]) -> str:
    return ".".join(str(part) for part in capability)
