"""TensorRT backend: plans loaded on a GPU, for both libraries that share the API."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rtfocus.errors import EngineError
from rtfocus.processing.engines.card_sections import Precision
from rtfocus.processing.gpu.kernel_cache import KernelCache
from rtfocus.processing.gpu.plan_cache import PlanCache
from rtfocus.processing.gpu.plan_errors import UnusablePlanError, load_error
from rtfocus.processing.gpu.plans import ReadyPlan, ready_plan, target_of
from rtfocus.processing.gpu.seam import (
    GpuDevice,
    GpuRequest,
    IoTensor,
    Shape,
)
from rtfocus.processing.gpu.tensorrt_import import (
    LibraryName,
    TensorRt,
    import_tensorrt,
    why_not_importable,
    why_unsupported,
)
from rtfocus.processing.gpu.trt_context import TensorRtContext

logger = logging.getLogger(__name__)


def why_unavailable(name: LibraryName, device: GpuDevice | None) -> str | None:
    """Return why a library cannot run networks here; None: it can."""
    why = why_not_importable(name)
    if why is not None or device is None:
        return why
    return why_unsupported(import_tensorrt(name), device.compute_capability)


def open_engine(
    name: LibraryName, request: GpuRequest, device: GpuDevice
) -> "TensorRtEngine":
    """Load a network, from the cached plan or from one that is built now.

    Raises
    ------
    EngineError
        Names the engine, what TensorRT said, and the remedy.
    """
    library = import_tensorrt(name)
    target = target_of(library, device)
    cache = PlanCache()
    plan = ready_plan(library, request, target, cache=cache)
    kernels = _kernel_file(cache, plan, device)
    try:
        return TensorRtEngine(library, request, plan.data, kernels)
    except UnusablePlanError as error:
        if plan.build_s is not None:
            raise
        logger.warning("%s", error)
        cache.discard(plan.key)
        plan = ready_plan(library, request, target, cache=cache)
        return TensorRtEngine(library, request, plan.data, kernels)


class TensorRtEngine:
    """A plan on a GPU; implements `rtfocus.processing.gpu.seam.GpuEngine`.

    Parameters
    ----------
    library
        That built `plan`.
    request
        What `plan` was built for.
    plan
        Serialised.
    kernels
        Where TensorRT for RTX keeps the kernels it compiles.

    Raises
    ------
    EngineError
        If the plan cannot be loaded; says why and what to do.
    """

    def __init__(
        self, library: TensorRt, request: GpuRequest, plan: bytes, kernels: Path
    ) -> None:
        self.name = request.name
        self.backend = f"{library.name} {library.release}"
        self.precision: Precision = request.precision
        self._library = library
        library.logger.errors.clear()
        self._runtime: Any = library.api.Runtime(library.logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise load_error(library, request.name, self._runtime, plan)
        self.tensors: Mapping[str, IoTensor] = _io_tensors(library.api, self._engine)
        self.context_bytes = int(self._engine.device_memory_size_v2)
        self._config: Any = None
        self._kernels: KernelCache | None = None
        if library.is_rtx:
            self._config = self._engine.create_runtime_config()
            self._kernels = KernelCache(self._config, kernels)
            _configure_rtx(library.api, self._config, graphs=request.cuda_graphs)
        self._measuring: Any = None

    def output_shapes(self, input_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shape of every output for these inputs."""
        if self._measuring is None:
            # Without memory of its own: it is asked for shapes and never runs.
            strategy = self._library.api.ExecutionContextAllocationStrategy
            self._measuring = self._engine.create_execution_context(
                strategy.USER_MANAGED
            )
        for tensor, shape in input_shapes.items():
            if not self._measuring.set_input_shape(tensor, shape):
                msg = f"engine '{self.name}': input '{tensor}' cannot have {shape}"
                raise EngineError(msg)
        return {
            tensor.name: tuple(self._measuring.get_tensor_shape(tensor.name))
            for tensor in self.tensors.values()
            if not tensor.is_input
        }

    def open_context(self) -> TensorRtContext:
        """Make one more execution context."""
        self._library.logger.errors.clear()
        arguments = () if self._config is None else (self._config,)
        context = self._engine.create_execution_context(*arguments)
        if context is None:
            errors = self._library.logger.errors
            msg = (
                f"engine '{self.name}': no memory for one more execution context of "
                f"{self.context_bytes / 1e6:.0f} MB ({errors[0] if errors else ''}); "
                "lower the frames in flight or the tiles per batch"
            )
            raise EngineError(msg)
        return TensorRtContext(self.name, self._library, context)

    def close(self) -> None:
        """Keep the kernels compiled meanwhile and free the weights."""
        if self._kernels is not None:
            self._kernels.save()
        # In this order: a context must not outlive its engine, nor that its runtime.
        self._measuring = self._kernels = self._config = None
        self._engine = None
        self._runtime = None


def _io_tensors(api: Any, engine: Any) -> dict[str, IoTensor]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return {
        name: IoTensor(
            name,
            np.dtype(api.nptype(engine.get_tensor_dtype(name))),
            is_input=engine.get_tensor_mode(name) == api.TensorIOMode.INPUT,
        )
        for name in names
    }


def _configure_rtx(api: Any, config: Any, *, graphs: bool) -> None:
    # Kernels for the shapes of a series are compiled before its first frame, at
    # the warm-up, not beside the frames.
    config.dynamic_shapes_kernel_specialization_strategy = (
        api.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    if graphs:
        config.cuda_graph_strategy = api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


def _kernel_file(cache: PlanCache, plan: ReadyPlan, device: GpuDevice) -> Path:
    card = re.sub(r"\W+", "-", device.name).strip("-").lower()
    return cache.path(plan.key).with_suffix(f".{card}.kernels")
