"""Backends: the CPU runtimes a network can run on, in order, and how it is opened."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import lcm
from typing import Literal

import numpy as np

from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.card import (
    EngineCard,
    Precision,
    input_of,
    verified_file,
)
from rtfocus.engines.registry import FoundEngine
from rtfocus.runtimes.cpu_engine import (
    CpuPrecision,
    CpuRequest,
    Engine,
    Inputs,
    OnnxRuntimeEngine,
    OpenVinoEngine,
    Shape,
    arranged_shape,
    import_openvino,
    openvino_precisions,
)
from rtfocus.runtimes.machine import (
    DECISIONS,
    Choice,
    Key,
    adds_int8_in_16_bits,
    choices,
    processor_name,
    time_passes,
    usable,
)

logger = logging.getLogger(__name__)

Wanted = Literal["auto", "f32", "bf16", "fp16", "int8"]
"""As in ``processing.precision``."""
TIMED_SIDE_PX = 576
"""Longest side of a frame that is timed; larger ones take as long per pixel."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A runtime: whether it can be used, and how an engine is opened on it."""

    name: str
    why_unavailable: Callable[[], str | None]
    """Reason why not, with the remedy; None: available."""
    open_engine: Callable[[CpuRequest], Engine]
    computes: Callable[[], tuple[str, ...]]
    """What it computes fp32 weights in on this CPU: ``f32`` and perhaps ``bf16``."""


def _why_no_openvino() -> str | None:
    return _why_not_importable("openvino", "openvino", import_openvino)


def _why_no_onnxruntime() -> str | None:
    name = "onnxruntime"
    return _why_not_importable(name, f'"rtfocus[{name}]"', partial(import_module, name))


def _why_not_importable(
    name: str, wheel: str, load: Callable[[], object]
) -> str | None:
    try:
        load()
    except ImportError as error:
        return f"{name} cannot be imported ({error}); pip install {wheel}"
    return None


# ORDER MATTERS for "auto": fastest first, the reference last.
BACKENDS: tuple[Backend, ...] = (
    Backend("openvino", _why_no_openvino, OpenVinoEngine, openvino_precisions),
    Backend("onnxruntime", _why_no_onnxruntime, OnnxRuntimeEngine, lambda: ("f32",)),
)


def choose_backend(wanted: str) -> Backend:
    """Return the backend of a name, or for ``auto`` the first that is available.

    Raises
    ------
    EngineError
        If the wanted one, or every one, is unavailable; says why.
    """
    return next(
        usable("network backend", wanted, BACKENDS, lambda b: b.why_unavailable())
    )


def open_engine(
    found: FoundEngine,
    settings: ProcessingConfig,
    *,
    shape: Shape,
    outputs: tuple[str, ...],
    threads: int = 1,
) -> Engine:
    """Open an engine on the backend and in the precision of the config.

    Parameters
    ----------
    settings
        ``backend`` and ``precision`` count here.
    shape
        (N, C, H, W) of the tiles.

    Raises
    ------
    EngineError
        If it is no network, its weights are damaged, or it cannot be loaded.
    """
    card = found.card
    tiles = input_of(card)
    condition = card.condition
    weights, precision = choose_weights(card, settings.precision)
    backend = choose_backend(settings.backend)
    request = CpuRequest(
        model=verified_file(found.folder, card, weights),
        inputs=Inputs(
            engine=found.name,
            tiles=tiles.name,
            shape=shape,
            condition=None if condition is None else condition.name,
            entries=0 if condition is None else len(condition.entries),
        ),
        outputs=outputs,
        precision=precision,
        threads=threads,
        weights=weights,
    )
    if settings.precision == "auto":
        request = _by_measurement(found, backend, request)
    return backend.open_engine(_arranged(card, request))


def _arranged(card: EngineCard, request: CpuRequest) -> CpuRequest:
    """Return the request of a network with its axes in an order of its own."""
    if card.steps is None:
        return request
    axes = card.steps.input_axes, card.steps.output_axes
    shape = arranged_shape(request.inputs.shape, axes[0])
    return replace(request, inputs=replace(request.inputs, shape=shape), axes=axes)


def _by_measurement(
    found: FoundEngine, backend: Backend, request: CpuRequest
) -> CpuRequest:
    """Return the request in what is fastest here, timed now or at an earlier start."""
    options = choices(found.card, backend.computes())
    if len(options) == 1:
        return replace(request, precision=options[0].computes)
    shape = timed_shape(found.card, request.inputs.shape)
    key = Key(
        engine=found.name,
        weights_sha256=tuple(found.card.sha256[one.weights] for one in options),
        processor=processor_name(),
        runtime=f"{backend.name} {import_module(backend.name).__version__}",
        threads=request.threads,
        shape=shape,
        outputs=request.outputs,
    )
    small = replace(request, inputs=replace(request.inputs, shape=shape))
    decision = DECISIONS.decide(key, partial(_time, found, backend, small, options))
    taken = next(one for one in options if one.name == decision.taken)
    return replace(_as_choice(found, request, taken), measured=str(decision))


def _time(
    found: FoundEngine, backend: Backend, request: CpuRequest, options: list[Choice]
) -> dict[str, float]:
    """Return the ms of a pass of every option."""
    shape, entries = request.inputs.shape, request.inputs.entries
    noise = np.random.default_rng(0)
    tiles = noise.standard_normal(shape).astype(np.float32)
    condition = np.zeros((len(tiles), entries), np.float32) if entries else None
    with ExitStack() as opened:
        passes: dict[str, Callable[[], object]] = {}
        for one in options:
            wanted = _arranged(found.card, _as_choice(found, request, one))
            engine = backend.open_engine(wanted)
            opened.callback(engine.close)
            passes[one.name] = partial(engine.infer, tiles, condition)
        return time_passes(passes)


def _as_choice(found: FoundEngine, request: CpuRequest, choice: Choice) -> CpuRequest:
    return replace(
        request,
        model=verified_file(found.folder, found.card, choice.weights),
        weights=choice.weights,
        precision=choice.computes,
    )


def timed_shape(card: EngineCard, shape: Shape) -> Shape:
    """Return the shape that is timed instead of an input's, which may be large."""
    tiles = input_of(card)
    step = lcm(tiles.multiple_px, round(tiles.stride_px))
    side = max(TIMED_SIDE_PX // step * step, tiles.tile_px)
    number, channels, height, width = shape
    return number, channels, min(height, side), min(width, side)


def choose_weights(card: EngineCard, wanted: Wanted) -> tuple[Precision, CpuPrecision]:
    """Return the weights file to run and what to compute in.

    Where a card lacks the file that is wanted, fp32 runs instead.
    """
    if wanted == "auto" or wanted == "f32" or wanted == "bf16":
        return "fp32", wanted
    if wanted not in card.files:
        logger.warning("engine '%s' has no %s weights: fp32 runs", card.name, wanted)
        return "fp32", "auto"
    if wanted == "int8" and adds_int8_in_16_bits():
        logger.warning(
            "engine '%s': int8 is less accurate on this processor, which has no VNNI; "
            "set processing.precision to auto",
            card.name,
        )
    return wanted, "auto"


def runs_on(engine: Engine) -> str:
    """Say what a network runs on, e.g. ``openvino bf16`` or ``openvino int8 bf16``.

    Where ``processing.precision: auto`` had a choice, the times that decided follow.
    """
    parts = [engine.backend, engine.request.weights, engine.precision]
    said = " ".join(part for part in parts if part != "fp32")
    measured = engine.request.measured
    return f"{said} ({measured})" if measured else said
