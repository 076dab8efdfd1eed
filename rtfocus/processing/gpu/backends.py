"""GPU backends: the runtimes a network can run on, in order of preference."""

import logging
from functools import partial
from importlib import import_module

from rtfocus.errors import EngineError
from rtfocus.processing.gpu import trt_backend
from rtfocus.processing.gpu.seam import GpuBackend, GpuDevice, GpuEngine, GpuRequest

logger = logging.getLogger(__name__)

_TORCH = "rtfocus.processing.gpu.torch_backend.engine"


def _why_no_torch(device: GpuDevice | None) -> str | None:
    try:
        module = import_module(_TORCH)
    except ImportError as error:
        return f"torch-cuda cannot be imported ({error}); pip install torch onnx"
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


def available_backends(wanted: str, device: GpuDevice | None) -> list[GpuBackend]:
    """Return the backends that can be used, in order, for a name or ``auto``.

    Parameters
    ----------
    wanted
        ``auto`` or a name of `GPU_BACKENDS`.
    device
        The GPU they are to run on; None: look at the libraries alone.

    Raises
    ------
    EngineError
        If the wanted one, or every one, is unavailable; gives each reason.
    """
    asked = [b for b in GPU_BACKENDS if wanted in ("auto", b.name)]
    reasons = {backend.name: backend.why_unavailable(device) for backend in asked}
    usable = [backend for backend in asked if reasons[backend.name] is None]
    if not usable:
        known = ", ".join(backend.name for backend in GPU_BACKENDS)
        told = [f"{name}: {why}" for name, why in reasons.items()]
        why = "; ".join(told) or f"known are {known} and auto"
        msg = f"no GPU backend for '{wanted}': {why}"
        raise EngineError(msg)
    for name, reason in reasons.items():
        if reason is not None:
            logger.info("GPU backend %s not taken: %s", name, reason)
    return usable


def open_network(wanted: str, request: GpuRequest, device: GpuDevice) -> GpuEngine:
    """Load a network with the backend of a name, or the first that can.

    With ``auto`` a backend that cannot build or load this network is told about and
    passed over.

    Raises
    ------
    EngineError
        If none can; gives each reason.
    """
    failures: list[EngineError] = []
    for backend in available_backends(wanted, device):
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
