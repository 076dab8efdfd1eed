"""TIFF file: its planes, and what its tags say of pixel sizes, channels, positions.

A file is parsed once and stays open while its images are in use; of many files
the ones used last. A plane is read in a time that does not grow with their number,
also from several threads.
"""

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from rtfocus.images.metadata import finite, length_um, positive, time_s
from rtfocus.images.ome_xml import OmeMetadata
from rtfocus.images.series import (
    ContrastWindow,
    Facts,
    ImageChannel,
    StagePosition,
    rising,
)

_MOST_PAGES = 256
"""Looked at to see which way z runs."""

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

    def __init__(self, path: Path, omexml: str | None) -> None:
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
        axes = [axis for axis in inner if axis not in place]
        plane = plane.transpose([axes.index(axis) for axis in "YXS" if axis in axes])
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


_PRINT_DPI = frozenset(
    int(dpi)
    for dpi in "72 75 90 96 100 120 144 150 180 200 220 240 250 300 350 360 400 600 "
    "720 1200 1440 2400 4800".split()
)
_COARSEST_UM = 100.0
"""Coarser than any microscope's pixel: a resolution for print or screen."""

_UNITS = {2: "inch", 3: "cm"}


def plain_facts(file: tifffile.TiffFile) -> Facts:
    """Return the pixel size of the resolution tags, in inch or cm.

    Values that programs write without knowing, as 72 dpi, and resolutions without
    a unit are none.
    """
    page = file.pages.first
    tag = page.tags.get("MicroManagerMetadata")
    if tag is not None and isinstance(tag.value, dict):
        return {**frame_facts(tag.value), **known_facts({"z_rises": _z_rises(file)})}
    unit = page.tags.get("ResolutionUnit")
    name = _UNITS.get(int(unit.value)) if unit is not None else None
    if name is None:
        return {}
    return {
        "pixel_size_y_um": _measured(_pixel_um(page, "YResolution", name)),
        "pixel_size_x_um": _measured(_pixel_um(page, "XResolution", name)),
    }


def imagej_facts(file: tifffile.TiffFile) -> Facts:
    """Return what ImageJ writes: pixel size and steps with units, colours, windows."""
    metadata = file.imagej_metadata or {}
    page = file.pages.first
    unit = _text(metadata.get("unit"))
    y_unit = _text(metadata.get("yunit")) or unit
    z_unit = _text(metadata.get("zunit")) or unit
    spacing = finite(metadata.get("spacing"))
    return {
        "pixel_size_y_um": _imagej_pixel_um(page, "YResolution", y_unit),
        "pixel_size_x_um": _imagej_pixel_um(page, "XResolution", unit),
        "z_step_um": length_um(abs(spacing), z_unit) if spacing else None,
        "z_rises": False if spacing and spacing < 0 else None,
        "time_step_s": time_s(
            metadata.get("finterval"), _text(metadata.get("tunit")) or "s"
        ),
        "channels": tuple(_imagej_channels(metadata)),
    }


def stack_facts(
    file: tifffile.TiffFile, ome: OmeMetadata | None
) -> list[tuple[str, Facts]]:
    """Return names and metadata of the positions of a Micro-Manager stack."""
    metadata = file.micromanager_metadata or {}
    summary = metadata.get("Summary", {})
    common: Facts = {**plain_facts(file), **summary_facts(summary)}
    labels = list(_labels(summary))
    if ome is None or not ome.images:
        return [(label, {**common, "position": label}) for label in labels] or [
            ("", common)
        ]
    return [
        (image.name, {**common, **known_facts(image.facts)}) for image in ome.images
    ]


def summary_facts(summary: dict[str, Any]) -> Facts:
    """Return what the summary of a Micro-Manager data set says of all images."""
    colors = _list(summary.get("ChColors"))
    channels = tuple(
        ImageChannel(
            name=str(name) or None,
            color=_mm_color(colors[number]) if number < len(colors) else None,
        )
        for number, name in enumerate(_list(summary.get("ChNames")))
    )
    step = finite(summary.get("z-step_um")) or 0.0
    facts: Facts = {
        "pixel_size_y_um": positive(summary.get("PixelSize_um")),
        "pixel_size_x_um": positive(summary.get("PixelSize_um")),
        "z_step_um": positive(abs(step)),
        "z_rises": False if step < 0 else None,
        "time_step_s": time_s(summary.get("Interval_ms"), "ms"),
        "channels": channels,
    }
    return known_facts(facts)


