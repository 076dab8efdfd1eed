"""Specs: what each array of a run is like: shape, type, scale, codecs, shard files."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from rtfocus.config.sections import StoreConfig
from rtfocus.errors import WriterError
from rtfocus.frame import TileGrid
from rtfocus.writers.header import RunHeader

AXES = ("t", "c", "z", "y", "x")
"""Of every array."""
RAW = "raw"
RESTORED = "restored"
DEFOCUS = "defocus"
CONFIDENCE = "confidence"

_SEPARATOR = "."
# With the separator "/" every frame makes four folders per image, which costs more
# than its file: 0.5 ms against 0.15 ms on ext4. OME-Zarr 0.5 allows both.
_SHARD_PREFIX = f"c{_SEPARATOR}"
_SHARD_NAME = re.compile(r"c\.(\d{1,12})\.(\d{1,9})\.(\d{1,9})\.0\.0")


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One OME-Zarr image; every position of the series has one of these."""

    name: str
    """``raw``, ``restored``, ``defocus`` or ``confidence``."""
    dtype: str
    """NumPy name, e.g. ``uint16``."""
    planes: int
    """Planes along c per channel of the series: 3 for RGB, else 1."""
    plane_shape: tuple[int, int]
    """(y, x) of a plane."""
    spacing_um: float
    """Distance of pixels in the specimen plane."""
    origin_um: float
    """Coordinate (both axes) of pixel (0, 0) in the frame's coordinates, in which
    the centre of the frame's first pixel lies at 0."""
    window: tuple[float, float]
    """Values shown black and white."""

    @property
    def fill_value(self) -> float:
        """What a missing frame reads as: NaN where the map can hold it."""
        return float("nan") if self.name in (DEFOCUS, CONFIDENCE) else 0.0

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame before compression."""
        pixels = self.planes * self.plane_shape[0] * self.plane_shape[1]
        return pixels * np.dtype(self.dtype).itemsize

    def shard_shape(self, chunk_px: int) -> tuple[int, int]:
        """Return (y, x) of the shard: the plane, rounded up to whole chunks."""
        (chunk_y, chunk_x) = self.chunk_shape(chunk_px)
        height, width = self.plane_shape
        return ceil(height / chunk_y) * chunk_y, ceil(width / chunk_x) * chunk_x

    def chunk_shape(self, chunk_px: int) -> tuple[int, int]:
        """Return (y, x) of the inner chunks, no larger than the plane."""
        height, width = self.plane_shape
        return min(chunk_px, height), min(chunk_px, width)


def image_specs(header: RunHeader) -> list[ImageSpec]:
    """Return the images that the run writes, raw first."""
    series, store = header.series, header.store
    dtype = np.dtype(series.dtype).name
    specs = []
    if store.raw:
        specs.append(_pixel_spec(header, RAW, dtype))
    if header.restored:
        camera = store.restored_dtype == "camera"
        specs.append(_pixel_spec(header, RESTORED, dtype if camera else "float32"))
    if header.grid is not None:
        depth_um = _depth_um(header)
        specs.append(_tile_spec(header, header.grid, DEFOCUS, (-depth_um, depth_um)))
        specs.append(_tile_spec(header, header.grid, CONFIDENCE, (0.0, 1.0)))
    return specs


def _pixel_spec(header: RunHeader, name: str, dtype: str) -> ImageSpec:
    series = header.series
    camera = np.dtype(series.dtype)
    if camera.kind == "f":
        top = 1.0
    else:
        top = 2.0 ** (series.bit_depth or 8 * camera.itemsize) - 1
    return ImageSpec(
        name=name,
        dtype=dtype,
        planes=header.planes,
        plane_shape=(series.shape[0], series.shape[1]),
        spacing_um=series.pixel_size_um,
        origin_um=0.0,
        window=(0.0, top),
    )


def _tile_spec(
    header: RunHeader, grid: TileGrid, name: str, window: tuple[float, float]
) -> ImageSpec:
    return ImageSpec(
        name=name,
        dtype="float32",
        planes=1,
        plane_shape=(grid.rows, grid.columns),
        spacing_um=grid.stride_px * header.series.pixel_size_um,
        origin_um=grid.origin_px * header.series.pixel_size_um,
        window=window,
    )


def _depth_um(header: RunHeader) -> float:
    """Range of defocus to show: eleven units n lambda / NA^2, else 10 um."""
    units = [c.optics.defocus_unit_um for c in header.series.channels if c.optics]
    return 11 * max(units) if units else 10.0


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard on the disk."""

    path: Path
    times: range
    """Time points that it may hold."""
    c: int
    """Channel, not plane."""
    z: int


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
