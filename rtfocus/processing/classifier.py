"""Classifier: the defocus of every tile of a frame, in one pass of a network."""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.frame import DefocusMap, TileGrid
from rtfocus.processing.engines.card import EngineCard
from rtfocus.processing.engines.card_sections import (
    BACKGROUND_LABEL,
    InputCard,
    OutputCard,
)
from rtfocus.processing.fourier import pad
from rtfocus.processing.preparation import Preparation
from rtfocus.processing.seam import Engine
from rtfocus.processing.tiling import BACKGROUND

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
    """Normalised, axes (1, 1, y, x)."""
    empty: NDArray[np.bool_]
    """Tiles without a specimen, axes (tile_y, tile_x)."""


class FrameClassifier:
    """A classifier engine applied to whole frames of one size.

    Parameters
    ----------
    card
        Of the engine.
    engine
        Opened for `fit.padded`; closed by `close`.
    fit
        Frame and input size.
    step_um
        Defocus between two levels in the optics of the frames.
    quantum
        Step between the camera's values; 0 for float frames.
    """

    def __init__(
        self,
        card: EngineCard,
        engine: Engine,
        fit: FrameFit,
        *,
        step_um: float,
        quantum: float,
    ) -> None:
        if card.input is None or card.output is None or card.levels is None:
            msg = f"engine '{card.name}' is a {card.kind}, not a classifier"
            raise EngineError(msg)
        self.card = card
        self.step_um = step_um
        self.precision = engine.precision
        """Numbers the network computes in: ``f32`` or ``bf16``."""
        self.runs_on = f"{engine.backend} {engine.precision}"
        """Runtime and precision, e.g. ``openvino bf16``."""
        self._engine = engine
        self._fit = fit
        self._preparation = Preparation(card, quantum)
        self._labels = _Labels(card.output)
        # The first inference compiles and shows how many tiles there are.
        blank = np.zeros((1, 1, *fit.padded), dtype=np.float32)
        rows, columns = self._logits(blank).shape[-2:]
        self.grid = _grid(card.input, fit, rows, columns, signed=card.levels.signed)

    def prepare(self, grey: Image) -> Prepared:
        """Normalise a frame (y, x), find its empty tiles, shape the input."""
        padded = pad(grey, self._fit.padded, 0, "symmetric")
        empty = self._preparation.background(padded, self.grid)
        return Prepared(self._preparation.normalise(padded)[None, None], empty)

    def classify(self, prepared: Prepared) -> DefocusMap:
        """Run the network on a prepared frame.

        Returns
        -------
        DefocusMap
            New arrays, axes (tile_y, tile_x).
        """
        logits = self._logits(prepared.tiles)[0]
        logits = logits[:, : self.grid.rows, : self.grid.columns]
        level, confidence, defocus = self._labels.decode(logits)
        level[prepared.empty] = BACKGROUND
        defocus[level == BACKGROUND] = np.nan
        defocus *= np.float32(self.step_um)
        return DefocusMap(self.grid, defocus, confidence, level)

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def _logits(self, prepared: Image) -> NDArray[np.float32]:
        logits = np.asarray(self._engine.infer(prepared), dtype=np.float32)
        wanted = len(self._labels.labels)
        if logits.ndim != 4 or logits.shape[1] != wanted:
            msg = (
                f"engine '{self.card.name}': its output is {logits.shape}, but the "
                f"card lists {wanted} labels; expected (N, {wanted}, rows, columns)"
            )
            raise EngineError(msg)
        return logits


class _Labels:
    """Turns logits into labels by the card's list."""

    def __init__(self, output: OutputCard) -> None:
        self.labels = output.labels
        self._levels = np.array(
            [
                BACKGROUND if label == BACKGROUND_LABEL else int(label)
                for label in output.labels
            ],
            dtype=np.int16,
        )

    def decode(
        self, logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.int16], Image, Image]:
        """Return level, confidence and defocus in levels, axes (tile_y, tile_x).

        The defocus is the mean over the chosen level and its two neighbours by
        their probabilities: finer than a level, blind to a far second opinion.
        """
        shifted = np.exp(logits - logits.max(axis=0))
        probability = shifted / shifted.sum(axis=0)
        chosen = probability.argmax(axis=0)
        level = self._levels[chosen]
        confidence = np.take_along_axis(probability, chosen[None], axis=0)[0]
        values = self._levels[:, None, None].astype(np.float32)
        near = np.abs(values - level) <= 1
        near &= values != BACKGROUND
        weight = np.where(near, probability, 0)
        total = np.maximum(weight.sum(axis=0), np.finfo(np.float32).tiny)
        defocus = (weight * values).sum(axis=0) / total
        return level, confidence, np.asarray(defocus, dtype=np.float32)


def _grid(
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