def _z_rises(file: tifffile.TiffFile) -> bool | None:
    """Return which way z runs in the first stack of Micro-Manager's pages."""
    found: dict[int, float | None] = {}
    first: list[object] | None = None
    for page in islice(file.pages, _MOST_PAGES):
        tag = page.aspage().tags.get("MicroManagerMetadata")
        frame = tag.value if tag is not None and isinstance(tag.value, dict) else {}
        stack = [frame.get(f"{axis}Index") for axis in ("Channel", "Frame", "Position")]
        first = first or stack
        if stack == first and isinstance(slice_ := frame.get("SliceIndex"), int):
            found[slice_] = finite(frame.get("ZPositionUm"))
    return rising([found[number] for number in sorted(found)])


def frame_facts(frame: dict[str, Any]) -> Facts:
    """Return what Micro-Manager's metadata of one frame say of its image."""
    x_um, y_um, z_um = (finite(frame.get(f"{axis}PositionUm")) for axis in "XYZ")
    stage = None
    if (x_um, y_um, z_um) != (None, None, None):
        stage = StagePosition(x_um=x_um, y_um=y_um, z_um=z_um)
    label = frame.get("PositionName")
    facts: Facts = {
        "pixel_size_y_um": positive(frame.get("PixelSizeUm")),
        "pixel_size_x_um": positive(frame.get("PixelSizeUm")),
        "position": str(label) if label else None,
        "stage": stage,
    }
    return known_facts(facts)


def _list(value: object) -> list[Any]:
    """Return a list that old versions wrote as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []


def _mm_color(value: object) -> str | None:
    """Return RRGGBB of Java's signed 32-bit AARRGGBB."""
    number = finite(value)
    return None if number is None else f"{int(number) & 0xFFFFFF:06X}"


def known_facts(facts: Facts) -> Facts:
    """Leave out what is unknown, so that it replaces nothing."""
    known: Facts = {}
    for key, value in facts.items():
        if value is not None and value != ():
            known[key] = value  # type: ignore[literal-required] # keys of Facts
    return known


def _labels(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the positions; a key of its own for each version."""
    for key in ("StagePositions", "InitialPositionList"):
        for entry in summary.get(key) or []:
            if isinstance(entry, str):
                entry = json.loads(entry)
            yield str(entry.get("Label") or entry.get("label") or "")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _pixel_um(page: tifffile.TiffPage, tag_name: str, unit: str | None) -> float | None:
    """Return the size of which the tag gives the inverse."""
    tag = page.tags.get(tag_name)
    if tag is None or not isinstance(tag.value, tuple) or len(tag.value) != 2:
        return None
    pixels, length = (positive(number) for number in tag.value)
    if pixels is None or length is None:
        return None
    return length_um(length / pixels, unit)


def _imagej_pixel_um(
    page: tifffile.TiffPage, tag_name: str, unit: str | None
) -> float | None:
    """Return the size in the user's unit; inches may be those of a printer."""
    pixel_um = _pixel_um(page, tag_name, unit)
    return _measured(pixel_um) if unit in _UNITS.values() else pixel_um


def _measured(pixel_um: float | None) -> float | None:
    """Drop resolutions that say how large to print."""
    if pixel_um is None or pixel_um > _COARSEST_UM:
        return None
    dpi = 25400 / pixel_um
    return None if any(abs(dpi - n) < n * 2e-3 for n in _PRINT_DPI) else pixel_um


def _imagej_channels(metadata: dict[str, Any]) -> Iterator[ImageChannel]:
    count = int(finite(metadata.get("channels")) or 1)
    luts = metadata.get("LUTs") or []
    ranges = metadata.get("Ranges") or ()
    if not ranges and "min" in metadata and "max" in metadata:
        ranges = (metadata["min"], metadata["max"])
    for number in range(min(count, 1000)):
        window = None
        if len(ranges) >= 2 * number + 2:
            start, end = (finite(v) for v in ranges[2 * number : 2 * number + 2])
            if start is not None and end is not None and start < end:
                window = ContrastWindow(start=start, end=end)
        color = None
        if number < len(luts):
            color = "".join(f"{int(level):02X}" for level in luts[number][:, -1])
        yield ImageChannel(color=color, window=window)
