"""Backends: the CPU runtimes a network can run on, and what it computes in there.

bf16 is the fastest on some processors and the slowest on others that list it, and int8
pays only where the processor adds it exactly: which one it is can only be measured. It
is timed once and kept.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import lcm
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.card import (
    EngineCard,
    Precision,
    input_of,
    verified_file,
)
from rtfocus.engines.registry import FoundEngine
from rtfocus.machine import cache_folder, processor_name, usable, write_atomically
from rtfocus.runtimes.cpu_engine import (
    CpuPrecision,
    CpuRequest,
    Engine,
    Inputs,
    OnnxRuntimeEngine,
    OpenVinoEngine,
    Shape,
    adds_int8_exactly,
    arranged_shape,
    import_openvino,
    openvino_precisions,
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


def choose_backend(name: str) -> Backend:
    """Return the backend of a name, or for ``auto`` the first that is available.

    Raises
    ------
    EngineError
        If the wanted one, or every one, is unavailable; says why.
    """
    return next(
        usable("network backend", name, BACKENDS, lambda b: b.why_unavailable())
    )


def open_engine(
    engine: FoundEngine,
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
    card = engine.card
    tiles = input_of(card)
    condition = card.condition
    weights, precision = choose_weights(card, settings.precision)
    backend = choose_backend(settings.backend)
    request = CpuRequest(
        model=verified_file(engine.folder, card, weights),
        inputs=Inputs(
            engine=engine.name,
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
        request = _by_measurement(engine, backend, request)
    return backend.open_engine(_arranged(card, request))


def _arranged(card: EngineCard, request: CpuRequest) -> CpuRequest:
    """Return the request of a network with its axes in an order of its own."""
    if card.steps is None:
        return request
    axes = card.steps.input_axes, card.steps.output_axes
    shape = arranged_shape(request.inputs.shape, axes[0])
    return replace(request, inputs=replace(request.inputs, shape=shape), axes=axes)


BUDGET_S = 1.0
"""Of the timing of one engine; every choice has a first pass and one that counts."""
_ROUNDS = 5
_WORTH = 0.9
"""What is less exact must be this much faster to be taken: the rest is chance."""
_LARGEST_DB = 0.2
_LEAST_ALIKE = 0.99


class Choice(msgspec.Struct, frozen=True):
    """A weights file, and what the CPU computes the rest in."""

    weights: Precision
    computes: Literal["f32", "bf16"]

    @property
    def name(self) -> str:
        """``f32``, ``bf16`` or ``int8``."""
        return "int8" if self.weights == "int8" else self.computes


class Key(msgspec.Struct, frozen=True):
    """All that a decision depends on."""

    engine: str
    weights_sha256: tuple[str, ...]
    """Of every choice."""
    processor: str
    runtime: str
    """With its release, e.g. ``openvino 2026.4``."""
    threads: int
    shape: tuple[int, ...]
    """(N, C, H, W) of what is timed."""
    outputs: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """Readable, and unique by the digest of all."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]
        return f"{self.engine}-{digest}.json"


class Decision(msgspec.Struct, frozen=True):
    """What was taken, and why."""

    key: Key
    taken: str
    """`Choice.name`."""
    times_ms: dict[str, float]
    """Shortest pass of every choice."""

    def __str__(self) -> str:
        """Return e.g. ``f32 35.4 ms, bf16 19.6 ms``."""
        return ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.times_ms.items())


def choices(card: EngineCard, computes: Sequence[str]) -> list[Choice]:
    """Return what a network may run in here, f32 first.

    Parameters
    ----------
    card
        Of the engine; its int8 weights are a choice where the card states that they
        stay within 0.2 dB and 99 % of the labels, and the processor adds int8 exactly.
    computes
        What the runtime computes in, among ``f32`` and ``bf16``.
    """
    widest: Literal["f32", "bf16"] = "bf16" if "bf16" in computes else "f32"
    options = [Choice("fp32", "f32")]
    if card.sees_image_alone:
        # Admitted by what it gives in f32; what bf16 does to it is not known.
        return options
    if widest == "bf16":
        options.append(Choice("fp32", "bf16"))
    if "int8" in card.files and _agrees(card) and adds_int8_exactly():
        options.append(Choice("int8", widest))
    return options


def _agrees(card: EngineCard) -> bool:
    stated = card.int8
    if stated is None:
        return False
    near = stated.restored_db is None or abs(stated.restored_db) <= _LARGEST_DB
    alike = stated.labels_alike is None or stated.labels_alike >= _LEAST_ALIKE
    return near and alike


