"""The GPU kernels compiled for the host: the same text, run by a C++ compiler."""

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import fft

from rtfocus.processing.gpu.cuda.compiler import read_source, signatures
from rtfocus.processing.gpu.work import DeviceArray

STANDIN = Path(__file__).parent / "gpu" / "standin"
THREADS = 256

_KERNEL = re.compile(
    r'extern "C" __global__ void (\w+)\(([^)]*)\) \{(.*?)\n\}', re.DOTALL
)
# What only makes sense within a block.
_COOPERATIVE = ("__shared__", "block_sum", "block_max", "sum_of_parts", "threadIdx")


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("cooperative_threads", ctypes.c_uint),
    ]


OLDEST_COMPILER = 12
"""Of g++: the first with 16-bit floats and barriers."""


def compiler() -> str:
    """Return the C++ compiler; skips where there is none that will do."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler (g++) to run the kernels on the host")
    said = subprocess.run(
        [found, "-dumpversion"], capture_output=True, encoding="utf-8", check=True
    )
    version = said.stdout.strip()
    if int(version.partition(".")[0]) < OLDEST_COMPILER:
        pytest.skip(f"g++ {version} is too old, {OLDEST_COMPILER} is needed")
    return found


def build(source: str, target: Path, *options: str) -> Path:
    """Compile a shared library of the tests' own."""
    text = target.with_suffix(".cpp")
    text.write_text(source, encoding="utf-8")
    command = [compiler(), "-std=c++20", "-O3", "-shared", "-fPIC", "-pthread"]
    command += [f"-I{STANDIN}", *options, "-o", str(target), str(text)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return target


def kernel_library(folder: Path) -> Path:
    """Compile every kernel with an entry ``host_NAME(launch, arguments)``."""
    entries = [_entry(*found) for found in _KERNEL.findall(read_source())]
    source = ['#include "host_kernels.h"', read_source(), *entries]
    return build("\n".join(source), folder / "kernels.so")


def _entry(name: str, arguments: str, body: str) -> str:
    declared = [argument.strip() for argument in arguments.split(",")]
    fields = " ".join(f"{argument};" for argument in declared)
    passed = ", ".join(f"p.{argument.rpartition(' ')[2]}" for argument in declared)
    cooperative = any(word in body for word in _COOPERATIVE)
    return (
        f'extern "C" void host_{name}(const Launch* launch, const void* raw) {{\n'
        f"  struct Arguments {{ {fields} }};\n"
        "  const Arguments& p = *(const Arguments*)raw;\n"
        f"  run_launch(*launch, {str(cooperative).lower()}, "
        f"[&] {{ {name}({passed}); }});\n}}"
    )


class HostKernels:
    """Launches kernels on NumPy arrays."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def __call__(self, name, count, *arguments, rows=1, cooperative_threads=1):
        """Run a kernel with `count` threads (rounded up to blocks) in `rows`."""
        packed = struct.pack(
            signatures()[name], *(_plain(argument) for argument in arguments)
        )
        launch = _Launch(-(-count // THREADS), rows, THREADS, cooperative_threads)
        self._library[f"host_{name}"](ctypes.byref(launch), packed)


def _plain(argument):
    """Turn an array into its address; None into 0."""
    if argument is None:
        return 0
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return argument.ctypes.data
    return argument


class HostMemory:
    """Implements `DeviceMemory` with NumPy arrays."""

    def __init__(self) -> None:
        self._arrays = []

    def at_free(self, close):
        """Nothing is freed here."""

    def allocate(self, shape, dtype, purpose):
        # Whatever lay there before: nothing may rely on zeros.
        return self.upload(np.full(shape, 77, dtype), purpose)

    def upload(self, values, purpose):
        assert purpose
        kept = np.ascontiguousarray(values).copy()
        self._arrays.append(kept)
        return DeviceArray(kept.ctypes.data, kept.shape, kept.dtype)


class HostWork:
    """Implements `Work` by doing it at once."""

    handle = 0

    def __init__(self, library: Path, cooperative_threads: int = 1) -> None:
        self._kernels = HostKernels(library)
        self._threads = cooperative_threads

    def launch(self, kernel, threads, *arguments, rows=1):
        plain = [
            argument.address if isinstance(argument, DeviceArray) else argument
            for argument in arguments
        ]
        self._kernels(
            kernel, threads, *plain, rows=rows, cooperative_threads=self._threads
        )

    def zero(self, array):
        ctypes.memset(array.address, 0, array.size_bytes)

    def copy(self, target, source):
        assert target.size_bytes == source.size_bytes
        ctypes.memmove(target.address, source.address, source.size_bytes)


class HostTransforms:
    """Implements `Transforms` with SciPy, unscaled as cuFFT."""

    def forward(self, work, image, spectrum):
        view(spectrum)[...] = fft.rfft2(view(image))

    def inverse(self, work, spectrum, image):
        found = fft.irfft2(view(spectrum), s=image.shape[-2:])
        # cuFFT spoils its input.
        view(spectrum)[...] = 77
        view(image)[...] = found * np.float32(np.prod(image.shape[-2:]))

    def close(self):
        """Nothing is open."""


def view(array):
    """Return a NumPy view of host memory that plays device memory."""
    raw = (ctypes.c_uint8 * array.size_bytes).from_address(array.address)
    return np.frombuffer(raw, array.dtype).reshape(array.shape)
