"""Driver: PyCUDA imported when it is needed, its errors as ours, one GPU per thread.

Nothing else imports PyCUDA. Objects of the driver are made, used and dropped in the
one thread that owns the GPU; other threads at most wait for an event.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from rtfocus.errors import EngineError
from rtfocus.processing.device import LostDeviceError


class OutOfGpuMemoryError(EngineError):
    """A reservation failed; with smaller settings the same series may fit."""


class LostGpuError(LostDeviceError):
    """The GPU stopped answering; no later call in this process will succeed."""


@cache
def import_driver() -> Any:
    """Return the module ``pycuda.driver``, initialised.

    Raises
    ------
    EngineError
        If PyCUDA or the driver is missing; says which, with the remedy.
    """
    try:
        cuda = import_module("pycuda.driver")
    except ImportError as error:
        msg = (
            f"no NVIDIA GPU can be used: PyCUDA cannot be imported ({error}); install "
            "the NVIDIA driver and rtfocus[gpu]"
        )
        raise EngineError(msg) from error
    try:
        cuda.init()
    except cuda.Error as error:
        msg = f"the NVIDIA driver does not answer ({error}); reinstall or update it"
        raise EngineError(msg) from error
    return cuda


@cache
def load_driver_library() -> ctypes.CDLL:
    """Load the driver itself, for the few calls that PyCUDA lacks or gets wrong."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        msg = f"the NVIDIA driver cannot be loaded ({error}); install it"
        raise EngineError(msg) from error


def check_status(status: int, what: str) -> None:
    """Raise EngineError unless a driver call made through ctypes succeeded."""
    if status:
        text = ctypes.c_char_p()
        load_driver_library().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown").decode(errors="replace")
        msg = f"{what} failed: {reason} (CUDA error {status})"
        raise EngineError(msg)


@contextmanager
def current_context(gpu_index: int) -> Iterator[None]:
    """Make the primary context of a GPU current in this thread for a block.

    TensorRT and torch live in that one; a context made anew would not be theirs.

    Raises
    ------
    EngineError
        If the driver gives none: the GPU is full, or in exclusive use.
    """
    with translated(gpu_index, "opening a context"):
        context = import_driver().Device(gpu_index).retain_primary_context()
        context.push()
    try:
        yield
    finally:
        context.pop()


@contextmanager
def translated(gpu_index: int, doing: str) -> Iterator[None]:
    """Turn PyCUDA's errors in a block into ours.

    Parameters
    ----------
    gpu_index
        For the message.
    doing
        What the block does, e.g. ``"copying frame 7"``.

    Raises
    ------
    OutOfGpuMemoryError
        If memory ran out.
    LostGpuError
        For anything else: the driver's errors are final for the process.
    """
    cuda = import_driver()
    try:
        yield
    except cuda.MemoryError as error:
        msg = f"GPU {gpu_index} has no memory left for {doing} ({error})"
        raise OutOfGpuMemoryError(msg) from error
    except cuda.Error as error:
        msg = (
            f"GPU {gpu_index} failed while {doing} ({error}); start again, and if it "
            "recurs look into the system log for Xid errors, update the driver, or set "
            "processing.device: cpu"
        )
        raise LostGpuError(msg) from error
