"""Device: what the processor asks of a CPU or a GPU, and the frames it hands over.

A device turns channel plans into work. It has no queue, no order and no thread of
its own: those are the processor's, which calls it from three kinds of threads::

    [own] prepare, enqueue, close ─▶ [estimate] estimate, begin_restoring ─▶
    [restore] restore
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.model import Config
from rtfocus.engines.fitted import forget_unseen, stated_um
from rtfocus.errors import EngineError, RtfocusError
from rtfocus.frame import (
    DefocusMap,
    Estimate,
    FrameHeader,
    FrameResult,
    SeriesStart,
    Slot,
    TileGrid,
)
from rtfocus.optics.normalisation import BELOW_OFFSET, told_below
from rtfocus.processing.channel_plan import ChannelPlan

Estimated = tuple[Estimate, DefocusMap]
"""A frame's defocus in one number and tile by tile."""


class LostDeviceError(EngineError):
    """The device stopped answering; no later frame of this process will succeed."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """The claim on a submitted frame; neither future can be cancelled.

    The caller owns the slot and must not release it before the result is there and
    its arrays are no longer needed: they belong to the slot.
    """

    slot: Slot
    estimate: "Future[Estimated | None]" = field(default_factory=Future)
    """Defocus, as soon as it is known; None: this channel has no classifier."""
    result: "Future[FrameResult]" = field(default_factory=Future)
    """Everything about the frame; EngineError: what went wrong with it."""

    def __post_init__(self) -> None:
        self.estimate.set_running_or_notify_cancel()
        self.result.set_running_or_notify_cancel()


@dataclass(slots=True)
class Job:
    """One frame in work."""

    ticket: Ticket
    plan: ChannelPlan
    channel: int
    """Position in the series."""
    unrestored: str | None = None
    """Why restoration is to be left out; None: restore."""
    seat: int = -1
    """Which of the frames in flight it is on the device, from 0."""
    flags: tuple[str, ...] = ()
    """What is wrong with its pixels: ``nan``, ``saturated``; set by the device."""
    estimated: Estimated | None = None
    expected_error: NDArray[np.float32] | None = None
    """As in `FrameResult`; set by the device."""
    strange: bool = False
    """Whether a restored pixel is NaN or infinite; set by the device."""
    failed: bool = False
    stage_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds per stage; set by the device."""

    @property
    def slot(self) -> Slot:
        """Where the frame lies."""
        return self.ticket.slot

    @property
    def skipped(self) -> str | None:
        """Why the frame is not restored; None: it is."""
        return self.unrestored or self.plan.skipped

    def fail(self, error: EngineError) -> None:
        """Tell everybody who waits for this frame."""
        self.failed = True
        for future in (self.ticket.estimate, self.ticket.result):
            if not future.done():
                future.set_exception(error)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage by this machine's clock."""
        start_s = time.perf_counter()
        yield
        self.stage_ms[name] = (time.perf_counter() - start_s) * 1e3


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a device is ready for."""

    grids: Mapping[str, TileGrid | None]
    """Tiles of the defocus maps by channel; None: not classified."""
    in_flight: int
    """Frames it works on at once, of as many as there are slots."""
    restoring: int
    """Threads that restore."""
    backends: Mapping[str, str]
    """Name of each network to its runtime and precision."""


class Device(Protocol):
    """Estimates and restores the frames of one series after the other.

    `prepare`, `enqueue` and `close` come from one thread, `estimate` and
    `begin_restoring` from a second, `restore` from as many as `Prepared.restoring`
    says; all of them within `entered`. What `enqueue`, `estimate`, `begin_restoring`
    and `restore` raise fails that frame alone; a `LostDeviceError` ends the device.
    """

    name: str
    """For messages, e.g. ``GPU 0``."""
    ahead: int
    """Most frames that are enqueued while an estimate is waited for."""

    def entered(self) -> AbstractContextManager[None]:
        """Return what a thread holds while it calls the device; enter it once."""
        ...

    def prepare(
        self, plans: Sequence[ChannelPlan], series: SeriesStart, slots: int
    ) -> Prepared:
        """Open engines and reserve buffers for a series.

        `plans` are in the order of the series' channels; frames come in slots with
        the indices 0 to ``slots - 1``.

        Raises
        ------
        EngineError
            If the device cannot run one of the plans; says why, with the remedy.
        """
        ...

    def enqueue(self, job: Job) -> None:
        """Begin work on a frame; its seat is free."""
        ...

    def estimate(self, job: Job) -> DefocusMap | None:
        """Wait for the defocus of a frame, and set its flags; None: no classifier."""
        ...

    def begin_restoring(self, job: Job) -> None:
        """Begin the restoration of a frame whose defocus is known and published."""
        ...

    def restore(self, job: Job) -> NDArray[np.generic] | None:
        """Wait for the restored frame; None where `Job.skipped`.

        Shape of the frame, camera's type or float32; memory of the job's slot.
        """
        ...

    def close(self) -> None:
        """Free everything of the series; called twice does nothing."""
        ...


def frame_fault(header: FrameHeader, series: SeriesStart) -> EngineError | None:
    """Return what is wrong with a frame that is not of its series; None: nothing."""
    if tuple(header.shape) == tuple(series.shape) and header.dtype == series.dtype:
        return None
    return EngineError(
        f"frame {header.sequence} is {header.shape} {header.dtype}, the series "
        f"is {series.shape} {series.dtype}; start a new series for it"
    )


def refuse_no_numbers(job: Job) -> None:
    """Refuse what a network made of a frame where it is NaN or infinite.

    Devices hand networks sound images: what is no number in a frame is replaced.
    """
    kind, restoration = "classifier", job.plan.restoration
    if job.estimated is None or not np.isnan(job.estimated[1].confidence).any():
        if not job.strange or restoration is None or restoration.found is None:
            return
        kind = "restorer"
    msg = (
        f"engine '{job.plan.engines[kind]}' made NaN or infinite values of a sound "
        "image: its weights are damaged or overflow; export or add the engine again"
    )
    raise EngineError(msg)


def without_frames(error: BaseException) -> BaseException:
    """Return an error whose tracebacks, its causes' too, are gone.

    Their frames would keep objects of a GPU's driver alive beyond the thread that
    owns the GPU, in which alone they can be freed. Of errors that are not ours the
    traceback stays as a note.
    """
    if not isinstance(error, RtfocusError):
        error.add_note("".join(traceback.format_exception(error)))
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def result_of(job: Job, restored: NDArray[Any] | None, device: str) -> FrameResult:
    """Return everything about a frame that was not skipped by a failure."""
    estimate, defocus = job.estimated or (None, None)
    if job.expected_error is not None and defocus is not None and "nan" in job.flags:
        forget_unseen(job.expected_error, defocus.grid, job.slot.pixels)
    below = told_below(job.slot.pixels, job.plan.camera.offset_counts)
    return FrameResult(
        estimate=estimate,
        defocus=None if defocus is None else _with_stated_deviation(job.plan, defocus),
        restored=restored,
        expected_error=job.expected_error,
        skipped=job.skipped,
        flags=job.flags if below is None else (*job.flags, BELOW_OFFSET),
        engines=dict(job.plan.engines),
        stage_ms=job.stage_ms,
        device=device,
    )


def _with_stated_deviation(plan: ChannelPlan, defocus: DefocusMap) -> DefocusMap:
    """Return a map of the channel's classifier that says how far off it may be."""
    classifier = plan.classifier
    assert classifier is not None
    fits = classifier.found.card.deviation
    fit = fits.get("blind" if plan.processing.blind else "told")
    return replace(defocus, stated_um=stated_um(defocus, fit, classifier.step_um))


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device: whether this machine can use it, and how it is opened."""

    name: str
    """As in ``processing.device``."""
    why_unavailable: Callable[[], str | None]
    """Reason why not, with the remedy; None: available."""
    open_devices: Callable[[Config], tuple[Device, ...]]
    """Return those that share the frames of a series."""


# GPU code is imported only where a GPU is looked for.
def _why_no_gpu() -> str | None:
    driver = import_module("rtfocus.processing.gpu.cuda.driver")
    why: str | None = driver.why_no_gpu() or driver.why_not_loadable(driver.NVRTC)
    return why


def _open_gpus(config: Config) -> tuple[Device, ...]:
    gpu = import_module("rtfocus.processing.gpu.device")
    return tuple(gpu.GpuDevice(config, index=i) for i in config.processing.gpu.index)


def _open_cpu(config: Config) -> tuple[Device, ...]:
    return (import_module("rtfocus.processing.cpu.device").CpuDevice(config),)


# ORDER MATTERS for "auto": fastest first.
DEVICES: tuple[DeviceKind, ...] = (
    DeviceKind("gpu", _why_no_gpu, _open_gpus),
    DeviceKind("cpu", lambda: None, _open_cpu),
)
