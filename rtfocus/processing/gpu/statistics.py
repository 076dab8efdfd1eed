"""Statistics of arrays on the device: ranks, cells of a frame, light and noise."""

from collections.abc import Sequence
from math import ceil

import numpy as np

from rtfocus.optics.normalisation import CELL_PX
from rtfocus.processing.gpu.work import (
    BLOCK,
    DeviceArray,
    DeviceMemory,
    FrameShape,
    Work,
)
from rtfocus.processing.restore import EDGES

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
