"""Channel: what sees and restores the frames of a channel on the CPU, by its plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import RestorationConfig
from rtfocus.engines.card import input_of
from rtfocus.frame import TileGrid
from rtfocus.processing.channel_plan import ChannelPlan, RestorationPlan
from rtfocus.processing.classify import invertible_normalisation
from rtfocus.processing.cpu.classifier import FrameClassifier, Seen
from rtfocus.processing.cpu.depth_variant import DepthVariantRestorer, LevelRestorer
from rtfocus.processing.cpu.network_restorer import (
    JointRestorer,
    TileNetwork,
    TileNetworkRestorer,
    WholeImageRestorer,
)
from rtfocus.processing.evidence import Evidence
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import PATCH_BY_PATCH

Image = NDArray[np.float32]


class FrameRestorer(Protocol):
    """Restores the frames of one channel; safe to use from several threads."""

    @property
    def runs_on(self) -> str | None:
        """Runtime and precision of its own network; None: it has none."""
        ...

    def restore_frame(
        self, signal: Image, seen: Seen | None, out: Image, *, quantum: float
    ) -> None:
        """Restore a frame.

        Parameters
        ----------
        signal
            Axes (y, x) or (y, x, colour); camera offset removed, no NaN.
        seen
            What the classifier saw in it; None: there is none, and the restorer does
            without.
        out
            Result, shape of `signal`, float32; in focus and background exactly as
            in `signal`, except of a restorer that knows no focus.
        quantum
            Step between the camera's values; 0 for float frames.
        """
        ...

    def close(self) -> None:
        """Free networks; called twice does nothing."""
        ...


def make_restorer(
    method: str,
    settings: RestorationConfig,
    montage: Montage,
    psfs: Mapping[int, Image],
    gain_e_per_count: float | None = None,
) -> LevelRestorer:
    """Make one of `METHODS` with the parameters of the config."""
    if method == PATCH_BY_PATCH:
        # Here, because it loads SciPy, which takes long, and few runs need it.
        from rtfocus.processing.cpu.patches import TileRestorer

        return TileRestorer(
            montage, psfs, iterations=settings.iterations, halo_px=settings.halo_px
        )
    return DepthVariantRestorer(
        montage,
        psfs,
        method=method,
        iterations=settings.iterations,
        noise_to_signal=settings.noise_to_signal,
        gain_e_per_count=gain_e_per_count,
        halo_px=settings.halo_px,
    )


def open_restorer(
    plan: ChannelPlan, grid: TileGrid | None, threads: int
) -> FrameRestorer | None:
    """Open what restores the frames of a channel; None: they are not restored.

    Parameters
    ----------
    plan
        Of the channel.
    grid
        Of the labels; None: there are none.
    threads
        Of a network.

    Raises
    ------
    EngineError
        If an engine is damaged or cannot be loaded.
    """
    restoration = plan.restoration
    if restoration is None:
        return None
    if restoration.way == "whole_image":
        network = TileNetwork(restoration.engine, plan.processing, threads=threads)
        return WholeImageRestorer(restoration.engine.card, network, plan.size)
    if grid is None:
        msg = f"channel '{plan.name}' has no levels to restore by"
        raise ValueError(msg)
    montage = plan.montage(grid)
    match restoration.way:
        case "by_level" | "by_patch" | "blind":
            return make_restorer(
                restoration.method,
                restoration.settings,
                montage,
                plan.psfs,
                plan.gain_e_per_count,
            )
        case "same_pass":
            return JointRestorer(montage, None, _evidence(plan))
        case "own_pass":
            own_pass = FrameClassifier(restoration.passed, plan.processing, threads)
            return JointRestorer(montage, own_pass, _evidence(plan))
        case "learned_wiener":
            return _learned_wiener(plan, restoration, montage, threads)
        case "by_tile":
            network = TileNetwork(restoration.engine, plan.processing, threads=threads)
            card = restoration.engine.card
            return TileNetworkRestorer(card, network, restoration.told, montage)


def _evidence(plan: ChannelPlan) -> Evidence | None:
    weighed = plan.weighed
    if weighed is None or weighed.card.evidence is None:
        return None
    return Evidence(
        weighed.card.evidence, invertible_normalisation(weighed.card), weighed.step_um
    )


def _learned_wiener(
    plan: ChannelPlan, restoration: RestorationPlan, montage: Montage, threads: int
) -> FrameRestorer:
    from rtfocus.processing.cpu.patches import LearnedWienerRestorer, Level

    card = restoration.engine.card
    network = TileNetwork(restoration.engine, plan.processing, threads=threads)
    psfs, told = plan.band_levels()
    levels = {
        level: Level(psf, () if told is None else tuple(told[index]))
        for index, (level, psf) in enumerate(psfs.items())
    }

    def predict(batch: Image, condition: Image) -> Image:
        return network.run(batch, None if told is None else condition)

    return LearnedWienerRestorer(
        montage,
        levels,
        predict,
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


@dataclass(frozen=True, slots=True)
class OpenChannel:
    """What does the work that a plan names."""

    plan: ChannelPlan
    classifier: FrameClassifier | None = None
    restorer: FrameRestorer | None = None

    @property
    def grid(self) -> TileGrid | None:
        """Tiles of the defocus maps; None: there are no maps."""
        return None if self.classifier is None else self.classifier.grid

    @property
    def backends(self) -> Mapping[str, str]:
        """Name of each network to its runtime and precision."""
        plan, found = self.plan, {}
        if plan.classifier is not None and self.classifier is not None:
            found[plan.classifier.found.name] = self.classifier.runs_on
        own = None if self.restorer is None else self.restorer.runs_on
        if plan.restoration is not None and own is not None:
            found[plan.restoration.name] = own
        return found

    def close(self) -> None:
        """Free the engines."""
        for opened in (self.classifier, self.restorer):
            if opened is not None:
                opened.close()


def open_channel(plan: ChannelPlan, total_threads: int) -> OpenChannel:
    """Open the engines of a channel and compute its filters.

    Raises
    ------
    EngineError
        If an engine is damaged or cannot be loaded.
    """
    if plan.classifier is None:
        return OpenChannel(plan, None, open_restorer(plan, None, total_threads))
    threads = share_threads(total_threads, one_pass=plan.classifier.restores)
    classifier = FrameClassifier(plan.classifier, plan.processing, threads.classify)
    try:
        restorer = open_restorer(plan, classifier.grid, threads.restore)
    except BaseException:
        classifier.close()
        raise
    return OpenChannel(plan, classifier, restorer)
