"""Companion: the OME-XML of a collection of positions, as bioformats2raw has it.

Names, sizes and stage places of the images, for readers that do not find them
otherwise, or refuse a collection without it.
"""

from pathlib import Path

import numpy as np

from rtfocus.frame import Position
from rtfocus.images.ome_xml import OmeImage, read_ome_xml, write_ome_xml
from rtfocus.images.series import ImageChannel, StagePosition
from rtfocus.writers.header import CONFIDENCE, ImageSpec, RunHeader, write_file
from rtfocus.writers.layout import channels_of, is_plate, store_path

COMPANION = "OME/METADATA.ome.xml"


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
        if spec.name == CONFIDENCE:
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
        found = len(read_ome_xml(path.read_bytes()).images)
    except (OSError, ValueError) as error:
        return str(error)
    planned = len(header.series.positions)
    return None if found == planned else f"it has {found} images, not {planned}"


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
