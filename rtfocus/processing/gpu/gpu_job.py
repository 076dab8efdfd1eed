"""GPU job: one frame's way through the GPU processor, as its caller sees it."""

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.frame import DefocusMap, Estimate, FrameResult
from rtfocus.processing.gpu.driver import without_frames
from rtfocus.slots import Slot


@dataclass
class GpuJob:
    """One frame in work, with the host buffers that belong to its slot."""

    packed_maps: NDArray[np.uint8]
    """Pinned copy of the maps, see `rtfocus.processing.gpu.frame_maps`."""
    counts: NDArray[Any]
    """Pinned copy of the restored frame."""
    slot: Slot | None = None
    channel: int = 0
    """Position in the series."""
    unrestored: str | None = None
    """Why restoration is to be left out; None: restore."""
    invalid: NDArray[np.bool_] | None = None
    """Pixels that are NaN or infinite; None: none."""
    estimate: Estimate | None = None
    defocus: DefocusMap | None = None
    result: FrameResult | None = None
    error: EngineError | None = None
    estimated: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)

    def begin(self, slot: Slot, channel: int, *, unrestored: str | None) -> None:
        """Take a new frame; what the last one left is forgotten."""
        self.slot, self.channel, self.unrestored = slot, channel, unrestored
        self.estimate = self.defocus = self.result = self.error = None
        self.invalid = None
        self.estimated.clear()
        self.finished.clear()

    def slot_in_work(self) -> Slot:
        """Return the slot of the frame in work."""
        if self.slot is None:
            msg = "a job without a frame was queued"
            raise ValueError(msg)
        return self.slot

    def fail(self, error: EngineError) -> None:
        """Wake everybody who waits for this frame with an error."""
        self.error = error
        self.estimated.set()
        self.finished.set()


def failure_of(job: GpuJob, error: Exception) -> EngineError:
    """Return the error of a frame for whoever waits for it.

    Without tracebacks: their frames would keep objects of the driver alive, which
    must be dropped in the thread that owns the GPU.
    """
    sequence = job.slot_in_work().frame().sequence
    kind = type(error) if isinstance(error, EngineError) else EngineError
    failure = kind(f"frame {sequence} could not be processed: {error}")
    failure.__cause__ = without_frames(error)
    return failure
