"""Arrays: the pixels of a run through tensorstore, Zarr v3, a shard per frame or per N.

A resolved write future means that the shard file has its final name, so it is
the commit signal that the journal waits for.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from rtfocus.config.sections import StoreConfig
from rtfocus.errors import WriterError
from rtfocus.frame import FrameResult
from rtfocus.writers.header import (
    CONFIDENCE,
    DEFOCUS,
    DEVIATION,
    EXPECTED_ERROR,
    RAW,
    RESTORED,
    SEPARATOR,
    ImageSpec,
    RunHeader,
    array_metadata,
    image_specs,
    is_document,
)
from rtfocus.writers.layout import (
    Windows,
    finish_group,
    image_groups,
    store_path,
    write_companions,
    write_groups,
)
from rtfocus.writers.places import Index

_FIRST_GROWTH = 64
_LARGEST_GROWTH = 4096
_SHARD_PREFIX = f"c{SEPARATOR}"
_SHARD_NAME = re.compile(r"c\.(\d{1,12})\.(\d{1,9})\.(\d{1,9})\.0\.0")
_MOST_THREADS = 8
"""More than this many copies at once do not make a disk faster."""


@cache
def context_of(*, fsync: bool) -> ts.Context:
    """Return the process's context with bounded concurrency and no cache.

    It is never closed: tensorstore 0.1.86 may touch the threads of a context for a
    moment after they went with the last array that has it, and spoils memory then.
    """
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    return ts.Context(
        {
            "data_copy_concurrency": {"limit": threads},
            "file_io_concurrency": {"limit": threads},
            # Frames are written once: a cache would only hold memory.
            "cache_pool": {"total_bytes_limit": 0},
            "file_io_sync": fsync,
        }
    )


class Commit(Protocol):
    """A write under way."""

    def result(self) -> object:
        """Wait until it is committed; raises what went wrong."""
        ...


class FailedStart:
    """What failed at its start and fails where all others do: when awaited."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> NoReturn:
        """Raise what went wrong."""
        raise self._error


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard on the disk."""

    array: Path
    """Folder that it lies in."""
    name: str
    times: range
    """Time points that it may hold."""
    c: int
    """Channel, not plane."""
    z: int

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.array / self.name

    def places(self, position: int) -> list[dict[str, int]]:
        """Return the places that it may hold frames of."""
        return [{"t": t, "p": position, "c": self.c, "z": self.z} for t in self.times]


def list_shards(array: Path, shard_frames: int) -> Iterator[ShardFile]:
    """Yield the shards in the folder of an array, `shard_frames` along t each.

    Raises
    ------
    WriterError
        If the folder cannot be read.
    """
    try:
        names = os.listdir(array)
    except OSError as error:
        msg = f"'{array}' cannot be read: {error.strerror}"
        raise WriterError(msg) from error
    for name in names:
        if (match := _SHARD_NAME.fullmatch(name)) is not None:
            number, c, z = map(int, match.groups())
            times = range(number * shard_frames, (number + 1) * shard_frames)
            yield ShardFile(array, name, times, c, z)


def shard_name(*numbers: int) -> str:
    """Return the file name of a shard by its numbers along t, c, z, y, x.

    >>> shard_name(12, 0, 3, 0, 0)
    'c.12.0.3.0.0'
    """
    return _SHARD_PREFIX + SEPARATOR.join(map(str, numbers))


class FrameArray:
    """One array with axes t, c, z, y, x on disk; t grows as needed.

    Parameters
    ----------
    path
        Folder of the array.
    spec
        What it holds.
    sizes
        Planned t, c (channels, not planes) and z; t None: unbounded.
    store
        Chunks, shards and codec.
    create
        False: the array exists, from an earlier process or a finished run. True: it
        is made where there is none; shards that lie there already stay.
    """

    def __init__(
        self,
        path: Path,
        spec: ImageSpec,
        sizes: tuple[int | None, int, int],
        store: StoreConfig,
        *,
        create: bool,
    ) -> None:
        self._path = path
        self._planes = spec.planes
        self._shard_frames = store.shard_frames
        shape = [sizes[0] or _FIRST_GROWTH, sizes[1] * spec.planes, sizes[2]]
        description: dict[str, Any] = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path)},
            # A dark frame is stored as any other: a shard that is absent was
            # never written.
            "store_data_equal_to_fill_value": True,
        }
        document = path / "zarr.json"
        create = create and not is_document(document)
        if create:
            # One that was torn or zeroed says nothing that the header does not.
            document.unlink(missing_ok=True)
            metadata = array_metadata(spec, [*shape, *spec.plane_shape], store)
            description["metadata"] = metadata
        context = context_of(fsync=store.fsync)
        self._opening: ts.Future[ts.TensorStore] | FailedStart
        try:
            self._opening = ts.open(
                description, context=context, open=not create, create=create
            )
        except ValueError as error:
            self._opening = FailedStart(error)

    @cached_property
    def _array(self) -> ts.TensorStore:
        try:
            return self._opening.result()
        except (ValueError, OSError, RuntimeError) as error:
            why = str(error).partition(" [tensor")[0]
            msg = f"cannot open array '{self._path}': {why}"
            raise WriterError(msg) from error

    @property
    def frames(self) -> int:
        """Present length along t."""
        return int(self._array.shape[0])

    def write(self, t: int, c: int, z: int, frames: list[NDArray[Any]]) -> Commit:
        """Start to write frames at t, t+1 ...; returns the commit future.

        The frames have axes (y, x) or (y, x, rgb); their memory must not change
        before the future is resolved.
        """
        try:
            self._reserve(t + len(frames))
            return self._start(t, c, z, frames)
        except Exception as error:  # raised by the future, like all other failures
            return FailedStart(error)

    def read(self, t: int, c: int, z: int) -> NDArray[Any]:
        """Read one frame back, axes (y, x) or (y, x, rgb)."""
        planes = slice(c * self._planes, (c + 1) * self._planes)
        try:
            place = self._array[t, planes, z]
            there = place.storage_statistics(query_fully_stored=True).result()
            # Of a file that is gone zeros are read.
            if not bool(there.fully_stored):
                msg = "its file is gone"
                raise OSError(msg)
            values: NDArray[Any] = place.read().result()
        except (ValueError, OSError, RuntimeError, IndexError) as error:
            msg = f"frame t={t} c={c} z={z} of '{self._path}' cannot be read: {error}"
            raise WriterError(msg) from error
        return values[0] if self._planes == 1 else np.moveaxis(values, 0, -1)

    def holds(self, t: int, c: int, z: int) -> bool:
        """Tell whether a frame is there, whole, and right by its checksums."""
        with suppress(WriterError):
            return self.read(t, c, z).size > 0
        return False

    def shards(self) -> Iterator[ShardFile]:
        """Yield the shards on the disk, whatever the length along t is."""
        return list_shards(self._path, self._shard_frames)

    def trim(self, frames: int) -> list[Path]:
        """Set the length along t; returns the shards that lie wholly beyond it.

        Their files stay where they are.

        Raises
        ------
        WriterError
            If it cannot be set.
        """
        try:
            if frames != self.frames:
                self._array = self._resized(frames)
            # Not left to tensorstore: it would delete them, and look for every file
            # that a long plan might have had.
            return [s.path for s in self.shards() if s.times.start >= frames]
        except (ValueError, OSError, RuntimeError) as error:
            msg = f"cannot trim '{self._path}' to {frames} time points: {error}"
            raise WriterError(msg) from error

    def reserve(self, frames: int) -> None:
        """Make the array at least this long along t; WriterError if it cannot be."""
        try:
            self._reserve(frames)
        except (ValueError, OSError, RuntimeError) as error:
            msg = f"cannot grow '{self._path}' to {frames} time points: {error}"
            raise WriterError(msg) from error

    def _start(self, t: int, c: int, z: int, frames: list[NDArray[Any]]) -> Commit:
        planes = slice(c * self._planes, (c + 1) * self._planes)
        if len(frames) > 1:
            target = self._array[t : t + len(frames), planes, z]
            source = np.stack([self._as_planes(frame) for frame in frames])
        else:
            target = self._array[t, planes, z]
            source = self._as_planes(frames[0])
        started = target.write(source, can_reference_source_data_indefinitely=True)
        commit: Commit = started.commit
        return commit

    def _reserve(self, frames: int) -> None:
        """Grow in doubling steps: each rewrites zarr.json, atomically."""
        if frames > self.frames:
            step = min(max(self.frames, _FIRST_GROWTH), _LARGEST_GROWTH)
            self._array = self._resized(max(frames, self.frames + step))

    def _resized(self, frames: int) -> ts.TensorStore:
        limits = [frames, *[None] * 4]
        return self._array.resize(
            exclusive_max=limits, resize_metadata_only=True
        ).result()

    def _as_planes(self, frame: NDArray[Any]) -> NDArray[Any]:
        """View a frame with axes (plane, y, x)."""
        return frame[np.newaxis] if frame.ndim == 2 else np.moveaxis(frame, -1, 0)


class RunImages:
    """Raw, restored, and maps of the tiles, of every position.

    Parameters
    ----------
    folder
        The run folder.
    header
        Decides what there is.
    create
        True: write the metadata that is not there, whole, before any frame.
    """

    def __init__(self, folder: Path, header: RunHeader, *, create: bool) -> None:
        self.specs = image_specs(header)
        self.names = [spec.name for spec in self.specs]
        self.stores = {store_path(folder, name) for name in self.names}
        self._needs_pixels = bool({RAW, RESTORED} & set(self.names))
        self._folder, self._header = folder, header
        self._groups = {s.name: image_groups(folder, header, s) for s in self.specs}
        if create:
            write_groups(folder, header, self.specs)
        sizes = header.size("t"), header.size("c") or 1, header.size("z") or 1
        self._arrays = {
            spec.name: [
                FrameArray(group / "0", spec, sizes, header.store, create=create)
                for group in self._groups[spec.name]
            ]
            for spec in self.specs
        }
        # Of 100,000 positions: opened beside each other they take a third less time.
        self.reserve(0)  # waits for all
        if create:
            self.describe_collections()

    @property
    def frame_bytes(self) -> int:
        """Bytes per frame in all images, before compression."""
        return sum(spec.frame_bytes for spec in self.specs)

    @property
    def frames(self) -> int:
        """Longest present length along t."""
        lengths = [a.frames for arrays in self._arrays.values() for a in arrays]
        return max(lengths, default=0)

    def pixels(
        self, raw: NDArray[Any], result: FrameResult | None
    ) -> dict[str, NDArray[Any]]:
        """Return what is to be stored of one frame, by image.

        Empty where the run keeps restored frames only and this one is not restored.

        Raises
        ------
        WriterError
            If a shape or dtype is not that of its image.
        """
        found: dict[str, NDArray[Any] | None] = {RAW: raw}
        if result is not None:
            found |= {RESTORED: result.restored, EXPECTED_ERROR: result.expected_error}
        if result is not None and (tiles := result.defocus) is not None:
            found |= {DEFOCUS: tiles.defocus_um, DEVIATION: tiles.stated_um}
            found[CONFIDENCE] = tiles.confidence
        pixels = {
            spec.name: _checked(spec, array)
            for spec in self.specs
            if (array := found.get(spec.name)) is not None
        }
        if self._needs_pixels and not {RAW, RESTORED} & pixels.keys():
            return {}
        return pixels

    def write(self, name: str, index: Index, frames: list[NDArray[Any]]) -> Commit:
        """Start to write `frames` from `index` on along t; returns the future."""
        array = self._arrays[name][index["p"]]
        return array.write(index["t"], index["c"], index["z"], frames)

    def read(self, name: str, index: Index) -> NDArray[Any]:
        """Read one frame of image `name` back; WriterError if it cannot be."""
        return self._arrays[name][index["p"]].read(index["t"], index["c"], index["z"])

    def holds(self, name: str, index: Index) -> bool:
        """Tell whether image `name` has a whole and right frame at `index`."""
        return self._arrays[name][index["p"]].holds(index["t"], index["c"], index["z"])

    def shards(self) -> Iterator[tuple[str, int, ShardFile]]:
        """Yield every shard on the disk with its image and position."""
        for name, arrays in self._arrays.items():
            for position, array in enumerate(arrays):
                for shard in array.shards():
                    yield name, position, shard

    def reserve(self, frames: int) -> None:
        """Make all arrays at least this long along t."""
        for array in chain.from_iterable(self._arrays.values()):
            array.reserve(frames)

    def trim(self, frames: int) -> list[Path]:
        """Set all lengths along t; returns the shards left beyond it."""
        every = chain.from_iterable(self._arrays.values())
        return [path for array in every for path in array.trim(frames)]

    def describe(
        self, position: int, rtfocus: dict[str, Any], windows: dict[str, Windows]
    ) -> None:
        """Say how a position's images ended, and their contrast by image name."""
        for spec in self.specs:
            finish_group(
                self._groups[spec.name][position],
                spec,
                rtfocus,
                windows.get(spec.name, []),
                fsync=self._header.store.fsync,
            )

    def describe_collections(self) -> None:
        """Write the OME-XML of several positions, with the present length along t."""
        frames = max(self.frames, 1)
        write_companions(self._folder, self._header, self.specs, frames)

    @property
    def channels(self) -> int:
        """Number of channels of the series."""
        return self._header.size("c") or 1

    @property
    def positions(self) -> int:
        """Number of positions."""
        return max((len(groups) for groups in self._groups.values()), default=0)


def _checked(spec: ImageSpec, array: NDArray[Any]) -> NDArray[Any]:
    """Return `array` if it is what the image holds."""
    shape = spec.plane_shape if spec.planes == 1 else (*spec.plane_shape, spec.planes)
    if array.shape != shape or array.dtype.str[1:] != np.dtype(spec.dtype).str[1:]:
        msg = (
            f"{spec.name} frame is {array.dtype.name} {array.shape}, its image holds "
            f"{spec.dtype} {shape}; a new shape or dtype needs a new series"
        )
        raise WriterError(msg)
    return array
