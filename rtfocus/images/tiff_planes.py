"""TIFF planes: one plane of a series, in a time that does not grow with their number.

A file is parsed once and stays open while its images are in use; of many files
the ones used last. Reading is safe from several threads.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

MAX_OPEN_FILES = 64
"""Files kept open and parsed; macOS gives a process 256 handles."""


class OpenTiff:
    """One TIFF, or the file by which a set of them is read, parsed when needed.

    Parameters
    ----------
    path
        The file.
    omexml
        OME-XML of a companion file that takes the place of the file's own.
    """

    def __init__(self, path: Path, omexml: str | None = None) -> None:
        self.path = path
        self._omexml = omexml
        self._lock = threading.RLock()
        self._parsed: list[tifffile.TiffFile] = []
        # Besides it, of the other files of its set, the one used last.
        self._other: list[tifffile.FileHandle] = []
        weakref.finalize(self, _close_all, self._parsed, self._other)

    @contextmanager
    def opened(self) -> Iterator[tifffile.TiffFile]:
        """Yield the parsed file, for this thread alone."""
        with self._lock:
            if not self._parsed:
                self._parsed.append(tifffile.TiffFile(self.path, omexml=self._omexml))
            _RECENT.note(self)
            yield self._parsed[0]

    def open_other(self, handle: tifffile.FileHandle) -> None:
        """Open another file of the set, which tifffile closes after parsing."""
        if handle.closed:
            while self._other:
                self._other.pop().close()
            handle.open()
            self._other.append(handle)

    def close_if_idle(self) -> None:
        """Close the file unless a thread reads from it."""
        if self._lock.acquire(blocking=False):
            try:
                _close_all(self._parsed, self._other)
            finally:
                self._lock.release()


def _close_all(
    files: list[tifffile.TiffFile], handles: list[tifffile.FileHandle]
) -> None:
    while files:
        files.pop().close()
    while handles:
        handles.pop().close()


class _Recent:
    """The files used last; it keeps none of them alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[int, weakref.ref[OpenTiff]] = OrderedDict()

    def note(self, file: OpenTiff) -> None:
        """Put a file to the end, close those before the last `MAX_OPEN_FILES`."""
        with self._lock:
            self._files[id(file)] = weakref.ref(file)
            self._files.move_to_end(id(file))
            surplus = len(self._files) - MAX_OPEN_FILES
            oldest = [self._files.popitem(last=False)[1] for _ in range(surplus)]
        for reference in oldest:
            old = reference()
            if old is not None:
                old.close_if_idle()


_RECENT = _Recent()


@dataclass(frozen=True)
class Layout:
    """How the axes of a series lie in its planes."""

    axes: str
    """T, C, Z, Y, X, S; any other letter is an axis that `fixed` holds still."""
    lengths: tuple[int, ...]
    fixed: dict[str, int]
    samples: int
    """Samples of a pixel that are read."""
    rgb: bool
    """The samples are colours of one plane; otherwise each is a channel."""


class TiffPlanes:
    """Reads the planes of one image of a TIFF.

    Pixels are read in blocks: a page, or as much as lies behind one another in the
    file. The last block is kept, as it may hold several planes.
    """

    def __init__(self, file: OpenTiff, number: int, layout: Layout) -> None:
        self._file = file
        self._number = number
        self._layout = layout
        self._lock = threading.Lock()
        self._block: tuple[int, NDArray[np.generic]] | None = None
        self._outer: int | None = None
        self._offset: int | None = None

    def __call__(self, t: int, c: int, z: int) -> NDArray[np.generic]:
        """Return plane (t, c, z) with axes y, x and perhaps colours."""
        layout = self._layout
        place = {"T": t, "Z": z, **layout.fixed}
        if layout.rgb:
            place["C"] = c
        else:
            place["C"], place["S"] = divmod(c, layout.samples)
        with self._lock:
            outer, block = self._read(place)
        inner = layout.axes[outer:]
        plane = block[tuple(place.get(axis, slice(None)) for axis in inner)]
        kept = [axis for axis in inner if axis not in place]
        plane = plane.transpose([kept.index(axis) for axis in "YXS" if axis in kept])
        if plane.ndim == 3:
            plane = plane[..., : layout.samples]
        return plane.copy()

    def _read(self, place: dict[str, int]) -> tuple[int, NDArray[np.generic]]:
        """Return the number of axes outside of a block, and the block."""
        with self._file.opened() as file:
            series = file.series[self._number]
            if self._outer is None:
                self._outer, self._offset = self._divide(series)
            axes, lengths = self._layout.axes, self._layout.lengths
            index = [place.get(axis, 0) for axis in axes[: self._outer]]
            number = int(np.ravel_multi_index(index, lengths[: self._outer]))
            if self._block is None or self._block[0] != number:
                shape = lengths[self._outer :]
                self._block = number, self._load(file, series, number, shape)
            return self._outer, self._block[1]

    def _divide(self, series: tifffile.TiffPageSeries) -> tuple[int, int | None]:
        """Return how many axes are outside of a block, and where the pixels begin.

        The beginning is None where pages are decoded one by one.
        """
        axes, lengths = self._layout.axes, self._layout.lengths
        inside = "YXS" if self._layout.rgb else "YX"
        first = min(axes.index(axis) for axis in inside)
        offset = None if series.is_multifile else series.dataoffset
        if offset is not None:
            return first, offset
        if series.transform is None:
            for outer in range(first + 1):
                if int(np.prod(lengths[:outer], dtype=np.int64)) == len(series):
                    return outer, None
        return 0, None

    def _load(
        self,
        file: tifffile.TiffFile,
        series: tifffile.TiffPageSeries,
        number: int,
        shape: tuple[int, ...],
    ) -> NDArray[np.generic]:
        size = int(np.prod(shape, dtype=np.int64))
        if self._offset is not None:
            dtype = np.dtype(series.dtype).newbyteorder(file.byteorder)
            file.filehandle.seek(self._offset + number * size * dtype.itemsize)
            data = file.filehandle.read(size * dtype.itemsize)
            if len(data) < size * dtype.itemsize:
                msg = "the file ends before it"
                raise OSError(msg)
            return np.frombuffer(data, dtype).reshape(shape)
        if self._outer == 0 and (len(series) != 1 or series.transform is not None):
            return np.asarray(series.asarray()).reshape(shape)
        page = series[number]
        if page is None:  # a gap: never written
            return np.zeros(shape, series.dtype)
        self._file.open_other(page.parent.filehandle)
        return np.asarray(page.asarray()).reshape(shape)
