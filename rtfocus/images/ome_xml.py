"""OME-XML: what it says of each image, as OME-TIFF and bioformats2raw keep it.

Read with the standard library: ome-types validates against the schema and refuses
files of Micro-Manager, ImageJ and others whose pixels are readable, and takes
seconds for the ten thousand TiffData of a long series. Written with it too, for the
collections of OME-Zarr: readers look there for the names and places of the images; that
of an OME-TIFF is written by tifffile.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from uuid import NAMESPACE_OID, uuid5
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np

from rtfocus.images.metadata import (
    NAMESPACE,
    SOFTWARE,
    OutputImage,
    PlaneFacts,
    coordinate_um,
    finite,
    length_um,
    positive,
    time_s,
)
from rtfocus.images.series import (
    MOST_PLANES,
    Facts,
    ImageChannel,
    ImageSeries,
    PlatePlace,
    StagePosition,
    rising,
    slices_um,
    writable_text,
)

_MAX_PLATE = 1000
"""Rows or columns of a plate; more come from a broken file."""
_NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_PIXEL_TYPES = {"float32": "float", "float64": "double"}
"""OME names of NumPy types; those of whole numbers are the same."""
_STEPS = (
    ("PhysicalSizeX", "pixel_size_x_um", "µm"),
    ("PhysicalSizeY", "pixel_size_y_um", "µm"),
    ("PhysicalSizeZ", "z_step_um", "µm"),
    ("TimeIncrement", "time_step_s", "s"),
)
"""Distances between pixels, slices and times: attribute, field of an image, unit."""


@dataclass(frozen=True)
class OmeImage:
    """One Image element."""

    name: str
    sizes: dict[str, int]
    """SizeT, SizeC, SizeZ, SizeY, SizeX by lower-case axis."""
    facts: Facts
    files: dict[str, str] = field(default_factory=dict)
    """Names of the files that its TiffData name, by UUID."""


@dataclass(frozen=True)
class OmeMetadata:
    """A whole OME document."""

    images: list[OmeImage]
    uuid: str | None = None
    """Of the file it was read from."""
    master: str | None = None
    """File with the full metadata, where this one only refers to it."""


def read_ome_xml(xml: str | bytes) -> OmeMetadata:
    """Read OME-XML.

    Raises
    ------
    ValueError
        If it is no XML, or an image lacks its sizes.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        msg = f"OME-XML is broken: {error}"
        raise ValueError(msg) from error
    objectives = {
        one.get("ID"): one
        for instrument in _children(root, "Instrument")
        for one in _children(instrument, "Objective")
    }
    places = _places(root)
    images = [
        _read_image(image, objectives, places.get(image.get("ID", "")))
        for image in _children(root, "Image")
        if _child(image, "Pixels") is not None
    ]
    binary_only = _child(root, "BinaryOnly")
    master = None if binary_only is None else binary_only.get("MetadataFile")
    return OmeMetadata(images, root.get("UUID"), master)


def write_ome_xml(images: Sequence[tuple[OmeImage, np.dtype[np.generic]]]) -> bytes:
    """Return OME-XML of images whose pixels lie elsewhere: ``METADATA.ome.xml``.

    Parameters
    ----------
    images
        With their types, in the order of the collection. What their facts leave out
        stays out.
    """
    root = Element("OME", {"xmlns": _NAMESPACE})
    for number, (image, dtype) in enumerate(images):
        _write_image(root, number, image, _PIXEL_TYPES.get(dtype.name, dtype.name))
    ElementTree.indent(root, " ")
    text: bytes = ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)
    return text


def _write_image(root: Element, number: int, image: OmeImage, kind: str) -> None:
    facts = image.facts
    name = writable_text(image.name)
    element = SubElement(root, "Image", {"ID": f"Image:{number}", "Name": name})
    position, stage = facts.get("position"), facts.get("stage") or StagePosition()
    if position is not None:
        label = {"Name": writable_text(position)}
        SubElement(element, "StageLabel", label | _places_um(stage, ""))
    attributes = {"ID": f"Pixels:{number}", "DimensionOrder": "XYZCT", "Type": kind}
    attributes |= {f"Size{axis.upper()}": str(image.sizes[axis]) for axis in "xyczt"}
    attributes |= _measures((name, facts.get(key), unit) for name, key, unit in _STEPS)
    pixels = SubElement(element, "Pixels", attributes)
    for c, channel in enumerate(facts.get("channels", ())):
        _write_channel(pixels, f"Channel:{number}:{c}", channel)
    SubElement(pixels, "MetadataOnly")
    for z, z_um in enumerate(slices_um(facts, image.sizes["z"])):
        if place := _places_um(replace(stage, z_um=z_um), "Position"):
            told = {"TheZ": str(z), "TheC": "0", "TheT": "0"}
            SubElement(pixels, "Plane", told | place)


