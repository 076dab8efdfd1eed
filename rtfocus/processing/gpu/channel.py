"""Channel: the engines and filters of one channel, opened on a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rtfocus.frame import TileGrid
from rtfocus.processing.channel_plan import ChannelPlan
from rtfocus.processing.gpu.backends import open_for_plan, runs_on
from rtfocus.processing.gpu.cells import FrameShape
from rtfocus.processing.gpu.gpu_classifier import GpuClassifier
from rtfocus.processing.gpu.gpu_correction import GpuCorrection
from rtfocus.processing.gpu.restorers import FrameRestorer, open_restorer
from rtfocus.processing.gpu.seam import GpuDevice
from rtfocus.processing.gpu.work import DeviceMemory


@dataclass(frozen=True, slots=True)
class GpuChannel:
    """What does the work that a plan names."""

    plan: ChannelPlan
    correction: GpuCorrection
    classifier: GpuClassifier | None = None
    restorer: FrameRestorer | None = None
    backends: Mapping[str, str] = field(default_factory=dict)
    """Name of each network to its runtime and precision."""

    @property
    def grid(self) -> TileGrid | None:
        """Tiles of the defocus maps; None: there are no maps."""
        return None if self.classifier is None else self.classifier.grid

    def close(self) -> None:
        """Free engines and transforms, after all that is in flight."""
        if self.restorer is not None:
            self.restorer.close()
        if self.classifier is not None:
            self.classifier.close()


def open_channel(
    plan: ChannelPlan, device: GpuDevice, memory: DeviceMemory
) -> GpuChannel:
    """Open the engines of a channel and compute its filters.

    Raises
    ------
    EngineError
        If an engine is damaged, or is one that only the CPU runs.
    """
    correction = GpuCorrection(memory, plan.correction, plan.shape)
    seen, restoration = plan.classifier, plan.restoration
    if seen is None:
        return GpuChannel(plan, correction)
    engine, _ = open_for_plan(plan, seen.found, device)
    backends = {seen.found.name: runs_on(engine)}
    classifier = GpuClassifier(memory, engine, seen, FrameShape.of(plan.shape))
    if restoration is None:
        return GpuChannel(plan, correction, classifier, None, backends)
    restorer, own = open_restorer(plan, classifier, device, memory)
    if own is not None:
        backends[restoration.name] = runs_on(own)
    return GpuChannel(plan, correction, classifier, restorer, backends)
