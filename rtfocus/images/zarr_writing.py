"""OME-Zarr writing: images, collections and plates of version 0.5."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import zarr
from yaozarrs import v05
from yaozarrs.write.v05 import Bf2RawBuilder, PlateBuilder, prepare_image

from rtfocus.images.provenance import zarr_attributes
from rtfocus.images.series import ImageChannel, ImageSeries, PlatePlace

if TYPE_CHECKING:
    from rtfocus.images.writing import OutputImage

_COMPRESSION: Literal["blosc-lz4"] = "blosc-lz4"
_COLOURS = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))


def write_zarr(path: Path, images: "Sequence[OutputImage]") -> None:
    """Write images as one OME-Zarr 0.5 at a path that is free.

    One image lies at the root; the images of one plate keep their wells; others are a
    bioformats2raw collection.
    """
    places = [image.like.place for image in images]
    if len(images) == 1 and places[0] is None:
        _write_image(path, images[0])
    elif _is_plate(places):
        _write_plate(path, images)
    else:
        _write_collection(path, images)


def _write_image(path: Path, image: "OutputImage") -> None:
    _, arrays = prepare_image(
        path,
        _ome(image),
        (_shape(image.like), image.dtype),
        chunks=(1, 1, 1, *image.like.shape[:2]),
        writer="zarr",
        compression=_COMPRESSION,
        extra_attributes=zarr_attributes(image.made, ["", "0"]),
    )
    _fill(arrays["0"], image)


def _write_collection(path: Path, images: "Sequence[OutputImage]") -> None:
    names = [str(number) for number in range(len(images))]
    nodes = ["", "OME", *names, *(f"{name}/0" for name in names)]
    builder = Bf2RawBuilder(
        path,
        writer="zarr",
        compression=_COMPRESSION,
        extra_attributes=zarr_attributes(_shared(images), nodes),
    )
    for name, image in zip(names, images, strict=True):
        builder.add_series(name, _ome(image), (_shape(image.like), image.dtype))
    _, arrays = builder.prepare()
    for name, image in zip(names, images, strict=True):
        _fill(arrays[f"{name}/0"], image)


def _write_plate(path: Path, images: "Sequence[OutputImage]") -> None:
    wells: dict[tuple[int, int], dict[str, OutputImage]] = {}
    for image in images:
        place = image.like.place
        assert place is not None
        wells.setdefault((place.row, place.column), {})[str(place.field)] = image
    first = images[0].like.place
    assert first is not None
    plate = _plate(first, list(wells))
    nodes = _plate_nodes(first, wells)
    builder = PlateBuilder(
        path,
        plate=plate,
        writer="zarr",
        compression=_COMPRESSION,
        extra_attributes=zarr_attributes(_shared(images), nodes),
    )
    for (row, column), fields in wells.items():
        builder.add_well(
            row=first.rows[row],
            col=first.columns[column],
            images={
                name: (_ome(image), (_shape(image.like), image.dtype))
                for name, image in fields.items()
            },
        )
    _, arrays = builder.prepare()
    for (row, column), fields in wells.items():
        well = f"{first.rows[row]}/{first.columns[column]}"
        for name, image in fields.items():
            _fill(arrays[f"{well}/{name}/0"], image)


def _is_plate(places: Sequence[PlatePlace | None]) -> bool:
    """Tell whether all images are different fields of one plate."""
    known = [place for place in places if place is not None]
    fields = {(place.row, place.column, place.field) for place in known}
    layouts = {(place.plate, place.rows, place.columns) for place in known}
    return len(known) == len(places) == len(fields) and len(layouts) == 1


def _plate(layout: PlatePlace, wells: Sequence[tuple[int, int]]) -> v05.Plate:
    return v05.Plate(
        plate=v05.PlateDef(
            name=layout.plate,
            rows=[v05.Row(name=name) for name in layout.rows],
            columns=[v05.Column(name=name) for name in layout.columns],
            wells=[
                v05.PlateWell(
                    path=f"{layout.rows[row]}/{layout.columns[column]}",
                    rowIndex=row,
                    columnIndex=column,
                )
                for row, column in wells
            ],
        )
    )


def _plate_nodes(
    layout: PlatePlace, wells: "dict[tuple[int, int], dict[str, OutputImage]]"
) -> list[str]:
    nodes = [""]
    for (row, column), fields in wells.items():
        well = f"{layout.rows[row]}/{layout.columns[column]}"
        nodes += [layout.rows[row], well]
        for name in fields:
            nodes += [f"{well}/{name}", f"{well}/{name}/0"]
    return sorted(set(nodes))


def _shared(images: "Sequence[OutputImage]") -> dict[str, str]:
    """Return how images were made: once where equal, else by image."""
    first = dict(images[0].made)
    if all(dict(image.made) == first for image in images):
        return first
    return {
        f"{image.like.name} {key}": text
        for image in images
        for key, text in image.made.items()
    }


def _shape(like: ImageSeries) -> tuple[int, ...]:
    """Axes (t, c, z, y, x); OME-Zarr has no rgb axis, colours become channels."""
    colours = like.shape[2] if len(like.shape) == 3 else 1
    sizes = like.sizes
    return (sizes["t"], sizes["c"] * colours, sizes["z"], *like.shape[:2])


def _fill(array: "zarr.Array[Any]", image: "OutputImage") -> None:
    for index, plane in zip(image.like.indices(), image.planes, strict=True):
        t, c, z = index["t"], index["c"], index["z"]
        if plane.ndim == 3:
            colours = plane.shape[2]
            for colour in range(colours):
                array[t, c * colours + colour, z] = plane[..., colour]
        else:
            array[t, c, z] = plane


def _ome(image: "OutputImage") -> v05.Image:
    like = image.like
    steps = (
        like.time_step_s,
        None,
        like.z_step_um,
        like.pixel_size_y_um,
        like.pixel_size_x_um,
    )

    def unit(step: float | None, name: str) -> str | None:
        # A scale without a unit is a number of pixels: what is unknown stays so.
        return None if step is None else name

    scale = v05.ScaleTransformation(scale=[step or 1.0 for step in steps])
    return v05.Image(
        multiscales=[
            v05.Multiscale(
                name=like.name,
                axes=[
                    v05.TimeAxis(name="t", unit=unit(steps[0], "second")),
                    v05.ChannelAxis(name="c"),
                    v05.SpaceAxis(name="z", unit=unit(steps[2], "micrometer")),
                    v05.SpaceAxis(name="y", unit=unit(steps[3], "micrometer")),
                    v05.SpaceAxis(name="x", unit=unit(steps[4], "micrometer")),
                ],
                datasets=[v05.Dataset(path="0", coordinateTransformations=[scale])],
            )
        ],
        omero=_omero(image),
    )


def _omero(image: "OutputImage") -> v05.Omero | None:
    """Return names, colours and contrast; None where nothing is known of them."""
    like = image.like
    known = any(channel != ImageChannel() for channel in like.channels)
    channels = [_omero_channel(c, image) for c in like.channels] if known else []
    if len(like.shape) == 3:
        channels = [
            _omero_channel(ImageChannel(name=name, color=color), image)
            for _ in range(like.sizes["c"])
            for name, color in _COLOURS
        ]
    return v05.Omero(channels=channels) if channels else None


def _omero_channel(channel: ImageChannel, image: "OutputImage") -> v05.OmeroChannel:
    """Describe a channel; white and the whole range where the input says nothing."""
    kind = image.dtype
    top = float(2 ** (8 * kind.itemsize) - 1) if kind.kind == "u" else 1.0
    window = channel.window if image.keeps_counts else None
    start, end = (window.start, window.end) if window else (0.0, top)
    low = window.low if window and window.low is not None else min(0.0, start)
    high = window.high if window and window.high is not None else max(top, end)
    return v05.OmeroChannel(
        label=channel.name,
        color=channel.color or "FFFFFF",
        window=v05.OmeroWindow(start=start, min=low, end=end, max=high),
    )
