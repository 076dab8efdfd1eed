"""Writing: processed images as TIFF, OME-TIFF or OME-Zarr, by the output's ending."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from yaozarrs import v05
from yaozarrs.write.v05 import Bf2RawBuilder, prepare_image

from rtfocus.errors import InputError
from rtfocus.images.series import ImageSeries

Planes = Iterator[NDArray[np.generic]]


@dataclass(frozen=True)
class OutputImage:
    """One image to write: the form of `like`, other pixels."""

    like: ImageSeries
    """Gives name, sizes, shape and pixel size."""
    dtype: np.dtype[np.generic]
    planes: Planes
    """In the order of ``like.indices()``; consumed once, one plane at a time."""


def write_images(output: Path, images: Sequence[OutputImage]) -> list[Path]:
    """Write images plane by plane and return the paths written.

    What fails halfway leaves nothing, and what was there before as it was.

    Parameters
    ----------
    output
        ``.tif`` or ``.tiff``: one file (OME-TIFF; several images = several
        series); ``.zarr``: OME-Zarr 0.5; no ending: a folder with one TIFF per
        image.
    images
        At least one.

    Raises
    ------
    InputError
        If the ending is unknown, the output exists as something else, or the
        disk refuses it.
    """
    suffix = output.suffix.lower()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if suffix in (".tif", ".tiff"):
            with _whole(output) as path:
                _write_tiff(path, images)
            return [output]
        if suffix == ".zarr":
            _refuse_no_zarr(output)
            with _whole(output) as path:
                _write_zarr(path, images)
            return [output]
        if suffix == "":
            return _write_folder(output, images)
    except OSError as error:
        msg = f"'{output}' cannot be written: {error}"
        raise InputError(msg) from error
    msg = f"'{output}': unknown ending '{suffix}'; use .tif, .ome.zarr or a folder"
    raise InputError(msg)


def _write_folder(folder: Path, images: Sequence[OutputImage]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths: list[Path] = []
    for image in images:
        path = folder / f"{image.like.name}.tif"
        if path in paths:
            # Same file name in two subfolders: keep both.
            path = folder / f"{image.like.path.parent.name}_{image.like.name}.tif"
        with _whole(path) as part:
            _write_tiff(part, [image])
        paths.append(path)
    return paths


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """Yield a path beside `output` that takes its place when the block ends well."""
    part = output.with_name(f".{output.name}.part")
    try:
        yield part
        if output.is_dir():
            shutil.rmtree(output)
        part.replace(output)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def _write_tiff(path: Path, images: Sequence[OutputImage]) -> None:
    with tifffile.TiffWriter(path, ome=True, bigtiff=_is_big(images)) as file:
        for image in images:
            like = image.like
            rgb = len(like.shape) == 3
            sizes = tuple(like.sizes[axis] for axis in "tcz")
            metadata: dict[str, object] = {
                "axes": "TCZYXS" if rgb else "TCZYX",
                "Name": like.name,
            }
            if like.pixel_size_um:
                metadata |= {
                    "PhysicalSizeX": like.pixel_size_um,
                    "PhysicalSizeY": like.pixel_size_um,
                }
            if like.z_step_um:
                metadata["PhysicalSizeZ"] = like.z_step_um
            file.write(
                image.planes,
                shape=(*sizes, *like.shape),
                dtype=image.dtype,
                photometric="rgb" if rgb else "minisblack",
                compression="zlib",
                metadata=metadata,
            )


def _is_big(images: Sequence[OutputImage]) -> bool:
    """Tell whether the pixels may pass the 4 GiB of a classic TIFF."""
    size = sum(
        len(i.like) * int(np.prod(i.like.shape)) * i.dtype.itemsize for i in images
    )
    return size > 3 * 2**30


def _refuse_no_zarr(path: Path) -> None:
    if path.exists() and not (path / "zarr.json").is_file():
        msg = f"'{path}' exists and is no Zarr group; choose another output"
        raise InputError(msg)


def _write_zarr(path: Path, images: Sequence[OutputImage]) -> None:
    if len(images) == 1:
        image = images[0]
        _, arrays = prepare_image(
            path,
            _ome(image.like),
            (_zarr_shape(image.like), image.dtype),
            chunks=(1, 1, 1, *image.like.shape[:2]),
            writer="zarr",
            overwrite=True,
            compression="blosc-lz4",
        )
        _fill(arrays["0"], image)
        return
    builder = Bf2RawBuilder(
        path, writer="zarr", overwrite=True, compression="blosc-lz4"
    )
    for number, image in enumerate(images):
        shape = _zarr_shape(image.like)
        builder.add_series(str(number), _ome(image.like), (shape, image.dtype))
    _, arrays = builder.prepare()
    for number, image in enumerate(images):
        _fill(arrays[f"{number}/0"], image)


def _zarr_shape(like: ImageSeries) -> tuple[int, ...]:
    """Axes (t, c, z, y, x); OME-Zarr has no rgb axis, colours become channels."""
    colours = like.shape[2] if len(like.shape) == 3 else 1
    sizes = like.sizes
    return (sizes["t"], sizes["c"] * colours, sizes["z"], *like.shape[:2])


def _fill(array: "zarr.Array[Any]", image: OutputImage) -> None:
    for index, plane in zip(image.like.indices(), image.planes, strict=True):
        t, c, z = index["t"], index["c"], index["z"]
        if plane.ndim == 3:
            colours = plane.shape[2]
            for colour in range(colours):
                array[t, c * colours + colour, z] = plane[..., colour]
        else:
            array[t, c, z] = plane


def _ome(like: ImageSeries) -> v05.Image:
    pixel_um = like.pixel_size_um or 1.0
    unit = "micrometer" if like.pixel_size_um else None
    scale = [1.0, 1.0, like.z_step_um or 1.0, pixel_um, pixel_um]
    return v05.Image(
        multiscales=[
            v05.Multiscale(
                name=like.name,
                axes=[
                    v05.TimeAxis(name="t"),
                    v05.ChannelAxis(name="c"),
                    v05.SpaceAxis(name="z", unit="micrometer"),
                    v05.SpaceAxis(name="y", unit=unit),
                    v05.SpaceAxis(name="x", unit=unit),
                ],
                datasets=[
                    v05.Dataset(
                        path="0",
                        coordinateTransformations=[
                            v05.ScaleTransformation(scale=scale)
                        ],
                    )
                ],
            )
        ]
    )
