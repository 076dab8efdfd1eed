"""Stream: kernels, copies, events and recordings in order, none of them waited for.

And the memory they work on: device arrays of one series, pinned arrays of the host.
"""

import ctypes
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.cuda.compiler import signatures
from rtfocus.processing.gpu.cuda.driver import (
    OutOfGpuMemoryError,
    check_status,
    import_driver,
    load_driver_library,
    translated,
)
from rtfocus.processing.gpu.work import BLOCK, Argument, DeviceArray, Work

logger = logging.getLogger(__name__)


class CudaMemory:
    """Implements `rtfocus.processing.gpu.work.DeviceMemory` with PyCUDA.

    Used where the primary context of the GPU is current.
    """

    def __init__(self, gpu_index: int) -> None:
        self._gpu_index = gpu_index
        self._cuda = import_driver()
        self._held: list[Any] = []
        self._users: list[Callable[[], None]] = []
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

    def at_free(self, close: Callable[[], None]) -> None:
        """Close a user of the memory before it is freed; see `DeviceMemory`."""
        self._users.append(close)

    def free(self) -> None:
        """Free everything; the caller has made sure that nothing of it is in flight."""
        while self._users:
            self._users.pop()()
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
        for address, (_, registered) in self._owners.items():
            if registered:
                _unregister(address)
        self._owners.clear()

    def _pin(self, owner: NDArray[Any], address: int, size_bytes: int) -> bool:
        known = self._owners.get(address)
        if known is None:
            # Kept alive: nothing else may come to lie in pinned pages.
            known = owner, _register(address, size_bytes)
            self._owners[address] = known
        return known[1]


_pinners: Counter[int] = Counter()
"""Who has pinned memory, by its address: it is pinned once, for every GPU at once."""
_pinning = threading.Lock()


def _register(address: int, size_bytes: int) -> bool:
    with _pinning:
        status = 0
        if not _pinners[address]:
            status = load_driver_library().cuMemHostRegister_v2(
                ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), _PORTABLE
            )
        _pinners[address] += not status
    if status:
        logger.warning(
            "%.0f MB of host memory cannot be pinned (CUDA error %d): copies wait for "
            "each other; raise the limit of locked memory (ulimit -l) or lower "
            "transport.memory_mb",
            size_bytes / 1e6,
            status,
        )
    return not status


def _unregister(address: int) -> None:
    with _pinning:
        _pinners[address] -= 1
        if not _pinners[address]:
            del _pinners[address]
            load_driver_library().cuMemHostUnregister(ctypes.c_void_p(address))


_NON_BLOCKING = 1


class LoadedKernels:
    """All kernels, loaded on the current GPU from what `compiled_kernels` returned."""

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
    """Implements `rtfocus.processing.gpu.work.Work` with a stream of PyCUDA."""

    def __init__(self, kernels: LoadedKernels) -> None:
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


_THREAD_LOCAL = 1
"""Only this thread's forbidden calls end a recording."""


class CudaGraph:
    """Launches recorded on a CUDA stream.

    Parameters
    ----------
    work
        Stream that records; nothing is executed.
    enqueue
        Enqueues the launches, on `work` alone.

    Raises
    ------
    EngineError
        If the driver cannot record them.
    """

    def __init__(self, work: Work, enqueue: Callable[[], None]) -> None:
        self._library = load_driver_library()
        stream = ctypes.c_void_p(work.handle)
        graph = ctypes.c_void_p()
        self._executable = ctypes.c_void_p()
        check_status(
            self._library.cuStreamBeginCapture_v2(stream, _THREAD_LOCAL), "recording"
        )
        try:
            try:
                enqueue()
            finally:
                # Also after a failure: a stream left recording executes nothing more.
                status = self._library.cuStreamEndCapture(stream, ctypes.byref(graph))
            check_status(status, "recording")
            status = self._library.cuGraphInstantiateWithFlags(
                ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0)
            )
        finally:
            if graph:
                self._library.cuGraphDestroy(graph)
        check_status(status, "preparing a recording")

    def launch(self, work: Work) -> None:
        """Enqueue everything that was recorded."""
        check_status(
            self._library.cuGraphLaunch(self._executable, ctypes.c_void_p(work.handle)),
            "replaying a recording",
        )

    def close(self) -> None:
        """Free the recording."""
        self._library.cuGraphExecDestroy(self._executable)


class Replayed:
    """A sequence that is recorded at its second run, if it can be.

    The first run goes as it is: libraries reserve and compile in it.

    Parameters
    ----------
    name
        For the log.
    enqueue
        Enqueues the sequence on a stream.
    why_not
        Reason why it must not be recorded; None: it may. Asked after the first run.
    """

    def __init__(
        self,
        name: str,
        enqueue: Callable[[Work], None],
        why_not: Callable[[Work], str | None],
    ) -> None:
        self._name = name
        self._enqueue = enqueue
        self._why_not = why_not
        self._runs = 0
        self._graph: CudaGraph | None = None

    def __call__(self, work: Work) -> None:
        """Enqueue the sequence once more."""
        self._runs += 1
        if self._runs == 2:
            self._graph = self._record(work)
        if self._graph is None:
            self._enqueue(work)
        else:
            self._graph.launch(work)

    @property
    def is_recorded(self) -> bool:
        """Whether it is replayed from a recording."""
        return self._graph is not None

    def close(self) -> None:
        """Free the recording."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _record(self, work: Work) -> CudaGraph | None:
        reason = self._why_not(work)
        if reason is None:
            try:
                return CudaGraph(work, lambda: self._enqueue(work))
            except (EngineError, import_driver().Error) as error:
                reason = str(error)
        logger.info("%s runs without a CUDA graph: %s", self._name, reason)
        return None
