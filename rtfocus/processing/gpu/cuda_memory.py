"""CUDA memory: device arrays of one series, freed together."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.processing.gpu.driver import (
    OutOfGpuMemoryError,
    import_driver,
    translated,
)
from rtfocus.processing.gpu.work import DeviceArray


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
