"""Job: one frame's way through the CPU processor, step by step."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.frame import Estimate, FrameResult
from rtfocus.processing.classifier import Seen
from rtfocus.processing.correction import Marks
from rtfocus.processing.estimate import estimate_frame
from rtfocus.processing.plan import ChannelPlan
from rtfocus.slots import Slot

Image = NDArray[np.float32]


@dataclass
class Job:
    """One frame in work, with the buffers that belong to its slot."""

    signal: Image
    """Corrected frame; becomes the restored one."""
    restored: NDArray[Any] | None
    """Result on the camera's scale; None where no channel is restored."""
    slot: Slot | None = None
    plan: ChannelPlan | None = None
    unrestored: str | None = None
    """Why restoration is to be left out; None: restore."""
    marks: Marks = field(default_factory=lambda: Marks((), None))
    estimate: Estimate | None = None
    seen: Seen | None = None
    """What the classifier saw; None: none yet, or there is none."""
    result: FrameResult | None = None
    error: EngineError | None = None
    stage_ms: dict[str, float] = field(default_factory=dict)
    estimated: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)

    def begin(self, slot: Slot, plan: ChannelPlan, *, unrestored: str | None) -> None:
        """Take a new frame; what the last one left is forgotten."""
        self.slot, self.plan, self.unrestored = slot, plan, unrestored
        self.estimate = self.seen = self.result = self.error = None
        self.stage_ms = {}
        self.estimated.clear()
        self.finished.clear()

    def of(self) -> tuple[Slot, ChannelPlan]:
        """Return the slot and the plan of the frame in work."""
        if self.slot is None or self.plan is None:
            msg = "a job without a frame was queued"
            raise ValueError(msg)
        return self.slot, self.plan

    def fail(self, error: EngineError) -> None:
        """Wake everybody who waits for this frame with an error."""
        self.error = error
        self.estimated.set()
        self.finished.set()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage in milliseconds."""
        begun = time.perf_counter()
        yield
        self.stage_ms[name] = (time.perf_counter() - begun) * 1e3


def attempt(step: Callable[[Job], None], job: Job) -> bool:
    """Apply a step; a failure goes to whoever waits for this frame."""
    try:
        step(job)
    except Exception as error:  # any fault of one frame must not end the thread
        sequence = job.slot.frame().sequence if job.slot is not None else None
        msg = f"frame {sequence} could not be processed: {error}"
        failure = EngineError(msg)
        failure.__cause__ = error
        job.fail(failure)
        return False
    return True


def classify(job: Job) -> None:
    """Correct a frame and estimate the defocus of its tiles."""
    slot, plan = job.of()
    with job.stage("correct"):
        job.marks = plan.correction.to_signal(slot.pixels, job.signal)
    if plan.classifier is None:
        return
    with job.stage("normalise"):
        prepared = plan.classifier.prepare(job.signal)
    with job.stage("classify"):
        job.seen = plan.classifier.see(prepared)
        job.estimate = estimate_frame(slot.frame(), job.seen.defocus)


def restore(job: Job, scratch: Image) -> None:
    """Restore a frame, or say why it was not."""
    _, plan = job.of()
    skipped = job.unrestored or plan.skipped
    restored = None
    if (
        skipped is None
        and plan.restorer is not None
        and job.seen is not None
        and job.restored is not None
    ):
        with job.stage("restore"):
            plan.restorer.restore(
                job.signal, job.seen, scratch, quantum=plan.correction.quantum
            )
            restored = job.restored
            plan.correction.to_counts(scratch, restored, job.marks.invalid)
    job.result = FrameResult(
        estimate=job.estimate,
        defocus=None if job.seen is None else job.seen.defocus,
        restored=restored,
        skipped=skipped,
        flags=job.marks.flags,
        engines=dict(plan.engines),
        stage_ms=job.stage_ms,
    )
