"""GPU percentiles: `PercentileRange` of every plane of a frame, on the device."""

from math import ceil, sqrt

import numpy as np

from rtfocus.optics.normalisation import PercentileRange
from rtfocus.processing.gpu.cells import FrameShape
from rtfocus.processing.gpu.rank_search import RankSearch, ranks_around
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work


class GpuPercentiles:
    """Finds offset and scale of every plane that a network sees.

    Parameters
    ----------
    memory
        Where the work space lies.
    rule
        Percentiles.
    frame
        Shape of the signal.
    planes
        Channels of the network.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        rule: PercentileRange,
        frame: FrameShape,
        planes: int,
    ) -> None:
        self._frame = frame
        self._planes = planes
        size = frame.height * frame.width
        self._step = max(1, int(sqrt(size / rule.sample_px)))
        self._columns = ceil(frame.width / self._step)
        count = ceil(frame.height / self._step) * self._columns
        self._values = memory.allocate((count,), np.float32, "percentiles")
        around = [
            ranks_around(percent / 100, count)
            for percent in (rule.low_percent, rule.high_percent)
        ]
        self._search = RankSearch(memory, [r for found in around for r in found[:2]])
        self._parts = [found[2] for found in around]

    def enqueue(self, work: Work, signal: DeviceArray, ranges: DeviceArray) -> None:
        """Write offset and scale per plane to `ranges`, axes (plane, 2)."""
        for plane in range(self._planes):
            work.launch(
                "sample",
                self._values.count,
                signal,
                *self._frame.sides,
                self._planes,
                plane,
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
