"""Machine: which processor this is, and how much of it this process may use."""

import os
import platform
from pathlib import Path


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
