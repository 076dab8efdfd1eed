"""GPU channel: everything prepared once to process the frames of one channel."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rtfocus.channel import Channel
from rtfocus.config.model import Config
from rtfocus.frame import SeriesStart, TileGrid
from rtfocus.processing.classifier import fit_frame
from rtfocus.processing.conditions import Conditions, is_mirrored
from rtfocus.processing.correction import CameraCorrection
from rtfocus.processing.engines.card import identity
from rtfocus.processing.engines.fit import check_fit, step_um
from rtfocus.processing.engines.opening import input_of
from rtfocus.processing.engines.registry import FoundEngine, find_engine
from rtfocus.processing.gpu.channel_view import GpuChannelView, runs_on
from rtfocus.processing.gpu.frame_restorers import GpuFrameRestorer
from rtfocus.processing.gpu.gpu_classifier import GpuClassifier, View
from rtfocus.processing.gpu.gpu_correction import GpuCorrection
from rtfocus.processing.gpu.restorer_opening import open_gpu_restorer
from rtfocus.processing.gpu.seam import GpuDevice
from rtfocus.processing.gpu.work import DeviceMemory
from rtfocus.processing.plan import compare_pixel_size


@dataclass(frozen=True)
class GpuChannel:
    """What happens to the frames of one channel on the device."""

    name: str
    camera: CameraCorrection
    correction: GpuCorrection
    classifier: GpuClassifier | None = None
    """None: no defocus is estimated."""
    restorer: GpuFrameRestorer | None = None
    """None: not restored, for the reason in `skipped`."""
    skipped: str | None = None
    engines: Mapping[str, str] = field(default_factory=dict)
    """Kind of engine to ``name@hash``, as in `FrameResult.engines`."""
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
    config: Config,
    series: SeriesStart,
    channel: Channel,
    device: GpuDevice,
    memory: DeviceMemory,
) -> GpuChannel:
    """Open the engines and compute the PSFs of a channel.

    Raises
    ------
    EngineError
        If an engine is missing, damaged, does not fit the optics, or is one that
        only the CPU runs.
    ConfigError
        If the flat field does not fit.
    """
    settings = config.channel(channel.name)
    optics = settings.optics or channel.optics
    camera = CameraCorrection(
        config.camera, series.shape, np.dtype(series.dtype), series.bit_depth
    )
    correction = GpuCorrection(memory, camera, series.shape)
    name = settings.classifier or config.processing.classifier
    if optics is None or name is None:
        reason = (
            f"channel '{channel.name}' has no optics in the config"
            if optics is None
            else "no classifier is configured"
        )
        return GpuChannel(channel.name, camera, correction, skipped=reason)
    compare_pixel_size(channel.name, optics, series.pixel_size_um)
    found = find_engine(name, config.processing.engine_folders)
    check_fit(found.card, optics, ignore=config.processing.ignore_optics)
    view = GpuChannelView(
        config=config,
        restoration=settings.restoration or config.processing.restoration,
        optics=optics,
        shape=tuple(series.shape),
        quantum=camera.quantum,
        device=device,
        memory=memory,
    )
    return _open_engines(channel.name, camera, correction, view, found)


def _open_engines(
    channel: str,
    camera: CameraCorrection,
    correction: GpuCorrection,
    view: GpuChannelView,
    found: FoundEngine,
) -> GpuChannel:
    """Open classifier and restorer, which may be one and the same."""
    classifier = _open_classifier(view, found)
    engines = {"classifier": identity(found.card)}
    backends = {found.name: runs_on(classifier.engine)}
    restorer, skipped = None, None
    if view.restoration.method == "none":
        skipped = "restoration.method is none"
    else:
        opened = open_gpu_restorer(view, found, classifier)
        restorer = opened.restorer
        engines["restorer"] = opened.identity
        if opened.engine is not None:
            backends[opened.name] = runs_on(opened.engine)
    return GpuChannel(
        channel,
        camera,
        correction,
        classifier,
        restorer,
        skipped,
        engines,
        backends,
    )


def _open_classifier(view: GpuChannelView, found: FoundEngine) -> GpuClassifier:
    card = found.card
    fit = fit_frame(input_of(card), view.size)
    engine, _ = view.open_network(found)
    conditions = Conditions(
        card, view.optics, blind=view.config.processing.blind, signed=False
    )
    return GpuClassifier(
        view.memory,
        engine,
        card,
        View(
            frame=view.frame,
            fit=fit,
            step_um=step_um(card, view.optics),
            quantum=view.quantum,
            mirrored=is_mirrored(view.optics),
            conditions=conditions,
        ),
    )