def _write_channel(pixels: Element, identity: str, channel: ImageChannel) -> None:
    attributes = {"ID": identity, "SamplesPerPixel": "1"}
    if channel.name is not None:
        attributes["Name"] = channel.name
    if channel.color is not None:
        attributes["Color"] = str(signed_rgba(channel.color))
    attributes |= _measures(
        [
            ("EmissionWavelength", channel.emission_nm, "nm"),
            ("ExcitationWavelength", channel.excitation_nm, "nm"),
        ]
    )
    SubElement(pixels, "Channel", attributes)


def _places_um(stage: StagePosition, prefix: str) -> dict[str, str]:
    places = zip("XYZ", (stage.x_um, stage.y_um, stage.z_um), strict=True)
    return _measures((f"{prefix}{axis}", um, "µm") for axis, um in places)


def _measures(facts: Iterable[tuple[str, Any, str]]) -> dict[str, str]:
    """Return the attributes of values that are known, each with its unit."""
    known: dict[str, str] = {}
    for key, value, unit in facts:
        if value is not None and np.isfinite(value):
            known |= {key: repr(float(value)), f"{key}Unit": unit}
    return known


def _read_image(
    image: Element, objectives: dict[str | None, Element], place: PlatePlace | None
) -> OmeImage:
    pixels = _child(image, "Pixels")
    assert pixels is not None, "images without Pixels are left out"
    facts: Facts = {
        "pixel_size_y_um": _size_um(pixels, "Y"),
        "pixel_size_x_um": _size_um(pixels, "X"),
        "z_step_um": _size_um(pixels, "Z"),
        "time_step_s": time_s(
            pixels.get("TimeIncrement"), pixels.get("TimeIncrementUnit", "s")
        ),
        "channels": tuple(_channels(pixels)),
        "place": place,
        **_stage_facts(pixels),
    }
    label = _child(image, "StageLabel")
    if label is not None:
        facts["position"] = label.get("Name")
        facts["stage"] = facts["stage"] or _stage_of(label, "")
    settings = _child(image, "ObjectiveSettings")
    if settings is not None:
        facts["refractive_index"] = positive(settings.get("RefractiveIndex"))
        objective = objectives.get(settings.get("ID"))
        if objective is not None:
            facts["numerical_aperture"] = positive(objective.get("LensNA"))
    return OmeImage(
        name=image.get("Name", ""),
        sizes=_sizes(pixels),
        facts=facts,
        files=dict(_files(pixels)),
    )


def _sizes(pixels: Element) -> dict[str, int]:
    """Return the length of every axis; refuse more planes than can be meant."""
    sizes = {axis: int(pixels.get(f"Size{axis.upper()}", 1)) for axis in "tczyx"}
    planes = [sizes["t"] * sizes["c"] * sizes["z"]]
    planes += [
        int(data.get(key, 0))
        for data in _children(pixels, "TiffData")
        for key in ("IFD", "PlaneCount", "NumPlanes")
    ]
    if max(planes) > MOST_PLANES:
        msg = f"OME-XML: an image of {max(planes)} planes; more than {MOST_PLANES}"
        raise ValueError(msg)
    return sizes


def _files(pixels: Element) -> Iterator[tuple[str, str]]:
    for data in _children(pixels, "TiffData"):
        uuid = _child(data, "UUID")
        if uuid is not None and uuid.text and uuid.get("FileName"):
            yield uuid.text, uuid.get("FileName", "")


def _size_um(pixels: Element, axis: str) -> float | None:
    unit = pixels.get(f"PhysicalSize{axis}Unit", "µm")
    return length_um(pixels.get(f"PhysicalSize{axis}"), unit)


