"""Engine: a plan loaded on a GPU, its execution contexts and the kernels it keeps."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rtfocus.engines.card import Precision
from rtfocus.errors import EngineError
from rtfocus.machine import write_atomically
from rtfocus.runtimes.gpu import (
    Gpu,
    GpuRequest,
    IoTensor,
    Shape,
)
from rtfocus.runtimes.tensorrt.library import (
    LibraryName,
    TensorRt,
    UnusablePlanError,
    compile_ahead,
    import_tensorrt,
    load_error,
    why_not_capturable,
    why_not_importable,
    why_unsupported,
)
from rtfocus.runtimes.tensorrt.plans import (
    PlanCache,
    ReadyPlan,
    built_ahead,
    ready_plan,
    target_of,
)

logger = logging.getLogger(__name__)


class TensorRtContext:
    """An execution context; implements `rtfocus.runtimes.gpu.GpuContext`."""

    def __init__(self, name: str, library: TensorRt, context: Any) -> None:
        self._name = name
        self._library = library
        self._context: Any = context
        self._shapes: dict[str, Shape] = {}

    def bind(
        self, buffers: Mapping[str, int], input_shapes: Mapping[str, Shape]
    ) -> None:
        """Set addresses and shapes for all following `enqueue`."""
        self._library.logger.errors.clear()
        for tensor, shape in input_shapes.items():
            if not self._context.set_input_shape(tensor, shape):
                msg = f"input '{tensor}' cannot have the shape {shape}"
                raise self._error(msg)
        for tensor, address in buffers.items():
            if not self._context.set_tensor_address(tensor, address):
                msg = f"there is no tensor '{tensor}' to bind"
                raise self._error(msg)
        lacking = self._context.infer_shapes()
        if lacking:
            msg = f"the shapes of {lacking} are not set"
            raise self._error(msg)
        self._shapes = dict(input_shapes)

    def enqueue(self, cuda_stream: int) -> None:
        """Launch the network on a CUDA stream."""
        if not self._context.execute_async_v3(cuda_stream):
            msg = f"the launch with {self._shapes} was refused"
            raise self._error(msg)

    def why_not_capturable(self, cuda_stream: int) -> str | None:
        """Return why `enqueue` may not be captured in a CUDA graph; None: it may."""
        return why_not_capturable(self._library, self._context, cuda_stream)

    def close(self) -> None:
        """Free the context."""
        self._context = None

    def _error(self, what: str) -> EngineError:
        errors = self._library.logger.errors
        reason = f": {errors[0]}" if errors else ""
        return EngineError(f"engine '{self._name}': {what}{reason}")


class KernelCache:
    """The runtime cache of one engine on one GPU, and its file.

    The engine's ``IRuntimeConfig`` gets the cache; the file is written at `save`.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._path = path
        self._cache: Any = config.create_runtime_cache()
        self._size = self._read()
        config.set_runtime_cache(self._cache)

    def _read(self) -> int:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            logger.warning("compiling GPU kernels, at this first start only")
            return 0
        except OSError as error:
            logger.warning("'%s' cannot be read: %s", self._path, error.strerror)
            return 0
        if not self._cache.deserialize(content):
            logger.warning("'%s' is of no use: compiling GPU kernels anew", self._path)
            return 0
        return len(content)

    def save(self) -> None:
        """Write the file if kernels were added since it was read."""
        kernels = bytes(self._cache.serialize())
        if len(kernels) == self._size:
            return
        try:
            write_atomically(self._path, kernels)
        except OSError as error:
            logger.warning(
                "compiled GPU kernels cannot be kept in '%s' (%s)",
                self._path,
                error.strerror,
            )
            return
        self._size = len(kernels)


def why_unavailable(name: LibraryName, device: Gpu | None) -> str | None:
    """Return why a library cannot run networks here; None: it can."""
    why = why_not_importable(name)
    if why is not None or device is None:
        return why
    return why_unsupported(device.compute_capability)


def open_engine(
    name: LibraryName, request: GpuRequest, device: Gpu
) -> "TensorRtEngine":
    """Load a network, from the cached plan or from one that is built now.

    Raises
    ------
    EngineError
        Names the engine, what TensorRT said, and the remedy.
    """
    library = import_tensorrt(name)
    cache = PlanCache()

    def load(plan: ReadyPlan) -> TensorRtEngine:
        card = re.sub(r"\W+", "-", device.name).strip("-").lower()
        kernels = cache.path(plan.key).with_suffix(f".{card}.kernels")
        return TensorRtEngine(library, request, plan.data, kernels)

    if library.is_rtx and request.precision == "fp32" and not request.tf32:
        logger.warning("engine '%s': %s", request.name, RTX_KEEPS_NO_FP32)
    plan = built_ahead(library, request, device, cache) or ready_plan(
        library, request, target_of(library, device), cache=cache
    )
    try:
        return load(plan)
    except UnusablePlanError as error:
        if plan.build_s is not None:
            raise _not_served(error, library, device) from error
        logger.warning("%s", error)
        cache.discard(plan.key)
    plan = ready_plan(library, request, target_of(library, device), cache=cache)
    try:
        return load(plan)
    except UnusablePlanError as error:
        raise _not_served(error, library, device) from error


RTX_KEEPS_NO_FP32 = (
    "TensorRT for RTX was told to leave out TF32, but on the card where this was "
    "compared (NVIDIA H200, release 1.4) restored frames were off by 1.3e-3 instead of "
    "1e-4; where every bit of fp32 counts set processing.gpu.backend: torch-cuda"
)


def _not_served(error: EngineError, library: TensorRt, device: Gpu) -> EngineError:
    """Say what to do where even a plan that was just built is refused."""
    reason = str(error).partition("; build it again")[0]
    return EngineError(
        f"{reason}, though it was built just now: {library.name} {library.release} "
        f"does not serve {device.name}; update it, or set processing.gpu.backend to "
        "another of tensorrt, tensorrt_rtx and torch-cuda"
    )


class TensorRtEngine:
    """A plan on a GPU; implements `rtfocus.runtimes.gpu.GpuEngine`.

    TensorRT for RTX keeps in `kernels` what it compiles.

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
            compile_ahead(library, self._config, graphs=request.cuda_graphs)
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
