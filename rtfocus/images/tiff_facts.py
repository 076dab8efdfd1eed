"""TIFF facts: pixel sizes, channels, positions in TIFF tags, ImageJ, Micro-Manager."""

import json
from collections.abc import Iterator
from typing import Any

import tifffile

from rtfocus.images.ome_xml import OmeMetadata
from rtfocus.images.series import (
    ContrastWindow,
    Facts,
    ImageChannel,
    StagePosition,
)
from rtfocus.images.units import finite, length_um, positive, time_s

_PRINT_DPI = frozenset(
    int(dpi)
    for dpi in "72 75 90 96 100 120 144 150 180 200 220 240 250 300 350 360 400 600 "
    "720 1200 1440 2400 4800".split()
)
_COARSEST_UM = 100.0
"""Coarser than any microscope's pixel: a resolution for print or screen."""

_UNITS = {2: "inch", 3: "cm"}


def plain_facts(file: tifffile.TiffFile) -> Facts:
    """Return the pixel size of the resolution tags, in inch or cm.

    Values that programs write without knowing, as 72 dpi, and resolutions without
    a unit are none.
    """
    page = file.pages.first
    tag = page.tags.get("MicroManagerMetadata")
    if tag is not None and isinstance(tag.value, dict):
        return frame_facts(tag.value)
    unit = page.tags.get("ResolutionUnit")
    name = _UNITS.get(int(unit.value)) if unit is not None else None
    if name is None:
        return {}
    return {
        "pixel_size_y_um": _measured(_pixel_um(page, "YResolution", name)),
        "pixel_size_x_um": _measured(_pixel_um(page, "XResolution", name)),
    }


def imagej_facts(file: tifffile.TiffFile) -> Facts:
    """Return what ImageJ writes: pixel size and steps with units, colours, windows."""
    metadata = file.imagej_metadata or {}
    page = file.pages.first
    unit = _text(metadata.get("unit"))
    y_unit = _text(metadata.get("yunit")) or unit
    z_unit = _text(metadata.get("zunit")) or unit
    spacing = finite(metadata.get("spacing"))
    return {
        "pixel_size_y_um": _imagej_pixel_um(page, "YResolution", y_unit),
        "pixel_size_x_um": _imagej_pixel_um(page, "XResolution", unit),
        "z_step_um": length_um(abs(spacing), z_unit) if spacing else None,
        "time_step_s": time_s(
            metadata.get("finterval"), _text(metadata.get("tunit")) or "s"
        ),
        "channels": tuple(_imagej_channels(metadata)),
    }


def stack_facts(
    file: tifffile.TiffFile, ome: OmeMetadata | None
) -> list[tuple[str, Facts]]:
    """Return names and metadata of the positions of a Micro-Manager stack."""
    found = file.micromanager_metadata or {}
    summary = found.get("Summary", {})
    common: Facts = {**plain_facts(file), **summary_facts(summary)}
    labels = list(_labels(summary))
    if ome is None or not ome.images:
        return [(label, {**common, "position": label}) for label in labels] or [
            ("", common)
        ]
    return [
        (image.name, {**common, **known_facts(image.facts)}) for image in ome.images
    ]


def summary_facts(summary: dict[str, Any]) -> Facts:
    """Return what the summary of a Micro-Manager data set says of all images."""
    colors = _list(summary.get("ChColors"))
    channels = tuple(
        ImageChannel(
            name=str(name) or None,
            color=_mm_color(colors[number]) if number < len(colors) else None,
        )
        for number, name in enumerate(_list(summary.get("ChNames")))
    )
    facts: Facts = {
        "pixel_size_y_um": positive(summary.get("PixelSize_um")),
        "pixel_size_x_um": positive(summary.get("PixelSize_um")),
        "z_step_um": positive(abs(finite(summary.get("z-step_um")) or 0.0)),
        "time_step_s": time_s(summary.get("Interval_ms"), "ms"),
        "channels": channels,
    }
    return known_facts(facts)


def frame_facts(frame: dict[str, Any]) -> Facts:
    """Return what Micro-Manager's metadata of one frame say of its image."""
    x_um, y_um, z_um = (finite(frame.get(f"{axis}PositionUm")) for axis in "XYZ")
    stage = None
    if (x_um, y_um, z_um) != (None, None, None):
        stage = StagePosition(x_um=x_um, y_um=y_um, z_um=z_um)
    label = frame.get("PositionName")
    facts: Facts = {
        "pixel_size_y_um": positive(frame.get("PixelSizeUm")),
        "pixel_size_x_um": positive(frame.get("PixelSizeUm")),
        "position": str(label) if label else None,
        "stage": stage,
    }
    return known_facts(facts)


def _list(value: object) -> list[Any]:
    """Return a list that old versions wrote as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []


def _mm_color(value: object) -> str | None:
    """Return RRGGBB of Java's signed 32-bit AARRGGBB."""
    number = finite(value)
    return None if number is None else f"{int(number) & 0xFFFFFF:06X}"


def known_facts(facts: Facts) -> Facts:
    """Leave out what is unknown, so that it replaces nothing."""
    known: Facts = {}
    for key, value in facts.items():
        if value is not None and value != ():
            known[key] = value  # type: ignore[literal-required] # keys of Facts
    return known


def _labels(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the positions; a key of its own for each version."""
    for key in ("StagePositions", "InitialPositionList"):
        for entry in summary.get(key) or []:
            if isinstance(entry, str):
                entry = json.loads(entry)
            yield str(entry.get("Label") or entry.get("label") or "")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _pixel_um(page: tifffile.TiffPage, tag_name: str, unit: str | None) -> float | None:
    """Return the size of which the tag gives the inverse."""
    tag = page.tags.get(tag_name)
    if tag is None or not isinstance(tag.value, tuple) or len(tag.value) != 2:
        return None
    pixels, length = (positive(number) for number in tag.value)
    if pixels is None or length is None:
        return None
    return length_um(length / pixels, unit)


def _imagej_pixel_um(
    page: tifffile.TiffPage, tag_name: str, unit: str | None
) -> float | None:
    """Return the size in the user's unit; inches may be those of a printer."""
    pixel_um = _pixel_um(page, tag_name, unit)
    return _measured(pixel_um) if unit in _UNITS.values() else pixel_um


def _measured(pixel_um: float | None) -> float | None:
    """Drop resolutions that say how large to print."""
    if pixel_um is None or pixel_um > _COARSEST_UM:
        return None
    dpi = 25400 / pixel_um
    return None if any(abs(dpi - n) < n * 2e-3 for n in _PRINT_DPI) else pixel_um


def _imagej_channels(metadata: dict[str, Any]) -> Iterator[ImageChannel]:
    count = int(finite(metadata.get("channels")) or 1)
    luts = metadata.get("LUTs") or []
    ranges = metadata.get("Ranges") or ()
    if not ranges and "min" in metadata and "max" in metadata:
        ranges = (metadata["min"], metadata["max"])
    for number in range(min(count, 1000)):
        window = None
        if len(ranges) >= 2 * number + 2:
            start, end = (finite(v) for v in ranges[2 * number : 2 * number + 2])
            if start is not None and end is not None and start < end:
                window = ContrastWindow(start=start, end=end)
        color = None
        if number < len(luts):
            color = "".join(f"{int(level):02X}" for level in luts[number][:, -1])
        yield ImageChannel(color=color, window=window)
