"""Layout: groups of an OME-Zarr 0.5, and what each says: images, series, wells, plates.

OME-Zarr 0.5 has no axis for colour, so an RGB frame is three planes along c, each
an omero channel shown in red, green or blue: that is what readers overlay right.

A collection of positions has OME-XML beside it, as bioformats2raw does: names, sizes
and stage places, for readers that do not find them otherwise.
"""

import os
from collections import Counter, defaultdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from pydantic import BaseModel, ValidationError

from rtfocus.channel import Channel
from rtfocus.errors import WriterError, writing
from rtfocus.frame import Position
from rtfocus.images.metadata import COMPANION
from rtfocus.images.ome_xml import OmeImage, read_ome_xml, write_ome_xml
from rtfocus.images.series import ImageChannel, StagePosition
from rtfocus.writers.header import (
    DEFOCUS,
    INNER,
    RAW,
    ImageSpec,
    RunHeader,
    is_document,
    write_file,
    write_json,
)
from rtfocus.writers.places import is_plate, position_paths

Windows = list[tuple[float, float] | None]
"""Values shown black and white, by channel of an image; None: as planned."""

_VERSION = "0.5"
_RGB = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
_COLOURS = ("00FFFF", "FF00FF", "FFFF00", "FF0000", "00FF00", "0000FF")
_MAP_COLOURS = {DEFOCUS: "FFB000"} | dict.fromkeys(INNER, "FFFFFF")
"""Of what is no picture of the specimen; everybody can tell amber from grey."""
_BY_WAVELENGTH_NM = (
    (490, "0000FF"),
    (570, "00FF00"),
    (620, "FF8000"),
    (5000, "FF0000"),
)


def store_path(folder: Path, name: str) -> Path:
    """Return the OME-Zarr of image `name`; `INNER` maps lie inside defocus."""
    return folder / f"{DEFOCUS if name in INNER else name}.ome.zarr"


def image_groups(folder: Path, header: RunHeader, spec: ImageSpec) -> list[Path]:
    """Return the image group of every position, by index p."""
    root = store_path(folder, spec.name)
    inner = spec.name if spec.name in INNER else ""
    paths = position_paths(header.series.positions)
    return [root.joinpath(path, inner) for path in paths]


def write_groups(folder: Path, header: RunHeader, specs: list[ImageSpec]) -> None:
    """Write the group metadata that is not there yet: complete before frame 0."""
    for group, attributes in group_documents(folder, header, specs).items():
        # What others have added to a run, or it says of itself at its end, stays.
        if not is_document(group / "zarr.json"):
            write_group(group, attributes, fsync=header.store.fsync)


def group_documents(
    folder: Path, header: RunHeader, specs: list[ImageSpec]
) -> dict[Path, dict[str, Any]]:
    """Return the attributes of every group, outer groups first.

    Raises
    ------
    WriterError
        If the series says something that OME-Zarr 0.5 does not allow.
    """
    # First: it says more about shared well fields than the format does.
    position_paths(header.series.positions)
    try:
        return _documents(folder, header, specs)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        msg = (
            f"series '{header.series.name}' does not fit OME-Zarr 0.5: {place} "
            f"{fault['input']!r}: {fault['msg']}"
        )
        raise WriterError(msg) from error


def _documents(
    folder: Path, header: RunHeader, specs: list[ImageSpec]
) -> dict[Path, dict[str, Any]]:
    documents: dict[Path, dict[str, Any]] = {}
    raw = next((spec for spec in specs if spec.name == RAW), None)
    raw_groups = [] if raw is None else image_groups(folder, header, raw)
    for spec in specs:
        if spec.name not in INNER:
            documents |= _collection(store_path(folder, spec.name), header)
        groups = image_groups(folder, header, spec)
        raws = [None] * len(groups) if raw in (None, spec) else raw_groups
        # Positions differ in their names alone, and a plate may have ten thousand.
        shared = image_document(header, spec, spec.name)
        places = zip(header.series.positions, groups, raws, strict=True)
        for position, group, raw_group in places:
            documents[group] = {
                "ome": _placed(shared, spec, position),
                "rtfocus": _description(header, spec, position)
                | _origin(group, raw_group),
            }
    return documents


