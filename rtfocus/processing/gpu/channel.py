"""Channel: what sees and restores the frames of a channel on a GPU, by its plan."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.engines.card import input_of
from rtfocus.engines.registry import FoundEngine
from rtfocus.errors import EngineError
from rtfocus.frame import TileGrid
from rtfocus.processing.channel_plan import ChannelPlan, RestorationPlan
from rtfocus.processing.classify import invertible_normalisation
from rtfocus.processing.gpu.classifier import FrameClassifier, InFlight, Part
from rtfocus.processing.gpu.cuda.driver import CudaTransforms
from rtfocus.processing.gpu.deconvolution import (
    BlindRichardsonLucyDeconvolution,
    RichardsonLucyDeconvolution,
    WienerDeconvolution,
)
from rtfocus.processing.gpu.depth_variant import (
    Blending,
    Deconvolution,
    DepthVariantRestorer,
)
from rtfocus.processing.gpu.network_restorer import (
    JointRestorer,
    TileNetworkRestorer,
    Weighing,
    images_of,
)
from rtfocus.processing.gpu.patches import LearnedWienerRestorer, PatchRestorer
from rtfocus.processing.gpu.preparation import Correction
from rtfocus.processing.gpu.tiles import TileConditions
from rtfocus.processing.gpu.work import DeviceMemory, FrameShape, Work
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import (
    DEFAULT_ITERATIONS,
    PAPER_HALO_PX,
    margin_px,
    padded_shape,
    patch_shape,
)
from rtfocus.processing.windows import FrameTiles
from rtfocus.runtimes.gpu import (
    Gpu,
    GpuEngine,
    GpuRequest,
    gpu_request,
    open_network,
    runs_on,
)


class FrameRestorer(Protocol):
    """Restores the frames of one channel, one after the other on one stream."""

    def parts(self, labels: NDArray[np.int16] | None) -> list[Part]:
        """Return what is enqueued for a frame, in order.

        Parameters
        ----------
        labels
            Level per tile, axes (tile_y, tile_x), at least one out of focus; None:
            everything that can be recorded.
        """
        ...

    def recurs(self, part: Part) -> bool:
        """Return whether other frames will ask for a part: only then it is recorded."""
        ...

    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue a part of the restoration of a frame."""
        ...

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        ...

    def close(self) -> None:
        """Free what is not memory."""
        ...


def open_for_plan(
    plan: ChannelPlan, found: FoundEngine, device: Gpu
) -> tuple[GpuEngine, GpuRequest]:
    """Load the network of an engine of a channel, and what was asked for.

    Raises
    ------
    EngineError
        If it has no network, or no backend runs it here.
    """
    settings = plan.processing.gpu
    request = gpu_request(
        found,
        plan.size,
        None if settings.precision == "auto" else settings.precision,
        tf32=settings.tf32,
        cuda_graphs=settings.cuda_graphs,
        tiles_per_batch=settings.tiles_per_batch,
    )
    return open_network(settings.backend, request, device), request


def open_restorer(
    plan: ChannelPlan,
    classifier: FrameClassifier,
    device: Gpu,
    memory: DeviceMemory,
) -> tuple[FrameRestorer, GpuEngine | None]:
    """Open what restores the frames of a channel.

    Parameters
    ----------
    plan
        Of a channel that is restored.
    classifier
        Whose labels say what is restored.
    device
        The GPU.
    memory
        Where filters and work space lie.

    Returns
    -------
    FrameRestorer
        Ready.
    GpuEngine or None
        Its own network; None: it has none.

    Raises
    ------
    EngineError
        If an engine is damaged or cannot be loaded.
    """
    restoration = plan.restoration
    if restoration is None:
        msg = f"channel '{plan.name}' is not restored: {plan.skipped}"
        raise ValueError(msg)
    match restoration.way:
        case "by_level" | "blind":
            return _by_level(plan, restoration, classifier, memory), None
        case "by_tile":
            return _by_tile(plan, restoration, classifier, device, memory)
        case "same_pass" | "own_pass":
            return _joint(plan, restoration, classifier, device, memory)
        case "by_patch":
            return _by_patch(plan, restoration, classifier, memory), None
        case "learned_wiener":
            return _learned_wiener(plan, restoration, classifier, device, memory)
        case "whole_image":
            raise _only_on_cpu(restoration)


