"""GPU backends: the runtimes a network can run on, in order of preference."""

import logging
from functools import partial
from importlib import import_module

from rtfocus.errors import EngineError
from rtfocus.processing.gpu import trt_backend
from rtfocus.processing.gpu.seam import GpuBackend, GpuDevice, GpuEngine, GpuRequest

logger = logging.getLogger(__name__)

_TORCH = "rtfocus.processing.gpu.torch_backend"


def _why_no_torch(device: GpuDevice | None) -> str | None:
    try:
        module = import_module(_TORCH)
    except ImportError as error:
        return f"torch cannot be imported ({error}); pip install torch"
    why: str | None = module.why_unavailable(device)
    return why


def _open_torch(request: GpuRequest, device: GpuDevice) -> GpuEngine:
    engine: GpuEngine = import_module(_TORCH).open_engine(request, device)
    return engine


# ORDER MATTERS for "auto": tuned on the card first, the second opinion last.
GPU_BACKENDS: tuple[GpuBackend, ...] = (
    GpuBackend(
        "tensorrt",
        partial(trt_backend.why_unavailable, "tensorrt"),
        partial(trt_backend.open_engine, "tensorrt"),
    ),
    GpuBackend(
        "tensorrt_rtx",
        partial(trt_backend.why_unavailable, "tensorrt_rtx"),
        partial(trt_backend.open_engine, "tensorrt_rtx"),
    ),
    GpuBackend("torch-cuda", _why_no_torch, _open_torch),
)


def choose_gpu_backend(wanted: str, device: GpuDevice | None) -> GpuBackend:
    """Return the GPU backend of a name, or for ``auto`` the first that is available.

    Parameters
    ----------
    wanted
        ``auto`` or a name of `GPU_BACKENDS`.
    device
        The GPU it is to run on; None: look at the libraries alone.

    Raises
    ------
    EngineError
        If the wanted one, or every one, is unavailable; gives each reason.
    """
    reasons: list[str] = []
    for backend in GPU_BACKENDS:
        if wanted not in ("auto", backend.name):
            continue
        why = backend.why_unavailable(device)
        if why is None:
            passed_over = f" (not {'; '.join(reasons)})" if reasons else ""
            logger.info("GPU backend: %s%s", backend.name, passed_over)
            return backend
        reasons.append(f"{backend.name}: {why}")
    if not reasons:
        known = ", ".join(backend.name for backend in GPU_BACKENDS)
        reasons.append(f"known are {known} and auto")
    msg = f"no GPU backend for '{wanted}': {'; '.join(reasons)}"
    raise EngineError(msg)
