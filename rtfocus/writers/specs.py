"""Specs: shape, type and scale of each image in a run folder."""

from dataclasses import dataclass
from math import ceil

import numpy as np

from rtfocus.frame import TileGrid
from rtfocus.writers.header import RunHeader

RAW = "raw"
RESTORED = "restored"
DEFOCUS = "defocus"
CONFIDENCE = "confidence"


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
