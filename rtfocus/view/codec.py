"""Codec: pictures on their way to a page, 16 bits deep, with a fixed header.

A picture is 80 bytes of header and, plane by plane, 40 bytes of header and the
packed pixels, all little-endian. ``page/codec.js`` is the other end::

    "RTFP" version flags planes _ | number sequence t p c z | z_um captured_s |
    saturated exposure_ms | height width | defocus_um confidence signed _ _ _

    kind dtype codec samples | width height bytes | scale offset | x0 y0 step |
    signed _ _ _

A stored value v means ``offset + scale * v``. Pixels of integer cameras up to 16 bits
travel as they are; others are spread over 16 bits.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np
from numcodecs import lz4
from numpy.typing import NDArray

from rtfocus.frame import TileGrid
from rtfocus.transport.viewer import Preview

MAGIC = b"RTFP"
VERSION = 1
HEADER = struct.Struct("<4sBBBxIiiiiiddIfIIdfB3x")
PLANE = struct.Struct("<BBBBIIIfffffB3x")
UNKNOWN = 0xFFFFFFFF
"""Number of saturated pixels where they were not counted."""


class PlaneKind(IntEnum):
    """What a plane shows."""

    RAW = 0
    RESTORED = 1
    DEFOCUS = 2
    SATURATION = 3
    DEVIATION = 4
    EXPECTED_ERROR = 5


MAPS = {
    "defocus": PlaneKind.DEFOCUS,
    "deviation": PlaneKind.DEVIATION,
    "expected_error": PlaneKind.EXPECTED_ERROR,
}
"""Planes of a value per tile, by their names in a run: um, um and counts."""


class Flag(IntFlag):
    """What is true of a picture as a whole."""

    NOTHING = 0
    LIVE = 1
    """It came through the preview socket, and may be reduced."""
    DETAIL = 2
    """A region of the picture before, with all its pixels."""
    ABSENT = 4
    """Nothing is stored at this place."""
    UNREADABLE = 8
    """Of what is stored there something cannot be read, or is gone."""


class Packing(IntEnum):
    """How the bytes of a plane travel."""

    PLAIN = 0
    LZ4_SPLIT = 1
    """Low bytes of all values, then high bytes, as one LZ4 block: the high bytes of
    camera images are nearly constant."""


@dataclass(frozen=True)
class PicturePlane:
    """One plane of a picture."""

    kind: PlaneKind
    pixels: NDArray[np.generic]
    """Shape (y, x) or (y, x, 3)."""
    x0: float = 0.0
    """Left edge of the first pixel, in pixels of the frame."""
    y0: float = 0.0
    step: float = 1.0
    """Side of a pixel, in pixels of the frame."""
    signed: bool = False
    """Of a defocus map: whether it knows the side of focus."""


@dataclass(frozen=True)
class Picture:
    """What a viewer shows at once."""

    planes: tuple[PicturePlane, ...]
    shape: tuple[int, int]
    """Height and width of the whole frame."""
    index: dict[str, int]
    sequence: int = -1
    z_um: float | None = None
    captured_s: float | None = 0.0
    """Since the series began; None: not known, as of a frame that a repair found."""
    exposure_ms: float = 0.0
    saturated: int | None = None
    defocus_um: float | None = None
    confidence: float = 0.0
    signed: bool = False
    flags: Flag = Flag.NOTHING


def map_plane(
    kind: PlaneKind, values: NDArray[np.generic], grid: TileGrid
) -> PicturePlane:
    """Return a map where its tiles lie in the frame."""
    corner = grid.origin_px + 0.5 - grid.stride_px / 2
    signed = grid.signed and kind is PlaneKind.DEFOCUS
    return PicturePlane(kind, values, corner, corner, grid.stride_px, signed)


def live_picture(preview: Preview, started_ns: int) -> Picture:
    """Return what the preview socket sent of a frame as a picture.

    Parameters
    ----------
    preview
        With its frame's header.
    started_ns
        Of the series.
    """
    header = preview.header
    frame = header.frame
    assert frame is not None
    planes = [PicturePlane(PlaneKind.RAW, preview.pixels, step=header.reduced)]
    for plane in header.planes:
        pixels = preview.planes.get(plane.name)
        if pixels is None:
            continue
        if plane.name == "restored":
            planes.append(PicturePlane(PlaneKind.RESTORED, pixels, step=header.reduced))
        elif plane.name == "saturation":
            planes.append(
                PicturePlane(PlaneKind.SATURATION, pixels, step=plane.block_px)
            )
        elif plane.name in MAPS and header.grid is not None:
            planes.append(map_plane(MAPS[plane.name], pixels, header.grid))
    estimate = header.estimate
    height, width = frame.shape[:2]
    return Picture(
        planes=tuple(planes),
        shape=(height, width),
        index=frame.index,
        sequence=frame.sequence,
        z_um=frame.z_um,
        captured_s=(frame.captured_ns - started_ns) / 1e9,
        exposure_ms=frame.exposure_ms,
        saturated=header.saturated,
        defocus_um=None if estimate is None else estimate.defocus_um,
        confidence=0.0 if estimate is None else estimate.confidence,
        signed=estimate is not None and estimate.signed,
        flags=Flag.LIVE,
    )


def pack(picture: Picture) -> bytes:
    """Return a picture as it travels; its number is put in by `numbered`."""
    parts = [
        HEADER.pack(
            MAGIC,
            VERSION,
            picture.flags,
            len(picture.planes),
            0,
            picture.sequence,
            *(picture.index.get(axis, 0) for axis in "tpcz"),
            _number(picture.z_um),
            _number(picture.captured_s),
            UNKNOWN if picture.saturated is None else picture.saturated,
            picture.exposure_ms,
            *picture.shape,
            _number(picture.defocus_um),
            picture.confidence,
            picture.signed,
        )
    ]
    for plane in picture.planes:
        parts.extend(_packed(plane))
    return b"".join(parts)


def numbered(packed: bytes, number: int) -> bytes:
    """Return a packed picture with the number that its receipt will have."""
    return packed[:8] + struct.pack("<I", number) + packed[12:]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _packed(plane: PicturePlane) -> tuple[bytes, bytes]:
    values, scale, offset = _sixteen_bits(plane)
    data, packing = _squeezed(values)
    height, width, *samples = plane.pixels.shape
    header = PLANE.pack(
        *(plane.kind, _DTYPES[values.dtype.str], packing, *(samples or (1,))),
        *(width, height, len(data)),
        *(scale, offset, plane.x0, plane.y0, plane.step, plane.signed),
    )
    return header, data


_DTYPES = {"<u2": 0, "<f4": 1, "|u1": 2}


def _sixteen_bits(plane: PicturePlane) -> tuple[NDArray[np.generic], float, float]:
    """Return values that travel, and what they mean: value = offset + scale * v."""
    pixels = plane.pixels
    if plane.kind in MAPS.values():
        return pixels.astype("<f4", copy=False), 1.0, 0.0
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        dtype = "|u1" if plane.kind is PlaneKind.SATURATION else "<u2"
        return pixels.astype(dtype, copy=False), 1.0, 0.0
    known = pixels.astype(np.float32)
    finite = known[np.isfinite(known)]
    if not finite.size:
        return np.zeros(pixels.shape, "<u2"), 1.0, 0.0
    low, high = float(finite.min()), float(finite.max())
    scale = (high - low) / 65535 or 1.0
    spread = np.nan_to_num((known - low) / scale, nan=0.0, posinf=65535, neginf=0)
    return np.rint(spread).astype("<u2"), scale, low


_LENGTH_BYTES = 4
"""Before the block of LZ4 that a page unpacks; numcodecs puts the length there."""


def _squeezed(values: NDArray[np.generic]) -> tuple[bytes, Packing]:
    plain = np.ascontiguousarray(values)
    if plain.dtype.str != "<u2" or plain.nbytes < 4096:
        return plain.tobytes(), Packing.PLAIN
    split = plain.reshape(-1).view(np.uint8).reshape(-1, 2).T.tobytes()
    packed = lz4.compress(split)[_LENGTH_BYTES:]
    if len(packed) >= plain.nbytes:
        return plain.tobytes(), Packing.PLAIN
    return packed, Packing.LZ4_SPLIT
