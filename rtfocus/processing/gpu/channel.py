"""Channel: what sees and restores the frames of a channel on a GPU, by its plan.

And the buffers and recordings that each of its frames in flight has for itself.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import RestorationConfig
from rtfocus.engines.card import input_of
from rtfocus.engines.registry import FoundEngine
from rtfocus.errors import EngineError
from rtfocus.frame import TileGrid
from rtfocus.processing.channel_plan import ChannelPlan, ClassifierPlan, RestorationPlan
from rtfocus.processing.gpu.classifier import ClassifierSlot, FrameClassifier
from rtfocus.processing.gpu.cuda.driver import CudaTransforms, import_driver
from rtfocus.processing.gpu.cuda.stream import Replayed
from rtfocus.processing.gpu.deconvolution import (
    BlindRichardsonLucyDeconvolution,
    Deconvolution,
    LevelTransfers,
    RichardsonLucyDeconvolution,
    WienerDeconvolution,
)
from rtfocus.processing.gpu.depth_variant import (
    Blending,
    DepthVariantRestorer,
    FrameRestorer,
    InFlight,
    PatchRestorer,
    Piece,
)
from rtfocus.processing.gpu.network_restorer import (
    JointRestorer,
    LearnedWienerRestorer,
    TileNetworkRestorer,
    Weighing,
)
from rtfocus.processing.gpu.preparation import FrameCorrection, TileConditions
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, FrameShape, Work
from rtfocus.processing.montage import FrameTiles, Montage
from rtfocus.processing.restore import (
    gaussian_like,
    iterations_of,
    margin_px,
    padded_shape,
    patch_halo_px,
    patch_shape,
)
from rtfocus.runtimes.gpu import (
    Gpu,
    GpuEngine,
    Shape,
    gpu_request,
    open_fitting,
    runs_on,
)

_LATTICE_PX = 2**20
"""That the learned Wiener filter sees at once: its rectangles may be small."""


class OpenChannel:
    """What does the work that a plan names.

    Raises
    ------
    EngineError
        If an engine is damaged or cannot be loaded; what was opened is closed again.
    """

    def __init__(self, plan: ChannelPlan, device: Gpu, memory: DeviceMemory) -> None:
        self.plan = plan
        self.correction = FrameCorrection(memory, plan.camera, plan.shape)
        self.classifier: FrameClassifier | None = None
        self.restorer: FrameRestorer | None = None
        self.montage: Montage | None = None
        """Tells which levels are restored; None: there are none."""
        self.backends: dict[str, str] = {}
        """Name of each network to its runtime and precision."""
        self._device = device
        self._memory = memory
        self._frame = FrameShape.of(plan.shape)
        self._opened = ExitStack()
        """Closes engines and transforms, those that others use last."""
        with self._opened as opened:
            self._open()
            self._opened = opened.pop_all()

    @property
    def grid(self) -> TileGrid | None:
        """Tiles of the defocus maps; None: there are no maps."""
        return None if self.classifier is None else self.classifier.grid

    def close(self) -> None:
        """Free engines and transforms, after all that is in flight."""
        self._opened.close()

    def _open(self) -> None:
        classifier, restoration = self.plan.classifier, self.plan.restoration
        if restoration is not None and restoration.way == "whole_image":
            msg = (
                f"restoration {restoration.name} has steps around its network, which "
                "only the CPU does; set processing.device: cpu"
            )
            raise EngineError(msg)
        if classifier is None:
            return
        self.classifier = self._classifier(classifier)
        if restoration is not None:
            self.montage = self.plan.montage(self.classifier.grid)
            self.restorer = self._restorer(restoration, self.classifier, self.montage)

    def _network(
        self, chosen: FoundEngine, most_px: int = 0
    ) -> tuple[GpuEngine, dict[str, Shape]]:
        """Load the network of an engine, and return the shapes of its inputs too."""
        settings = self.plan.processing.gpu
        ask = partial(
            gpu_request,
            chosen,
            self.plan.size,
            None if settings.precision == "auto" else settings.precision,
            tf32=settings.tf32,
            cuda_graphs=settings.cuda_graphs,
            tiles_per_batch=settings.tiles_per_batch,
        )
        free_bytes, _ = import_driver().mem_get_info()
        engine, request = open_fitting(
            settings.backend, ask, self._device, free_bytes, most_px
        )
        self._opened.callback(engine.close)
        self.backends[chosen.name] = runs_on(engine)
        return engine, {name: of.largest for name, of in request.inputs.items()}

    def _classifier(self, network_plan: ClassifierPlan) -> FrameClassifier:
        """Open a classifier or joint engine."""
        return FrameClassifier(
            self._memory, *self._network(network_plan.found), network_plan, self._frame
        )

    def _transfers(
        self,
        psfs: Mapping[int, NDArray[np.float32]],
        whole: Mapping[int, tuple[int, int]],
        *,
        recorded: bool,
        kept: bool = True,
    ) -> LevelTransfers:
        """Plan transforms, at once where recordings ask, and transfer functions."""
        transforms = CudaTransforms(set(whole.values()) if recorded else set())
        self._opened.callback(transforms.close)
        return LevelTransfers(self._memory, transforms, psfs, whole, kept=kept)

    def _restorer(
        self,
        restoration: RestorationPlan,
        classifier: FrameClassifier,
        montage: Montage,
    ) -> FrameRestorer:
        """Open what restores, by the labels of a classifier."""
        match restoration.way:
            case "by_level" | "blind":
                return self._by_level(restoration, montage)
            case "by_tile":
                return self._by_tile(restoration, montage)
            case "same_pass" | "own_pass":
                return self._joint(restoration, classifier, montage)
            case "by_patch":
                return self._by_patch(restoration.settings, montage)
        return self._learned_wiener(restoration.engine, montage)

    def _by_level(
        self, restoration: RestorationPlan, montage: Montage
    ) -> FrameRestorer:
        settings, psfs, size = restoration.settings, self.plan.psfs, self.plan.size
        margins = {n: margin_px(psf, settings.halo_px) for n, psf in psfs.items()}
        whole = {level: padded_shape(size, px) for level, px in margins.items()}
        blind = restoration.way == "blind"
        if blind:
            psfs = {level: gaussian_like(psf) for level, psf in psfs.items()}
        transfers = self._transfers(psfs, whole, recorded=True, kept=not blind)
        deconvolution: Deconvolution
        if settings.method == "wiener":
            deconvolution = WienerDeconvolution(
                transfers,
                settings,
                quantum=self.plan.camera.quantum,
                gain_e_per_count=self.plan.gain_e_per_count,
            )
        elif blind:
            deconvolution = BlindRichardsonLucyDeconvolution(transfers, settings)
        else:
            deconvolution = RichardsonLucyDeconvolution(transfers, settings)
        return DepthVariantRestorer(
            self._memory, deconvolution, montage, frame=self._frame, margins_px=margins
        )

    def _by_tile(self, restoration: RestorationPlan, montage: Montage) -> FrameRestorer:
        card, memory = restoration.engine.card, self._memory
        tiles = FrameTiles(input_of(card), self.plan.size)
        engine, shapes = self._network(restoration.engine)
        conditions, told = None, restoration.conditions
        if card.condition is not None and told is not None:
            conditions = TileConditions(memory, told, tiles, montage.grid)
        restorer = TileNetworkRestorer(
            memory,
            engine,
            card,
            shapes=shapes,
            frame=self._frame,
            blending=Blending(memory, montage, self._frame),
            conditions=conditions,
        )
        self._opened.callback(restorer.network.close)
        return restorer

    def _joint(
        self,
        restoration: RestorationPlan,
        classifier: FrameClassifier,
        montage: Montage,
    ) -> FrameRestorer:
        """Open a joint engine in the classifier's pass, or in one of its own."""
        memory, frame = self._memory, self._frame
        apart, network, own = restoration.way == "own_pass", classifier, None
        if apart or len(classifier.colours) > 1:
            network = self._classifier(restoration.own_pass or classifier.plan)
            own = network.open_slot(memory)
            self._opened.callback(own.network.close)
        evidence, weighing = self.plan.evidence, None
        needs_labels = network.plan.looks_twice or (apart and evidence is not None)
        if evidence is not None:
            weighing = Weighing(memory, evidence, frame=frame, grid=network.grid)
        return JointRestorer(
            network,
            Blending(memory, montage, frame),
            own=own,
            labels=network.allocate_maps(memory) if own and needs_labels else None,
            weighing=weighing,
        )

    def _by_patch(self, settings: RestorationConfig, montage: Montage) -> FrameRestorer:
        psfs = self.plan.psfs
        halo_px = patch_halo_px(settings)
        height, width = (
            max(span.stop - span.start for span in spans) + 2 * halo_px
            for spans in montage.spans
        )
        widest = max((psf.shape for psf in psfs.values()), key=max)
        whole = dict.fromkeys(psfs, patch_shape((height, width), widest))
        return PatchRestorer(
            self._transfers(psfs, whole, recorded=False),
            montage,
            frame=self._frame,
            halo_px=halo_px,
            iterations=iterations_of(settings),
        )

    def _learned_wiener(self, chosen: FoundEngine, montage: Montage) -> FrameRestorer:
        psfs, conditions = self.plan.band_levels()
        engine, shapes = self._network(chosen, _LATTICE_PX)
        side = input_of(chosen.card).tile_px
        restorer = LearnedWienerRestorer(
            self._transfers(psfs, dict.fromkeys(psfs, (side, side)), recorded=False),
            engine,
            chosen.card,
            conditions=conditions,
            montage=montage,
            frame=self._frame,
            shapes=shapes,
        )
        self._opened.callback(restorer.network.close)
        return restorer