def _by_level(
    plan: ChannelPlan,
    restoration: RestorationPlan,
    classifier: FrameClassifier,
    memory: DeviceMemory,
) -> FrameRestorer:
    settings, psfs = restoration.settings, plan.psfs
    margins = {level: margin_px(psf, settings.halo_px) for level, psf in psfs.items()}
    whole = {level: padded_shape(plan.size, px) for level, px in margins.items()}
    with ExitStack() as opened:
        transforms = CudaTransforms(set(whole.values()))
        opened.callback(transforms.close)
        given = memory, transforms, psfs, whole
        deconvolution: Deconvolution
        if restoration.method == "wiener":
            deconvolution = WienerDeconvolution(
                *given,
                quantum=plan.camera.quantum,
                noise_to_signal=settings.noise_to_signal,
                gain_e_per_count=plan.gain_e_per_count,
            )
        elif restoration.way == "blind":
            deconvolution = BlindRichardsonLucyDeconvolution(
                *given, iterations=settings.iterations
            )
        else:
            deconvolution = RichardsonLucyDeconvolution(
                *given, method=restoration.method, iterations=settings.iterations
            )
        restorer = DepthVariantRestorer(
            memory,
            deconvolution,
            transforms,
            plan.montage(classifier.grid),
            frame=FrameShape.of(plan.shape),
            margins_px=margins,
        )
        opened.pop_all()
    return restorer


def _by_tile(
    plan: ChannelPlan,
    restoration: RestorationPlan,
    classifier: FrameClassifier,
    device: Gpu,
    memory: DeviceMemory,
) -> tuple[FrameRestorer, GpuEngine]:
    card = restoration.engine.card
    tiles = FrameTiles(input_of(card), plan.size)
    with ExitStack() as opened:
        engine, request = open_for_plan(plan, restoration.engine, device)
        opened.callback(engine.close)
        conditions = None
        if card.condition is not None and restoration.conditions is not None:
            conditions = TileConditions(
                memory, restoration.conditions, tiles, classifier.grid
            )
        restorer = TileNetworkRestorer(
            memory,
            engine,
            card,
            batch=request.inputs[input_of(card).name].largest[0],
            tiles=tiles,
            frame=FrameShape.of(plan.shape),
            blending=Blending(memory, plan.montage(classifier.grid)),
            conditions=conditions,
        )
        opened.pop_all()
    return restorer, engine


def _joint(
    plan: ChannelPlan,
    restoration: RestorationPlan,
    classifier: FrameClassifier,
    device: Gpu,
    memory: DeviceMemory,
) -> tuple[FrameRestorer, GpuEngine | None]:
    """Open a joint engine in the classifier's pass, or in one of its own."""
    frame = FrameShape.of(plan.shape)
    card = restoration.engine.card
    output = "" if card.restored is None else card.restored.name
    blending = Blending(memory, plan.montage(classifier.grid))
    engine, seen = None, classifier
    with ExitStack() as opened:
        own, labels = None, None
        if (
            restoration.way == "own_pass"
            or len(images_of(frame, classifier.planes)) > 1
        ):
            engine, _ = open_for_plan(plan, restoration.engine, device)
            opened.callback(engine.close)
            looks = restoration.own_pass or classifier.plan
            seen = FrameClassifier(memory, engine, looks, frame)
            own = seen.open_slot(memory)
            opened.callback(own.network.close)
        weighing = None
        if (weighed := plan.weighed) is not None and weighed.card.evidence is not None:
            weighing = Weighing(
                memory,
                weighed.card.evidence,
                invertible_normalisation(weighed.card),
                weighed.step_um,
                frame=frame,
                grid=seen.grid,
            )
            if restoration.way == "own_pass":
                labels = seen.allocate_maps(memory)
        opened.pop_all()
    restorer = JointRestorer(
        seen, blending, frame, output, own=own, labels=labels, weighing=weighing
    )
    return restorer, engine


