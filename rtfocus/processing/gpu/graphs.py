"""Graphs: a sequence of launches recorded once and replayed with one call.

Through the driver itself, PyCUDA has no graphs. A sequence that cannot be recorded
runs as it is, and the reason is told once.
"""

import ctypes
import logging
from collections.abc import Callable

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.driver import (
    check_status,
    import_driver,
    load_driver_library,
)
from rtfocus.processing.gpu.work import Work

logger = logging.getLogger(__name__)

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
