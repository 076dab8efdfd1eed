"""Plans: from the cache, or built once from the ONNX file, which is logged.

They are built through the API that all releases share. Networks are strongly typed,
so the weights file alone decides the arithmetic; int8 comes as Q/DQ nodes. No timing
cache is set: with it TensorRT for RTX would need a GPU to build.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rtfocus.errors import EngineError
from rtfocus.machine import cache_folder, write_atomically
from rtfocus.runtimes.gpu import Gpu, GpuRequest, ShapeRange
from rtfocus.runtimes.tensorrt.library import (
    Capability,
    Progress,
    TensorRt,
    build_error,
    listed_capabilities,
    make_monitor,
    name_capabilities,
    parse_error,
    why_unsupported,
)

logger = logging.getLogger(__name__)

_FORMAT = "rtfocus plan 1"
_WORDS = {
    "weights_sha256": "other weights",
    "release": "release {release}",
    "gpu": "{gpu}",
    "inputs": "other shapes",
    "tf32": "tf32 {tf32}",
    "workspace_bytes": "another workspace",
}
"""What a plan in the cache was built for instead, by the field that differs."""


@dataclass(frozen=True, slots=True)
class PlanKey:
    """All that a plan's validity depends on."""

    engine: str
    precision: str
    library: str
    """``tensorrt`` or ``tensorrt_rtx``."""
    release: str
    gpu: str
    """What it was built for: a card's name and compute capability, for TensorRT
    for RTX the compute capability alone or ``8.0 and later``."""
    weights_sha256: str
    inputs: Mapping[str, ShapeRange]
    """The optimisation profile."""
    tf32: bool
    workspace_bytes: int | None

    @classmethod
    def of(cls, library: TensorRt, request: GpuRequest, gpu: str) -> "PlanKey":
        """Return the key of a request's plan, built by a library for a GPU."""
        return cls(
            engine=request.name,
            precision=request.precision,
            library=library.name,
            release=library.release,
            gpu=gpu,
            weights_sha256=request.weights_sha256,
            inputs=dict(request.inputs),
            tf32=request.tf32,
            workspace_bytes=request.workspace_bytes,
        )

    @property
    def stem(self) -> str:
        """File name without suffix: readable, and unique by the digest of all."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{self.engine}-{self.precision}-{self.library}-{digest}"


class PlanCache:
    """Plans in a folder, which is made with the first; None: the user's cache."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder() / "plans"

    def path(self, key: PlanKey) -> Path:
        """Return where the plan of a key is kept."""
        return self.folder / f"{key.stem}.plan"

    def find(self, key: PlanKey) -> bytes | None:
        """Return the plan of a key; None where there is none or it is damaged."""
        path = self.path(key)
        try:
            head, _, plan = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("plan '%s' cannot be read: %s", path, error.strerror)
            return None
        header = _header(head)
        if header is None or header.get("sha256") != hashlib.sha256(plan).hexdigest():
            logger.warning("plan '%s' is damaged and will be built again", path)
            return None
        return plan

    def keep(self, key: PlanKey, plan: bytes) -> bool:
        """Keep a plan; False, with a warning, where the folder cannot be written."""
        header = {
            "format": _FORMAT,
            "key": asdict(key),
            "sha256": hashlib.sha256(plan).hexdigest(),
        }
        line = json.dumps(header, sort_keys=True).encode()
        try:
            write_atomically(self.path(key), line + b"\n" + plan)
        except OSError as error:
            logger.warning(
                "plan of engine '%s' cannot be kept in '%s' (%s): it will be built "
                "again at the next start; name a writable folder in RTFOCUS_CACHE",
                key.engine,
                self.folder,
                error.strerror,
            )
            return False
        return True

    def discard(self, key: PlanKey) -> None:
        """Remove the plan of a key, if it is there and can be removed."""
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("'%s' cannot be removed: %s", self.path(key), error.strerror)

    def why_absent(self, key: PlanKey) -> str:
        """Return what the nearest plan of the same engine was built for instead."""
        expected = _plain(asdict(key))
        differences = [
            [
                words.format_map(stored)
                for field, words in _WORDS.items()
                if stored[field] != expected[field]
            ]
            for stored in self._stored(key)
        ]
        nearest = min(differences, key=len, default=None)
        if not nearest:
            return "there is none yet"
        return f"the one there is was built for {', '.join(nearest)}"

    def _stored(self, key: PlanKey) -> Iterator[dict[str, Any]]:
        """Yield the keys of the plans of the same engine, precision and library."""
        pattern = f"{key.engine}-{key.precision}-{key.library}-*.plan"
        for path in self.folder.glob(pattern):
            try:
                with path.open("rb") as file:
                    header = _header(file.readline())
            except OSError:
                continue
            if header is not None:
                yield header["key"]


