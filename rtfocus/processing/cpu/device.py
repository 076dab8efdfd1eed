"""CpuDevice: frames through NumPy, a CPU network and Fourier transforms."""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.model import Config
from rtfocus.frame import DefocusMap, SeriesStart
from rtfocus.machine import usable_threads
from rtfocus.processing.camera import Marks, write_counts
from rtfocus.processing.channel_plan import ChannelPlan
from rtfocus.processing.cpu.channel import OpenChannel, open_channel, share_threads
from rtfocus.processing.cpu.classifier import Seen
from rtfocus.processing.device import Job, Prepared

Image = NDArray[np.float32]


@dataclass
class _SlotBuffers:
    """What belongs to one slot."""

    signal: Image
    """Corrected frame."""
    restored: NDArray[Any] | None
    """Result on the camera's scale; None where no channel is restored."""
    marks: Marks = field(default_factory=Marks)
    pedestal: float = 0.0
    """What a frame with negative values was lifted by."""
    seen: Seen | None = None
    """What the classifier saw; None: none yet, or there is none."""


class CpuDevice:
    """Implements `rtfocus.processing.device.Device` on the CPU.

    Parameters
    ----------
    config
        Sections ``processing`` and ``store``.
    """

    name = "CPU"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._channels: list[OpenChannel] = []
        self._slots: list[_SlotBuffers] = []
        self._thread = threading.local()

    def entered(self) -> AbstractContextManager[None]:
        """Threads need nothing to use a CPU."""
        return nullcontext()

    def prepare(
        self, plans: Sequence[ChannelPlan], series: SeriesStart, slots: int
    ) -> Prepared:
        """Open engines and reserve buffers for a series."""
        # While networks are compiled; the first frame waits for the rest of it.
        loading = threading.Thread(target=import_module, args=("scipy.fft",))
        loading.start()
        threads = self._config.processing.threads or usable_threads()
        for plan in plans:
            self._channels.append(open_channel(plan, threads))
        wanted = any(plan.restoration is not None for plan in plans)
        as_float = self._config.store.restored_dtype == "float32"
        dtype = np.dtype(np.float32) if as_float else np.dtype(series.dtype)
        self._slots = [
            _SlotBuffers(
                signal=np.empty(series.shape, dtype=np.float32),
                restored=np.empty(series.shape, dtype=dtype) if wanted else None,
            )
            for _ in range(slots)
        ]
        self._thread = threading.local()
        return Prepared(
            grids={channel.plan.name: channel.grid for channel in self._channels},
            in_flight=slots,
            restoring=share_threads(threads).restore,
            backends={
                name: runtime
                for channel in self._channels
                for name, runtime in channel.backends.items()
            },
        )

    def enqueue(self, job: Job) -> None:
        """Correct a frame."""
        buffers, channel = self._slots[job.slot.index], self._channels[job.channel]
        camera, pixels = job.plan.camera, job.slot.pixels
        with job.stage("correct"):
            if channel.classifier is None and channel.restorer is None:
                # It is recorded alone: nobody reads a signal.
                buffers.marks = camera.mark(pixels)
            else:
                buffers.pedestal = camera.pedestal(pixels)
                buffers.marks = camera.to_signal(pixels, buffers.signal)
                if buffers.pedestal:
                    buffers.signal += np.float32(buffers.pedestal)
        job.flags = buffers.marks.flags

    def estimate(self, job: Job) -> DefocusMap | None:
        """Find the defocus of a frame's tiles."""
        buffers = self._slots[job.slot.index]
        classifier = self._channels[job.channel].classifier
        buffers.seen = None
        if classifier is None:
            return None
        with job.stage("normalise"):
            prepared = classifier.prepare(buffers.signal)
        with job.stage("classify"):
            buffers.seen = classifier.see(prepared)
        return buffers.seen.defocus

    def begin_restoring(self, job: Job) -> None:
        """Nothing: a CPU restores when somebody waits for it."""

    def restore(self, job: Job) -> NDArray[Any] | None:
        """Restore a frame, into a scratch frame of this thread and then its slot's."""
        buffers = self._slots[job.slot.index]
        channel = self._channels[job.channel]
        restorer = channel.restorer
        restored, seen = buffers.restored, buffers.seen
        if job.skipped is not None or restorer is None or restored is None:
            return None
        with job.stage("restore"):
            scratch = self._scratch(buffers.signal)
            restorer.restore_frame(
                buffers.signal, seen, scratch, quantum=job.plan.camera.quantum
            )
            self._store(job, scratch, restored)
        return restored

    def _store(self, job: Job, scratch: Image, restored: NDArray[Any]) -> None:
        """Put a restored signal on the camera's scale, unless it has one of its own."""
        buffers = self._slots[job.slot.index]
        invalid, restoration = buffers.marks.invalid, job.plan.restoration
        if restoration is not None and not restoration.gives_counts:
            write_counts(scratch, restored, invalid)
            return
        if buffers.pedestal:
            scratch -= np.float32(buffers.pedestal)
        job.plan.camera.to_counts(scratch, restored, invalid)

    def close(self) -> None:
        """Free the engines; the buffers stay, somebody may still read a result."""
        for channel in self._channels:
            channel.close()
        self._channels = []

    def _scratch(self, like: Image) -> Image:
        """Return this thread's own frame."""
        if not hasattr(self._thread, "scratch"):
            self._thread.scratch = np.empty_like(like)
        scratch: Image = self._thread.scratch
        return scratch
