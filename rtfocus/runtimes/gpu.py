"""GPU: what the device asks of a runtime, and those there are, in order of preference.

The processor owns device buffers, CUDA streams and CUDA events; a backend only
turns addresses of inputs into addresses of outputs. No call waits for the GPU
but `GpuBackend.open` and `GpuEngine.open_context`. Every call comes from a thread that
has the device's primary context current, those of one execution context never from
two at once.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rtfocus.engines.card import (
    EngineCard,
    Precision,
    verified_file,
)
from rtfocus.engines.registry import FoundEngine, fit_frame, fit_tiles
from rtfocus.errors import EngineError
from rtfocus.machine import usable

Shape = tuple[int, ...]
"""Extents of a tensor, e.g. (N, C, H, W)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as backends need to know it; read from the driver by the processor."""

    gpu_index: int
    """Position in the driver's list."""
    name: str
    """Product name, e.g. ``NVIDIA RTX A4000``."""
    compute_capability: tuple[int, int]
    """Major and minor, e.g. (8, 6)."""
    memory_bytes: int
    """Total device memory."""


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Shapes an input may take: one tensor of an optimisation profile."""

    smallest: Shape
    usual: Shape
    """The shape the plan is tuned for."""
    largest: Shape


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """Everything a backend needs to make a network ready on a GPU."""

    name: str
    """Of the engine, for messages."""
    model: Path
    """ONNX file of this precision, already verified against the card."""
    weights_sha256: str
    """Checksum of `model`: part of the key under which a plan is cached."""
    precision: Precision
    """Which weights file of the engine's card runs; it decides the arithmetic."""
    inputs: Mapping[str, ShapeRange]
    """Every input tensor by name, e.g. ``tiles`` and ``condition``."""
    tf32: bool = True
    """False: fp32 products keep all 23 bits, for comparison with the reference."""
    workspace_bytes: int | None = None
    """Most device memory one layer of a plan may take; None: no limit."""
    cuda_graphs: bool = True
    """Let a backend that can record its kernels as a CUDA graph by itself do so."""


@dataclass(frozen=True, slots=True)
class IoTensor:
    """An input or output of a network."""

    name: str
    dtype: np.dtype[np.generic]
    """Element type in device memory; float32 for every precision of our engines."""
    is_input: bool


class GpuContext(Protocol):
    """One concurrent inference: an execution context with its I/O addresses.

    A slot owns one per engine, so that frames in flight share nothing but weights.
    """

    def bind(
        self, buffers: Mapping[str, int], input_shapes: Mapping[str, Shape]
    ) -> None:
        """Set the device address of every I/O tensor and the shape of every input.

        Holds for all following `enqueue` until the next `bind`. Buffers are dense,
        C order, and belong to the caller, who keeps them until the work is done.

        Parameters
        ----------
        buffers
            Device address by tensor name, inputs and outputs.
        input_shapes
            Shape by input name, within the request's range.

        Raises
        ------
        EngineError
            Names the tensor and the rule it breaks.
        """
        ...

    def enqueue(self, cuda_stream: int) -> None:
        """Launch the network on a non-default CUDA stream; returns before it ran.

        Raises
        ------
        EngineError
            If the launch is refused; names the engine and the shapes.
        """
        ...

    def why_not_capturable(self, cuda_stream: int) -> str | None:
        """Return why `enqueue` may not be captured in a CUDA graph; None: it may.

        Ask after one `enqueue` with the same binding: the first may allocate.
        """
        ...

    def close(self) -> None:
        """Free the context; the caller has made sure that nothing runs in it."""
        ...


