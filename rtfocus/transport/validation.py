"""Validation: a peer's words against the protocol, once, where they come in."""

import math

import numpy as np

from rtfocus.errors import ProtocolError, TransportError
from rtfocus.frame import FrameHeader, SeriesStart

DTYPES = ("|u1", "<u2", "<u4", "|i1", "<i2", "<i4", "<f4", "<f8")
"""Pixel types of version 1: little-endian numbers."""


def check_series(start: SeriesStart) -> None:
    """Check a series start.

    Raises
    ------
    TransportError
        If frames like this cannot be received; names the field.
    """
    grey, rgb = len(start.shape) == 2, len(start.shape) == 3 and start.shape[2] == 3
    faults = {
        f"shape={start.shape} is not (y, x) or (y, x, 3)": not (grey or rgb)
        or min(start.shape) < 1,
        f"dtype={start.dtype!r} is none of {', '.join(DTYPES)}": start.dtype
        not in DTYPES,
        "channels is empty": not start.channels,
        "positions is empty": not start.positions,
        f"pixel_size_um={start.pixel_size_um} is not > 0": not start.pixel_size_um > 0,
        f"sizes={start.sizes} has an axis that is not t, p, c or z": not set(
            start.sizes
        )
        <= set("tpcz"),
        "series_uid is empty": not start.series_uid,
    }
    found = [fault for fault, is_fault in faults.items() if is_fault]
    if found:
        msg = f"the publisher announces a series that cannot be received: {found[0]}"
        raise TransportError(msg)


def check_header(header: FrameHeader, series: SeriesStart) -> None:
    """Check that a header belongs to the series.

    Raises
    ------
    ProtocolError
        If it does not; its shape and dtype are not looked at here.
    """
    if header.series_uid != series.series_uid:
        msg = f"frame of series '{header.series_uid}', not '{series.series_uid}'"
        raise ProtocolError(msg, "series")
    if header.sequence < 0 or (header.event_index or 0) < 0:
        msg = f"sequence={header.sequence} or event_index={header.event_index} < 0"
        raise ProtocolError(msg)
    for axis, place in header.index.items():
        size = series.sizes.get(axis, 1)
        # size is None where an axis has no end.
        if axis not in "tpcz" or place < 0 or (size is not None and place >= size):
            msg = f"frame {header.sequence}: no {axis}={place} in sizes {series.sizes}"
            raise ProtocolError(msg, "index")


def is_alike(header: FrameHeader, series: SeriesStart) -> bool:
    """Tell whether a frame has the series' shape and dtype."""
    return header.shape == series.shape and header.dtype == series.dtype


def pixel_bytes(header: FrameHeader) -> int:
    """Return how many bytes the pixels of this frame must have.

    Raises
    ------
    ProtocolError
        If its shape or dtype is none.
    """
    if header.dtype not in DTYPES or not header.shape or min(header.shape) < 1:
        msg = f"frame {header.sequence}: shape={header.shape} dtype={header.dtype!r}"
        raise ProtocolError(msg)
    return math.prod(header.shape) * np.dtype(header.dtype).itemsize
