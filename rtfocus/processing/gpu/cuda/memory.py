"""Memory: device arrays of one series, and pinned arrays of the host."""

import ctypes
import logging
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.processing.gpu.cuda.driver import (
    OutOfGpuMemoryError,
    import_driver,
    load_driver_library,
    translated,
)
from rtfocus.processing.gpu.work import DeviceArray

logger = logging.getLogger(__name__)


class CudaMemory:
    """Implements `rtfocus.processing.gpu.work.DeviceMemory` with PyCUDA.

    Parameters
    ----------
    gpu_index
        Whose primary context is current in this thread.
    """

    def __init__(self, gpu_index: int) -> None:
        self._gpu_index = gpu_index
        self._cuda = import_driver()
        self._held: list[Any] = []
        self.size_bytes = 0
        """Bytes reserved so far."""

    def allocate(
        self, shape: tuple[int, ...], dtype: DTypeLike, purpose: str
    ) -> DeviceArray:
        """Reserve an array; see `DeviceMemory.allocate`."""
        kind = np.dtype(dtype)
        # The driver refuses to reserve nothing.
        size_bytes = max(1, prod(shape) * kind.itemsize)
        try:
            memory = self._cuda.mem_alloc(size_bytes)
        except self._cuda.MemoryError as error:
            free, total = self._cuda.mem_get_info()
            msg = (
                f"GPU {self._gpu_index}: {purpose} needs {size_bytes / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} of {total / 1e6:.0f} MB are free, "
                f"{self.size_bytes / 1e6:.0f} MB are held beside it; lower "
                "processing.gpu.frames_in_flight or the camera's region"
            )
            raise OutOfGpuMemoryError(msg) from error
        self._held.append(memory)
        self.size_bytes += size_bytes
        return DeviceArray(int(memory), shape, kind)

    def upload(self, values: NDArray[Any], purpose: str) -> DeviceArray:
        """Reserve an array and fill it; waits until it is filled."""
        dense = np.ascontiguousarray(values)
        array = self.allocate(dense.shape, dense.dtype, purpose)
        with translated(self._gpu_index, f"copying {purpose}"):
            self._cuda.memcpy_htod(array.address, dense)
        return array

    def free(self) -> None:
        """Free everything; the caller has made sure that nothing uses it."""
        for memory in self._held:
            memory.free()
        self._held.clear()
        self.size_bytes = 0


_PORTABLE = 1
_PAGE = 4096


class PinnedMemory:
    """Arrays that are pinned until `release`; used in the thread that owns the GPU."""

    def __init__(self) -> None:
        self._owners: dict[int, tuple[NDArray[Any], bool]] = {}

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return a new pinned array; it stays valid after `release`."""
        size_bytes = prod(shape) * np.dtype(dtype).itemsize
        # Whole pages of its own: two pinned pieces must not share one.
        pages = max(1, -(-size_bytes // _PAGE))
        raw = np.empty((pages + 1) * _PAGE, np.uint8)
        start = -raw.ctypes.data % _PAGE
        self._pin(raw, raw.ctypes.data + start, pages * _PAGE)
        return raw[start : start + size_bytes].view(dtype).reshape(shape)

    def is_pinned(self, pixels: NDArray[Any]) -> bool:
        """Return whether an array lies in pinned memory.

        What owns it, such as a whole slot pool, is pinned when it is first seen.
        """
        owner = pixels
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return self._pin(owner, owner.ctypes.data, owner.nbytes)

    def release(self) -> None:
        """Unpin everything; nothing is being copied."""
        library = load_driver_library()
        for address, (_, registered) in self._owners.items():
            if registered:
                library.cuMemHostUnregister(ctypes.c_void_p(address))
        self._owners.clear()

    def _pin(self, owner: NDArray[Any], address: int, size_bytes: int) -> bool:
        known = self._owners.get(address)
        if known is None:
            # Kept alive: nothing else may come to lie in pinned pages.
            known = owner, _register(address, size_bytes)
            self._owners[address] = known
        return known[1]


def _register(address: int, size_bytes: int) -> bool:
    status = load_driver_library().cuMemHostRegister_v2(
        ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), _PORTABLE
    )
    if status:
        logger.warning(
            "%.0f MB of host memory cannot be pinned (CUDA error %d): copies wait for "
            "each other; raise the limit of locked memory (ulimit -l) or lower "
            "transport.memory_mb",
            size_bytes / 1e6,
            status,
        )
    return not status