def _placed(
    image: dict[str, Any], spec: ImageSpec, position: Position
) -> dict[str, Any]:
    """Return the ``ome`` attribute of the image of one position: its name and place.

    The axes of the stage are taken for those of the image. Where the stage's place
    is not known the image begins at 0.
    """
    (multiscale,) = image["multiscales"]
    (dataset,) = multiscale["datasets"]
    stage = StagePosition(x_um=position.x_um, y_um=position.y_um)
    at = stage.moved(spec.origin_um, spec.origin_um)
    place = [at.y_um, at.x_um]
    transforms = list(dataset["coordinateTransformations"])
    if any(place):
        translation = [0.0, 0.0, 0.0, *place]
        transforms.append({"type": "translation", "translation": translation})
    placed = multiscale | {
        "name": f"{position.name} {spec.name}",
        "datasets": [dataset | {"coordinateTransformations": transforms}],
    }
    return image | {"multiscales": [placed]}


def _origin(group: Path, raw: Path | None) -> dict[str, str]:
    """Return which raw image another was made of, as a path from its own group."""
    if raw is None:
        return {}
    return {"made_of": Path(os.path.relpath(raw, group)).as_posix()}


def write_group(group: Path, attributes: dict[str, Any], *, fsync: bool) -> None:
    """Create a Zarr group with these attributes."""
    with writing(group, WriterError):
        group.mkdir(parents=True, exist_ok=True)
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    write_json(group / "zarr.json", document, fsync=fsync)


def finish_group(
    node: Path,
    spec: ImageSpec,
    rtfocus: dict[str, Any],
    windows: Windows,
    *,
    fsync: bool,
) -> None:
    """Say in an image's group how its run ended, and what to show black and white.

    One atomic change. A contrast that is no longer the planned one is somebody's own
    and stays.

    Parameters
    ----------
    node
        The group.
    spec
        Of the image.
    rtfocus
        Is added to the attribute of this name.
    windows
        By channel of the ``omero`` attribute.

    Raises
    ------
    WriterError
        If the metadata cannot be read or written.
    """
    path = node / "zarr.json"
    try:
        document = msgspec.json.decode(path.read_bytes())
        present = document.setdefault("attributes", {})
        present["rtfocus"] = present.get("rtfocus", {}) | rtfocus
        channels = present.get("ome", {}).get("omero", {}).get("channels", [])
        for channel, window in zip(channels, windows, strict=False):
            if window is not None and _is_planned(channel.get("window"), spec):
                channel["window"] = _window(spec, window)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        msg = f"'{path}' is no Zarr metadata ({error}); the run folder is damaged"
        raise WriterError(msg) from error
    write_json(path, document, fsync=fsync)


def _is_planned(window: object, spec: ImageSpec) -> bool:
    return window is None or window == _window(spec, spec.window)


def _window(spec: ImageSpec, shown: tuple[float, float]) -> dict[str, float]:
    (low, high), (start, end) = spec.window, shown
    return {"start": start, "min": min(low, start), "end": end, "max": max(high, end)}


def _collection(root: Path, header: RunHeader) -> dict[Path, dict[str, Any]]:
    """Return what lies above the images: plate and wells, or the series list."""
    positions = header.series.positions
    if is_plate(positions):
        documents = {root: {"ome": plate_document(header.series.name, positions)}}
        wells = defaultdict(list)
        for position in positions:
            wells[well_of(position)].append(position.field)
        for (row, column), fields in sorted(wells.items()):
            documents[root / row] = {}
            listed = [str(field) for field in sorted(fields)]
            documents[root / row / column] = {"ome": well_document(listed)}
        return documents
    if len(positions) == 1:
        return {}
    top, series = series_documents(position_paths(positions))
    return {root: {"ome": top}, root / "OME": {"ome": series}}


def _description(
    header: RunHeader, spec: ImageSpec, position: Position
) -> dict[str, Any]:
    """Return what rtfocus itself says about one image."""
    series = header.series
    return {
        "image": spec.name,
        "series_uid": series.series_uid,
        "started_ns": series.started_ns,
        "position": msgspec.to_builtins(position),
        "planned": series.sizes,
        "finished": False,
        **spec.says,
    }


