"""Native library: NVIDIA's libraries that come as wheels or with a CUDA toolkit."""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rtfocus.errors import EngineError


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """One of NVIDIA's libraries and where it may come from."""

    name: str
    """E.g. ``nvrtc``."""
    linux: tuple[str, ...]
    """File names, newest first."""
    windows: tuple[str, ...]
    package: str
    """Wheel that holds it."""


NVRTC = NativeLibrary(
    "nvrtc",
    ("libnvrtc.so.13", "libnvrtc.so.12"),
    ("nvrtc64_130_0.dll", "nvrtc64_120_0.dll"),
    "nvidia-cuda-nvrtc",
)
CUFFT = NativeLibrary(
    "cufft",
    ("libcufft.so.12", "libcufft.so.11"),
    ("cufft64_12.dll", "cufft64_11.dll"),
    "nvidia-cufft",
)


@cache
def load_library(library: NativeLibrary) -> ctypes.CDLL:
    """Load a library: first from wheels, then wherever the system finds it.

    Raises
    ------
    EngineError
        Names the files that were looked for and the remedy.
    """
    names = library.windows if sys.platform == "win32" else library.linux
    candidates = [str(path) for path in _in_wheels(names)] + list(names)
    reasons = []
    for candidate in candidates:
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            reasons.append(str(error))
    msg = (
        f"{library.name} cannot be loaded ({'; '.join(reasons)}); "
        f"pip install {library.package}, or rtfocus[gpu]"
    )
    raise EngineError(msg)


def why_not_loadable(library: NativeLibrary) -> str | None:
    """Return why a library cannot be used on this machine; None: it can."""
    try:
        load_library(library)
    except EngineError as error:
        return str(error)
    return None


def _in_wheels(names: tuple[str, ...]) -> list[Path]:
    """Return the files of these names in ``nvidia/`` of any folder of ``sys.path``."""
    folders = [Path(entry) / "nvidia" for entry in sys.path]
    return [
        path
        for name in names
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.rglob(name))
    ]
