"""CpuDevice: frames through NumPy, a CPU network and Fourier transforms, by plan."""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.model import Config
from rtfocus.engines.card import input_of
from rtfocus.frame import DefocusMap, SeriesStart, TileGrid
from rtfocus.machine import usable_threads
from rtfocus.processing.camera import Marks, write_counts
from rtfocus.processing.channel_plan import ChannelPlan, restored_dtype
from rtfocus.processing.classify import invertible_normalisation
from rtfocus.processing.cpu.classifier import (
    FrameClassifier,
    NetworkView,
    Prediction,
    TileNetwork,
)
from rtfocus.processing.cpu.depth_variant import (
    FrameRestorer,
)
from rtfocus.processing.cpu.network_restorer import (
    JointRestorer,
    LearnedWienerRestorer,
    TileNetworkRestorer,
    WholeImageRestorer,
    make_restorer,
)
from rtfocus.processing.device import Job, Prepared

Image = NDArray[np.float32]


def open_restorer(
    plan: ChannelPlan, grid: TileGrid | None, threads: int
) -> FrameRestorer | None:
    """Open what restores the frames of a channel; None: they are not restored.

    `grid` is that of the labels; None: there are none.
    """
    restoration = plan.restoration
    if restoration is None:
        return None
    if restoration.way == "whole_image":
        network = TileNetwork(restoration.engine, plan.processing, threads=threads)
        return WholeImageRestorer(restoration.engine.card, network, plan.size)
    assert grid is not None
    montage = plan.montage(grid)
    match restoration.way:
        case "by_level" | "by_patch" | "blind":
            quantum, gain = plan.camera.quantum, plan.gain_e_per_count
            return make_restorer(
                montage, plan.psfs, restoration.settings, quantum, gain
            )
        case "same_pass":
            return JointRestorer(montage, None, plan.evidence)
        case "own_pass":
            assert restoration.own_pass is not None
            own_pass = FrameClassifier(restoration.own_pass, plan.processing, threads)
            return JointRestorer(montage, own_pass, plan.evidence)
    card = restoration.engine.card
    network = TileNetwork(restoration.engine, plan.processing, threads=threads)
    if restoration.way == "by_tile":
        assert restoration.conditions is not None
        return TileNetworkRestorer(card, network, restoration.conditions, montage)
    psfs, conditions = plan.band_levels()
    return LearnedWienerRestorer(
        montage,
        psfs,
        conditions,
        network.run,
        tile_px=input_of(card).tile_px,
        halo_px=input_of(card).halo_px,
        normalisation=invertible_normalisation(card),
        network=network,
    )


@dataclass(frozen=True, slots=True)
class Threads:
    """How the threads are shared between classification and restoration."""

    classify: int
    """Of the network that estimates the defocus."""
    restore: int
    """Frames restored at once; a network that restores has as many threads."""


