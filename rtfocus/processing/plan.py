"""Plan: everything that is prepared once to process the frames of one channel."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config.model import Config
from rtfocus.frame import SeriesStart
from rtfocus.processing.classifier import FrameClassifier
from rtfocus.processing.correction import CameraCorrection
from rtfocus.processing.engines.card import identity
from rtfocus.processing.engines.fit import check_fit
from rtfocus.processing.engines.registry import FoundEngine, find_engine
from rtfocus.processing.methods import FrameRestorer
from rtfocus.processing.restorers import (
    ChannelView,
    find_joint,
    open_classifier,
    open_restorer,
)

logger = logging.getLogger(__name__)

# A pixel size that differs more than this from the optics' is not rounding.
_PIXEL_TOLERANCE = 0.02


@dataclass(frozen=True)
class ChannelPlan:
    """What happens to the frames of one channel."""

    name: str
    correction: CameraCorrection
    classifier: FrameClassifier | None
    """None: no defocus is estimated."""
    restorer: FrameRestorer | None
    """None: not restored, for the reason in `skipped`."""
    skipped: str | None
    engines: Mapping[str, str]
    """Kind of engine to ``name@hash``, as in `FrameResult.engines`."""
    backends: Mapping[str, str]
    """Name of each network to its runtime and precision."""

    def close(self) -> None:
        """Free the engines."""
        if self.classifier is not None:
            self.classifier.close()
        if self.restorer is not None:
            self.restorer.close()


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


def plan_channel(
    config: Config, series: SeriesStart, channel: Channel, total_threads: int
) -> ChannelPlan:
    """Open the engines, compute the PSFs and choose the restoration of a channel.

    Raises
    ------
    EngineError
        If an engine is missing, damaged or does not fit the optics.
    ConfigError
        If the flat field does not fit.
    """
    settings = config.channel(channel.name)
    optics = settings.optics or channel.optics
    correction = CameraCorrection(
        config.camera, series.shape, np.dtype(series.dtype), series.bit_depth
    )
    name = settings.classifier or config.processing.classifier
    if optics is None or name is None:
        reason = (
            f"channel '{channel.name}' has no optics in the config"
            if optics is None
            else "no classifier is configured"
        )
        return ChannelPlan(channel.name, correction, None, None, reason, {}, {})
    compare_pixel_size(channel.name, optics, series.pixel_size_um)
    found = find_engine(name, config.processing.engine_folders)
    check_fit(found.card, optics, ignore=config.processing.ignore_optics)
    view = ChannelView(
        config=config,
        restoration=settings.restoration or config.processing.restoration,
        optics=optics,
        shape=tuple(series.shape),
        quantum=correction.quantum,
        blind=config.processing.blind,
        threads=total_threads,
    )
    return _open_engines(channel.name, correction, view, found)


def _open_engines(
    channel: str, correction: CameraCorrection, view: ChannelView, found: FoundEngine
) -> ChannelPlan:
    """Open classifier and restorer, which may be one and the same."""
    joint = find_joint(view)
    one_pass = joint is not None and joint.folder == found.folder
    threads = share_threads(view.threads, one_pass=one_pass)
    processing = view.config.processing
    classifier = open_classifier(
        replace(view, threads=threads.classify), found, restores=one_pass
    )
    engines = {"classifier": identity(found.card)}
    backends = {found.name: classifier.runs_on(processing)}
    if view.restoration.method == "none":
        reason = "restoration.method is none"
        return ChannelPlan(
            channel, correction, classifier, None, reason, engines, backends
        )
    try:
        opened = open_restorer(
            replace(view, threads=threads.restore), classifier, one_pass=one_pass
        )
    except Exception:
        classifier.close()
        raise
    engines["restorer"] = opened.identity
    if opened.runs_on is not None:
        backends[opened.name] = opened.runs_on
    return ChannelPlan(
        channel, correction, classifier, opened.restorer, None, engines, backends
    )


def compare_pixel_size(
    channel: str, optics: OpticalSystem, pixel_size_um: float
) -> None:
    """Warn when the microscope reports another pixel size than the optics."""
    if abs(pixel_size_um / optics.pixel_size_um - 1.0) > _PIXEL_TOLERANCE:
        logger.warning(
            "channel '%s': the microscope reports %g um per pixel, the optics say "
            "%g um; PSFs follow the optics",
            channel,
            pixel_size_um,
            optics.pixel_size_um,
        )
