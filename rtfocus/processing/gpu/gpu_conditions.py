"""GPU conditions: what a restorer is told of its tiles, found on the device."""

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.processing.conditions import Conditions
from rtfocus.processing.frame_tiles import FrameTiles
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work

# As in kernels/labels.cu; entries that are not named are fixed.
_KINDS = {"level": 1, "defocus_levels": 2, "defocus_known": 3}


class GpuConditions:
    """Fills the condition tensor of a restorer, as `Conditions` does.

    Parameters
    ----------
    memory
        Where the tables lie.
    conditions
        Of the engine in the optics of the channel.
    tiles
        Of the restorer.
    grid
        Of the labels.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        conditions: Conditions,
        tiles: FrameTiles,
        grid: TileGrid,
    ) -> None:
        terms = conditions.terms
        self._terms = terms
        self._grid = grid
        down, across = tiles.windows
        self._tiles = down.count * across.count
        self._tile_columns = across.count
        self._spans = [
            memory.upload(table, "conditions")
            for axis in tiles.near(grid)
            for table in _spans(axis)
        ]
        kinds = [_KINDS.get(entry, 0) for entry in terms.entries]
        fixed = [terms.fixed.get(entry, 0.0) for entry in terms.entries]
        self._kinds = memory.upload(np.array(kinds, np.int32), "conditions")
        self._fixed = memory.upload(np.array(fixed, np.float32), "conditions")

    def enqueue(
        self, work: Work, maps: dict[str, DeviceArray], condition: DeviceArray
    ) -> None:
        """Enqueue maps of the labels -> `condition`, axes (tile, entry)."""
        terms = self._terms
        work.launch(
            "tile_conditions",
            self._tiles,
            maps["level"],
            maps["confidence"],
            maps["defocus_um"],
            self._grid.columns,
            BACKGROUND,
            *self._spans,
            self._tiles,
            self._tile_columns,
            self._kinds,
            self._fixed,
            len(terms.entries),
            terms.levels_per_um,
            float(terms.farthest),
            int(terms.signed_levels),
            int(terms.hides_defocus),
            condition,
        )


def _spans(
    near: list[NDArray[np.bool_]],
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the first and the last label near each tile; first > last: none."""
    found = [np.flatnonzero(labels) for labels in near]
    first = [int(labels[0]) if labels.size else 1 for labels in found]
    last = [int(labels[-1]) if labels.size else 0 for labels in found]
    return np.array(first, np.int32), np.array(last, np.int32)
