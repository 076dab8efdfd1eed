"""Work: what the GPU's algorithms need of a device, and what several of them measure.

Nothing here knows the driver. The algorithms allocate when they are made and afterwards
only enqueue: nothing in them waits for the GPU. What they are given has one meaning
throughout: in `memory` lie their tables and work space, `frame` is the shape of the
signal, `planes` are the channels of a network, `shapes` those of all that it is given
at once, `montage` has the blending weights of the classifier's tiles, `transfers` the
PSF of each level.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.errors import EngineError
from rtfocus.optics.normalisation import CELL_PX
from rtfocus.processing.restore import EDGES

BLOCK = 256
"""Threads of a block that works together."""


@dataclass(frozen=True, slots=True)
class FrameShape:
    """Of the signal."""

    height: int
    width: int
    channels: int

    @staticmethod
    def of(shape: tuple[int, ...]) -> "FrameShape":
        """Read a shape (y, x) or (y, x, colour)."""
        return FrameShape(shape[0], shape[1], shape[2] if len(shape) == 3 else 1)

    def images(self, planes: int) -> tuple[int, ...]:
        """Return the colours that a network sees one by one; (-1,): the frame."""
        return tuple(range(self.channels)) if planes < self.channels else (-1,)

    @property
    def sides(self) -> tuple[int, int, int]:
        """Height, width, channels: arguments of kernels."""
        return self.height, self.width, self.channels


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A dense array in device memory, C order."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return self.count * self.dtype.itemsize

    def shaped(self, shape: tuple[int, ...]) -> "DeviceArray":
        """Return the first elements of the array in another shape."""
        return DeviceArray(self.address, shape, self.dtype)

    def from_element(self, index: int) -> "DeviceArray":
        """Return the flat rest of the array behind the first `index` elements."""
        return DeviceArray(
            self.address + index * self.dtype.itemsize,
            (self.count - index,),
            self.dtype,
        )


class DeviceMemory(Protocol):
    """Memory of one GPU; all of it is freed together."""

    def allocate(
        self, shape: tuple[int, ...], dtype: DTypeLike, purpose: str
    ) -> DeviceArray:
        """Reserve an array.

        Raises
        ------
        EngineError
            Out of memory: names the purpose, the size and the setting to lower.
        """
        ...

    def upload(self, values: NDArray[Any], purpose: str) -> DeviceArray:
        """Reserve an array and fill it; waits until it is filled."""
        ...

    def at_free(self, close: Callable[[], None]) -> None:
        """Have what uses the memory closed before it is freed, if it still is open."""
        ...


Argument = DeviceArray | int | float | None
"""Of a kernel; None is the null pointer."""


class Work(Protocol):
    """A CUDA stream: work that the GPU does in order."""

    @property
    def handle(self) -> int:
        """Of the CUDA stream, for libraries."""
        ...

    def launch(
        self, kernel: str, threads: int, *arguments: Argument, rows: int = 1
    ) -> None:
        """Enqueue a kernel with at least as many threads, in blocks of 256.

        Parameters
        ----------
        kernel
            Of ``kernels/``.
        threads
            Rounded up to whole blocks.
        arguments
            In the order and of the types that the kernel declares.
        rows
            Rows of blocks (``gridDim.y``).
        """
        ...

    def zero(self, array: DeviceArray) -> None:
        """Enqueue filling an array with zero bytes."""
        ...

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Enqueue a copy within the device; sizes are equal."""
        ...


class Transforms(Protocol):
    """Fourier transforms of real images, axes (y, x) or (image, y, x)."""

    def forward(self, work: Work, image: DeviceArray, spectrum: DeviceArray) -> None:
        """Enqueue image -> half spectrum."""
        ...

    def inverse(self, work: Work, spectrum: DeviceArray, image: DeviceArray) -> None:
        """Enqueue half spectrum -> image, times height * width; spoils `spectrum`."""
        ...

    def close(self) -> None:
        """Free them."""
        ...


SPAN = np.dtype([("first", "<i4"), ("last", "<i4")])
"""From the first to the last of a row, ``Span`` of the kernels; first > last: none."""
BETWEEN = np.dtype([("first", "<i4"), ("second", "<i4"), ("share", "<f4")])
"""Between two of a row, and the share of the second, ``Between`` of the kernels."""


def spans(belongs: NDArray[np.bool_]) -> NDArray[np.void]:
    """Return the `SPAN` of the rows that belong to each column; axes (row, column)."""
    result = np.empty(belongs.shape[1], SPAN)
    result["first"] = np.where(belongs.any(axis=0), belongs.argmax(axis=0), 1)
    result["last"] = len(belongs) - 1 - belongs[::-1].argmax(axis=0)
    result["last"][~belongs.any(axis=0)] = 0
    return result


def neighbours(weights: NDArray[np.float32], step: int = 1) -> NDArray[np.void]:
    """Return the two tiles of every pixel and the share of the second, `BETWEEN`.

    Parameters
    ----------
    weights
        Axes (tile that takes part, pixel); at most two neighbours per pixel.
    step
        Every how many tiles of the grid take part.
    """
    first = weights.astype(bool).argmax(axis=0)
    result = np.empty(len(first), BETWEEN)
    result["first"] = first * step
    result["second"] = np.minimum(first + 1, len(weights) - 1) * step
    result["share"] = 1 - np.take_along_axis(weights, first[None], axis=0)[0]
    return result


def spectrum_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the half spectrum of images of a shape."""
    return *shape[:-1], shape[-1] // 2 + 1


KINDS: dict[np.dtype[Any], int] = {
    np.dtype("|u1"): 0,
    np.dtype("<u2"): 1,
    np.dtype("<f4"): 2,
    np.dtype("<f2"): 3,
}


def kind_of(dtype: DTypeLike) -> int:
    """Return the kernels' number of an element type.

    Raises
    ------
    EngineError
        If the kernels do not know it.
    """
    found = KINDS.get(np.dtype(dtype))
    if found is None:
        known = ", ".join(kind.str for kind in KINDS)
        msg = f"tensors of {np.dtype(dtype)} are unknown to the kernels: {known}"
        raise EngineError(msg)
    return found


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
