"""Channel: what sees and restores the frames of a channel on the CPU, by its plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import RestorationConfig
from rtfocus.engines.card import input_of
from rtfocus.frame import TileGrid
from rtfocus.processing.channel_plan import ChannelPlan, RestorationPlan
from rtfocus.processing.classify import Conditions, invertible_normalisation
from rtfocus.processing.cpu.classifier import (
    FrameClassifier,
    Seen,
    known,
    open_classifier,
)
from rtfocus.processing.cpu.depth_variant import DepthVariantRestorer, TileRestorer
from rtfocus.processing.cpu.network_restorer import (
    JointRestorer,
    LearnedWienerRestorer,
    Level,
    TileNetworkRestorer,
    WholeImageRestorer,
)
from rtfocus.processing.cpu.networks import TileNetwork, open_tile_network
from rtfocus.processing.cpu.preparation import Correction
from rtfocus.processing.evidence import Evidence
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import PATCH_BY_PATCH
from rtfocus.runtimes.cpu_backends import runs_on

Image = NDArray[np.float32]


class FrameRestorer(Protocol):
    """Restores the frames of one channel; safe to use from several threads."""

    def restore(
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


class LevelRestorer(Protocol):
    """Restores by the level of every tile alone; safe to use from several threads."""

    def restore(
        self,
        signal: Image,
        labels: NDArray[np.int16],
        out: Image,
        *,
        quantum: float = 0.0,
    ) -> Image:
        """Write the restored `signal` to `out`; see `DepthVariantRestorer`."""
        ...


class ByLevel:
    """A `FrameRestorer` that needs nothing but levels.

    Parameters
    ----------
    restorer
        Does the work.
    network
        What it runs, to be closed with it; None: it needs none.
    """

    def __init__(
        self, restorer: LevelRestorer, network: TileNetwork | None = None
    ) -> None:
        self._restorer = restorer
        self._network = network

    def restore(
        self, signal: Image, seen: Seen | None, out: Image, *, quantum: float
    ) -> None:
        """Restore a frame, see `FrameRestorer`."""
        level = known(seen).defocus.level
        self._restorer.restore(signal, level, out, quantum=quantum)

    def close(self) -> None:
        """Free the network."""
        if self._network is not None:
            self._network.close()


def make_restorer(
    method: str,
    settings: RestorationConfig,
    montage: Montage,
    psfs: Mapping[int, Image],
    gain_e_per_count: float | None = None,
) -> LevelRestorer:
    """Make one of `METHODS` with the parameters of the config."""
    if method == PATCH_BY_PATCH:
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
) -> tuple[FrameRestorer, str | None]:
    """Open what restores the frames of a channel.

    Parameters
    ----------
    plan
        Of a channel that is restored.
    grid
        Of the labels; None: there are none.
    threads
        Of a network.

    Returns
    -------
    FrameRestorer
        Ready.
    str or None
        Runtime and precision of its own network; None: it has none.

    Raises
    ------
    EngineError
        If an engine is damaged or cannot be loaded.
    """
    restoration = plan.restoration
    if restoration is None:
        msg = f"channel '{plan.name}' is not restored: {plan.skipped}"
        raise ValueError(msg)
    if restoration.way == "whole_image":
        network = _open_tiles(plan, restoration, threads)
        whole = WholeImageRestorer(restoration.engine.card, network, plan.size)
        return whole, runs_on(network.engine)
    if grid is None:
        msg = f"channel '{plan.name}' has no levels to restore by"
        raise ValueError(msg)
    montage = plan.montage(grid)
    match restoration.way:
        case "by_level" | "by_patch" | "blind":
            classical = make_restorer(
                restoration.method,
                restoration.settings,
                montage,
                plan.psfs,
                plan.gain_e_per_count,
            )
            return ByLevel(classical), None
        case "same_pass":
            return JointRestorer(montage, None, _evidence(plan)), None
        case "own_pass":
            return _own_pass(plan, restoration, montage, threads)
        case "learned_wiener":
            return _learned_wiener(plan, restoration, montage, threads)
        case "by_tile":
            card = restoration.engine.card
            network = _open_tiles(plan, restoration, threads)
            told = _told(restoration)
            tiles = TileNetworkRestorer(card, network, told, montage)
            return tiles, runs_on(network.engine)


def _own_pass(
    plan: ChannelPlan, restoration: RestorationPlan, montage: Montage, threads: int
) -> tuple[FrameRestorer, str]:
    """Open a joint engine beside another classifier, for a pass of its own."""
    if restoration.own_pass is None:
        msg = f"'{restoration.name}' was planned without its pass"
        raise ValueError(msg)
    engine = open_classifier(restoration.own_pass, plan.processing, threads)
    restorer = JointRestorer(montage, engine, _evidence(plan))
    return restorer, engine.runs_on


def _evidence(plan: ChannelPlan) -> Evidence | None:
    weighed = plan.weighed
    if weighed is None or weighed.card.evidence is None:
        return None
    return Evidence(
        weighed.card.evidence, invertible_normalisation(weighed.card), weighed.step_um
    )


def _learned_wiener(
    plan: ChannelPlan, restoration: RestorationPlan, montage: Montage, threads: int
) -> tuple[FrameRestorer, str]:
    card = restoration.engine.card
    tiles = input_of(card)
    network = _open_tiles(plan, restoration, threads)
    output = "" if card.output is None else card.output.name
    psfs, told = plan.band_levels()
    levels = {
        level: Level(psf, () if told is None else tuple(told[index]))
        for index, (level, psf) in enumerate(psfs.items())
    }

    def predict(batch: Image, condition: Image) -> Image:
        return network.run(batch, None if told is None else condition)[output]

    restorer = LearnedWienerRestorer(
        montage,
        levels,
        predict,
        tile_px=tiles.tile_px,
        halo_px=tiles.halo_px,
        normalisation=invertible_normalisation(card),
    )
    return ByLevel(restorer, network), runs_on(network.engine)


def _told(restoration: RestorationPlan) -> Conditions:
    if restoration.conditions is None:
        msg = f"'{restoration.name}' was planned without conditions"
        raise ValueError(msg)
    return restoration.conditions


def _open_tiles(
    plan: ChannelPlan, restoration: RestorationPlan, threads: int
) -> TileNetwork:
    output = restoration.engine.card.output
    return open_tile_network(
        restoration.engine,
        plan.processing,
        outputs=() if output is None else (output.name,),
        threads=threads,
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
    correction: Correction
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


def open_channel(plan: ChannelPlan, total_threads: int) -> OpenChannel:
    """Open the engines of a channel and compute its filters.

    Raises
    ------
    EngineError
        If an engine is damaged or cannot be loaded.
    """
    correction = Correction(plan.camera)
    seen, restoration = plan.classifier, plan.restoration
    if seen is None:
        if restoration is None:
            return OpenChannel(plan, correction)
        restorer, runs = open_restorer(plan, None, total_threads)
        backends = {} if runs is None else {restoration.name: runs}
        return OpenChannel(plan, correction, None, restorer, backends)
    threads = share_threads(total_threads, one_pass=seen.restores)
    classifier = open_classifier(seen, plan.processing, threads.classify)
    backends = {seen.found.name: classifier.runs_on}
    if restoration is None:
        return OpenChannel(plan, correction, classifier, None, backends)
    try:
        restorer, runs_on = open_restorer(plan, classifier.grid, threads.restore)
    except BaseException:
        classifier.close()
        raise
    if runs_on is not None:
        backends[restoration.name] = runs_on
    return OpenChannel(plan, correction, classifier, restorer, backends)