def _only_on_cpu(restoration: RestorationPlan) -> EngineError:
    return EngineError(
        f"restoration {restoration.method} is a model of bioimage.io, which does not "
        "run on a GPU; set processing.device: cpu"
    )


def _by_patch(
    plan: ChannelPlan,
    restoration: RestorationPlan,
    classifier: FrameClassifier,
    memory: DeviceMemory,
) -> FrameRestorer:
    settings, psfs = restoration.settings, plan.psfs
    montage = plan.montage(classifier.grid)
    halo_px = PAPER_HALO_PX if settings.halo_px is None else settings.halo_px
    height, width = (
        max(span.stop - span.start for span in spans) + 2 * halo_px
        for spans in montage.spans()
    )
    widest = max((psf.shape for psf in psfs.values()), key=max)
    with ExitStack() as opened:
        transforms = CudaTransforms(set())
        opened.callback(transforms.close)
        restorer = PatchRestorer(
            memory,
            transforms,
            psfs,
            montage,
            frame=FrameShape.of(plan.shape),
            shape=patch_shape((height, width), widest),
            halo_px=halo_px,
            iterations=settings.iterations or DEFAULT_ITERATIONS,
        )
        opened.pop_all()
    return restorer


def _learned_wiener(
    plan: ChannelPlan,
    restoration: RestorationPlan,
    classifier: FrameClassifier,
    device: Gpu,
    memory: DeviceMemory,
) -> tuple[FrameRestorer, GpuEngine]:
    card = restoration.engine.card
    psfs, told = plan.band_levels()
    with ExitStack() as opened:
        engine, request = open_for_plan(plan, restoration.engine, device)
        opened.callback(engine.close)
        transforms = CudaTransforms(set())
        opened.callback(transforms.close)
        restorer = LearnedWienerRestorer(
            memory,
            transforms,
            engine,
            card,
            psfs=psfs,
            told=told,
            montage=plan.montage(classifier.grid),
            frame=FrameShape.of(plan.shape),
            batch=request.inputs[input_of(card).name].largest[0],
        )
        opened.pop_all()
    return restorer, engine


@dataclass(frozen=True, slots=True)
class OpenChannel:
    """What does the work that a plan names."""

    plan: ChannelPlan
    correction: Correction
    classifier: FrameClassifier | None = None
    restorer: FrameRestorer | None = None
    backends: Mapping[str, str] = field(default_factory=dict)
    """Name of each network to its runtime and precision."""
    montage: Montage | None = None
    """Tells which levels are restored; None: there are none."""

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


def open_channel(plan: ChannelPlan, device: Gpu, memory: DeviceMemory) -> OpenChannel:
    """Open the engines of a channel and compute its filters.

    Raises
    ------
    EngineError
        If an engine is damaged or cannot be loaded.
    """
    correction = Correction(memory, plan.camera, plan.shape)
    seen, restoration = plan.classifier, plan.restoration
    if seen is None:
        if restoration is not None:
            raise _only_on_cpu(restoration)
        return OpenChannel(plan, correction)
    # What is opened when a later part fails is closed again.
    with ExitStack() as opened:
        engine, _ = open_for_plan(plan, seen.found, device)
        opened.callback(engine.close)
        backends = {seen.found.name: runs_on(engine)}
        classifier = FrameClassifier(memory, engine, seen, FrameShape.of(plan.shape))
        if restoration is None:
            opened.pop_all()
            return OpenChannel(plan, correction, classifier, None, backends)
        montage = plan.montage(classifier.grid)
        restorer, own = open_restorer(plan, classifier, device, memory)
        opened.pop_all()
    if own is not None:
        backends[restoration.name] = runs_on(own)
    return OpenChannel(plan, correction, classifier, restorer, backends, montage)
