"""Machine: what a computer offers: processor, memory, disks, a cache, its clock.

And which of several kinds of a thing can be used on it.
"""

import logging
import os
import platform
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar
from uuid import uuid4

import psutil
from platformdirs import user_cache_path

from rtfocus.errors import EngineError, OutputError, WriterError

logger = logging.getLogger(__name__)

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


def processor_flags() -> frozenset[str]:
    """Return what Linux says an x86 can do; empty: the system does not tell."""
    return frozenset(_processor_line("flags").split())


def multiplies_bf16() -> bool:
    """Tell whether the processor multiplies bf16 itself (AVX-512 BF16 or AMX).

    Where it has to be imitated, networks train twenty times slower in bf16 than in
    float32. False where the system does not tell what the processor has.
    """
    return not processor_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


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


def with_load() -> str:
    """Return processor, usable threads and load: milliseconds depend on them."""
    load = psutil.getloadavg()[0]
    return (
        f"{processor_name()}, {usable_threads()} usable threads, load {load:.1f} at "
        "the end"
    )


class Memory(NamedTuple):
    """Main memory in bytes."""

    total: int
    free: int


class _GroupVersion(NamedTuple):
    """How a version of Linux' control groups tells of memory."""

    root: str
    files: tuple[str, str]
    """With the limit, and with what is used of it."""
    cached: tuple[str, str]


_VERSIONS = {
    "": _GroupVersion(
        "", ("memory.max", "memory.current"), ("inactive_file", "active_file")
    ),
    "memory": _GroupVersion(
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("total_inactive_file", "total_active_file"),
    ),
}
"""By the controller that ``/proc/self/cgroup`` names."""


def memory(
    groups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")
) -> Memory:
    """Return the memory that this process may use, and what of it is free.

    Of a container that is its own limit, not the machine's.

    Parameters
    ----------
    groups, mine
        Where Linux tells the limits of control groups, and the groups of this process.
    """
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for folder, version in _memory_groups(groups, mine):
        try:
            limit, used = (int((folder / name).read_text()) for name in version.files)
            stat = (folder / "memory.stat").read_text().split()
        except (OSError, ValueError):  # unknown, or no limit: "max"
            continue
        fields = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
        # Files that were read fill the rest of a group, and give way.
        cached = sum(fields.get(name, 0) for name in version.cached)
        total, free = min(total, limit), min(free, max(limit - used + cached, 0))
    return Memory(total, free)


