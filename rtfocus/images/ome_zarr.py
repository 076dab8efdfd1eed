"""OME-Zarr: reads versions 0.4 and 0.5 through zarr-python.

Single images, bioformats2raw collections, plates, and rtfocus run folders'
images alike: every multiscales group below the path is one series.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import GroupNotFoundError

from rtfocus.errors import InputError
from rtfocus.images.series import ImageChannel, ImageSeries, native_dtype


def read_ome_zarr(path: Path) -> list[ImageSeries]:
    """Open every image of an OME-Zarr at its full resolution.

    Raises
    ------
    InputError
        If the path is no Zarr group or holds no multiscales image.
    """
    try:
        root = zarr.open_group(path, mode="r")
    except (GroupNotFoundError, OSError, ValueError, KeyError) as error:
        msg = f"'{path}' cannot be opened as a Zarr group: {error}"
        raise InputError(msg) from error
    images = list(_images(root, ""))
    if not images:
        msg = f"'{path}' holds no OME-Zarr image (no 'multiscales' metadata)"
        raise InputError(msg)
    stem = path.name.split(".")[0]
    return [
        _describe(path, f"{stem}_{name}" if name else stem, group)
        for name, group in images
    ]


def _images(group: zarr.Group, name: str) -> Iterator[tuple[str, zarr.Group]]:
    """Yield all multiscales groups, depth first, names joined by underscores."""
    if "multiscales" in _ome(group):
        yield name, group
        return
    for key, child in sorted(group.groups(), key=lambda item: _natural(item[0])):
        if key not in ("labels", "OME"):
            yield from _images(child, f"{name}_{key}" if name else key)


def _natural(key: str) -> tuple[int, str]:
    return (int(key), "") if key.isdigit() else (1 << 30, key)


def _ome(group: zarr.Group) -> dict[str, Any]:
    attributes: dict[str, Any] = dict(group.attrs)
    inner: dict[str, Any] = attributes.get("ome", attributes)
    return inner


def _describe(path: Path, name: str, group: zarr.Group) -> ImageSeries:
    ome = _ome(group)
    try:
        scales = ome["multiscales"][0]
        axes = [axis["name"] for axis in scales["axes"]]
        level = scales["datasets"][0]
        array = group[level["path"]]
        steps = dict(zip(axes, _scale_of(level), strict=False))
    except (KeyError, IndexError, TypeError) as error:
        msg = f"'{path}': image '{name}' has broken multiscales metadata: {error}"
        raise InputError(msg) from error
    if not isinstance(array, zarr.Array) or not set(axes) <= set("tczyx"):
        msg = f"'{path}': image '{name}' has axes {axes}; readable are t, c, z, y, x"
        raise InputError(msg)
    lengths = dict(zip(axes, array.shape, strict=True))
    channels = ome.get("omero", {}).get("channels", [])
    return ImageSeries(
        name=name,
        path=path,
        sizes={axis: lengths.get(axis, 1) for axis in "tcz"},
        shape=(lengths["y"], lengths["x"]),
        dtype=native_dtype(array.dtype),
        read_plane=_PlaneReader(array, axes),
        files=(path,),
        pixel_size_y_um=steps.get("y"),
        pixel_size_x_um=steps.get("x"),
        z_step_um=steps.get("z"),
        channels=tuple(ImageChannel(name=c.get("label")) for c in channels),
    )


def _scale_of(level: dict[str, Any]) -> list[float]:
    for transform in level.get("coordinateTransformations", []):
        if transform.get("type") == "scale":
            return list(transform["scale"])
    return []


class _PlaneReader:
    """Reads one plane of an array whose axes are a subset of t, c, z, y, x."""

    def __init__(self, array: "zarr.Array[Any]", axes: list[str]) -> None:
        self._array = array
        self._axes = axes

    def __call__(self, t: int, c: int, z: int) -> NDArray[np.generic]:
        place = {"t": t, "c": c, "z": z}
        window = tuple(place.get(axis, slice(None)) for axis in self._axes)
        plane = np.asarray(self._array[window])
        return plane if self._axes.index("y") < self._axes.index("x") else plane.T
