"""Machine: what it offers this process, which kinds can run on it, findings of it."""

import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import psutil
from platformdirs import user_cache_path

from rtfocus.errors import EngineError

CACHE_VARIABLE = "RTFOCUS_CACHE"
"""Environment variable that names another folder, e.g. on a fast local disk."""


def cache_folder() -> Path:
    """Return the folder of this user's cache, which may not exist yet."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else user_cache_path("rtfocus", appauthor=False)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a kill, never meets half of it.

    Raises
    ------
    OSError
        If the folder or the file cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    unfinished = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


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
