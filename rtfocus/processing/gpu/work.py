"""Work: what the GPU's algorithms need of a device, and nothing of its driver.

The algorithms allocate when they are made and afterwards only enqueue: nothing in
them waits for the GPU. What they are given has one meaning throughout: in `memory` lie
their tables and work space, `frame` is the shape of the signal, `planes` are the
channels of a network, `shapes` those of all that it is given at once, `montage` has the
blending weights of the classifier's tiles, `transfers` the PSF of each level.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rtfocus.errors import EngineError

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
    found = np.empty(belongs.shape[1], SPAN)
    found["first"] = np.where(belongs.any(axis=0), belongs.argmax(axis=0), 1)
    found["last"] = len(belongs) - 1 - belongs[::-1].argmax(axis=0)
    found["last"][~belongs.any(axis=0)] = 0
    return found


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
    found = np.empty(len(first), BETWEEN)
    found["first"] = first * step
    found["second"] = np.minimum(first + 1, len(weights) - 1) * step
    found["share"] = 1 - np.take_along_axis(weights, first[None], axis=0)[0]
    return found


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
