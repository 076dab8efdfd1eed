"""Restorer opening: from a name in the config to what restores on the device."""

from dataclasses import dataclass

from rtfocus.errors import EngineError
from rtfocus.processing.engines.card import EngineCard, identity
from rtfocus.processing.engines.fit import check_fit
from rtfocus.processing.engines.registry import FoundEngine, find_engine
from rtfocus.processing.gpu.blending import GpuBlending
from rtfocus.processing.gpu.channel_view import GpuChannelView
from rtfocus.processing.gpu.cufft import CudaTransforms
from rtfocus.processing.gpu.frame_restorers import (
    ClassicalFrames,
    GpuFrameRestorer,
    JointFrames,
)
from rtfocus.processing.gpu.gpu_classifier import GpuClassifier
from rtfocus.processing.gpu.gpu_restorer import (
    GpuDeconvolution,
    GpuDepthVariantRestorer,
    transform_shape,
)
from rtfocus.processing.gpu.gpu_richardson_lucy import GpuRichardsonLucy
from rtfocus.processing.gpu.gpu_wiener import GpuWiener
from rtfocus.processing.gpu.seam import GpuEngine
from rtfocus.processing.restoration import METHODS
from rtfocus.processing.restorers import level_psfs
from rtfocus.processing.tiling import Montage


@dataclass(frozen=True, slots=True)
class OpenGpuRestorer:
    """A restorer with what the report says of it."""

    restorer: GpuFrameRestorer
    identity: str
    """``name@hash``."""
    engine: GpuEngine | None = None
    """Its own network; None: it has none."""


def open_gpu_restorer(
    view: GpuChannelView, found: FoundEngine, classifier: GpuClassifier
) -> OpenGpuRestorer:
    """Open the restoration of a channel by its name.

    Parameters
    ----------
    view
        Channel and GPU.
    found
        Engine of the classifier.
    classifier
        Whose labels say what is restored.

    Raises
    ------
    EngineError
        If the engine is missing or unfit, or only the CPU runs it.
    """
    name = view.restoration.method
    montage = Montage(classifier.grid, view.size, view.restoration.window)
    if name in METHODS:
        return _classical(view, classifier, montage, name)
    restorer = find_engine(name, view.config.processing.engine_folders)
    card = restorer.card
    method = card.implementation.removeprefix("builtin:")
    if method in METHODS:
        return _classical(view, classifier, montage, method)
    if restorer.folder == found.folder:
        return _joint(view, card, classifier, montage)
    check_fit(card, view.optics, ignore=view.config.processing.ignore_optics)
    msg = (
        f"restoration '{name}' ({card.kind}, {card.implementation}) does not run on a "
        f"GPU yet; those that do: {', '.join(METHODS)}, and a joint engine that is the "
        "classifier too; or set processing.device: cpu"
    )
    raise EngineError(msg)


def _classical(
    view: GpuChannelView, classifier: GpuClassifier, montage: Montage, method: str
) -> OpenGpuRestorer:
    psfs = level_psfs(classifier.card, view.optics)
    shape, halo_px = transform_shape(psfs, view.size, view.restoration.halo_px)
    transforms = CudaTransforms(shape)
    deconvolution: GpuDeconvolution
    if method == "wiener":
        deconvolution = GpuWiener(
            view.memory,
            transforms,
            psfs,
            quantum=view.quantum,
            noise_to_signal=view.restoration.noise_to_signal,
            gain_e_per_count=view.config.camera.gain_e_per_count,
        )
    else:
        deconvolution = GpuRichardsonLucy(
            view.memory,
            transforms,
            psfs,
            iterations=view.restoration.iterations,
            accelerated=method == "richardson_lucy_accelerated",
        )
    restorer = GpuDepthVariantRestorer(
        view.memory,
        deconvolution,
        montage,
        frame=view.frame,
        shape=shape,
        halo_px=halo_px,
        levels=tuple(psfs),
    )
    return OpenGpuRestorer(
        ClassicalFrames(restorer, transforms), f"{view.restoration.method}@builtin"
    )


def _joint(
    view: GpuChannelView,
    card: EngineCard,
    classifier: GpuClassifier,
    montage: Montage,
) -> OpenGpuRestorer:
    if card.restored is None or card.input is None:
        msg = f"engine '{card.name}' is a {card.kind}: it does not restore"
        raise EngineError(msg)
    if view.frame.channels != 1 and card.input.channels == 1:
        msg = (
            f"engine '{card.name}' sees one colour at a time, which only the CPU does "
            "with colour frames; set processing.device: cpu"
        )
        raise EngineError(msg)
    restorer = JointFrames(
        classifier, GpuBlending(view.memory, montage), view.frame, card.restored.name
    )
    return OpenGpuRestorer(restorer, identity(card))
