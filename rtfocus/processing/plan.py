"""Plan: everything that is prepared once to process the frames of one channel."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.frame import SeriesStart
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.classifier import FrameClassifier, fit_frame
from rtfocus.processing.correction import CameraCorrection
from rtfocus.processing.engines.backends import Request, choose_backend
from rtfocus.processing.engines.card import EngineCard, identity, verified_file
from rtfocus.processing.engines.fit import check_fit, parts, step_um
from rtfocus.processing.engines.registry import FoundEngine, find_engine
from rtfocus.processing.methods import METHODS, Restorer, make_restorer
from rtfocus.processing.tiling import Montage

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
    restorer: Restorer | None
    """None: not restored, for the reason in `skipped`."""
    skipped: str | None
    engines: Mapping[str, str]
    """Kind of engine to ``name@hash``, as in `FrameResult.engines`."""

    def close(self) -> None:
        """Free the engine."""
        if self.classifier is not None:
            self.classifier.close()


@dataclass(frozen=True, slots=True)
class Threads:
    """How the threads are shared between classification and restoration."""

    classify: int
    """Of the network."""
    restore: int
    """Frames restored at once, each on one thread."""


def share_threads(total: int) -> Threads:
    """Split threads evenly; each side has at least one, restoring at most four.

    Frames restored side by side use the cores better than one Fourier transform
    on several of them.
    """
    restore = min(4, max(1, total // 2))
    return Threads(classify=max(1, total - restore), restore=restore)


def plan_channel(
    config: Config, series: SeriesStart, channel: Channel, threads: Threads
) -> ChannelPlan:
    """Open the engine, compute the PSFs and choose the restoration of a channel.

    Raises
    ------
    EngineError
        If the engine is missing, damaged or does not fit the optics.
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
        return ChannelPlan(channel.name, correction, None, None, reason, {})
    _compare_pixel_size(channel.name, optics, series.pixel_size_um)
    found = find_engine(name, config.processing.engine_folders)
    check_fit(found.card, optics, ignore=config.processing.ignore_optics)
    classifier = _open_classifier(
        config, found, optics, series, threads.classify, correction.quantum
    )
    engines = {"classifier": identity(found.card)}
    restoration = settings.restoration or config.processing.restoration
    if restoration.method == "none":
        reason = "restoration.method is none"
        return ChannelPlan(channel.name, correction, classifier, None, reason, engines)
    method = _builtin_method(config, restoration.method)
    shape = (series.shape[0], series.shape[1])
    restorer = make_restorer(
        method,
        restoration,
        Montage(classifier.grid, shape, restoration.window),
        level_psfs(found.card, optics),
        config.camera.gain_e_per_count,
    )
    engines["restorer"] = f"{restoration.method}@builtin"
    return ChannelPlan(channel.name, correction, classifier, restorer, None, engines)


def level_psfs(
    card: EngineCard, optics: OpticalSystem
) -> dict[int, NDArray[np.float32]]:
    """Compute the PSF of every level from 1 on, in the configured optics."""
    levels, _ = parts(card)
    step = step_um(card, optics)
    return {
        level: compute_psf(optics, level * step) for level in range(1, levels.count)
    }


def _open_classifier(
    config: Config,
    found: FoundEngine,
    optics: OpticalSystem,
    series: SeriesStart,
    threads: int,
    quantum: float,
) -> FrameClassifier:
    card = found.card
    if card.input is None or card.output is None:
        msg = f"engine '{card.name}' is a {card.kind}; a classifier is needed here"
        raise EngineError(msg)
    fit = fit_frame(card.input, (series.shape[0], series.shape[1]))
    backend = choose_backend(config.processing.backend)
    engine = backend.open_engine(
        Request(
            name=card.name,
            model=verified_file(found.folder, card),
            input_name=card.input.name,
            output_name=card.output.name,
            shape=(1, card.input.channels, *fit.padded),
            precision=config.processing.precision,
            threads=threads,
        )
    )
    step = step_um(card, optics)
    return FrameClassifier(card, engine, fit, step_um=step, quantum=quantum)


def _builtin_method(config: Config, name: str) -> str:
    """Return the built-in method of a name or of a builtin engine's card."""
    if name in METHODS:
        return name
    card = find_engine(name, config.processing.engine_folders).card
    method = card.implementation.removeprefix("builtin:")
    if card.kind != "restorer" or method not in METHODS:
        msg = (
            f"restoration '{name}' is a {card.kind} with implementation "
            f"'{card.implementation}', which this processor cannot run; "
            f"built in are {', '.join(METHODS)} and none"
        )
        raise EngineError(msg)
    return method


def _compare_pixel_size(
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
