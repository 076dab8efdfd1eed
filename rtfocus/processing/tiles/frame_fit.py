"""Frame fit: how a frame is brought to a size its network takes, and its tiles.

All channels of a series must share one grid of tiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.frame import TileGrid
from rtfocus.processing.engines.card import InputCard

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


def common_grid(grids: Mapping[str, TileGrid | None]) -> TileGrid | None:
    """Return the grid of all classified channels; None: none is classified.

    Parameters
    ----------
    grids
        By channel; None: not classified.

    Raises
    ------
    EngineError
        If two channels have different grids: one map cannot hold both.
    """
    found = {name: grid for name, grid in grids.items() if grid is not None}
    if len(set(found.values())) > 1:
        msg = (
            f"classifiers of channels {', '.join(found)} divide a frame into different "
            "tiles; use engines with the same tile_px and stride_px"
        )
        raise EngineError(msg)
    return next(iter(found.values()), None)


def to_planes(signal: Image, channels: int) -> Image:
    """Arrange a frame as the images of a batch.

    Parameters
    ----------
    signal
        Axes (y, x) or (y, x, colour).
    channels
        Of the network. 1: colours are images of their own; 3: a grey frame is
        shown three times.

    Returns
    -------
    Image
        Axes (image, channel, y, x); a view where it can be.
    """
    if signal.ndim == 2:
        return np.broadcast_to(signal, (1, channels, *signal.shape))
    colours = np.moveaxis(signal, -1, 0)
    return colours[:, None] if channels == 1 else colours[None]


def from_planes(planes: Image, shape: tuple[int, ...]) -> Image:
    """Undo `to_planes`; a grey frame is the mean of what its channels became."""
    if len(shape) == 2:
        grey = planes[0, 0] if planes.shape[1] == 1 else planes[0].mean(axis=0)
        return np.asarray(grey)
    colours = planes[:, 0] if planes.shape[1] == 1 else planes[0]
    return np.moveaxis(colours, 0, -1)


def paired_planes(signal: Image, out: Image) -> list[tuple[Image, Image]]:
    """Pair up the 2-D planes of input and output: one, or one per colour."""
    if signal.ndim == 2:
        return [(signal, out)]
    return [(signal[..., c], out[..., c]) for c in range(signal.shape[-1])]
