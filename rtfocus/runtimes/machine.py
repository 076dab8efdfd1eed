"""Machine: what it offers, what can run on it, and what networks compute in best here.

bf16 is the fastest on some processors and the slowest on others that list it, and int8
pays only where the processor adds it exactly: which one it is can only be measured. It
is timed once and kept.
"""

import hashlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from uuid import uuid4

import msgspec
import psutil
from platformdirs import user_cache_path

from rtfocus.engines.card import EngineCard, Precision
from rtfocus.errors import EngineError

CACHE_VARIABLE = "RTFOCUS_CACHE"
"""Environment variable that names another folder, e.g. on a fast local disk."""


def cache_folder() -> Path:
    """Return the folder of this user's cache, which may not exist yet."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else user_cache_path("rtfocus", appauthor=False)


def write_atomically(path: Path, data: bytes, *, first: bool = False) -> bool:
    """Write a file so that a reader, or a kill, never meets half of it.

    `first`: only where there is none yet; returns False where there is one.

    Raises
    ------
    OSError
        If the folder or the file cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}{uuid4().hex}")
    try:
        with unfinished.open("xb") as file:
            file.write(data)
        if first:
            try:
                os.link(unfinished, path)
            except FileExistsError:
                return False
            except OSError:
                # A file system without links.
                if path.exists():
                    return False
                unfinished.replace(path)
        else:
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def processor_name() -> str:
    """Return the processor's model; Linux hides it from ``platform``."""
    return _processor_line("model name") or platform.processor() or platform.machine()


def adds_int8_in_16_bits() -> bool:
    """Tell whether int8 networks lose accuracy here: an x86 without VNNI.

    Sums of products are cut off at 16 bits there. False where the system does not
    tell what the processor has.
    """
    flags = _processor_line("flags").split()
    return bool(flags) and not any("vnni" in flag for flag in flags)


def adds_int8_exactly() -> bool:
    """Tell whether int8 networks are exact here: an x86 with VNNI.

    False where the system does not tell what the processor has.
    """
    return "vnni" in _processor_line("flags")


def multiplies_bf16() -> bool:
    """Tell whether the processor multiplies bf16 itself (AVX-512 BF16 or AMX).

    Where it has to be imitated, networks train twenty times slower in bf16 than in
    float32. False where the system does not tell what the processor has.
    """
    flags = _processor_line("flags").split()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def usable_threads() -> int:
    """Return the threads this process may use, which a container or job limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_line(key: str) -> str:
    """Return a line of Linux' description of the processor; empty: there is none."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


logger = logging.getLogger(__name__)


class _Kind(Protocol):
    @property
    def name(self) -> str: ...


K = TypeVar("K", bound=_Kind)


def usable(
    what: str,
    wanted: str,
    kinds: Sequence[K],
    why_unavailable: Callable[[K], str | None],
    remedy: str = "",
) -> Iterator[K]:
    """Yield the kinds that can be used, in order; those behind are not even asked.

    Parameters
    ----------
    what
        For messages, e.g. ``GPU backend``.
    wanted
        Name of a kind, or ``auto`` for any.
    kinds
        The best first.
    why_unavailable
        Reason why one cannot be used, with the remedy; None: it can.
    remedy
        Ends the message if there is none.

    Raises
    ------
    EngineError
        If the wanted one, or every one, is unavailable; gives each reason.
    """
    reasons: list[str] = []
    found = False
    for kind in kinds:
        if wanted not in ("auto", kind.name):
            continue
        why = why_unavailable(kind)
        if why is not None:
            reasons.append(f"{kind.name}: {why}")
            continue
        if not found:
            passed_over = f" (not {'; '.join(reasons)})" if reasons else ""
            logger.info("%s: %s%s", what, kind.name, passed_over)
        found = True
        yield kind
    if not found:
        known = ", ".join(kind.name for kind in kinds)
        told = "; ".join(reasons) or f"known are {known} and auto"
        msg = f"no {what} for '{wanted}': {told}{remedy}"
        raise EngineError(msg)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis."""

    topic: str
    """What was looked at, e.g. ``device adapters``."""
    found: str
    """What is there, with version and place."""
    remedy: str | None = None
    """How to get what is missing; None: nothing is."""
    needed: bool = True
    """False: rtfocus runs without it."""


def with_load() -> str:
    """Return processor, usable threads and load: milliseconds depend on them."""
    load = psutil.getloadavg()[0]
    return (
        f"{processor_name()}, {usable_threads()} usable threads, load {load:.1f} at "
        "the end"
    )


BUDGET_S = 1.0
"""Of the timing of one engine; every choice has a first pass and one that counts."""
_ROUNDS = 5
_WORTH = 0.9
"""What must be this much faster than f32 to be taken: the rest is chance."""
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
    found = [Choice("fp32", "f32")]
    if card.sees_image_alone:
        # Admitted by what it gives in f32; nobody has said what bf16 does to it.
        return found
    if widest == "bf16":
        found.append(Choice("fp32", "bf16"))
    if "int8" in card.files and _agrees(card) and adds_int8_exactly():
        found.append(Choice("int8", widest))
    return found


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
    """Return the fastest, f32 unless another is at least a tenth faster."""
    best = min(times_ms, key=lambda name: times_ms[name])
    return best if times_ms[best] < _WORTH * times_ms["f32"] else "f32"


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
            found = msgspec.json.decode(path.read_bytes(), type=Decision)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
            logger.warning("'%s' cannot be read: measured again (%s)", path, error)
            return None
        if found.key != key or found.taken not in found.times_ms:
            logger.warning("'%s' is of something else: measured again", path)
            return None
        return found

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
