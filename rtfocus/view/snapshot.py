"""Snapshot: one plane as a 16-bit OME-TIFF that says what it is."""

import io
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from rtfocus.errors import InputError
from rtfocus.images.provenance import NAMESPACE, SOFTWARE
from rtfocus.images.series import writable_text
from rtfocus.view.codec import Kind
from rtfocus.view.scene import Scene
from rtfocus.view.source_run import Place, Region

_KINDS = {"raw": Kind.RAW, "restored": Kind.RESTORED}


def snapshot(
    scene: Scene, kind: str, place: Place, region: Region | None = None
) -> bytes:
    """Return a plane as a TIFF: what is stored, or what the newest picture has.

    Parameters
    ----------
    scene
        What is shown.
    kind
        ``raw`` or ``restored``.
    place
        t, p, c, z.
    region
        In pixels of the frame; None: all of it.

    Raises
    ------
    InputError
        If there is no such plane.
    """
    if kind not in _KINDS:
        msg = f"no plane '{kind}'; choose raw or restored"
        raise InputError(msg)
    stored = scene.stored
    line = None if stored is None else stored.line(place)
    if stored is not None and line is not None and kind in (line.get("stored") or ()):
        pixels, step = stored.plane("raw" if kind == "raw" else "restored", place), 1
    else:
        pixels, step = _newest(scene, kind, place)
    if region is not None:
        pixels = pixels[
            region.y0 // step : -(-region.y1 // step),
            region.x0 // step : -(-region.x1 // step),
        ]
    if not pixels.size:
        msg = f"the region {region} is not in the frame"
        raise InputError(msg)
    return _tiff(pixels, _facts(scene, kind, place, step, region))


def _newest(scene: Scene, kind: str, place: Place) -> tuple[NDArray[np.generic], int]:
    shown = scene.newest(place[1], place[2], place[3])
    if shown is not None and shown.place == place:
        for plane in shown.picture.planes:
            if plane.kind is _KINDS[kind]:
                return plane.pixels, int(plane.step)
    msg = f"there is no {kind} plane at t, p, c, z = {place}"
    raise InputError(msg)


def _facts(
    scene: Scene, kind: str, place: Place, step: int, region: Region | None
) -> dict[str, Any]:
    series = scene.series
    assert series is not None
    pixel_um = series.pixel_size_um * step
    t, p, c, z = place
    told = {
        "rtfocus": SOFTWARE,
        "run": scene.folder,
        "series": series.series_uid,
        "image": kind,
        **{axis: str(i) for axis, i in zip("tpcz", place, strict=True)},
        "position": series.positions[p].name,
        "every pixel": str(step),
    }
    if region is not None:
        told["region y0 x0 y1 x1"] = f"{region.y0} {region.x0} {region.y1} {region.x1}"
    line = None if scene.stored is None else scene.stored.line(place)
    plane: dict[str, Any] = {}
    if line is not None:
        told["sequence"] = str(line["sequence"])
        told["captured_ns"] = str(line.get("captured_ns"))
        estimate = line.get("estimate") or {}
        told["defocus_um"] = str(estimate.get("defocus_um"))
        if line.get("exposure_ms") is not None:
            plane |= {"ExposureTime": [line["exposure_ms"]], "ExposureTimeUnit": ["ms"]}
        if line.get("z_um") is not None:
            plane |= {"PositionZ": [line["z_um"]], "PositionZUnit": ["µm"]}
    return {
        "Name": writable_text(f"{series.name} {kind} t{t} p{p} c{c} z{z}"),
        "PhysicalSizeX": pixel_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": pixel_um,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": [writable_text(series.channels[c].name)]},
        **({"Plane": plane} if plane else {}),
        "MapAnnotation": {
            "Namespace": NAMESPACE,
            "Value": {key: writable_text(text) for key, text in told.items()},
        },
    }


def _tiff(pixels: NDArray[np.generic], facts: dict[str, Any]) -> bytes:
    is_colour = pixels.ndim == 3
    memory = io.BytesIO()
    with tifffile.TiffWriter(memory, ome=True) as file:
        file.write(
            np.ascontiguousarray(pixels),
            photometric="rgb" if is_colour else "minisblack",
            compression="zlib",
            software=SOFTWARE,
            metadata={"axes": "YXS" if is_colour else "YX", **facts},
        )
    return memory.getvalue()
