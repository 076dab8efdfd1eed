"""Machine: which processor this is, and how much of it this process may use."""

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """Return the processor's model; Linux hides it from ``platform``."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_threads() -> int:
    """Return the threads this process may use, which a container or job limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
