"""Tiles: a frame as overlapping normalised tiles, and what is told of them.

And what reads a frame's noise, ranks and sums: statistics of arrays on the device.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.processing.classify import Conditions
from rtfocus.processing.gpu.work import (
    BLOCK,
    DeviceArray,
    DeviceMemory,
    FrameShape,
    Work,
    kind_of,
    neighbours,
    spans,
)
from rtfocus.processing.montage import AxisWindows, FrameTiles
from rtfocus.processing.restore import EDGES

Image = NDArray[np.float32]


class Tiles:
    """Tiles of frames of one size, in windows along y and x.

    What of them lies outside the frame is mirrored.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        frame: FrameShape,
        planes: int,
        windows: tuple[AxisWindows, AxisWindows],
    ) -> None:
        down, across = windows
        self.count = down.count * across.count
        """Tiles of a frame, row by row."""
        self._frame = frame
        self._planes = planes
        self._places = across.count, down.size_px, across.size_px, down.halo_px
        self._elements = self.count * planes * down.size_px * across.size_px
        self._weights = [
            memory.upload(neighbours(frame_weights(axis, length)), "weights of tiles")
            for axis, length in zip(windows, frame.sides[:2], strict=True)
        ]

    def cut(
        self,
        work: Work,
        signal: DeviceArray,
        ranges: DeviceArray,
        tiles: DeviceArray,
        colour: int = -1,
    ) -> None:
        """Enqueue signal -> all tiles, axes (N, C, H, W).

        `colour` is the one that a network of one channel sees; -1: it sees the frame.
        """
        work.launch(
            "gather_tiles",
            self._elements,
            signal,
            *self._frame.sides,
            self._planes,
            colour,
            *self._places,
            self._elements,
            ranges,
            tiles,
            kind_of(tiles.dtype),
        )

    def join(
        self,
        work: Work,
        tiles: DeviceArray,
        ranges: DeviceArray,
        out: DeviceArray,
        colour: int = -1,
    ) -> None:
        """Enqueue all tiles -> frame, or one of its colours, in the signal's unit."""
        work.launch(
            "blend_tiles",
            out.count,
            tiles,
            kind_of(tiles.dtype),
            *self._frame.sides,
            self._planes,
            colour,
            *self._places,
            *self._weights,
            ranges,
            out,
        )


def whole_frame_tile(padded: tuple[int, int]) -> tuple[AxisWindows, AxisWindows]:
    """Return the one tile that holds a frame, mirrored behind it to `padded`."""
    height, width = padded
    return AxisWindows(1, height, 0), AxisWindows(1, width, 0)


def frame_weights(axis: AxisWindows, length: int) -> Image:
    """Return the weights of windows, axes (window, pixel of the frame)."""
    result = np.zeros((axis.count, length), np.float32)
    for index, (weights, row) in enumerate(zip(axis.weights(), result, strict=True)):
        start = index * axis.own_px - axis.halo_px
        first, last = max(start, 0), min(start + axis.size_px, length)
        row[first:last] = weights[first - start : last - start]
    return result


# As in kernels/labels.cu; entries that are not named are fixed.
_KINDS = {"level": 1, "defocus_levels": 2, "defocus_known": 3}


class TileConditions:
    """Fills the condition tensor of a restorer, as `Conditions` does."""

    def __init__(
        self,
        memory: DeviceMemory,
        conditions: Conditions,
        tiles: FrameTiles,
        grid: TileGrid,
    ) -> None:
        self._conditions = conditions
        self._grid = grid
        down, across = tiles.windows
        self._tiles = down.count * across.count
        self._tile_columns = across.count
        self._spans = [
            memory.upload(spans(np.stack(near, axis=1)), "conditions")
            for near in tiles.near(grid)
        ]
        kinds = [_KINDS.get(entry, 0) for entry in conditions.entries]
        fixed = [conditions.fixed.get(entry, 0.0) for entry in conditions.entries]
        self._kinds = memory.upload(np.array(kinds, np.int32), "conditions")
        self._fixed = memory.upload(np.array(fixed, np.float32), "conditions")

    def enqueue(
        self, work: Work, maps: dict[str, DeviceArray], condition: DeviceArray
    ) -> None:
        """Enqueue maps of the labels -> `condition`, axes (tile, entry)."""
        terms = self._conditions
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


