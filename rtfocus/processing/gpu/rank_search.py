"""Rank search: exact order statistics of an array on the device."""

from collections.abc import Sequence

import numpy as np

from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work

_BINS = 256
_ROUNDS = 4
"""Bytes of a float."""
_MOST_BLOCKS = 128


class RankSearch:
    """Finds several order statistics of equally long arrays.

    Parameters
    ----------
    memory
        Where the result and the work space lie.
    ranks
        0 is the smallest value.
    """

    def __init__(self, memory: DeviceMemory, ranks: Sequence[int]) -> None:
        self._count = len(ranks)
        self._wanted = memory.upload(np.array(ranks, np.int32), "ranks")
        self._prefix = memory.allocate((self._count,), np.uint32, "ranks")
        self._left = memory.allocate((self._count,), np.int32, "ranks")
        self._histogram = memory.allocate((self._count, _BINS), np.uint32, "ranks")
        self.found = memory.allocate((self._count,), np.float32, "ranks")
        """The values, in the order of `ranks`."""

    def enqueue(self, work: Work, values: DeviceArray) -> None:
        """Search in an array of float32 without NaN."""
        searches = self._count
        work.launch(
            "rank_begin",
            _BINS * searches,
            self._wanted,
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
