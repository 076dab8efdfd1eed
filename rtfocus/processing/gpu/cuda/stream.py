"""Stream: kernels, copies, events and recordings in order, none of them waited for."""

import ctypes
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.cuda.compiler import signatures
from rtfocus.processing.gpu.cuda.driver import (
    check_status,
    import_driver,
    load_driver_library,
)
from rtfocus.processing.gpu.work import Argument, DeviceArray, Work

logger = logging.getLogger(__name__)


BLOCK = 256
_NON_BLOCKING = 1


class Kernels:
    """All kernels, loaded on the current GPU.

    Parameters
    ----------
    code
        Of `rtfocus.processing.gpu.cuda.compiler.compiled_kernels`.
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
            enqueue()
        finally:
            # Also after a failure: a stream left recording executes nothing more.
            status = self._library.cuStreamEndCapture(stream, ctypes.byref(graph))
        check_status(status, "recording")
        status = self._library.cuGraphInstantiateWithFlags(
            ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0)
        )
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
        self.reason: str | None = None
        """Why it is not recorded; None: it is, or nobody tried yet."""

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
        self.reason = self._why_not(work)
        if self.reason is None:
            try:
                return CudaGraph(work, lambda: self._enqueue(work))
            except (EngineError, import_driver().Error) as error:
                self.reason = str(error)
        logger.info("%s runs without a CUDA graph: %s", self._name, self.reason)
        return None