_BINS = 256
_ROUNDS = 4
"""Bytes of a float."""
_MOST_BLOCKS = 128


class RankSearch:
    """Finds several order statistics of equally long arrays; rank 0 is the smallest."""

    def __init__(self, memory: DeviceMemory, ranks: Sequence[int]) -> None:
        self._count = len(ranks)
        self._wanted = memory.upload(np.array(ranks, np.int32), "ranks")
        self._prefix = memory.allocate((self._count,), np.uint32, "ranks")
        self._left = memory.allocate((self._count,), np.int32, "ranks")
        self._histogram = memory.allocate((self._count, _BINS), np.uint32, "ranks")
        self.found = memory.allocate((self._count,), np.float32, "ranks")
        """The values, in the order of `ranks`."""

    def enqueue(self, work: Work, values: DeviceArray, beyond: int = 0) -> None:
        """Search in an array of float32 without NaN; `beyond` is added to all ranks."""
        searches = self._count
        work.launch(
            "rank_begin",
            _BINS * searches,
            self._wanted,
            beyond,
            searches,
            self._prefix,
            self._left,
            self._histogram,
        )
        threads = min(values.count, _MOST_BLOCKS * _BINS)
        for turn in range(_ROUNDS):
            work.launch(
                "rank_count",
                threads,
                values,
                values.count,
                turn,
                self._prefix,
                self._histogram,
                rows=searches,
            )
            work.launch(
                "rank_narrow",
                _BINS * searches,
                turn,
                self._prefix,
                self._left,
                self._histogram,
                self.found,
            )


def ranks_around(quantile: float, count: int) -> tuple[int, int, float]:
    """Return the ranks a quantile lies between, and the part of the way.

    Examples
    --------
    >>> ranks_around(0.5, 4)
    (1, 2, 0.5)
    """
    place = quantile * (count - 1)
    below = min(int(place), count - 1)
    return below, min(below + 1, count - 1), place - below


PARTS = 128
"""Blocks whose partial sums one more block adds up, always in the same order."""


class Light:
    """Sum of the positive values and the highest value of an image."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._sums = memory.allocate((PARTS,), np.float64, "sums")
        self._maxima = memory.allocate((PARTS,), np.float32, "sums")
        self.sum = memory.allocate((1,), np.float64, "sums")
        self.highest = memory.allocate((1,), np.float32, "sums")

    def enqueue(self, work: Work, image: DeviceArray) -> None:
        """Measure an image."""
        work.launch(
            "light_parts", PARTS * BLOCK, image, image.count, self._sums, self._maxima
        )
        work.launch(
            "light", BLOCK, self._sums, self._maxima, PARTS, self.sum, self.highest
        )


class Noise:
    """The smaller part of the finest details of an image, whose mean is its noise.

    As `rtfocus.processing.restore.noise_variance`, of images up to a largest shape.
    """

    def __init__(self, memory: DeviceMemory, largest: tuple[int, int]) -> None:
        self._power = memory.allocate((max(_details(largest), 1),), np.float32, "noise")
        self._search = RankSearch(memory, (0,))
        self.sums = memory.allocate((PARTS,), np.float64, "noise")
        """Parts of the sum of all details below `limit`."""
        self.counts = memory.allocate((PARTS,), np.float64, "noise")
        """Parts of their number."""

    @property
    def limit(self) -> DeviceArray:
        """The greatest detail that counts."""
        return self._search.found

    def kept(self, shape: tuple[int, ...]) -> int:
        """Return how many details of an image count, the rest are edges."""
        details = _details(shape)
        return max(1, int((1 - EDGES) * details)) if details else 0

    def enqueue(self, work: Work, image: DeviceArray) -> None:
        """Measure an image."""
        height, width = image.shape
        details = _details(image.shape)
        if not details:
            return
        power = self._power.shaped((details,))
        work.launch("diagonal_power", details, image, height, width, power)
        self._search.enqueue(work, power, self.kept(image.shape) - 1)
        work.launch(
            "below_parts",
            PARTS * BLOCK,
            power,
            details,
            self.limit,
            self.sums,
            self.counts,
        )


def _details(shape: tuple[int, ...]) -> int:
    return (shape[0] // 2) * (shape[1] // 2)
