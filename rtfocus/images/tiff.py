"""TIFF: plain, ImageJ and OME files through tifffile."""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from rtfocus.errors import InputError
from rtfocus.images.series import ImageSeries, native_dtype

_UNIT_UM = {
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "m": 1e6,
    "cm": 1e4,
    "inch": 25400.0,
}


def read_tiff(path: Path) -> list[ImageSeries]:
    """Open every series of a TIFF; unnamed stack axes count as t, then z."""
    try:
        with tifffile.TiffFile(path) as file:
            scale = _scale(file)
            series = [
                _describe(path, number, one, scale, several=len(file.series) > 1)
                for number, one in enumerate(file.series)
            ]
    except (OSError, ValueError, tifffile.TiffFileError) as error:
        msg = f"'{path}' cannot be read as TIFF: {error}"
        raise InputError(msg) from error
    if not series:
        msg = f"'{path}' holds no image"
        raise InputError(msg)
    return series


def _describe(
    path: Path,
    number: int,
    series: tifffile.TiffPageSeries,
    scale: tuple[float | None, float | None],
    *,
    several: bool,
) -> ImageSeries:
    axes = _canonical_axes(series.axes, series.shape)
    lengths = dict(zip(axes, series.shape, strict=True))
    rgb = (min(lengths["S"], 3),) if lengths.get("S", 1) >= 3 else ()
    sizes = {axis: lengths.get(axis.upper(), 1) for axis in "tcz"}
    name = path.name.split(".")[0]
    return ImageSeries(
        name=f"{name}_{series.name or number}" if several else name,
        path=path,
        sizes=sizes,
        shape=(lengths["Y"], lengths["X"], *rgb),
        dtype=native_dtype(series.dtype),
        read_plane=_PlaneReader(path, number, axes, bool(rgb)),
        files=(path,),
        pixel_size_y_um=scale[0],
        pixel_size_x_um=scale[0],
        z_step_um=scale[1],
    )


def _canonical_axes(axes: str, shape: tuple[int, ...]) -> str:
    """Rename axes to T, C, Z, Y, X, S; ValueError where two claim one place.

    Unnamed stack axes (Q, I, R ...) take t, then z, then c, but a short
    innermost one (up to 4) beside another is a channel.
    """
    known = [a if a in "TCZYXS" else "?" for a in axes]
    unnamed = [i for i, axis in enumerate(known) if axis == "?"]
    free = [axis for axis in "TZC" if axis not in known]
    if len(unnamed) > 1 and shape[unnamed[-1]] <= 4 and "C" in free:
        known[unnamed.pop()] = "C"
        free.remove("C")
    for place in unnamed:
        if not free:
            msg = f"axes '{axes}' are more than t, c, z, y, x and rgb"
            raise ValueError(msg)
        known[place] = free.pop(0)
    if len(set(known)) != len(known) or not {"Y", "X"} <= set(known):
        msg = f"axes '{axes}' cannot be mapped to t, c, z, y, x and rgb"
        raise ValueError(msg)
    return "".join(known)


class _PlaneReader:
    """Reads one plane of one series; the file is open only while it reads."""

    def __init__(self, path: Path, number: int, axes: str, rgb: bool) -> None:
        self._path = path
        self._number = number
        self._axes = axes
        self._rgb = rgb

    def __call__(self, t: int, c: int, z: int) -> NDArray[np.generic]:
        place = {"T": t, "C": c, "Z": z}
        with tifffile.TiffFile(self._path) as file:
            series = file.series[self._number]
            plane = self._from_page(series, place)
        rest = [a for a in self._axes if a in "YXS"]
        order = [rest.index(a) for a in "YXS" if a in rest]
        plane = plane.transpose(order)
        if plane.ndim == 3:
            plane = plane[..., :3] if self._rgb else plane[..., 0]
        return plane

    def _from_page(
        self, series: tifffile.TiffPageSeries, place: dict[str, int]
    ) -> NDArray[np.generic]:
        """Read one page where a page is a plane, else the series and cut it."""
        outer = [a for a in self._axes if a in place]
        lengths = [series.shape[self._axes.index(a)] for a in outer]
        if self._axes.startswith("".join(outer)) and len(series.pages) == np.prod(
            lengths, dtype=int
        ):
            flat = np.ravel_multi_index([place[a] for a in outer], lengths)
            page = series.pages[int(flat) if outer else 0]
            if page is not None:
                return np.asarray(page.asarray())
        window = tuple(place.get(a, slice(None)) for a in self._axes)
        return np.asarray(series.asarray()[window])


def _scale(file: tifffile.TiffFile) -> tuple[float | None, float | None]:
    """Pixel size and z step in um, from OME-XML, ImageJ tags or the resolution."""
    if file.is_ome and file.ome_metadata:
        return _ome_scale(tifffile.xml2dict(file.ome_metadata))
    metadata = file.imagej_metadata or {}
    unit = _UNIT_UM.get(str(metadata.get("unit", "")).replace("\\u00B5", "µ"))
    resolution = file.pages.first.tags.get("XResolution") if file.pages else None
    pixel = None
    if unit and resolution is not None and resolution.value[0]:
        pixel = unit * resolution.value[1] / resolution.value[0]
    spacing = metadata.get("spacing")
    return pixel, float(spacing) * unit if spacing and unit else None


def _ome_scale(xml: dict[str, Any]) -> tuple[float | None, float | None]:
    image = xml.get("OME", {}).get("Image", {})
    pixels = (image[0] if isinstance(image, list) else image).get("Pixels", {})

    def size_um(axis: str) -> float | None:
        value = pixels.get(f"PhysicalSize{axis}")
        unit = _UNIT_UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        return float(value) * unit if value and unit else None

    return size_um("X"), size_um("Z")
