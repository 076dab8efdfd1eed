"""Preparation: counts to signal, signal to what a network sees, and back.

As `rtfocus.optics.normalisation` and `rtfocus.processing.classify`, on the device, from
the same statistics of cells of 12 px.
"""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.optics.normalisation import (
    CELL_PX,
    ContrastToNoise,
    LocalStandardisation,
    PercentileRange,
)
from rtfocus.processing.camera import CameraCorrection
from rtfocus.processing.classify import Conditions, tiles_in_cells
from rtfocus.processing.gpu.work import (
    BLOCK,
    CellStatistics,
    DeviceArray,
    DeviceMemory,
    FrameShape,
    RankSearch,
    Work,
    kind_of,
    neighbours,
    ranks_around,
    spans,
)
from rtfocus.processing.montage import AxisWindows, FrameTiles


class Standardisation:
    """`LocalStandardisation` on the device, of `cells` measured on the same stream."""

    def __init__(
        self, memory: DeviceMemory, rule: LocalStandardisation, cells: CellStatistics
    ) -> None:
        self._rule = rule
        self._cells = cells
        low, high, _ = ranks_around(0.5, cells.count)
        self._median = RankSearch(memory, (low, high))
        self._middle = memory.allocate((1,), np.float32, "normalisation")
        self._power = memory.allocate((cells.count,), np.float64, "normalisation")
        self._mean_power = memory.allocate((1,), np.float64, "normalisation")
        self._inverse = memory.allocate((cells.count,), np.float32, "normalisation")

    def enqueue(self, work: Work, signal: DeviceArray, out: DeviceArray) -> None:
        """Write the network's view of a frame to `out`, (1, 1, y, x)."""
        cells = self._cells
        self._median.enqueue(work, cells.mean)
        work.launch(
            "cell_power",
            cells.count,
            cells.sum,
            cells.squares,
            cells.count,
            self._median.found,
            self._middle,
            self._power,
        )
        work.launch("mean_of", BLOCK, self._power, cells.count, self._mean_power)
        work.launch(
            "cell_inverse_deviation",
            cells.count,
            self._power,
            cells.rows,
            cells.columns,
            self._rule.window_px // CELL_PX,
            self._rule.floor,
            self._mean_power,
            self._inverse,
        )
        work.launch(
            "standardise",
            out.count,
            signal,
            *cells.frame.sides,
            cells.rows,
            cells.columns,
            self._middle,
            self._inverse,
            out,
            kind_of(out.dtype),
        )


class Background:
    """`ContrastToNoise` on the device, of `cells` measured on the same stream.

    `quantum` is the step between the camera's values; 0 for float frames.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        rule: ContrastToNoise,
        cells: CellStatistics,
        grid: TileGrid,
        quantum: float,
    ) -> None:
        self._rule = rule
        self._cells = cells
        self._grid = grid
        self._quantum = quantum
        low, high, self._part = ranks_around(0.1, cells.count)
        self._quietest = RankSearch(memory, (low, high))
        self._darkest = RankSearch(memory, (0,))
        self._brightest = RankSearch(memory, (cells.count - 1,))
        self._noise = memory.allocate((1,), np.float32, "the background rule")

    def enqueue(self, work: Work, empty: DeviceArray) -> None:
        """Write 1 to `empty` (uint8) for tiles in which nothing stands out."""
        cells, grid = self._cells, self._grid
        self._quietest.enqueue(work, cells.steps)
        if self._quantum <= 0:
            self._darkest.enqueue(work, cells.lowest)
            self._brightest.enqueue(work, cells.peak)
        work.launch(
            "background_noise",
            1,
            self._quietest.found,
            self._part,
            self._darkest.found,
            self._brightest.found,
            self._quantum,
            self._noise,
        )
        work.launch(
            "background",
            empty.count,
            cells.mean,
            cells.peak,
            cells.rows,
            cells.columns,
            grid.rows,
            grid.columns,
            *tiles_in_cells(grid),
            self._rule.contrast,
            self._rule.peak,
            self._noise,
            empty,
        )


class Percentiles:
    """Finds offset and scale of every plane that a network sees."""

    def __init__(
        self,
        memory: DeviceMemory,
        rule: PercentileRange,
        frame: FrameShape,
        planes: int,
    ) -> None:
        self._frame = frame
        self._planes = planes
        self._step = rule.step(frame.height * frame.width)
        self._columns = ceil(frame.width / self._step)
        count = ceil(frame.height / self._step) * self._columns
        self._values = memory.allocate((count,), np.float32, "percentiles")
        around = [
            ranks_around(percent / 100, count)
            for percent in (rule.low_percent, rule.high_percent)
        ]
        self._search = RankSearch(memory, [r for ranks in around for r in ranks[:2]])
        self._parts = [ranks[2] for ranks in around]

    def enqueue(
        self, work: Work, signal: DeviceArray, ranges: DeviceArray, colour: int = -1
    ) -> None:
        """Write offset and scale per plane to `ranges`, axes (plane, 2).

        `colour` is the one that a network of one channel sees; -1: it sees the frame.
        """
        for plane in range(self._planes):
            alone = colour >= 0
            work.launch(
                "sample",
                self._values.count,
                signal,
                *self._frame.sides,
                self._frame.channels if alone else self._planes,
                colour if alone else plane,
                self._step,
                self._columns,
                self._values.count,
                self._values,
            )
            self._search.enqueue(work, self._values)
            work.launch(
                "percentile_range",
                1,
                self._search.found,
                *self._parts,
                ranges.from_element(2 * plane),
            )


class FrameCorrection:
    """Corrects frames of one shape, as its like on the CPU."""

    def __init__(
        self, memory: DeviceMemory, correction: CameraCorrection, shape: tuple[int, ...]
    ) -> None:
        self._offset = correction.offset_counts
        self._saturation = correction.saturation_counts
        self._channels = shape[2] if len(shape) == 3 else 1
        self._divisor: DeviceArray | None = None
        self._divisor_channels = 0
        if correction.divisor is not None:
            field = np.ascontiguousarray(correction.divisor, np.float32)
            self._divisor = memory.upload(field, "the flat field")
            self._divisor_channels = field.size // (shape[0] * shape[1])

    def to_signal(
        self,
        work: Work,
        frame: DeviceArray,
        signal: DeviceArray,
        flags: DeviceArray,
    ) -> None:
        """Enqueue the correction of a frame without NaN.

        Parameters
        ----------
        frame
            Counts of the camera.
        signal
            Result, float32.
        flags
            Two int32, see `MapLayout`: both are cleared, the first is set.
        """
        work.zero(flags)
        work.launch(
            "to_signal",
            frame.count,
            frame,
            kind_of(frame.dtype),
            frame.count,
            self._channels,
            self._offset,
            self._saturation,
            self._divisor,
            self._divisor_channels,
            signal,
            flags,
        )

    def to_counts(
        self, work: Work, signal: DeviceArray, out: DeviceArray, flags: DeviceArray
    ) -> None:
        """Enqueue the way back to the camera's scale, rounded and clipped.

        The second of `flags` is set where a value is no number.
        """
        work.launch(
            "to_counts",
            out.count,
            signal,
            out.count,
            self._offset,
            out,
            kind_of(out.dtype),
            flags,
        )


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
            memory.upload(neighbours(_frame_weights(axis, length)), "weights of tiles")
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


def _frame_weights(axis: AxisWindows, length: int) -> NDArray[np.float32]:
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
