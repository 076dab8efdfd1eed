"""GPU tiles: a frame as overlapping normalised tiles on the device, and back."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.gpu.cells import FrameShape
from rtfocus.processing.gpu.gpu_correction import kind_of
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work
from rtfocus.processing.windows import AxisWindows

Image = NDArray[np.float32]


class GpuTiles:
    """Tiles of frames of one size.

    Parameters
    ----------
    memory
        Where the tables lie.
    frame
        Shape of the signal.
    planes
        Channels of the network.
    starts
        First pixel of every tile along y and x; may lie outside the frame.
    tile
        Height and width of the tiles.
    weights
        How much every tile counts along y and x, axes (tile, pixel of the frame);
        each pixel's add up to 1.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        frame: FrameShape,
        planes: int,
        *,
        starts: tuple[Sequence[int], Sequence[int]],
        tile: tuple[int, int],
        weights: tuple[Image, Image],
    ) -> None:
        self.count = len(starts[0]) * len(starts[1])
        """Tiles of a frame, row by row."""
        self.tile_elements = planes * tile[0] * tile[1]
        """Elements of one tile."""
        self._frame = frame
        self._planes = planes
        self._columns = len(starts[1])
        self._tile = tile
        self._starts = [
            memory.upload(np.array(first, np.int32), "places of tiles")
            for first in starts
        ]
        self._weights = [
            memory.upload(table, "weights of tiles")
            for axis in weights
            for table in (*_reach(axis), np.asarray(axis, np.float32))
        ]

    def cut(
        self,
        work: Work,
        signal: DeviceArray,
        ranges: DeviceArray,
        tiles: DeviceArray,
        *,
        first: int,
        count: int,
    ) -> None:
        """Enqueue signal -> `count` tiles from `first` on, axes (N, C, H, W)."""
        work.launch(
            "gather_tiles",
            count * self.tile_elements,
            signal,
            *self._frame.sides,
            self._planes,
            *self._starts,
            self._columns,
            *self._tile,
            first,
            count * self.tile_elements,
            ranges,
            tiles,
            kind_of(tiles.dtype),
        )

    def join(
        self, work: Work, tiles: DeviceArray, ranges: DeviceArray, out: DeviceArray
    ) -> None:
        """Enqueue all tiles -> frame in the unit of the signal."""
        work.launch(
            "blend_tiles",
            out.count,
            tiles,
            kind_of(tiles.dtype),
            *self._frame.sides,
            self._planes,
            *self._starts,
            self._columns,
            *self._tile,
            *self._weights,
            ranges,
            out,
        )


def whole_frame_tile(
    memory: DeviceMemory, frame: FrameShape, planes: int, padded: tuple[int, int]
) -> GpuTiles:
    """Return the one tile that holds a frame, mirrored behind it to `padded`."""
    return GpuTiles(
        memory,
        frame,
        planes,
        starts=([0], [0]),
        tile=padded,
        weights=(
            np.ones((1, frame.height), np.float32),
            np.ones((1, frame.width), np.float32),
        ),
    )


def windowed_tiles(
    memory: DeviceMemory,
    frame: FrameShape,
    planes: int,
    windows: tuple[AxisWindows, AxisWindows],
) -> GpuTiles:
    """Return the tiles of `rtfocus.processing.frame_tiles.FrameTiles`."""
    down, across = windows
    return GpuTiles(
        memory,
        frame,
        planes,
        starts=(window_starts(down), window_starts(across)),
        tile=(down.size_px, across.size_px),
        weights=(
            frame_weights(down, frame.height),
            frame_weights(across, frame.width),
        ),
    )


def window_starts(axis: AxisWindows) -> list[int]:
    """Return where windows begin in the frame, before which they have a halo."""
    return [index * axis.own_px - axis.halo_px for index in range(axis.count)]


def frame_weights(axis: AxisWindows, length: int) -> Image:
    """Return the weights of windows, axes (window, pixel of the frame)."""
    result = np.zeros((axis.count, length), np.float32)
    for start, weights, row in zip(
        window_starts(axis), axis.weights(), result, strict=True
    ):
        first, last = max(start, 0), min(start + axis.size_px, length)
        row[first:last] = weights[first - start : last - start]
    return result


def _reach(weights: Image) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the first and last tile with a weight in every pixel."""
    touched = weights > 0
    last = len(weights) - 1 - touched[::-1].argmax(axis=0)
    return touched.argmax(axis=0).astype(np.int32), last.astype(np.int32)
