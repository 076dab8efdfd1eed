"""Frame maps: what is found in a frame, in one piece of memory that is copied once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import DefocusMap, TileGrid
from rtfocus.processing.gpu.work import DeviceArray

_FLOATS = ("defocus_um", "confidence", "uncertainty_um")


@dataclass(frozen=True, slots=True)
class MapLayout:
    """Where the maps of a grid lie within their memory: wide elements first."""

    tiles: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all maps of a frame."""
        return 4 * (3 * self.tiles + 1) + 2 * self.tiles

    def device_arrays(self, memory: DeviceArray) -> dict[str, DeviceArray]:
        """Return the maps by name, ``saturated`` and ``level`` included."""
        return {
            name: DeviceArray(memory.address + start, (count,), np.dtype(dtype))
            for name, (start, count, dtype) in self._places().items()
        }

    def host_arrays(self, memory: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return views of a host copy by name."""
        return {
            name: memory[start : start + count * np.dtype(dtype).itemsize].view(dtype)
            for name, (start, count, dtype) in self._places().items()
        }

    def _places(self) -> dict[str, tuple[int, int, str]]:
        """First byte, elements and type of every map."""
        places: dict[str, tuple[int, int, str]] = {}
        start = 0
        for name in _FLOATS:
            places[name] = (start, self.tiles, "<f4")
            start += 4 * self.tiles
        places["saturated"] = (start, 1, "<i4")
        places["level"] = (start + 4, self.tiles, "<i2")
        return places


def defocus_map(grid: TileGrid, found: dict[str, NDArray[Any]]) -> DefocusMap:
    """Make new arrays, axes (tile_y, tile_x), of a frame's maps on the host."""
    shaped = {
        name: found[name].reshape(grid.rows, grid.columns).copy()
        for name in (*_FLOATS, "level")
    }
    return DefocusMap(grid=grid, **shaped)
