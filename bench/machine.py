"""Machine: what a benchmark ran on, and where its figures go."""

import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from rtfocus.machine import processor_name, usable_threads

_PACKAGES = (
    "rtfocus",
    "numpy",
    "scipy",
    "pyzmq",
    "msgspec",
    "tensorstore",
    "zarr",
    "openvino",
    "onnxruntime",
    "pymmcore-plus",
    "pymmcore",
    "scikit-image",
)


def describe() -> dict[str, Any]:
    """Return processor, cores, memory, system and versions as plain values."""
    return {
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable_threads": usable_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_1min": round(psutil.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
    }


def write(name: str, payload: dict[str, Any], out: Path | None) -> Path:
    """Write figures beside the machine they are from; return the file.

    Parameters
    ----------
    name
        Of the benchmark; names the file when `out` is a folder or None.
    payload
        Figures and configuration, plain values.
    out
        A ``.json`` file, a folder, or None for ``bench/results``.
    """
    target = out or Path(__file__).parent / "results"
    path = target if target.suffix == ".json" else target / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    taken = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"bench": name, "taken": taken, "machine": describe(), **payload}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _versions() -> list[tuple[str, str]]:
    found = []
    for package in _PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    return found
