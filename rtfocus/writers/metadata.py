"""Metadata: OME-Zarr 0.5 documents of images, series, wells and plates.

OME-Zarr 0.5 has no axis for colour, so an RGB frame is three planes along c, each
an omero channel shown in red, green or blue: that is what readers overlay right.
"""

from collections import Counter
from itertools import cycle, islice
from typing import Any

from pydantic import BaseModel
from yaozarrs import v05

from rtfocus.channel import Channel
from rtfocus.frame import Position
from rtfocus.writers.header import RunHeader
from rtfocus.writers.specs import DEFOCUS, ImageSpec

AXES = ("t", "c", "z", "y", "x")

_RGB = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
_COLOURS = ("00FFFF", "FF00FF", "FFFF00", "FF0000", "00FF00", "0000FF")
_BY_WAVELENGTH_NM = (
    (490, "0000FF"),
    (570, "00FF00"),
    (620, "FF8000"),
    (5000, "FF0000"),
)


def image_document(header: RunHeader, spec: ImageSpec, name: str) -> dict[str, Any]:
    """Return the ``ome`` attribute of one image group."""
    series = header.series
    plane = [spec.spacing_um] * 2
    origin = [spec.origin_um] * 2
    transforms: list[v05.ScaleTransformation | v05.TranslationTransformation] = [
        v05.ScaleTransformation(
            scale=[series.interval_s or 1.0, 1.0, series.z_step_um or 1.0, *plane]
        )
    ]
    if spec.origin_um:
        transforms.append(
            v05.TranslationTransformation(translation=[0.0, 0.0, 0.0, *origin])
        )
    multiscale = v05.Multiscale(
        name=name,
        axes=[
            v05.TimeAxis(name="t", unit="second"),
            v05.ChannelAxis(name="c"),
            *(v05.SpaceAxis(name=axis, unit="micrometer") for axis in "zyx"),
        ],
        datasets=[v05.Dataset(path="0", coordinateTransformations=transforms)],
    )
    omero = v05.Omero(channels=_omero_channels(header, spec))
    return _dump(v05.Image(multiscales=[multiscale], omero=omero))


def series_documents(paths: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ``ome`` attributes of a bioformats2raw root and its OME group."""
    root = v05.Bf2Raw.model_validate({"bioformats2raw.layout": 3})
    return _dump(root), _dump(v05.Series(series=paths))


def plate_document(name: str, positions: list[Position]) -> dict[str, Any]:
    """Return the ``ome`` attribute of a plate."""
    wells = sorted({well_of(position) for position in positions})
    rows = {row: i for i, row in enumerate(sorted({row for row, _ in wells}))}
    columns = {name: i for i, name in enumerate(sorted({name for _, name in wells}))}
    fields = Counter(map(well_of, positions))
    plate = v05.PlateDef(
        name=name,
        rows=[v05.Row(name=row) for row in rows],
        columns=[v05.Column(name=column) for column in columns],
        wells=[
            v05.PlateWell(
                path=f"{row}/{column}",
                rowIndex=rows[row],
                columnIndex=columns[column],
            )
            for row, column in wells
        ],
        field_count=max(fields.values()),
    )
    return _dump(v05.Plate(plate=plate))


def well_document(fields: list[str]) -> dict[str, Any]:
    """Return the ``ome`` attribute of one well with these field paths."""
    images = [v05.FieldOfView(path=path) for path in fields]
    return _dump(v05.Well(well=v05.WellDef(images=images)))


def well_of(position: Position) -> tuple[str, str]:
    """Return (row, column) of a position on a plate."""
    return position.plate_row or "", position.plate_column or ""


def _omero_channels(header: RunHeader, spec: ImageSpec) -> list[v05.OmeroChannel]:
    channels = header.series.channels
    low, high = spec.window
    window = v05.OmeroWindow(start=low, min=low, end=high, max=high)
    if spec.planes == 3:
        named = [
            (f"{channel.name} {colour}" if len(channels) > 1 else colour, code)
            for channel in channels
            for colour, code in _RGB
        ]
    elif spec.name == DEFOCUS or len(channels) == 1:
        named = [(channel.name, "FFFFFF") for channel in channels]
    else:
        spare = islice(cycle(_COLOURS), len(channels))
        named = [
            (channel.name, _colour(channel, other))
            for channel, other in zip(channels, spare, strict=True)
        ]
    return [
        v05.OmeroChannel(label=label, color=code, active=True, window=window)
        for label, code in named
    ]


def _colour(channel: Channel, other: str) -> str:
    """Return the colour of the emitted light, or `other` where it is unknown."""
    if channel.optics is None:
        return other
    nm = channel.optics.wavelength_nm
    return next((code for limit, code in _BY_WAVELENGTH_NM if nm < limit), other)


def _dump(document: BaseModel) -> dict[str, Any]:
    content: dict[str, Any] = document.model_dump(mode="json", exclude_none=True)
    return content
