"""CUDA stream: kernels, copies and events in order, none of them waited for."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.gpu.driver import import_driver
from rtfocus.processing.gpu.kernel_source import signatures
from rtfocus.processing.gpu.work import Argument, DeviceArray

BLOCK = 256
_NON_BLOCKING = 1


class Kernels:
    """All kernels, loaded on the current GPU.

    Parameters
    ----------
    code
        Of `rtfocus.processing.gpu.kernel_compiler.compiled_kernels`.
    """

    def __init__(self, code: bytes) -> None:
        self._module: Any = import_driver().module_from_buffer(code)
        self.functions: Mapping[str, Any] = {
            name: self._load(name, codes) for name, codes in signatures().items()
        }

    def _load(self, name: str, codes: str) -> Any:
        function = self._module.get_function(name)
        function.prepare(codes)
        return function


class CudaStream:
    """Implements `rtfocus.processing.gpu.work.Work` with a stream of PyCUDA.

    Parameters
    ----------
    kernels
        That it can launch.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._cuda = import_driver()
        # The default stream would wait for, and hold up, every other one.
        self._stream = self._cuda.Stream(_NON_BLOCKING)
        self._kernels = kernels

    @property
    def handle(self) -> int:
        """Of the CUDA stream, for libraries."""
        return int(self._stream.handle)

    def launch(
        self, kernel: str, threads: int, *arguments: Argument, rows: int = 1
    ) -> None:
        """Enqueue a kernel; see `Work.launch`."""
        plain = [
            argument.address if isinstance(argument, DeviceArray) else argument or 0
            for argument in arguments
        ]
        self._kernels.functions[kernel].prepared_async_call(
            (-(-threads // BLOCK), rows), (BLOCK, 1, 1), self._stream, *plain
        )

    def zero(self, array: DeviceArray) -> None:
        """Enqueue filling an array with zero bytes."""
        self._cuda.memset_d8_async(array.address, 0, array.size_bytes, self._stream)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Enqueue a copy within the device."""
        self._cuda.memcpy_dtod_async(
            target.address, source.address, target.size_bytes, self._stream
        )

    def copy_in(self, target: DeviceArray, source: NDArray[np.generic]) -> None:
        """Enqueue host to device; `source` is pinned, dense, and kept until then."""
        self._cuda.memcpy_htod_async(target.address, source, self._stream)

    def copy_out(self, target: NDArray[np.generic], source: DeviceArray) -> None:
        """Enqueue device to host; `target` is pinned, dense, not read until then."""
        self._cuda.memcpy_dtoh_async(target, source.address, self._stream)

    def record(self, event: Any) -> None:
        """Enqueue the mark that everything so far is done."""
        event.record(self._stream)

    def wait(self, event: Any) -> None:
        """Enqueue waiting, on the GPU, for an event recorded before."""
        self._stream.wait_for_event(event)

    def synchronise(self) -> None:
        """Wait for all that is enqueued: at the start and the end only."""
        self._stream.synchronize()


def new_event() -> Any:
    """Make an event that also tells the time; waiting for it lets others work."""
    cuda = import_driver()
    return cuda.Event(cuda.event_flags.BLOCKING_SYNC)