def _header(line: bytes) -> dict[str, Any] | None:
    """Return the header of a plan file; None if the line is none."""
    try:
        header = json.loads(line)
    except ValueError:
        return None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        return None
    return header


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """Return a key as it reads back from JSON, which has no tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


@dataclass(frozen=True, slots=True)
class PlanTarget:
    """The GPU a plan is for."""

    gpu: str
    """As in `PlanKey.gpu`."""
    capabilities: tuple[Capability, ...] = ()
    """TensorRT for RTX: those named to the builder; none: 8.0 and later."""

    @staticmethod
    def named(capability: Capability) -> "PlanTarget":
        """Return the target of TensorRT for RTX that names a compute capability."""
        return PlanTarget(_text(capability), (capability,))


@dataclass(frozen=True, slots=True)
class ReadyPlan:
    """A plan and where it came from."""

    data: bytes
    key: PlanKey
    build_s: float | None
    """Seconds it took to build; None: it was in the cache."""


ANY_CARD = PlanTarget("8.0 and later")
"""TensorRT for RTX: every card it serves, those of 7.5 apart."""

_TURING = (7, 5)
"""The only card that is served but by a plan that names it."""


def target_of(library: TensorRt, device: Gpu) -> PlanTarget:
    """Return the target of a library's plans for the GPU at hand.

    TensorRT for RTX names no capability: its runtime says what it runs, whatever the
    release lists.

    Raises
    ------
    EngineError
        If the card is too old.
    """
    capability = device.compute_capability
    why = why_unsupported(capability)
    if why is not None:
        raise EngineError(why)
    if not library.is_rtx:
        return PlanTarget(f"{device.name}, {_text(capability)}")
    return PlanTarget.named(capability) if capability == _TURING else ANY_CARD


def built_ahead(
    library: TensorRt, request: GpuRequest, device: Gpu, cache: PlanCache
) -> ReadyPlan | None:
    """Return the plan of TensorRT for RTX that was built for this card by name."""
    if not library.is_rtx:
        return None
    target = PlanTarget.named(device.compute_capability)
    key = PlanKey.of(library, request, target.gpu)
    plan = cache.find(key)
    return None if plan is None else ReadyPlan(plan, key, None)


def rtx_target(library: TensorRt, capability: Capability) -> PlanTarget:
    """Return the target of TensorRT for RTX for a card that is not at hand.

    Cards newer than every one the release lists take the plan for any card.

    Raises
    ------
    EngineError
        If the release cannot name it: only its runtime could tell, on the card.
    """
    why = why_unsupported(capability)
    if why is not None:
        raise EngineError(why)
    listed = listed_capabilities(library)
    if capability in listed:
        return PlanTarget.named(capability)
    if capability > max(listed):
        return ANY_CARD
    msg = (
        f"{library.name} {library.release} builds for "
        f"{', '.join(_text(known) for known in listed)} by name, not for "
        f"{_text(capability)}; build without --capability: that plan is for any card "
        "from 8.0 on, and the card says whether it runs it"
    )
    raise EngineError(msg)


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
    key = PlanKey.of(library, request, target.gpu)
    cached = None if rebuild else cache.find(key)
    if cached is not None:
        return ReadyPlan(cached, key, None)
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


def build_plan(
    library: TensorRt,
    request: GpuRequest,
    capabilities: Sequence[Capability] = (),
    progress: Progress | None = None,
) -> bytes:
    """Build the plan of a network; TensorRT itself tunes it on the current GPU.

    Parameters
    ----------
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
    network, parser = _parsed(library, builder, request)
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


def _parsed(library: TensorRt, builder: Any, request: GpuRequest) -> tuple[Any, Any]:
    api = library.api
    flags = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # Releases without the flag know nothing but strongly typed networks.
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = api.OnnxParser(network, library.logger)
    try:
        model = request.model.read_bytes()
    except OSError as error:
        why = f"cannot be read: {error.strerror}; copy the engine again"
        msg = f"weights '{request.model}' {why}"
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
    capabilities: Sequence[Capability],
) -> Any:
    api = library.api
    config = builder.create_builder_config()
    if not request.tf32:
        config.clear_flag(api.BuilderFlag.TF32)
    if request.workspace_bytes is not None:
        pool = api.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, request.workspace_bytes)
    name_capabilities(library, config, capabilities)
    profile = builder.create_optimization_profile()
    for name, shapes in request.inputs.items():
        profile.set_shape(name, shapes.smallest, shapes.usual, shapes.largest)
    if config.add_optimization_profile(profile) < 0:
        raise build_error(library, request)
    return config


def _text(capability: Sequence[int]) -> str:
    return ".".join(str(part) for part in capability)