@dataclass(frozen=True, slots=True)
class SlotBuffers:
    """Device memory of one frame in flight."""

    frame: DeviceArray
    """Counts of the camera."""
    signal: DeviceArray
    restored: DeviceArray
    """Float32, unit of the signal."""
    counts: DeviceArray
    """Restored, on the camera's scale."""
    packed_maps: DeviceArray
    maps: dict[str, DeviceArray]
    """Parts of `packed_maps`."""


class ChannelSlot:
    """The work on one frame of one channel, recorded where it can be, if `graphs`."""

    def __init__(
        self,
        buffers: SlotBuffers,
        memory: DeviceMemory,
        channel: OpenChannel,
        *,
        graphs: bool,
    ) -> None:
        self.channel = channel
        self._buffers = buffers
        self._seen: ClassifierSlot | None = None
        if channel.classifier is not None:
            self._seen = channel.classifier.open_slot(memory)
        self._off = None if graphs else "processing.gpu.cuda_graphs is off"
        self.classify = Replayed(
            f"classification of channel '{channel.plan.name}'",
            self._classify,
            lambda work: self._off or self._why_not_classify(work),
        )
        self._pieces: dict[Piece, Replayed] = {}

    def close(self) -> None:
        """Free contexts and recordings."""
        for replayed in (self.classify, *self._pieces.values()):
            replayed.close()
        if self._seen is not None:
            self._seen.network.close()

    def _classify(self, work: Work) -> None:
        slot, channel = self._buffers, self.channel
        channel.correction.to_signal(work, slot.frame, slot.signal, slot.maps["flags"])
        if channel.classifier is not None and self._seen is not None:
            channel.classifier.enqueue(work, self._seen, slot.signal, slot.maps)

    def restore(self, work: Work, labels: NDArray[np.int16] | None) -> None:
        """Enqueue the restoration of the levels that tiles have; None: of all.

        Every piece is recorded alone, so that those a frame does not need are
        left out.
        """
        slot, channel = self._buffers, self.channel
        restorer, montage = channel.restorer, channel.montage
        if restorer is None or montage is None or self._seen is None:
            return
        in_focus = labels is not None and not montage.present(labels)
        if in_focus or restorer.adds:
            work.copy(slot.restored, slot.signal)
        frame = InFlight(slot.signal, slot.maps, self._seen, slot.restored)
        if in_focus:
            restorer.in_focus(work, frame)
        else:
            for piece in restorer.pieces(labels):
                if restorer.recurs(piece):
                    self._piece(restorer, frame, piece)(work)
                else:
                    restorer.enqueue(work, frame, piece)
        flags = slot.maps["flags"]
        channel.correction.to_counts(work, slot.restored, slot.counts, flags)

    def _piece(
        self, restorer: FrameRestorer, frame: InFlight, piece: Piece
    ) -> Replayed:
        """Return a piece of the restoration, recorded at its second run."""
        replayed = self._pieces.get(piece)
        if replayed is None:
            replayed = self._pieces[piece] = Replayed(
                f"restoration of channel '{self.channel.plan.name}' {piece}",
                lambda work: restorer.enqueue(work, frame, piece),
                lambda work: self._off or restorer.why_not_capturable(work),
            )
        return replayed

    def _why_not_classify(self, work: Work) -> str | None:
        return (
            None if self._seen is None else self._seen.network.why_not_capturable(work)
        )
