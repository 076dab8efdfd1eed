"""Light: sum, maximum and noise of an image on the device."""

import numpy as np

from rtfocus.processing.gpu.cells import BLOCK
from rtfocus.processing.gpu.rank_search import RankSearch
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work

PARTS = 128
"""Blocks whose partial sums one more block adds up, always in the same order."""


class GpuLight:
    """Sum of the positive values and the highest value of an image.

    Parameters
    ----------
    memory
        Where both lie.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._sums = memory.allocate((PARTS,), np.float64, "sums")
        self._maxima = memory.allocate((PARTS,), np.float32, "sums")
        self.sum = memory.allocate((1,), np.float64, "sums")
        self.highest = memory.allocate((1,), np.float32, "sums")

    def enqueue(self, work: Work, image: DeviceArray) -> None:
        """Measure an image."""
        work.launch(
            "light_parts",
            PARTS * BLOCK,
            image,
            image.count,
            self._sums,
            self._maxima,
        )
        work.launch(
            "light", BLOCK, self._sums, self._maxima, PARTS, self.sum, self.highest
        )


class GpuNoise:
    """The smaller part of the finest details of an image, whose mean is its noise.

    As `rtfocus.processing.noise.noise_variance`.

    Parameters
    ----------
    memory
        Where the work space lies.
    shape
        Height and width of the images.
    """

    def __init__(self, memory: DeviceMemory, shape: tuple[int, int]) -> None:
        self._shape = shape
        details = (shape[0] // 2) * (shape[1] // 2)
        self.kept = max(1, int(0.99 * details)) if details else 0
        """Details that count; the rest are edges."""
        self._power = memory.allocate((max(details, 1),), np.float32, "noise")
        self._search = RankSearch(memory, (max(self.kept - 1, 0),))
        self.sums = memory.allocate((PARTS,), np.float64, "noise")
        """Parts of the sum of all details below `limit`."""
        self.counts = memory.allocate((PARTS,), np.float64, "noise")
        """Parts of their number."""

    @property
    def limit(self) -> DeviceArray:
        """The greatest detail that counts."""
        return self._search.found

    def enqueue(self, work: Work, image: DeviceArray) -> None:
        """Measure an image."""
        work.launch(
            "diagonal_power", self._power.count, image, *self._shape, self._power
        )
        self._search.enqueue(work, self._power)
        work.launch(
            "below_parts",
            PARTS * BLOCK,
            self._power,
            self._power.count,
            self.limit,
            self.sums,
            self.counts,
        )
