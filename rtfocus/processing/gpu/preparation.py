"""Preparation: counts to signal, signal to what a network sees, on the device.

As `rtfocus.optics.normalisation` and `rtfocus.processing.classify`, from the same
statistics of cells of 12 px. What no kernel is to meet is taken out on the host before.
"""

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.frame import TileGrid
from rtfocus.optics.normalisation import (
    CELL_PX,
    ContrastToNoise,
    LocalStandardisation,
    PercentileRange,
)
from rtfocus.processing.camera import CameraCorrection, fill, write_counts
from rtfocus.processing.classify import tiles_in_cells
from rtfocus.processing.gpu.cuda.stream import PinnedMemory
from rtfocus.processing.gpu.tiles import RankSearch, ranks_around
from rtfocus.processing.gpu.work import (
    BLOCK,
    DeviceArray,
    DeviceMemory,
    FrameShape,
    Work,
    kind_of,
)


class CellStatistics:
    """Statistics of the cells of a frame padded by mirroring.

    Parameters
    ----------
    padded
        Height and width of the padded frame, itself mirrored up to whole cells.
    """

    def __init__(
        self, memory: DeviceMemory, frame: FrameShape, padded: tuple[int, int]
    ) -> None:
        self.frame, self._padded = frame, padded
        self.rows, self.columns = (ceil(side / CELL_PX) for side in padded)
        self.count = self.rows * self.columns
        single = [memory.allocate((self.count,), np.float32, "cells") for _ in range(4)]
        double = [memory.allocate((self.count,), np.float64, "cells") for _ in range(2)]
        self.mean, self.lowest, self.peak, self.steps = single
        self.sum, self.squares = double
        self._measured = *single, *double

    def enqueue(self, work: Work, signal: DeviceArray) -> None:
        """Measure the cells of a frame."""
        work.launch(
            "cell_statistics",
            self.count,
            signal,
            *self.frame.sides,
            *self._padded,
            self.rows,
            self.columns,
            *self._measured,
        )


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
        self._search = RankSearch(memory, [r for found in around for r in found[:2]])
        self._parts = [found[2] for found in around]

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


class Correction:
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


def carried_as(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the type in which frames cross to the device and back.

    What cameras give crosses as it is; every other integer or float type as the
    float32 that any device computes with, turned on the host.
    """
    kind = np.dtype(dtype)
    return kind if kind.str in ("|u1", "<u2") else np.dtype(np.float32)


class HostBuffers:
    """Pinned host memory that belongs to one of the caller's slots."""

    def __init__(
        self,
        pinned: PinnedMemory,
        shape: tuple[int, ...],
        restored_dtype: np.dtype[Any],
        maps_bytes: int,
    ) -> None:
        self._pinned = pinned
        self.packed_maps: NDArray[np.uint8] = pinned.empty((maps_bytes,), np.uint8)
        """Copy of the maps, see `rtfocus.processing.gpu.classifier.MapLayout`."""
        self.counts: NDArray[Any] = pinned.empty(shape, carried_as(restored_dtype))
        """Copy of the restored frame, as the device gives it."""
        same = self.counts.dtype == restored_dtype
        self._restored = self.counts if same else np.empty(shape, restored_dtype)
        self._staged: NDArray[Any] | None = None
        self.invalid: NDArray[np.bool_] | None = None
        """Pixels that are NaN or infinite; None: none."""
        self._pedestal = 0.0
        """What a frame with negative values was lifted by."""
        self._lifted_flags: tuple[str, ...] | None = None
        """What is wrong with a lifted frame; None: it is not lifted."""

    def take(self, pixels: NDArray[Any], camera: CameraCorrection) -> NDArray[Any]:
        """Return pinned pixels without NaN and from 0 on: the same, or a copy."""
        self.invalid = found = camera.find_invalid(pixels)
        self._pedestal = camera.pedestal(pixels)
        self._lifted_flags = None
        dtype = carried_as(pixels.dtype)
        plain = found is None and not self._pedestal and pixels.dtype == dtype
        if plain and self._pinned.is_pinned(pixels):
            return pixels
        if (staged := self._staged) is None:
            staged = self._staged = self._pinned.empty(pixels.shape, dtype)
        np.copyto(staged, pixels, casting="unsafe")
        if found is not None:
            fill(staged, found)
        if self._pedestal:
            staged += np.float32(self._pedestal)
            self._lifted_flags = camera.mark(pixels).flags
        return staged

    def flags(self, *, saturated: bool) -> tuple[str, ...]:
        """Return what is wrong with the frame; `saturated`: by what the device got."""
        if self._lifted_flags is not None:
            # The device got other values than the camera's.
            return self._lifted_flags
        flags = {"nan": self.invalid is not None, "saturated": saturated}
        return tuple(name for name, is_so in flags.items() if is_so)

    def give(self) -> NDArray[Any]:
        """Return the restored frame that has arrived, in the type of the series."""
        if self.counts.dtype == np.float32:
            if self._pedestal:
                self.counts -= np.float32(self._pedestal)
            write_counts(self.counts, self._restored, self.invalid)
        return self._restored
