"""Pinning: page-locked host memory, without which no copy runs beside anything.

Through the driver itself, because PyCUDA 2026.1's ``register_host_memory`` crashes
(its issue 459), and because memory that PyCUDA allocates must be freed in the
thread that owns the GPU, which results that somebody still reads do not wait for.
"""

import ctypes
import logging
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.processing.gpu.driver import load_driver_library

logger = logging.getLogger(__name__)

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