def share_threads(total: int, *, one_pass: bool = False) -> Threads:
    """Split threads evenly; each side has at least one, restoring at most four.

    Frames restored side by side use the cores better than one Fourier transform
    on several of them. A network that does both in one pass leaves next to nothing
    to the restoration and takes all threads.
    """
    if one_pass:
        return Threads(classify=total, restore=1)
    restore = min(4, max(1, total // 2))
    return Threads(classify=max(1, total - restore), restore=restore)


class OpenChannel:
    """What does the work that a plan names.

    Raises
    ------
    EngineError
        If an engine is damaged or cannot be loaded; what was opened is closed again.
    """

    def __init__(self, plan: ChannelPlan, total_threads: int) -> None:
        self.plan = plan
        self.classifier: FrameClassifier | None = None
        self.restorer: FrameRestorer | None = None
        self.backends: dict[str, str] = {}
        """Name of each network to its runtime and precision."""
        threads = total_threads
        if (network := plan.classifier) is not None:
            shared = share_threads(total_threads, one_pass=network.restores)
            self.classifier = FrameClassifier(network, plan.processing, shared.classify)
            self.backends[network.found.name] = self.classifier.runs_on
            threads = shared.restore
        try:
            self.restorer = restorer = open_restorer(plan, self.grid, threads)
        except BaseException:
            self.close()
            raise
        if plan.restoration is not None and restorer is not None and restorer.runs_on:
            self.backends[plan.restoration.name] = restorer.runs_on

    @property
    def grid(self) -> TileGrid | None:
        """Tiles of the defocus maps; None: there are no maps."""
        return None if self.classifier is None else self.classifier.grid

    def close(self) -> None:
        """Free the engines."""
        for opened in (self.classifier, self.restorer):
            if opened is not None:
                opened.close()


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
    view: NetworkView | None = None
    """Input of the classifier; None: it has had it, or there is none."""
    prediction: Prediction | None = None
    """None: none yet, or there is no classifier."""


class CpuDevice:
    """Implements `rtfocus.processing.device.Device` on the CPU."""

    name = "CPU"
    # Each holds its network input: more would cost memory for nothing.
    ahead = 2

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
        # SciPy loads while networks compile; the first frame waits for the rest.
        loading = threading.Thread(target=import_module, args=("scipy.fft",))
        loading.start()
        threads = self._config.processing.threads or usable_threads()
        for plan in plans:
            self._channels.append(OpenChannel(plan, threads))
        restores = any(plan.restoration is not None for plan in plans)
        dtype = restored_dtype(self._config, series)
        self._slots = [
            _SlotBuffers(
                signal=np.empty(series.shape, dtype=np.float32),
                restored=np.empty(series.shape, dtype=dtype) if restores else None,
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
        """Correct and normalise a frame, while the network sees the one before."""
        buffers, channel = self._slots[job.slot.index], self._channels[job.channel]
        camera, pixels = job.plan.camera, job.slot.pixels
        with job.stage("correct"):
            if channel.classifier is None and channel.restorer is None:
                # Recorded alone: the signal is not read.
                buffers.marks = camera.mark(pixels)
            else:
                buffers.pedestal = camera.pedestal(pixels)
                buffers.marks = camera.to_signal(pixels, buffers.signal)
                if buffers.pedestal:
                    buffers.signal += np.float32(buffers.pedestal)
        job.flags = buffers.marks.flags
        if channel.classifier is not None:
            with job.stage("normalise"):
                buffers.view = channel.classifier.prepare(buffers.signal)

    def estimate(self, job: Job) -> DefocusMap | None:
        """Find the defocus of a frame's tiles."""
        buffers = self._slots[job.slot.index]
        classifier = self._channels[job.channel].classifier
        view, buffers.view, buffers.prediction = buffers.view, None, None
        if classifier is None or view is None:
            return None
        with job.stage("classify"):
            buffers.prediction = classifier.see(view)
        return buffers.prediction.defocus

    def begin_restoring(self, job: Job) -> None:
        """Do nothing: a CPU restores in `restore`."""

    def restore(self, job: Job) -> NDArray[Any] | None:
        """Restore a frame, into a scratch frame of this thread and then its slot's."""
        buffers = self._slots[job.slot.index]
        restorer = self._channels[job.channel].restorer
        restored, prediction = buffers.restored, buffers.prediction
        if job.skipped is not None or restorer is None or restored is None:
            return None
        # `_store` reports results that are not finite.
        with job.stage("restore"), np.errstate(over="ignore", invalid="ignore"):
            scratch = self._scratch(buffers.signal)
            job.expected_error = restorer.restore_frame(
                buffers.signal, prediction, scratch
            )
            self._store(job, scratch, restored)
        return restored

    def _store(self, job: Job, scratch: Image, restored: NDArray[Any]) -> None:
        """Put a restored signal on the camera's scale, unless it has one of its own."""
        buffers = self._slots[job.slot.index]
        invalid, restoration = buffers.marks.invalid, job.plan.restoration
        # The maximum is NaN where one value is.
        job.strange = not np.isfinite(scratch.max(initial=0))
        if restoration is not None and not restoration.gives_counts:
            write_counts(scratch, restored, invalid)
            return
        if buffers.pedestal:
            scratch -= np.float32(buffers.pedestal)
        job.plan.camera.to_counts(scratch, restored, invalid)

    def close(self) -> None:
        """Free the engines; the buffers stay, for results may still be read."""
        for channel in self._channels:
            channel.close()
        self._channels = []

    def _scratch(self, like: Image) -> Image:
        """Return this thread's own frame."""
        if not hasattr(self._thread, "scratch"):
            self._thread.scratch = np.empty_like(like)
        scratch: Image = self._thread.scratch
        return scratch
