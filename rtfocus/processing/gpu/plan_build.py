"""Plan build: ONNX file to TensorRT plan, through the API all its releases share.

Networks are strongly typed, so the weights file alone decides the arithmetic;
int8 comes as Q/DQ nodes. No timing cache is set: with it TensorRT for RTX would
need a GPU to build.
"""

from collections.abc import Iterable
from typing import Any

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.plan_errors import build_error, parse_error
from rtfocus.processing.gpu.plan_progress import Progress, make_monitor
from rtfocus.processing.gpu.seam import GpuRequest
from rtfocus.processing.gpu.tensorrt_import import TensorRt

Capability = tuple[int, int]
"""Major and minor, e.g. (8, 6)."""


def build_plan(
    library: TensorRt,
    request: GpuRequest,
    capabilities: Iterable[Capability] = (),
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
    capabilities: Iterable[Capability],
) -> Any:
    api = library.api
    config = builder.create_builder_config()
    if not request.tf32:
        config.clear_flag(api.BuilderFlag.TF32)
    if request.workspace_bytes is not None:
        pool = api.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, request.workspace_bytes)
    if library.is_rtx:
        _set_capabilities(api, config, list(capabilities))
    profile = builder.create_optimization_profile()
    for name, shapes in request.inputs.items():
        profile.set_shape(name, shapes.smallest, shapes.usual, shapes.largest)
    if config.add_optimization_profile(profile) < 0:
        raise build_error(library, request)
    return config


def _set_capabilities(api: Any, config: Any, capabilities: list[Capability]) -> None:
    if not capabilities:
        return
    config.num_compute_capabilities = len(capabilities)
    for index, (major, minor) in enumerate(capabilities):
        known = getattr(api.ComputeCapability, f"SM{major}{minor}", None)
        if known is None or not config.set_compute_capability(known, index):
            msg = f"this release builds no plans for compute capability {major}.{minor}"
            raise EngineError(msg)