def _memory_groups(groups: Path, mine: Path) -> Iterator[tuple[Path, _GroupVersion]]:
    """Yield the control groups of this process that may limit its memory."""
    try:
        lines = mine.read_text("utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controller, path = line.split(":", 2)
        if (version := _VERSIONS.get(controller)) is None:
            continue
        root = groups / version.root
        group = root / path.lstrip("/")
        # A container may see the path of its host, and its own group at the root.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield folder, version


def free_bytes(folder: Path) -> int:
    """Return what is free for this user on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def check_space(folder: Path, planned: int | None, min_free: int) -> None:
    """Refuse a run that does not fit.

    Parameters
    ----------
    folder
        An existing folder on the disk in question.
    planned
        Bytes of all planned pixels before compression; None: unbounded.
    min_free
        Bytes that must be left.

    Raises
    ------
    OutputError
        Names what is planned, what is free and the remedy.
    """
    free = free_bytes(folder)
    if free < (planned or 0) + min_free:
        needed = "an unbounded run" if planned is None else f"{_mb(planned)} planned"
        msg = (
            f"disk of '{folder}' has {_mb(free)} free, too little for {needed} and "
            f"store.min_free_mb={min_free / 1e6:.0f}; free space, choose another "
            "run.folder, record less or lower store.min_free_mb"
        )
        raise OutputError(msg)


_SAMPLE_S = 0.25
_WINDOW, _LEAST_S = 40, 5.0
"""Ten seconds of samples; of less than five no rate is known: runs begin in bursts."""


class DiskWatch:
    """Watches the free space: 4 times a second, near its end before every frame."""

    def __init__(
        self,
        folder: Path,
        min_free: int,
        *,
        free: Callable[[Path], int] = free_bytes,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._min_free = min_free
        self._free = free
        self._clock_s = clock_s
        self._samples: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self.sample()

    def sample(self, *, at_once: bool = False) -> int:
        """Return the free bytes, measured a moment ago or `at_once`."""
        now = self._clock_s()
        is_due = not self._samples or now - self._samples[-1][0] >= _SAMPLE_S
        free = self._free(self._folder) if is_due or at_once else self._samples[-1][1]
        if is_due:
            self._samples.append((now, free))
        return free

    def check(self) -> None:
        """Raise WriterError when less than the minimum is left."""
        # A fast disk fills between two samples.
        is_near = self._samples[-1][1] < 2 * self._min_free
        if (free := self.sample(at_once=is_near)) < self._min_free:
            msg = (
                f"disk of '{self._folder}' has only {_mb(free)} free, less than "
                f"store.min_free_mb={self._min_free / 1e6:.0f}: the run ends here; "
                "free space before the next one"
            )
            raise WriterError(msg)

    def time_to_full_s(self) -> float | None:
        """Return seconds until the minimum is reached at the current rate.

        None while the disk does not fill, and at first.
        """
        (began, free_then), (now, free_now) = self._samples[0], self._samples[-1]
        if now - began < _LEAST_S:
            return None
        used, left = free_then - free_now, max(free_now - self._min_free, 0)
        return left * (now - began) / used if used > 0 else None


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


class RunClock:
    """Unix time that goes on evenly, even if the machine's clock is set meanwhile.

    Images are numbered and dated by it, drifts are followed by it: one that leaps by
    an hour would send the stage away. It is the machine's clock while that goes evenly.
    """

    _SET_NS = 100_000_000
    """The machine's clock has been set if it is further off than clocks go apart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> int:
        """Go by the machine's clock as it is now, which is returned: a run begins."""
        now_ns = time.time_ns()
        self._zero_ns = now_ns - _counted_ns()
        return now_ns

    def now_ns(self) -> int:
        """Return the time."""
        told_ns, counted_ns = self.told_ns(), _counted_ns()
        even_ns = self._zero_ns + counted_ns
        if abs(told_ns - even_ns) > self._SET_NS:
            return even_ns
        self._zero_ns = told_ns - counted_ns
        return told_ns

    def told_ns(self) -> int:
        """Return the machine's clock, set or not, counted on from its last tick."""
        told_ns = time.time_ns()
        since_ns = self._zero_ns + _counted_ns() - told_ns
        return told_ns + since_ns if 0 < since_ns <= _TICK_NS else told_ns

    def at_ns(self, counted_ns: int) -> int:
        """Return the time of a reading of ``time.perf_counter_ns``."""
        return self.now_ns() - (time.perf_counter_ns() - counted_ns)

    def now_s(self) -> float:
        """Return the time in seconds."""
        return self.now_ns() / 1e9


def _counted_ns() -> int:
    """Count on while the machine sleeps, too, where a system tells."""
    if sys.platform == "win32":
        return time.perf_counter_ns()
    else:
        clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return time.clock_gettime_ns(clock)


_TICK_NS = int(1e9 * time.get_clock_info("time").resolution)
"""Up to Python 3.12 Windows' clock stands still for 16 ms, and its monotonic one."""
RUN_CLOCK = RunClock()
"""Of this process; restarted by each series."""


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
    has_any = False
    for kind in kinds:
        if wanted not in ("auto", kind.name):
            continue
        why = why_unavailable(kind)
        if why is not None:
            reasons.append(f"{kind.name}: {why}")
            continue
        if not has_any:
            passed_over = f" (not {'; '.join(reasons)})" if reasons else ""
            logger.info("%s: %s%s", what, kind.name, passed_over)
        has_any = True
        yield kind
    if not has_any:
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
