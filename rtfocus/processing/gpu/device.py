"""GpuDevice: frames through one GPU, as `rtfocus.processing.device.Device`.

The thread that prepares and enqueues owns the GPU: it makes, uses and drops every
object of the driver. The others wait for events, which lets every other thread run,
and hand out what has arrived.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from numpy.typing import NDArray

from rtfocus.config.model import Config
from rtfocus.frame import DefocusMap, SeriesStart
from rtfocus.processing.channel_plan import ChannelPlan
from rtfocus.processing.device import Job, Prepared
from rtfocus.processing.gpu.cuda.driver import current_context, find_device, translated
from rtfocus.processing.gpu.engine import Gpu
from rtfocus.processing.gpu.session import Session

Spans = dict[str, tuple[float, float]]
"""Begin and end of every stage in ms since the series began, by the GPU's clock."""
Trace = Callable[[int, Spans], None]
"""Told the sequence of a frame and its spans."""


class GpuDevice:
    """One NVIDIA GPU; implements `rtfocus.processing.device.Device`.

    Parameters
    ----------
    config
        Sections ``processing`` and ``store``.
    trace
        Told when every stage of a frame began and ended; None: nobody is.

    Raises
    ------
    EngineError
        If there is no such GPU.
    """

    def __init__(self, config: Config, trace: Trace | None = None) -> None:
        self._config = config
        self._trace = trace
        self._gpu: Gpu = find_device(config.processing.gpu.index)
        self._index = self._gpu.gpu_index
        self._session: Session | None = None
        self.name = f"GPU {self._index}"
        self.memory_bytes = 0
        """Device memory in use when the last series was ready, networks included."""

    def entered(self) -> AbstractContextManager[None]:
        """Make the GPU's context current in a thread."""
        return current_context(self._index)

    def prepare(
        self, plans: Sequence[ChannelPlan], series: SeriesStart, slots: int
    ) -> Prepared:
        """Open engines and reserve buffers for a series."""
        session = Session(self._config, plans, series, slots, self._gpu)
        self._session = session
        self.memory_bytes = session.used_bytes()
        return Prepared(
            grids={channel.plan.name: channel.grid for channel in session.channels},
            in_flight=len(session.device_slots),
            restoring=1,
            backends={
                name: runtime
                for channel in session.channels
                for name, runtime in channel.backends.items()
            },
        )

    def enqueue(self, job: Job) -> None:
        """Enqueue a frame up to its maps; returns before any of it is done."""
        with translated(self._index, "enqueueing a frame"):
            self._open_session().enqueue(job)

    def estimate(self, job: Job) -> DefocusMap | None:
        """Wait for the maps of a frame."""
        with translated(self._index, "estimating"):
            return self._open_session().wait_maps(job)

    def begin_restoring(self, job: Job) -> None:
        """Enqueue the restoration of what is out of focus."""
        with translated(self._index, "enqueueing a restoration"):
            self._open_session().enqueue_restoration(job)

    def restore(self, job: Job) -> NDArray[Any] | None:
        """Wait for all of a frame."""
        session = self._open_session()
        with translated(self._index, "restoring"):
            restored = session.wait_restored(job)
            spans = session.spans(job)
        job.stage_ms = {stage: end - begin for stage, (begin, end) in spans.items()}
        if self._trace is not None:
            self._trace(job.slot.frame().sequence, spans)
        return restored

    def close(self) -> None:
        """Wait for the GPU and free everything; called twice does nothing."""
        if self._session is not None:
            self._session.close()
        self._session = None

    def _open_session(self) -> Session:
        if self._session is None:
            msg = "a frame came before the GPU was prepared"
            raise ValueError(msg)
        return self._session