class GpuEngine(Protocol):
    """A network loaded on one GPU."""

    name: str
    """Folder name in ``engines/``."""
    backend: str
    """Runtime with its release, e.g. ``tensorrt_rtx 1.7.1``."""
    precision: Precision
    tensors: Mapping[str, IoTensor]
    """Every I/O tensor by name."""
    context_bytes: int
    """Device memory a context takes beside the caller's buffers; 0: not known."""

    def output_shapes(self, input_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shape of every output for these inputs, to size buffers."""
        ...

    def open_context(self) -> GpuContext:
        """Make one more execution context; EngineError names the memory it needs."""
        ...

    def close(self) -> None:
        """Free the weights, after all contexts; called twice does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class GpuBackend:
    """A GPU runtime: whether it can be used, and how a network is loaded."""

    name: str
    """``tensorrt``, ``tensorrt_rtx`` or ``torch-cuda``."""
    why_unavailable: Callable[[Gpu | None], str | None]
    """Reason why not on this GPU, with the remedy; None: available. Without a GPU
    (None) it tells about the libraries alone."""
    open: Callable[[GpuRequest, Gpu], GpuEngine]
    """Load the network, building and caching its plan first where it needs one."""


PIXELS_PER_BATCH = 2**21
"""What a restorer sees at once on an unknown card: 32 tiles of 256 px."""
_SHARE = 4
"""A restorer takes up to this part of a card, whose other parts are for frames in
flight, classifiers, and what runs beside."""
_BYTES_PER_PX = 1024
"""What a network holds at once for a pixel of its input: 125 to 670 of ours, fp32."""


def pixels_at_once(device: Gpu | None, free_bytes: int | None = None) -> int:
    """Return how many pixels a restorer's network may see at once on a card.

    By the whole of its memory, so that a series finds the plan of the last one, and
    cards of one model give the same bytes; fewer only where half of what is free does
    not hold them.

    Parameters
    ----------
    device
        None: it is not known.
    free_bytes
        Of its memory; None: all of it.

    Examples
    --------
    >>> card = Gpu(0, "of 8 GB", (8, 6), 8 * 2**30)
    >>> pixels_at_once(card), pixels_at_once(card, 2**30)
    (2097152, 524288)
    """
    if device is None:
        return PIXELS_PER_BATCH
    pixels = device.memory_bytes // (_SHARE * _BYTES_PER_PX)
    free = device.memory_bytes if free_bytes is None else free_bytes
    while pixels > 1 and pixels * _BYTES_PER_PX > free // 2:
        pixels //= 2
    return pixels


def engine_inputs(
    card: EngineCard,
    frame: tuple[int, int],
    tiles_per_batch: int | None = None,
    pixels: int = PIXELS_PER_BATCH,
) -> dict[str, ShapeRange]:
    """Return the shapes of every input of an engine for a camera.

    Classifiers and joint engines take whole frames, one at a time; restorers take
    the frame's tiles in batches, or the frame as one tile where their card allows it.

    Parameters
    ----------
    frame
        Height and width of the camera's frame in pixels.
    tiles_per_batch
        Most tiles of a restorer, which then never sees a frame as one; None: by
        `pixels`.
    pixels
        That a restorer may see at once, see `pixels_at_once`.

    Raises
    ------
    EngineError
        If the card describes no input, or steps around the network.
    """
    if card.sees_image_alone:
        msg = (
            f"engine '{card.name}' has steps around its network, which only the CPU "
            "does; set processing.device: cpu"
        )
        raise EngineError(msg)
    if card.input is None:
        msg = f"engine '{card.name}' ({card.implementation}) is no network to build"
        raise EngineError(msg)
    if card.kind == "restorer":
        batch, sides = fit_tiles(card.input, frame, tiles_per_batch, pixels)
    else:
        batch, sides = 1, fit_frame(card.input, frame).padded
    inputs = {card.input.name: batched((batch, card.input.channels, *sides))}
    if card.condition is not None:
        inputs[card.condition.name] = batched((batch, len(card.condition.entries)))
    return inputs


def batched(largest: Shape) -> ShapeRange:
    """Return the shapes from a batch of one to the largest, which is the usual."""
    return ShapeRange((1, *largest[1:]), largest, largest)


def preferred_precision(engine: FoundEngine) -> Precision:
    """Return the precision that runs where none is asked for.

    fp16 where the engine has it: GPUs compute it several times faster, and it stays
    within a hundredth of the reference. int8 costs quality and is only run on demand.

    Raises
    ------
    EngineError
        If the engine is no network.
    """
    if "fp32" not in engine.card.files:
        msg = (
            f"engine '{engine.name}' is {engine.card.implementation}: it has no "
            "network, so there is nothing to build"
        )
        raise EngineError(msg)
    return "fp16" if "fp16" in engine.card.files else "fp32"


def gpu_request(
    engine: FoundEngine,
    frame: tuple[int, int],
    precision: Precision | None = None,
    *,
    tf32: bool = True,
    cuda_graphs: bool = True,
    tiles_per_batch: int | None = None,
    pixels: int = PIXELS_PER_BATCH,
) -> GpuRequest:
    """Return the request for an engine and a camera.

    Parameters
    ----------
    frame, tiles_per_batch, pixels
        Of `engine_inputs`.
    precision
        Weights to run; None: `preferred_precision`.
    tf32, cuda_graphs
        As in `GpuRequest`.

    Raises
    ------
    EngineError
        If the engine is no network, lacks these weights, or they are damaged.
    """
    chosen = precision or preferred_precision(engine)
    model = verified_file(engine.folder, engine.card, chosen)
    return GpuRequest(
        name=engine.name,
        model=model,
        weights_sha256=engine.card.sha256[chosen],
        precision=chosen,
        inputs=engine_inputs(engine.card, frame, tiles_per_batch, pixels),
        tf32=tf32,
        cuda_graphs=cuda_graphs,
    )


logger = logging.getLogger(__name__)

_TENSORRT = "rtfocus.runtimes.tensorrt.engine"
_TORCH = "rtfocus.runtimes.torch_engine"


def _late(module: str, function: str, *first: str) -> Callable[..., Any]:
    """Return a function of a runtime, which is imported when it is called."""

    def call(*arguments: object) -> object:
        return getattr(import_module(module), function)(*first, *arguments)

    return call


def _why_no_torch(device: Gpu | None) -> str | None:
    try:
        why: str | None = _late(_TORCH, "why_unavailable")(device)
    except ImportError as error:
        return f"torch-cuda cannot be imported ({error}); pip install torch onnx"
    return why


# ORDER MATTERS for "auto": tuned on the card first, the second opinion last.
GPU_BACKENDS: tuple[GpuBackend, ...] = (
    *(
        GpuBackend(
            name,
            _late(_TENSORRT, "why_unavailable", name),
            _late(_TENSORRT, "open_engine", name),
        )
        for name in ("tensorrt", "tensorrt_rtx")
    ),
    GpuBackend("torch-cuda", _why_no_torch, _late(_TORCH, "open_engine")),
)


def open_network(name: str, request: GpuRequest, device: Gpu) -> GpuEngine:
    """Load a network with the backend of a name, or the first that can.

    With ``auto`` a backend that cannot build or load this network is logged and
    passed over.

    Raises
    ------
    EngineError
        If none can; gives each reason.
    """
    failures: list[EngineError] = []
    for backend in usable(
        "GPU backend", name, GPU_BACKENDS, lambda known: known.why_unavailable(device)
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


def open_fitting(
    wanted: str,
    ask: Callable[..., GpuRequest],
    device: Gpu,
    free_bytes: int,
    most_px: int,
) -> tuple[GpuEngine, GpuRequest]:
    """Load a network for as many pixels at once as the card's memory allows.

    Of `most_px` at most, if given; of half as many where its runtime wants more than
    half of `free_bytes`. `ask` is `gpu_request` but for its ``pixels``.
    """
    pixels = pixels_at_once(device, free_bytes)
    request = ask(pixels=min(pixels, most_px or pixels))
    engine = open_network(wanted, request, device)
    while engine.context_bytes > free_bytes // 2:
        shapes = [of_input.largest for of_input in request.inputs.values()]
        # Axes (tile, channel, y, x); conditions, with (tile, entry), are smaller.
        fewer = ask(pixels=max(prod(shape) // shape[1] for shape in shapes) // 2)
        if fewer.inputs == request.inputs:
            break
        text = "GPU %d: engine '%s' wants %.0f MB of %.0f that are free: it sees less"
        megabytes = engine.context_bytes / 1e6, free_bytes / 1e6
        logger.warning(text, device.gpu_index, engine.name, *megabytes)
        engine.close()
        request = fewer
        engine = open_network(wanted, request, device)
    return engine, request


def runs_on(engine: GpuEngine) -> str:
    """Say what a network runs on, e.g. ``tensorrt 10.13.3 fp16``."""
    return f"{engine.backend} {engine.precision}"
