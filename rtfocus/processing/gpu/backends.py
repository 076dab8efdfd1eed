"""Backends: the GPU runtimes a network can run on, in order of preference."""

import logging
from functools import partial
from importlib import import_module

from rtfocus.engines.registry import FoundEngine
from rtfocus.errors import EngineError
from rtfocus.machine import usable
from rtfocus.processing.channel_plan import ChannelPlan
from rtfocus.processing.gpu.engine import (
    Gpu,
    GpuBackend,
    GpuEngine,
    GpuRequest,
    gpu_request,
)
from rtfocus.processing.gpu.tensorrt import engine as tensorrt_engine

logger = logging.getLogger(__name__)

_TORCH = "rtfocus.processing.gpu.torch_engine"


def _why_no_torch(device: Gpu | None) -> str | None:
    try:
        module = import_module(_TORCH)
    except ImportError as error:
        return f"torch-cuda cannot be imported ({error}); pip install torch onnx"
    why: str | None = module.why_unavailable(device)
    return why


def _open_torch(request: GpuRequest, device: Gpu) -> GpuEngine:
    engine: GpuEngine = import_module(_TORCH).open_engine(request, device)
    return engine


# ORDER MATTERS for "auto": tuned on the card first, the second opinion last.
GPU_BACKENDS: tuple[GpuBackend, ...] = (
    GpuBackend(
        "tensorrt",
        partial(tensorrt_engine.why_unavailable, "tensorrt"),
        partial(tensorrt_engine.open_engine, "tensorrt"),
    ),
    GpuBackend(
        "tensorrt_rtx",
        partial(tensorrt_engine.why_unavailable, "tensorrt_rtx"),
        partial(tensorrt_engine.open_engine, "tensorrt_rtx"),
    ),
    GpuBackend("torch-cuda", _why_no_torch, _open_torch),
)


def open_network(wanted: str, request: GpuRequest, device: Gpu) -> GpuEngine:
    """Load a network with the backend of a name, or the first that can.

    With ``auto`` a backend that cannot build or load this network is told about and
    passed over.

    Raises
    ------
    EngineError
        If none can; gives each reason.
    """
    failures: list[EngineError] = []
    for backend in usable(
        "GPU backend", wanted, GPU_BACKENDS, lambda known: known.why_unavailable(device)
    ):
        try:
            engine = backend.open(request, device)
        except EngineError as error:
            logger.warning("GPU backend %s passed over: %s", backend.name, error)
            failures.append(error)
        else:
            logger.info("engine '%s' runs on %s", request.name, engine.backend)
            return engine
    if len(failures) == 1:
        raise failures[0]
    msg = "; ".join(str(error) for error in failures)
    raise EngineError(msg) from failures[-1]


def open_for_plan(
    plan: ChannelPlan, found: FoundEngine, device: Gpu
) -> tuple[GpuEngine, GpuRequest]:
    """Load the network of an engine of a channel, and what was asked for.

    Raises
    ------
    EngineError
        If it has no network, or no backend runs it here.
    """
    settings = plan.processing.gpu
    request = gpu_request(
        found,
        plan.size,
        None if settings.precision == "auto" else settings.precision,
        tf32=settings.tf32,
        cuda_graphs=settings.cuda_graphs,
    )
    return open_network(settings.backend, request, device), request


def runs_on(engine: GpuEngine) -> str:
    """Say what a network runs on, e.g. ``tensorrt 10.13.3 fp16``."""
    return f"{engine.backend} {engine.precision}"
