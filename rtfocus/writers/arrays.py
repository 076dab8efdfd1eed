"""Arrays: Zarr v3 pixels through tensorstore, one shard per frame or per N frames.

A resolved write future means that the shard file has its final name, so it is
the commit signal that the journal waits for.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from rtfocus.config.processor import StoreConfig
from rtfocus.errors import WriterError
from rtfocus.writers.header import is_document
from rtfocus.writers.layout import AXES
from rtfocus.writers.specs import ImageSpec

_SEPARATOR = "."
# With the separator "/" every frame makes four folders per image, which costs more
# than its file: 0.5 ms against 0.15 ms on ext4. OME-Zarr 0.5 allows both.
_SHARD_PREFIX = f"c{_SEPARATOR}"
_SHARD_NAME = re.compile(r"c\.(\d{1,12})\.(\d{1,9})\.(\d{1,9})\.0\.0")

_FIRST_GROWTH = 64
_LARGEST_GROWTH = 4096


def open_context(store: StoreConfig, threads: int) -> ts.Context:
    """Return a tensorstore context with bounded concurrency and no cache."""
    return ts.Context(
        {
            "data_copy_concurrency": {"limit": threads},
            "file_io_concurrency": {"limit": threads},
            # Frames are written once: a cache would only hold memory.
            "cache_pool": {"total_bytes_limit": 0},
            "file_io_sync": store.fsync,
        }
    )


class Commit(Protocol):
    """A write under way."""

    def result(self) -> object:
        """Wait until it is committed; raises what went wrong."""
        ...


class FailedWrite:
    """A write that failed at its start and fails where all others do: when awaited."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> None:
        """Raise what went wrong."""
        raise self._error


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard on the disk."""

    path: Path
    times: range
    """Time points that it may hold."""
    c: int
    """Channel, not plane."""
    z: int


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
    context
        As from `open_context`.
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
        context: ts.Context,
        *,
        create: bool,
    ) -> None:
        self._path = path
        self._planes = spec.planes
        self._shard_frames = store.shard_frames
        frames, channels, slices = sizes
        shape = [frames or _FIRST_GROWTH, channels * spec.planes, slices]
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
        try:
            self._array = ts.open(
                description,
                context=context,
                open=not create,
                create=create,
            ).result()
        except (ValueError, OSError, RuntimeError) as error:
            msg = f"cannot open array '{path}': {error}"
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
            return FailedWrite(error)

    def read(self, t: int, c: int, z: int) -> NDArray[Any]:
        """Read one frame back, axes (y, x) or (y, x, rgb)."""
        planes = slice(c * self._planes, (c + 1) * self._planes)
        try:
            found: NDArray[Any] = self._array[t, planes, z].read().result()
        except (ValueError, OSError, RuntimeError, IndexError) as error:
            msg = f"frame t={t} c={c} z={z} of '{self._path}' cannot be read: {error}"
            raise WriterError(msg) from error
        return found[0] if self._planes == 1 else np.moveaxis(found, 0, -1)

    def holds(self, t: int, c: int, z: int) -> bool:
        """Tell whether a frame is there, whole, and right by its checksums."""
        planes = slice(c * self._planes, (c + 1) * self._planes)
        try:
            place = self._array[t, planes, z]
            found = place.storage_statistics(query_fully_stored=True).result()
            place.read().result()
        except (ValueError, OSError, RuntimeError, IndexError):
            return False
        return bool(found.fully_stored)

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
        if (found := _SHARD_NAME.fullmatch(name)) is not None:
            number, c, z = map(int, found.groups())
            times = range(number * shard_frames, (number + 1) * shard_frames)
            yield ShardFile(array / name, times, c, z)


def shard_name(*numbers: int) -> str:
    """Return the file name of a shard by its numbers along t, c, z, y, x.

    >>> shard_name(12, 0, 3, 0, 0)
    'c.12.0.3.0.0'
    """
    return _SHARD_PREFIX + _SEPARATOR.join(map(str, numbers))


def array_metadata(
    spec: ImageSpec, shape: list[int], store: StoreConfig
) -> dict[str, Any]:
    """Return the Zarr v3 metadata of an image's array."""
    # JSON has no NaN; Zarr v3 writes it as a string.
    fill: Any = "NaN" if np.isnan(spec.fill_value) else spec.fill_value
    if np.dtype(spec.dtype).kind != "f":
        fill = int(fill)
    frames = store.shard_frames
    outer = [frames, spec.planes, 1, *spec.shard_shape(store.chunk_px)]
    inner = [1, 1, 1, *spec.chunk_shape(store.chunk_px)]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [little, *_compression(store, np.dtype(spec.dtype).itemsize)]
    index_codecs = [little, {"name": "crc32c"}]
    return {
        "shape": shape,
        "data_type": spec.dtype,
        "fill_value": fill,
        "dimension_names": list(AXES),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
        "chunk_key_encoding": {
            "name": "default",
            "configuration": {"separator": _SEPARATOR},
        },
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": inner,
                    "codecs": codecs,
                    "index_codecs": index_codecs,
                },
            }
        ],
    }


def _compression(store: StoreConfig, itemsize: int) -> list[dict[str, Any]]:
    """Return the codecs that follow ``bytes``: compression, then a checksum.

    The checksum lets `rtfocus check` find a flipped bit; it costs far less than
    the fastest compression.
    """
    checksum = {"name": "crc32c"}
    if store.codec == "none":
        return [checksum]
    if store.codec == "zstd":
        options: dict[str, Any] = {"level": store.codec_level, "checksum": False}
        return [{"name": "zstd", "configuration": options}, checksum]
    options = {
        "cname": store.codec.removeprefix("blosc-"),
        "clevel": min(store.codec_level, 9),
        "shuffle": "shuffle" if itemsize > 1 else "noshuffle",
        "typesize": itemsize,
        "blocksize": 0,
    }
    return [{"name": "blosc", "configuration": options}, checksum]
