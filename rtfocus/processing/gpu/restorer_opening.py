"""Restorer opening: from a name in the config to what restores on the device."""

from dataclasses import dataclass

from rtfocus.errors import EngineError
from rtfocus.processing.conditions import Conditions
from rtfocus.processing.engines.card import EngineCard, identity
from rtfocus.processing.engines.fit import check_fit
from rtfocus.processing.engines.opening import input_of
from rtfocus.processing.engines.registry import FoundEngine, find_engine
from rtfocus.processing.frame_tiles import FrameTiles
from rtfocus.processing.gpu.blending import GpuBlending
from rtfocus.processing.gpu.channel_view import GpuChannelView
from rtfocus.processing.gpu.cufft import CudaTransforms
from rtfocus.processing.gpu.frame_restorers import (
    ClassicalFrames,
    GpuFrameRestorer,
    JointFrames,
)
from rtfocus.processing.gpu.gpu_classifier import GpuClassifier
from rtfocus.processing.gpu.gpu_conditions import GpuConditions
from rtfocus.processing.gpu.gpu_restorer import (
    GpuDeconvolution,
    GpuDepthVariantRestorer,
    transform_shape,
)
from rtfocus.processing.gpu.gpu_richardson_lucy import GpuRichardsonLucy
from rtfocus.processing.gpu.gpu_tile_restorer import GpuTileRestorer
from rtfocus.processing.gpu.gpu_wiener import GpuWiener
from rtfocus.processing.gpu.seam import GpuEngine
from rtfocus.processing.methods import METHODS as ALL_METHODS
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

    @property
    def name(self) -> str:
        """Of the engine or method."""
        return self.identity.partition("@")[0]


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
    if name in ALL_METHODS:
        raise _only_on_cpu(name)
    restorer = find_engine(name, view.config.processing.engine_folders)
    card = restorer.card
    method = card.implementation.removeprefix("builtin:")
    if method in METHODS:
        return _classical(view, classifier, montage, method)
    if restorer.folder == found.folder:
        return _joint(view, card, classifier, montage)
    check_fit(card, view.optics, ignore=view.config.processing.ignore_optics)
    if card.kind == "restorer" and card.implementation == "onnx":
        return _tiles(view, restorer, classifier, montage)
    what = f"{name} ({card.kind}, {card.implementation})"
    raise _only_on_cpu(what)


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


def _tiles(
    view: GpuChannelView,
    found: FoundEngine,
    classifier: GpuClassifier,
    montage: Montage,
) -> OpenGpuRestorer:
    card = found.card
    tiles = FrameTiles(input_of(card), view.size)
    _refuse_single_colours(view, card)
    engine, request = view.open_network(found)
    conditions = None
    if card.condition is not None:
        told = Conditions(
            card,
            view.optics,
            blind=view.config.processing.blind,
            signed=classifier.grid.signed,
        )
        conditions = GpuConditions(view.memory, told, tiles, classifier.grid)
    restorer = GpuTileRestorer(
        view.memory,
        engine,
        card,
        batch=request.inputs[input_of(card).name].largest[0],
        tiles=tiles,
        frame=view.frame,
        blending=GpuBlending(view.memory, montage),
        conditions=conditions,
    )
    return OpenGpuRestorer(restorer, identity(card), engine)


def _only_on_cpu(what: str) -> EngineError:
    return EngineError(
        f"restoration {what} does not run on a GPU; those that do: "
        f"{', '.join(METHODS)}, restorers that are a network alone, and a joint engine "
        "that is the classifier too; or set processing.device: cpu"
    )


def _refuse_single_colours(view: GpuChannelView, card: EngineCard) -> None:
    """Refuse networks that would have to see one colour after the other."""
    if view.frame.channels != 1 and input_of(card).channels == 1:
        msg = (
            f"engine '{card.name}' sees one colour at a time, which only the CPU does "
            "with colour frames; set processing.device: cpu"
        )
        raise EngineError(msg)


def _joint(
    view: GpuChannelView,
    card: EngineCard,
    classifier: GpuClassifier,
    montage: Montage,
) -> OpenGpuRestorer:
    if card.restored is None:
        msg = f"engine '{card.name}' is a {card.kind}: it does not restore"
        raise EngineError(msg)
    _refuse_single_colours(view, card)
    restorer = JointFrames(
        classifier, GpuBlending(view.memory, montage), view.frame, card.restored.name
    )
    return OpenGpuRestorer(restorer, identity(card))
