"""Classifier: the defocus of every tile of a frame, in one pass of a network.

A joint engine gives the restored frame in the same pass.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import ProcessingConfig
from rtfocus.errors import EngineError
from rtfocus.frame import BACKGROUND, DefocusMap
from rtfocus.processing.camera import luminance
from rtfocus.processing.channel_plan import ClassifierPlan
from rtfocus.processing.classify import LabelDecoder, turned
from rtfocus.processing.cpu.networks import (
    FrameNetwork,
    labels_of,
    open_frame_network,
)
from rtfocus.processing.cpu.preparation import Preparation
from rtfocus.processing.montage import pad
from rtfocus.processing.windows import from_planes, tile_grid, to_planes
from rtfocus.runtimes.cpu_backends import runs_on

Image = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A frame ready for the network."""

    tiles: Image
    """Normalised, axes (image, channel, y, x)."""
    empty: NDArray[np.bool_]
    """Tiles without a specimen, axes (tile_y, tile_x)."""
    ranges: tuple[tuple[float, float], ...]
    """Offset and scale that normalised each plane; empty: there is no way back."""
    shape: tuple[int, ...]
    """Of the frame."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a network saw in a frame."""

    defocus: DefocusMap
    restored: Image | None
    """Shape and unit of the signal; None: the network does not restore."""


def known(seen: Seen | None) -> Seen:
    """Return what the classifier saw; ValueError where there is none."""
    if seen is None:
        msg = "a frame without defocus was to be restored"
        raise ValueError(msg)
    return seen


class FrameClassifier:
    """A classifier or joint engine applied to whole frames of one size.

    Parameters
    ----------
    plan
        Engine and frames.
    network
        Opened for at least `FrameFit.padded`; closed by `close`.
    """

    def __init__(self, plan: ClassifierPlan, network: FrameNetwork) -> None:
        card = plan.card
        if card.kind == "restorer" or not (card.input and card.output and card.levels):
            msg = f"engine '{card.name}' is a {card.kind}, not a classifier"
            raise EngineError(msg)
        self.card = card
        self.step_um = plan.step_um
        self._network = network
        self._fit = plan.fit
        self._channels = card.input.channels
        self._restores = network.restores
        self._mirrored = plan.mirrored and card.levels.signed
        self._conditions = plan.conditions
        self._preparation = Preparation(card, plan.quantum)
        self._labels = LabelDecoder(card.output)
        # The first inference compiles and shows how many tiles there are.
        blank = np.zeros(network.input_shape, dtype=np.float32)
        logits, _ = network.run(blank, self._condition(len(blank)))
        rows, columns = labels_of(logits).shape[-2:]
        self.grid = tile_grid(
            card.input, plan.fit, rows, columns, signed=card.levels.signed
        )

    def prepare(self, signal: Image) -> Prepared:
        """Normalise a frame (y, x) or (y, x, 3) and find its empty tiles."""
        grey = luminance(signal)
        padded = self._pad(grey)
        empty = self._preparation.background(padded, self.grid)
        images = self._images(signal, grey)
        if len(images) == 1 and self._channels == 1:
            tiles, found = self._preparation.normalise(padded, of=grey)
            return Prepared(tiles[None, None], empty, found, signal.shape)
        tiles = np.empty((*images.shape[:2], *padded.shape), np.float32)
        ranges: list[tuple[float, float]] = []
        for place in np.ndindex(images.shape[:2]):
            plane = images[place]
            tiles[place], found = self._preparation.normalise(
                self._pad(plane), of=plane
            )
            ranges += found
        return Prepared(tiles, empty, tuple(ranges), signal.shape)

    def classify(self, prepared: Prepared) -> DefocusMap:
        """Run the network on a prepared frame; new arrays, axes (tile_y, tile_x)."""
        return self.see(prepared).defocus

    def see(self, prepared: Prepared) -> Seen:
        """Run the network on a prepared frame for all that it tells of it."""
        tiles = prepared.tiles
        logits, restored = self._network.run(tiles, self._condition(len(tiles)))
        defocus = self._map(labels_of(logits)[0], prepared.empty)
        if restored is None:
            return Seen(defocus, None)
        return Seen(defocus, self._to_signal(restored, prepared))

    @property
    def precision(self) -> str:
        """Numbers the network computes in: ``f32``, ``bf16`` ..."""
        return self._network.engine.precision

    def probabilities(self, prepared: Prepared) -> Image:
        """Return how likely every label of the card is, in its order.

        For evaluations that look beyond the chosen label. Axes (label, tile_y,
        tile_x); labels as the engine sees them, mirrored where it is.
        """
        tiles = prepared.tiles
        logits, _ = self._network.run(tiles, self._condition(len(tiles)))
        shown = labels_of(logits)[0][:, : self.grid.rows, : self.grid.columns]
        shifted = np.exp(shown - shown.max(axis=0))
        return np.asarray(shifted / shifted.sum(axis=0), dtype=np.float32)

    @property
    def runs_on(self) -> str:
        """Runtime and precision, e.g. ``openvino bf16``."""
        return runs_on(self._network.engine)

    def close(self) -> None:
        """Free the engine."""
        self._network.close()

    def _images(self, signal: Image, grey: Image) -> Image:
        """Return what the network sees: the grey frame first, then its colours."""
        if self._channels == 3:
            return to_planes(signal, 3)
        planes = to_planes(grey, 1)
        if self._restores and signal.ndim == 3:
            planes = np.concatenate([planes, to_planes(signal, 1)])
        return planes

    def _pad(self, plane: Image) -> Image:
        return pad(plane, self._network.shape, 0, "symmetric")

    def _condition(self, number: int) -> Image | None:
        return None if self._conditions is None else self._conditions.unknown(number)

    def _map(self, logits: Image, empty: NDArray[np.bool_]) -> DefocusMap:
        found = self._labels.decode(logits[:, : self.grid.rows, : self.grid.columns])
        level, defocus = found.level, found.defocus
        if self._mirrored:
            level, defocus = turned(level, defocus)
        level[empty] = BACKGROUND
        background = level == BACKGROUND
        defocus_um = defocus * np.float32(self.step_um)
        uncertainty_um = found.uncertainty * np.float32(self.step_um)
        defocus_um[background] = uncertainty_um[background] = np.nan
        return DefocusMap(
            self.grid, defocus_um, found.confidence, level, uncertainty_um
        )

    def _to_signal(self, restored: Image, prepared: Prepared) -> Image:
        """Cut the network's image to the frame and bring it back to its unit."""
        height, width = self._fit.shape
        ranges = prepared.ranges
        if len(prepared.shape) == 3 and self._channels == 1:
            # The first image was the grey one, for the labels.
            restored, ranges = restored[1:], ranges[1:]
        cut = restored[..., :height, :width]
        for place, (offset, scale) in zip(
            np.ndindex(cut.shape[:2]), ranges, strict=True
        ):
            cut[place] *= np.float32(scale)
            cut[place] += np.float32(offset)
        return from_planes(cut, prepared.shape)


def open_classifier(
    plan: ClassifierPlan, settings: ProcessingConfig, threads: int = 1
) -> FrameClassifier:
    """Open a classifier or joint engine on whole frames.

    Parameters
    ----------
    plan
        Engine and frames.
    settings
        Backend and precision.
    threads
        Of the network.
    """
    network = open_frame_network(
        plan.found,
        settings,
        plan.fit.padded,
        images=plan.images,
        restored=plan.restores,
        threads=threads,
    )
    return FrameClassifier(plan, network)