def _channels(pixels: Element) -> Iterator[ImageChannel]:
    """Yield one channel per index of axis c; samples of a pixel count one by one."""
    for channel in _children(pixels, "Channel"):
        samples = int(finite(channel.get("SamplesPerPixel")) or 1)
        one = ImageChannel(
            name=channel.get("Name"),
            color=_color(channel.get("Color")),
            emission_nm=_wavelength_nm(channel, "Emission"),
            excitation_nm=_wavelength_nm(channel, "Excitation"),
        )
        yield from [one] * min(max(samples, 1), 64)


def _color(text: str | None) -> str | None:
    """Return RRGGBB of OME's signed 32-bit RRGGBBAA."""
    number = finite(text)
    if number is None:
        return None
    return f"{(int(number) >> 8) & 0xFFFFFF:06X}"


def _wavelength_nm(channel: Element, kind: str) -> float | None:
    unit = channel.get(f"{kind}WavelengthUnit", "nm")
    um = length_um(channel.get(f"{kind}Wavelength"), unit)
    return None if um is None else float(f"{1000 * um:.9g}")


def _stage_facts(pixels: Element) -> Facts:
    """Return where the stage stood at the first plane, and which way z runs."""
    planes = list(_children(pixels, "Plane"))
    first = [
        one for one in planes if one.get("TheC", "0") == one.get("TheT", "0") == "0"
    ]
    first.sort(key=lambda one: finite(one.get("TheZ")) or 0)
    stages = [_stage_of(one, "Position") for one in first or planes[:1]]
    places = [finite(one.get("PositionZ")) for one in first]
    return {"stage": stages[0] if stages else None, "z_rises": rising(places)}


def _stage_of(element: Element, prefix: str) -> StagePosition | None:
    """Read X, Y, Z; the default unit, reference frame, has no length."""
    x_um, y_um, z_um = (
        coordinate_um(element.get(prefix + axis), element.get(f"{prefix}{axis}Unit"))
        for axis in "XYZ"
    )
    if x_um is None and y_um is None and z_um is None:
        return None
    return StagePosition(x_um=x_um, y_um=y_um, z_um=z_um)


def _places(root: Element) -> dict[str, PlatePlace]:
    """Return the place of every image that lies in a plate, by the image's ID."""
    places: dict[str, PlatePlace] = {}
    for plate in _children(root, "Plate"):
        wells = [
            (int(well.get("Row", 0)), int(well.get("Column", 0)), well)
            for well in _children(plate, "Well")
        ]
        if not wells:
            continue
        rows = max(int(plate.get("Rows", 0)), 1 + max(well[0] for well in wells))
        columns = max(int(plate.get("Columns", 0)), 1 + max(w[1] for w in wells))
        if min(min(w[:2]) for w in wells) < 0 or max(rows, columns) > _MAX_PLATE:
            msg = f"OME-XML: a plate of {rows} rows and {columns} columns is none"
            raise ValueError(msg)
        row_names = _names(rows, plate.get("RowNamingConvention", "letter"))
        column_names = _names(columns, plate.get("ColumnNamingConvention", "number"))
        for row, column, well in wells:
            for number, sample in enumerate(_children(well, "WellSample")):
                image = _child(sample, "ImageRef")
                if image is not None:
                    places[image.get("ID", "")] = PlatePlace(
                        plate=plate.get("Name", plate.get("ID", "")),
                        rows=row_names,
                        columns=column_names,
                        row=row,
                        column=column,
                        field=number,
                    )
    return places


def _names(count: int, convention: str) -> tuple[str, ...]:
    if convention != "letter":
        return tuple(str(number + 1) for number in range(count))
    return tuple(map(row_letters, range(count)))


def row_letters(number: int) -> str:
    """Return A, B, ... Z, AA, AB, ... of the number of a plate's row, from 0."""
    text = ""
    number += 1
    while number:
        number, quotient = divmod(number - 1, 26)
        text = chr(ord("A") + quotient) + text
    return text


def _children(element: Element, tag: str) -> Iterator[Element]:
    """Yield the children of a name, whatever the version of the schema."""
    return (child for child in element if child.tag.rpartition("}")[2] == tag)


def _child(element: Element, tag: str) -> Element | None:
    return next(_children(element, tag), None)