def image_document(header: RunHeader, spec: ImageSpec, name: str) -> dict[str, Any]:
    """Return the ``ome`` attribute of an image group, wherever it is placed."""
    t_s, z_um = header.series.interval_s, header.series.z_step_um
    steps = (t_s or 1, 1, z_um or 1, spec.spacing_um, spec.spacing_um)
    axes = [
        {"name": "t", "type": "time", "unit": "second"},
        {"name": "c", "type": "channel"},
        *({"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"),
    ]
    for axis in (axes[0], axes[2]):
        if not header.has_scale(axis["name"]):
            del axis["unit"]
    scale = {"type": "scale", "scale": [float(step) for step in steps]}
    level = {"path": "0", "coordinateTransformations": [scale]}
    return {
        "version": _VERSION,
        "multiscales": [{"name": name, "axes": axes, "datasets": [level]}],
        "omero": {"channels": _omero_channels(header, spec)},
    }


def series_documents(paths: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ``ome`` attributes of a bioformats2raw root and its OME group."""
    root = {"version": _VERSION, "bioformats2raw.layout": 3}
    return root, {"version": _VERSION, "series": paths}


def plate_document(name: str, positions: list[Position]) -> dict[str, Any]:
    """Return the ``ome`` attribute of a plate; its models know what names may be."""
    # What every run says is written plainly: these models take as long to load as
    # all networks take to compile.
    from yaozarrs import v05

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
    from yaozarrs import v05

    images = [v05.FieldOfView(path=path) for path in fields]
    return _dump(v05.Well(well=v05.WellDef(images=images)))


def well_of(position: Position) -> tuple[str, str]:
    """Return (row, column) of a position on a plate."""
    return position.plate_row or "", position.plate_column or ""


def _omero_channels(header: RunHeader, spec: ImageSpec) -> list[dict[str, Any]]:
    window = {key: float(v) for key, v in _window(spec, spec.window).items()}
    return [
        {"window": window, "label": label, "color": code, "active": True}
        for label, code in channels_of(header, spec)
    ]


def channels_of(header: RunHeader, spec: ImageSpec) -> list[tuple[str, str]]:
    """Return label and colour of every index of axis c."""
    channels = header.series.channels
    if spec.planes == 3:
        return [
            (f"{channel.name} {colour}" if len(channels) > 1 else colour, code)
            for channel in channels
            for colour, code in _RGB
        ]
    if spec.name in _MAP_COLOURS:
        code = _MAP_COLOURS[spec.name]
        return [(f"{channel.name} {spec.name}", code) for channel in channels]
    if len(channels) == 1:
        return [(channel.name, "FFFFFF") for channel in channels]
    spare = islice(cycle(_COLOURS), len(channels))
    return [
        (channel.name, _colour(channel, other))
        for channel, other in zip(channels, spare, strict=True)
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


def write_companions(
    folder: Path, header: RunHeader, specs: list[ImageSpec], frames: int
) -> None:
    """Write the OME-XML of every collection of positions, unless it says the same.

    Parameters
    ----------
    folder
        Of the run.
    header
        Names, places, sizes.
    specs
        Of the images of the run.
    frames
        Time points there are, or are planned.
    """
    positions = header.series.positions
    if is_plate(positions) or len(positions) == 1:
        return
    for spec in specs:
        if spec.name in INNER:
            continue
        kind = np.dtype(spec.dtype)
        content = write_ome_xml(
            [(_ome_image(header, spec, one, frames), kind) for one in positions]
        )
        path = store_path(folder, spec.name) / COMPANION
        if not path.is_file() or path.read_bytes() != content:
            write_file(path, content, fsync=header.store.fsync)


def companion_fault(folder: Path, header: RunHeader, spec: ImageSpec) -> str | None:
    """Return why a collection's OME-XML cannot be read; None: it can, or is not there.

    Runs of before 0.3 have none.
    """
    path = store_path(folder, spec.name) / COMPANION
    if not path.is_file():
        return None
    try:
        count = len(read_ome_xml(path.read_bytes()).images)
    except (OSError, ValueError) as error:
        return str(error)
    planned = len(header.series.positions)
    return None if count == planned else f"it has {count} images, not {planned}"


def _ome_image(
    header: RunHeader, spec: ImageSpec, position: Position, frames: int
) -> OmeImage:
    series = header.series
    height, width = spec.plane_shape
    channels = channels_of(header, spec)
    optics = [one.optics for one in series.channels for _ in range(spec.planes)]
    return OmeImage(
        name=position.name,
        sizes={
            "t": frames,
            "c": len(channels),
            "z": header.size("z") or 1,
            "y": height,
            "x": width,
        },
        facts={
            "pixel_size_y_um": spec.spacing_um,
            "pixel_size_x_um": spec.spacing_um,
            "z_step_um": series.z_step_um,
            "time_step_s": series.interval_s,
            "position": position.name,
            "stage": StagePosition(x_um=position.x_um, y_um=position.y_um),
            "channels": tuple(
                ImageChannel(
                    name=name,
                    color=color,
                    emission_nm=None if known is None else known.wavelength_nm,
                )
                for (name, color), known in zip(channels, optics, strict=True)
            ),
        },
    )
