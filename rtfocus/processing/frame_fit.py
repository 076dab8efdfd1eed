"""Frame fit: how a frame is brought to a size its network takes, and its tiles.

All channels of a series must share one grid of tiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from rtfocus.errors import EngineError
from rtfocus.frame import TileGrid
from rtfocus.processing.engines.card_sections import InputCard


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