def write_tiff(path: Path | BinaryIO, images: Sequence[OutputImage]) -> None:
    """Write images as the series of one OME-TIFF, plane by plane."""
    # Here, as the stores of a run need the documents above and write no TIFF.
    import tifffile

    planes = ((len(i.like), i.like.shape, i.dtype.itemsize) for i in images)
    size = sum(count * math.prod(shape) * each for count, shape, each in planes)
    # A classic TIFF ends at 4 GiB.
    with tifffile.TiffWriter(path, ome=True, bigtiff=size > 3 * 2**30) as file:
        for image in images:
            like = image.like
            rgb = len(like.shape) == 3
            sizes = tuple(like.sizes[axis] for axis in "tcz")
            file.write(
                image.planes,
                shape=(*sizes, *like.shape),
                dtype=image.dtype,
                photometric="rgb" if rgb else "minisblack",
                compression="zlib",
                software=SOFTWARE,
                metadata={
                    "axes": "TCZYXS" if rgb else "TCZYX",
                    "UUID": _uuid(images),
                    "Name": like.name,
                    **_measures((n, getattr(like, k), unit) for n, k, unit in _STEPS),
                    **_ome_channels(like),
                    **_ome_planes(image),
                    "MapAnnotation": _ome_map(image),
                },
            )


def _uuid(images: Sequence[OutputImage]) -> str:
    """Return the same for the same images made in the same way, so equal files.

    A UUID of another kind would hold the time and this computer's address.
    """
    identity = [
        (i.like.name, i.like.path.name, i.like.sizes, dict(i.made)) for i in images
    ]
    return f"urn:uuid:{uuid5(NAMESPACE_OID, repr(identity))}"


def _ome_channels(like: ImageSeries) -> dict[str, object]:
    """Return names, colours and wavelengths, a list each; what no channel has: none."""
    attributes: dict[str, list[object]] = {
        "Name": [channel.name for channel in like.channels],
        "Color": [
            None if channel.color is None else signed_rgba(channel.color)
            for channel in like.channels
        ],
        "EmissionWavelength": [channel.emission_nm for channel in like.channels],
        "ExcitationWavelength": [channel.excitation_nm for channel in like.channels],
    }
    known: dict[str, object] = {}
    for key, values in attributes.items():
        if any(value is not None for value in values):
            known[key] = values
            if key.endswith("Wavelength"):
                known[f"{key}Unit"] = ["nm"] * len(values)
    return {"Channel": known} if known else {}


def _ome_planes(image: OutputImage) -> dict[str, object]:
    """Return where and when the planes were taken, as far as known."""
    like = image.like
    stage = like.stage or StagePosition()
    taken = image.taken or [PlaneFacts()] * len(like)
    known = []
    for one, index in zip(taken, like.indices(), strict=True):
        z_um = like.slices_um[index["z"]] if one.z_um is None else one.z_um
        at = replace(stage, z_um=z_um)
        times = ("DeltaT", one.delta_s, "s"), ("ExposureTime", one.exposure_ms, "ms")
        known.append(_places_um(at, "Position") | _measures(times))
    return {"Plane": known} if any(known) else {}


def _ome_map(image: OutputImage) -> dict[str, object]:
    """Return how an image was made, and what OME-XML has no place for."""
    like = image.like
    pairs = dict(image.made)
    if like.position is not None:
        pairs["position"] = like.position
    if like.place is not None:
        row, column = like.place.rows[like.place.row], like.place.columns
        pairs["plate"] = like.place.plate
        pairs["well"] = f"{row}{column[like.place.column]}"
        pairs["field"] = str(like.place.field)
    for number, channel in enumerate(like.channels):
        window = channel.window
        if window is not None and image.keeps_counts:
            pairs[f"contrast window c{number}"] = f"{window.start:g} to {window.end:g}"
    value = {key: writable_text(text) for key, text in pairs.items()}
    return {"Namespace": NAMESPACE, "Value": {"rtfocus": SOFTWARE, **value}}


def signed_rgba(color: str) -> int:
    """Return RRGGBB, opaque, as the signed 32-bit RRGGBBAA of OME.

    >>> signed_rgba("FF0000"), signed_rgba("00FF00")
    (-16776961, 16711935)
    """
    rgba = (int(color, 16) << 8) | 0xFF
    return rgba - (1 << 32) if rgba >= 1 << 31 else rgba
