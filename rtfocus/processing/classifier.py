"""Classifier: the defocus of every tile of a frame, in one pass of a network.

A joint engine gives the restored frame in the same pass.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.processor import ProcessingConfig
from rtfocus.errors import EngineError
from rtfocus.frame import BACKGROUND, DefocusMap, TileGrid
from rtfocus.processing.conditions import Conditions, turned
from rtfocus.processing.correction import luminance
from rtfocus.processing.engines.card import EngineCard
from rtfocus.processing.engines.card_sections import InputCard
from rtfocus.processing.engines.opening import runs_on
from rtfocus.processing.fourier import pad
from rtfocus.processing.frame_network import FrameNetwork, labels_of
from rtfocus.processing.labels import LabelDecoder
from rtfocus.processing.planes import from_planes, to_planes
from rtfocus.processing.preparation import Preparation

Image = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FrameFit:
    """How frames of one size are brought to a size the network takes."""

    shape: tuple[int, int]
    """Height and width of the frame."""
    padded: tuple[int, int]
    """Height and width handed to the network, mirrored behind each axis."""


def fit_frame(card: InputCard, shape: tuple[int, int]) -> FrameFit:
    """Compute the input size for frames of a shape (height, width).

    A frame is extended to a whole tile more where more than half a stride would
    lie behind the last tile, and to the multiple the network asks for.
    """
    padded = tuple(_padded_side(card, side) for side in shape)
    return FrameFit(shape, (padded[0], padded[1]))


def _padded_side(card: InputCard, side: int) -> int:
    first = card.origin_px - (card.tile_px - 1) / 2
    behind = side - first - card.tile_px
    tiles = max(0, ceil(behind / card.stride_px - 0.5))
    needed = max(side, ceil(first + card.tile_px + tiles * card.stride_px))
    return ceil(needed / card.multiple_px) * card.multiple_px


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


class FrameClassifier:
    """A classifier or joint engine applied to whole frames of one size.

    Parameters
    ----------
    card
        Of the engine.
    network
        Opened for at least `fit.padded`; closed by `close`.
    fit
        Frame and input size.
    step_um
        Defocus between two levels in the optics of the frames.
    quantum
        Step between the camera's values; 0 for float frames.
    conditions
        What the engine is told; None: nothing.
    mirrored
        The engine sees the sign of the defocus turned, see
        `rtfocus.processing.conditions.is_mirrored`.
    """

    def __init__(
        self,
        card: EngineCard,
        network: FrameNetwork,
        fit: FrameFit,
        *,
        step_um: float,
        quantum: float,
        conditions: Conditions | None = None,
        mirrored: bool = False,
    ) -> None:
        if card.kind == "restorer" or not (card.input and card.output and card.levels):
            msg = f"engine '{card.name}' is a {card.kind}, not a classifier"
            raise EngineError(msg)
        self.card = card
        self.step_um = step_um
        self._network = network
        self._fit = fit
        self._channels = card.input.channels
        self._restores = network.restores
        self._mirrored = mirrored and card.levels.signed
        self._conditions = conditions
        self._preparation = Preparation(card, quantum)
        self._labels = LabelDecoder(card.output)
        # The first inference compiles and shows how many tiles there are.
        blank = np.zeros(network.input_shape, dtype=np.float32)
        logits, _ = network.run(blank, self._condition(len(blank)))
        rows, columns = labels_of(logits).shape[-2:]
        self.grid = tile_grid(card.input, fit, rows, columns, signed=card.levels.signed)

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

    def runs_on(self, settings: ProcessingConfig) -> str:
        """Return runtime and precision, e.g. ``openvino bf16``."""
        return runs_on(self.card, self._network.engine, settings.precision)

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


def tile_grid(
    card: InputCard, fit: FrameFit, rows: int, columns: int, *, signed: bool
) -> TileGrid:
    """Grid of the tiles whose centre lies in the frame; at least one per axis."""
    counts = [
        min(found, max(1, ceil((side - card.origin_px) / card.stride_px)))
        for found, side in zip((rows, columns), fit.shape, strict=True)
    ]
    return TileGrid(
        rows=counts[0],
        columns=counts[1],
        tile_px=card.tile_px,
        stride_px=card.stride_px,
        origin_px=card.origin_px,
        signed=signed,
    )