def time_passes(
    passes: Mapping[str, Callable[[], object]],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time passes in turns, so that a busy moment meets all of them.

    Each runs the network once; returns the shortest of each in ms, by the same names.
    """
    for run in passes.values():
        # Memory is reserved and kernels are made at the first pass.
        run()
    end = clock() + BUDGET_S
    times = dict.fromkeys(passes, float("inf"))
    for _ in range(_ROUNDS):
        for name, run in passes.items():
            started = clock()
            run()
            times[name] = min(times[name], 1e3 * (clock() - started))
        if clock() >= end:
            break
    return times


def fastest(times_ms: Mapping[str, float]) -> str:
    """Return the fastest; of a tenth or less, the one that stands before it."""
    best, *others = times_ms
    for name in others:
        if times_ms[name] < _WORTH * times_ms[best]:
            best = name
    return best


class Decisions:
    """Decisions in a folder; one that was made stays as long as its key does.

    Safe to use from several threads and processes, which get the same decision as
    long as the folder can be written, and those of one object in any case.

    Parameters
    ----------
    folder
        Made when the first is kept; None: ``precision`` in the user's cache.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[Key, Decision] = {}
        self._turn = threading.Lock()

    def path(self, key: Key) -> Path:
        """Return where the decision of a key is kept."""
        return (self._folder or cache_folder() / "precision") / key.file_name

    def decide(self, key: Key, measure: Callable[[], dict[str, float]]) -> Decision:
        """Return the decision of a key; `measure` tells ms where there is none yet."""
        with self._turn:
            known = self._known.get(key) or self._find(key)
            if known is None:
                times = measure()
                known = self._keep(Decision(key, fastest(times), times))
                logger.info(
                    "engine '%s': precision auto takes %s (%s)",
                    key.engine,
                    known.taken,
                    known,
                )
            self._known[key] = known
            return known

    def _find(self, key: Key) -> Decision | None:
        path = self.path(key)
        try:
            decision = msgspec.json.decode(path.read_bytes(), type=Decision)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
            logger.warning("'%s' cannot be read: measured again (%s)", path, error)
            return None
        if decision.key != key or decision.taken not in decision.times_ms:
            logger.warning("'%s' is of something else: measured again", path)
            return None
        return decision

    def _keep(self, decision: Decision) -> Decision:
        """Keep a decision; return the one that another process kept before."""
        path = self.path(decision.key)
        text = json.dumps(msgspec.to_builtins(decision), indent=1).encode()
        try:
            if write_atomically(path, text, first=True):
                return decision
            earlier = self._find(decision.key)
            if earlier is not None:
                return earlier
            write_atomically(path, text)
        except OSError as error:
            logger.warning(
                "'%s' cannot be written (%s): precision is measured at every start; "
                "name a writable folder in RTFOCUS_CACHE, or set processing.precision",
                path,
                error.strerror,
            )
        return decision


DECISIONS = Decisions()
"""Those of this process."""


def _by_measurement(
    engine: FoundEngine, backend: Backend, request: CpuRequest
) -> CpuRequest:
    """Return the request in what is fastest here, timed now or at an earlier start."""
    options = choices(engine.card, backend.computes())
    if len(options) == 1:
        return replace(request, precision=options[0].computes)
    shape = timed_shape(engine.card, request.inputs.shape)
    key = Key(
        engine=engine.name,
        weights_sha256=tuple(engine.card.sha256[one.weights] for one in options),
        processor=processor_name(),
        runtime=f"{backend.name} {import_module(backend.name).__version__}",
        threads=request.threads,
        shape=shape,
        outputs=request.outputs,
    )
    small = replace(request, inputs=replace(request.inputs, shape=shape))
    decision = DECISIONS.decide(key, partial(_time, engine, backend, small, options))
    chosen = next(one for one in options if one.name == decision.taken)
    return replace(_as_choice(engine, request, chosen), measured=str(decision))


def _time(
    chosen: FoundEngine, backend: Backend, request: CpuRequest, options: list[Choice]
) -> dict[str, float]:
    """Return the ms of a pass of every option."""
    shape, entries = request.inputs.shape, request.inputs.entries
    noise = np.random.default_rng(0)
    tiles = noise.standard_normal(shape).astype(np.float32)
    condition = np.zeros((len(tiles), entries), np.float32) if entries else None
    with ExitStack() as opened:
        passes: dict[str, Callable[[], object]] = {}
        for one in options:
            arranged = _arranged(chosen.card, _as_choice(chosen, request, one))
            engine = backend.open_engine(arranged)
            opened.callback(engine.close)
            passes[one.name] = partial(engine.infer, tiles, condition)
        return time_passes(passes)


def _as_choice(engine: FoundEngine, request: CpuRequest, choice: Choice) -> CpuRequest:
    return replace(
        request,
        model=verified_file(engine.folder, engine.card, choice.weights),
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
    if wanted == "int8" and not adds_int8_exactly():
        logger.warning(
            "engine '%s': int8 is inexact on this processor, which has no VNNI; "
            "set processing.precision to auto",
            card.name,
        )
    return wanted, "auto"


def runs_on(engine: Engine) -> str:
    """Say what a network runs on, e.g. ``openvino bf16`` or ``openvino int8 bf16``.

    Where ``processing.precision: auto`` had a choice, the times that decided follow.
    """
    parts = [engine.backend, engine.request.weights, engine.precision]
    text = " ".join(part for part in parts if part != "fp32")
    measured = engine.request.measured
    return f"{text} ({measured})" if measured else text
