"""OME-Zarr writing: images, collections and plates of versions 0.5 and 0.4.

Version 0.4 is made of 0.5: the arrays are of Zarr version 2 from the start, and what
the groups say is turned into it at the end.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from yaozarrs import v05
from yaozarrs.write.v05 import Bf2RawBuilder, PlateBuilder, prepare_image

from rtfocus import files
from rtfocus.errors import OutputError
from rtfocus.images.metadata import OutputImage, zarr_attributes
from rtfocus.images.ome_xml import OmeImage, write_ome_xml
from rtfocus.images.series import ImageChannel, ImageSeries, PlatePlace

_COMPRESSION: Literal["blosc-lz4"] = "blosc-lz4"
_COLOURS = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))


_SCREEN_PX = 512
"""A pyramid ends with the first level that is no larger."""
_CHUNK_PX = 1024
"""Of a pyramid: a viewer loads what it shows."""


@dataclass(frozen=True)
class ZarrForm:
    """How an OME-Zarr is laid out."""

    version: Literal["0.5", "0.4"] = "0.5"
    """0.4 is of Zarr version 2, for programs that know no newer one."""
    pyramid: bool = False
    """Whether there are smaller levels, each half as large as the one before."""

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return (y, x) of every level of planes of a shape, the full one first."""
        levels = [(shape[0], shape[1])]
        while self.pyramid and max(levels[-1]) > _SCREEN_PX:
            y, x = levels[-1]
            levels.append((max(y // 2, 1), max(x // 2, 1)))
        return levels

    def chunks(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the chunks of planes of a shape."""
        most = _CHUNK_PX if self.pyramid else max(shape[:2])
        return (1, 1, 1, min(shape[0], most), min(shape[1], most))


_PLAIN = ZarrForm()


def write_zarr(
    path: Path, images: Sequence[OutputImage], form: ZarrForm = _PLAIN
) -> None:
    """Write images as one OME-Zarr at a path that is free.

    One image lies at the root; the images of one plate keep their wells; others are a
    bioformats2raw collection.
    """
    for place, image in zip(prepare_zarr(path, images, form), images, strict=True):
        fill_image(path, place, image, form)
    if form.version == "0.4":
        _turn_into_04(path)


def prepare_zarr(
    path: Path, images: Sequence[OutputImage], form: ZarrForm = _PLAIN
) -> list[str]:
    """Make all of an OME-Zarr but its pixels; no plane of `images` is taken.

    Returns
    -------
    list of str
        As `places_in_zarr`.
    """
    places = places_in_zarr(images)
    if places == [""]:
        prepare_image(path, *_declared(images[0], form), **_creation(images[0], form))
    elif is_plate([image.like.place for image in images]):
        _prepare_plate(path, images, form)
    else:
        _prepare_collection(path, dict(zip(places, images, strict=True)), form)
    _mark(path, _shared(images))
    return places


def places_in_zarr(images: Sequence[OutputImage]) -> list[str]:
    """Return of each image the path of its group in an OME-Zarr of all of them.

    The root is the empty text.
    """
    places = [image.like.place for image in images]
    if len(images) == 1 and places[0] is None:
        return [""]
    if not is_plate(places):
        return [str(number) for number in range(len(images))]
    return [
        f"{place.rows[place.row]}/{place.columns[place.column]}/{place.field}"
        for place in places
        if place is not None
    ]


def fill_image(
    path: Path, place: str, image: OutputImage, form: ZarrForm = _PLAIN
) -> None:
    """Write all planes of an image to its place in a Zarr that was prepared.

    Images lie in arrays of their own: several processes may fill different ones.
    """
    levels = [
        zarr.open_array(path / place / level, mode="r+")
        for level in _level_names(image, form)
    ]
    for index, plane in zip(image.like.indices(), image.planes, strict=True):
        t, c, z = index["t"], index["c"], index["z"]
        colours = 1 if plane.ndim == 2 else plane.shape[2]
        for colour in range(colours):
            grey = plane if plane.ndim == 2 else plane[..., colour]
            for array, smaller in zip(levels, _halved(grey), strict=False):
                array[t, c * colours + colour, z] = smaller


def _prepare_collection(
    path: Path, images: dict[str, OutputImage], form: ZarrForm
) -> None:
    builder = Bf2RawBuilder(path, **_creation(images["0"], form))
    for name, image in images.items():
        builder.add_series(name, *_declared(image, form))
    builder.prepare()
    described = [(_ome_image(image.like), image.dtype) for image in images.values()]
    (path / "OME" / "METADATA.ome.xml").write_bytes(write_ome_xml(described))


def _prepare_plate(path: Path, images: Sequence[OutputImage], form: ZarrForm) -> None:
    wells: dict[tuple[int, int], dict[str, OutputImage]] = {}
    for image in images:
        place = image.like.place
        assert place is not None
        wells.setdefault((place.row, place.column), {})[str(place.field)] = image
    first = images[0].like.place
    assert first is not None
    plate = _plate(first, list(wells))
    builder = PlateBuilder(path, plate=plate, **_creation(images[0], form))
    for (row, column), fields in wells.items():
        builder.add_well(
            row=first.rows[row],
            col=first.columns[column],
            images={name: _declared(image, form) for name, image in fields.items()},
        )
    builder.prepare()


def _creation(image: OutputImage, form: ZarrForm) -> dict[str, Any]:
    """Return how the builders create arrays."""
    return {
        "chunks": form.chunks(image.like.shape),
        "writer": "zarr" if form.version == "0.5" else _create_zarr_2,
        "compression": _COMPRESSION,
    }


def _create_zarr_2(
    path: Path,
    shape: tuple[int, ...],
    dtype: Any,  # noqa: ANN401 (as yaozarrs calls it)
    chunks: tuple[int, ...],
    **_: object,
) -> "zarr.Array[Any]":
    """Create an array of Zarr version 2, as yaozarrs asks for it."""
    return zarr.create_array(
        path,
        shape=shape,
        dtype=dtype,
        chunks=tuple(map(min, chunks, shape)),
        zarr_format=2,
        compressors=numcodecs.Blosc(cname="lz4", shuffle=numcodecs.Blosc.SHUFFLE),
        chunk_key_encoding={"name": "v2", "separator": "/"},
    )


def _turn_into_04(path: Path) -> None:
    """Say in version 0.4 what the groups say in 0.5."""
    for document in sorted(path.rglob("zarr.json")):
        attributes = json.loads(document.read_text("utf-8")).get("attributes", {})
        ome = attributes.pop("ome", {})
        ome.pop("version", None)
        for holder in (*ome.get("multiscales", []), ome.get("plate"), ome.get("well")):
            if holder is not None:
                holder["version"] = "0.4"
        group = document.parent
        (group / ".zgroup").write_text(json.dumps({"zarr_format": 2}), "utf-8")
        (group / ".zattrs").write_text(json.dumps(ome | attributes, indent=1), "utf-8")
        document.unlink()


def is_plate(places: Sequence[PlatePlace | None]) -> bool:
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


def _mark(path: Path, made: dict[str, str]) -> None:
    """Say in the root how all was made, and which groups and arrays there are."""
    documents = [*path.rglob("zarr.json"), *path.rglob(".zarray")]
    nodes = [document.parent.relative_to(path).as_posix() for document in documents]
    root = path / "zarr.json"
    content = json.loads(root.read_text("utf-8"))
    content["attributes"] |= zarr_attributes(made, nodes)
    root.write_text(json.dumps(content, indent=2), "utf-8")


def _shared(images: Sequence[OutputImage]) -> dict[str, str]:
    """Return how images were made: once where equal, else by image."""
    first = dict(images[0].made)
    if all(dict(image.made) == first for image in images):
        return first
    return {
        f"{image.like.name} {key}": text
        for image in images
        for key, text in image.made.items()
    }


def _level_names(image: OutputImage, form: ZarrForm) -> list[str]:
    return [str(level) for level in range(len(form.shapes(image.like.shape)))]


def _declared(
    image: OutputImage, form: ZarrForm
) -> tuple[v05.Image, list[tuple[tuple[int, ...], np.dtype[np.generic]]]]:
    """Return the metadata of an image, and shape and type of its levels."""
    like = image.like
    # Axes (t, c, z, y, x); OME-Zarr has no rgb axis, colours become channels.
    colours = like.shape[2] if len(like.shape) == 3 else 1
    sizes = like.sizes
    outer = (sizes["t"], sizes["c"] * colours, sizes["z"])
    levels = form.shapes(like.shape)
    return _ome(image, len(levels)), [
        ((*outer, *level), image.dtype) for level in levels
    ]


def _halved(plane: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield a plane, then ever smaller means of two by two pixels."""
    while True:
        yield plane
        y, x = (max(length // 2, 1) for length in plane.shape)
        step_y, step_x = (min(length, 2) for length in plane.shape)
        blocks = plane[: y * step_y, : x * step_x].reshape(y, step_y, x, step_x)
        mean = blocks.mean(axis=(1, 3), dtype=np.float64)
        if plane.dtype.kind in "iu":
            mean = np.rint(mean)
        plane = mean.astype(plane.dtype)


def _ome(image: OutputImage, levels: int) -> v05.Image:
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
                datasets=[
                    v05.Dataset(
                        path=str(level),
                        coordinateTransformations=_transforms(like, steps, level),
                    )
                    for level in range(levels)
                ],
            )
        ],
        omero=_omero(image),
    )


def _transforms(
    like: ImageSeries, steps: Sequence[float | None], level: int
) -> list[v05.ScaleTransformation | v05.TranslationTransformation]:
    """Return scale and place of a level: its first pixel is the mean of the first."""
    scale = [step or 1.0 for step in steps]
    place = [0.0] * 5
    stage = (like.stage.y_um, like.stage.x_um) if like.stage else (None, None)
    for axis, um, length in zip((3, 4), stage, like.shape[:2], strict=True):
        # An axis is halved until it has one pixel.
        factor = 2 ** min(level, length.bit_length() - 1)
        known = um if um is not None and steps[axis] is not None else 0.0
        place[axis] = known + (factor - 1) / 2 * scale[axis]
        scale[axis] *= factor
    transforms: list[v05.ScaleTransformation | v05.TranslationTransformation] = [
        v05.ScaleTransformation(scale=scale)
    ]
    if any(place):
        transforms.append(v05.TranslationTransformation(translation=place))
    return transforms


def _ome_image(like: ImageSeries) -> OmeImage:
    """Describe an image in the terms of OME-XML."""
    colours = like.shape[2] if len(like.shape) == 3 else 1
    sizes = dict(like.sizes, y=like.shape[0], x=like.shape[1])
    sizes["c"] *= colours
    return OmeImage(
        name=like.name,
        sizes=sizes,
        facts={
            "pixel_size_y_um": like.pixel_size_y_um,
            "pixel_size_x_um": like.pixel_size_x_um,
            "z_step_um": like.z_step_um,
            "time_step_s": like.time_step_s,
            "position": like.position,
            "stage": like.stage,
            "z_rises": like.z_rises,
            "channels": like.channels if colours == 1 else (),
        },
    )


def _omero(image: OutputImage) -> v05.Omero | None:
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


def _omero_channel(channel: ImageChannel, image: OutputImage) -> v05.OmeroChannel:
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


def arrays_of(group: Path) -> list[Path]:
    """Return the arrays of an image in an OME-Zarr."""
    return [path for path in group.iterdir() if (path / "zarr.json").is_file()]


def fill_apart(part: Path, group: Path, image: OutputImage) -> None:
    """Write the pixels of an image elsewhere: who is killed leaves half of none."""
    for array in arrays_of(group):
        (part / array.name).mkdir(parents=True)
        shutil.copyfile(array / "zarr.json", part / array.name / "zarr.json")
    fill_image(part, "", image)


def put_in_place(part: Path, group: Path) -> None:
    """Move the pixels of an image into their arrays, each whole.

    What stands there came so too, from a process that was killed before its mark or
    does the same unit: it is whole, and is never taken away.
    """
    for array in arrays_of(group):
        chunks, place = part / array.name / "c", array / "c"
        if place.exists() or not chunks.exists():  # zeros alone need no chunks
            continue
        try:
            files.replace(chunks, place)
        except OutputError:
            if not place.exists():
                raise
        files.sync_names(array)
