"""Channel: the engines and filters of one channel, opened on the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rtfocus.frame import TileGrid
from rtfocus.processing.channel_plan import ChannelPlan
from rtfocus.processing.classifier import FrameClassifier, open_classifier
from rtfocus.processing.cpu.restorers import FrameRestorer, open_restorer


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


@dataclass(frozen=True, slots=True)
class CpuChannel:
    """What does the work that a plan names."""

    plan: ChannelPlan
    classifier: FrameClassifier | None = None
    restorer: FrameRestorer | None = None
    backends: Mapping[str, str] = field(default_factory=dict)
    """Name of each network to its runtime and precision."""

    @property
    def grid(self) -> TileGrid | None:
        """Tiles of the defocus maps; None: there are no maps."""
        return None if self.classifier is None else self.classifier.grid

    def close(self) -> None:
        """Free the engines."""
        if self.classifier is not None:
            self.classifier.close()
        if self.restorer is not None:
            self.restorer.close()


def open_channel(plan: ChannelPlan, total_threads: int) -> CpuChannel:
    """Open the engines of a channel and compute its filters.

    Raises
    ------
    EngineError
        If an engine is damaged or cannot be loaded.
    """
    seen, restoration = plan.classifier, plan.restoration
    if seen is None:
        return CpuChannel(plan)
    threads = share_threads(total_threads, one_pass=seen.restores)
    classifier = open_classifier(seen, plan.processing, threads.classify)
    backends = {seen.found.name: classifier.runs_on(plan.processing)}
    if restoration is None:
        return CpuChannel(plan, classifier, None, backends)
    try:
        restorer, runs_on = open_restorer(plan, classifier.grid, threads.restore)
    except BaseException:
        classifier.close()
        raise
    if runs_on is not None:
        backends[restoration.name] = runs_on
    return CpuChannel(plan, classifier, restorer, backends)
