"""Grids: the one grid of tiles that all channels of a series must share."""

from collections.abc import Mapping

from rtfocus.errors import EngineError
from rtfocus.frame import TileGrid


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
