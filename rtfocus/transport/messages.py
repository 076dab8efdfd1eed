"""Messages: wire protocol version 1, typed, and held to the protocol as they come in.

`PROTOCOL.md` says when each one is sent. All are msgpack maps whose ``type`` is
the tag below; unknown keys are ignored, so that later versions may add some.

Numbers above all are checked: NaN and infinity are no measurements, and an integer of
a peer decides how long a loop runs and how much memory a list takes.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec.msgpack import Decoder

from rtfocus.errors import OpticsError, ProtocolError, TransportError
from rtfocus.frame import (
    MOST_PLACES,
    PROTOCOL_VERSION,
    Act,
    Estimate,
    FrameHeader,
    SeriesEnd,
    SeriesStart,
)
from rtfocus.transport.memory import Placed, Segment

T = TypeVar("T")
DTYPES = ("|u1", "<u2", "<u4", "|i1", "<i2", "<i4", "<f4", "<f8")
"""Pixel types of version 1: little-endian numbers."""
FAULTS = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises for bad msgpack, wrong types and invalid text."""


class _Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Form shared by all control messages."""


class Hello(_Message, frozen=True, tag="hello"):
    """A processor asks to record; repeated every heartbeat until it is answered."""

    version: int
    role: str
    """``recorder``: the only one in version 1."""
    uid: str
    """Unique per recorder and series; never shown to other subscribers."""
    pairing: str = ""
    """Word that the publisher must know too, unless it has none."""
    host: str = ""
    """Where the recorder runs; this and the next two are for people."""
    pid: int = 0
    """Its process there."""
    user: str = ""
    """Whose process it is."""

    @property
    def who(self) -> str:
        """Name the recorder, e.g. ``process 123 (anna) on host scope``."""
        process = f"process {self.pid}" if self.pid else "a processor"
        user = f" ({printable(self.user)})" if self.user else ""
        host = f" on host {printable(self.host)}" if self.host else ""
        return process + user + host


class Progress(_Message, frozen=True, tag="progress"):
    """What the recorder has and may be sent; also its heartbeat."""

    uid: str
    series_uid: str
    credit_upto: int
    """Frames with a smaller sequence may be sent."""
    received_upto: int
    """All frames with a smaller sequence arrived or were given up as gaps."""
    durable_upto: int
    """All frames with a smaller sequence are committed or were given up."""


class Resend(_Message, frozen=True, tag="resend"):
    """Send from here; the first one of a recorder opens the flow of frames."""

    uid: str
    series_uid: str
    sequence: int
    attempt: int
    """Counts the recorder's requests from 1; `Rewind` carries it back."""
    folder: str = ""
    """Where the recorder puts the series, for people."""
    shared: bool = False
    """It sees the segment of the welcome: frames are to come `Placed` from here on."""


class Ended(_Message, frozen=True, tag="ended"):
    """Receipt of the end of the series."""

    uid: str
    series_uid: str


class Ask(_Message, frozen=True, tag="ask"):
    """A viewer of the run asks for something; done if this side allows it."""

    uid: str
    series_uid: str
    what: Act


class Leave(_Message, frozen=True, tag="leave"):
    """The recorder goes away on purpose."""

    uid: str
    series_uid: str
    """Empty if it goes before it was welcomed."""
    reason: str


class Welcome(_Message, frozen=True, tag="welcome"):
    """The processor is the recorder of this series."""

    version: int
    uid: str
    topic: str
    """To subscribe to on the frames socket."""
    start: SeriesStart
    shared: Segment | None = None
    """Where the frames lie; a recorder may read them there."""


class Waiting(_Message, frozen=True, tag="waiting"):
    """No series yet; the processor asks again at its next heartbeat."""

    version: int


class Refused(_Message, frozen=True, tag="refused"):
    """The processor is not the recorder (any more)."""

    uid: str
    code: str
    """``occupied``, ``pairing``, ``unknown`` (restarted publisher), ``role``."""
    reason: str


class Ping(_Message, frozen=True, tag="ping"):
    """Heartbeat of the publisher, on the control and on the frames socket."""

    version: int
    series_uid: str
    sent_upto: int
    """All frames with a smaller sequence were sent since the last rewind."""
    attempt: int


class RawOnly(_Message, frozen=True, tag="raw_only"):
    """The recorder is too slow: restore later."""

    series_uid: str
    reason: str


class Abandon(_Message, frozen=True, tag="abandon"):
    """The publisher gives the series up; what was not sent will not come."""

    series_uid: str
    frames_sent: int
    """Frames the publisher took over, sent or not."""
    reason: str


class Complaint(_Message, frozen=True, tag="complaint"):
    """Answer to a message that could not be understood."""

    reason: str


class Rewind(_Message, frozen=True, tag="rewind"):
    """On the frames socket: the next frame is `sequence`, as `attempt` asked for."""

    version: int
    series_uid: str
    sequence: int
    """Larger than asked for where the publisher holds no earlier frame."""
    attempt: int


class _Probe(msgspec.Struct, frozen=True):
    """Just enough of a message to tell its version."""

    version: Any = None


FromRecorder = Hello | Progress | Resend | Ended | Ask | Leave | Estimate
FromPublisher = Welcome | Waiting | Refused | Ping | RawOnly | Abandon | Complaint
InStream = FrameHeader | Placed | SeriesEnd | Ping | Rewind

_encoder = msgspec.msgpack.Encoder()
_from_recorder: Decoder[FromRecorder] = Decoder(FromRecorder)
_from_publisher: Decoder[FromPublisher] = Decoder(FromPublisher)
_in_stream: Decoder[InStream] = Decoder(InStream)


def printable(text: str, most: int = 400) -> str:
    """Return what a peer said in a form that does a terminal no harm."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:most])
    return shown if len(text) <= most else f"{shown}..."


def pack(message: msgspec.Struct) -> bytes:
    """Encode a message."""
    return _encoder.encode(message)


def unpack_from_recorder(data: bytes) -> FromRecorder:
    """Decode what a recorder sent; ProtocolError names the fault."""
    return _unpack(_from_recorder, data)


def unpack_from_publisher(data: bytes) -> FromPublisher:
    """Decode what a publisher sent.

    Raises
    ------
    ProtocolError
        If it is no message of this protocol.
    TransportError
        If it is one, and announces optics that no microscope has.
    """
    try:
        return _unpack(_from_publisher, data)
    except ProtocolError as error:
        why = error.__cause__
        if why is None or not isinstance(why.__cause__, OpticsError):
            raise
        # Well-formed: it would be said again and again, and never be true.
        raise unreceivable(why) from error


def unreceivable(why: object) -> TransportError:
    """Say that no recorder can receive the series that a publisher announces."""
    msg = f"the publisher announces a series that cannot be received: {why}"
    return TransportError(msg)


def unpack_in_stream(data: bytes) -> InStream:
    """Decode the header part of a frames message; ProtocolError names the fault."""
    return _unpack(_in_stream, data)


def _unpack(decoder: Decoder[T], data: bytes) -> T:
    try:
        message = understood(decoder, data, "a message")
    except ProtocolError as error:
        version = _version(data)
        if version in (None, PROTOCOL_VERSION):
            raise
        raise _wrong_version(version) from error
    version = getattr(message, "version", PROTOCOL_VERSION)
    if version != PROTOCOL_VERSION:
        raise _wrong_version(version)
    return message


def _version(data: bytes) -> object:
    try:
        return msgspec.msgpack.decode(data, type=_Probe).version
    except FAULTS:
        return None


def _wrong_version(version: object) -> ProtocolError:
    msg = (
        f"protocol version {version}, this side speaks {PROTOCOL_VERSION}; "
        "install the same rtfocus on both sides"
    )
    return ProtocolError(msg, "version")


def understood(decoder: Decoder[T], data: bytes, what: str) -> T:
    """Decode `data`; ProtocolError says that it is not `what`."""
    try:
        return decoder.decode(data)
    except FAULTS as error:
        msg = f"not {what} of protocol version {PROTOCOL_VERSION}: {error}"
        raise ProtocolError(msg, "malformed") from error


MOST_LOST = 2**20
"""Longest hole in a series without an end."""
MOST_SKIPPED = 100_000
"""Most time points or events, beyond two per frame, that a frame may lie ahead."""
MOST_WARNINGS = 100
"""Warnings kept of what a publisher says at the end; the rest is counted."""
MOST_COUNT = 2**63
"""Counters of a store end below."""


def most_lost(series: SeriesStart) -> int:
    """Return how many frames may be missing in a row: more is no loss but a mistake."""
    places = _places(series)
    # Probes of an autofocus count in the sequence, but not among the places.
    return MOST_LOST if places is None else min(2 * places + 4096, MOST_LOST + places)


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
    _check_numbers(header, series)


def check_estimate(estimate: Estimate) -> None:
    """Check an estimate before anything is focused by it; ProtocolError names it."""
    counters = {
        "sequence": estimate.sequence,
        "captured_ns": estimate.captured_ns,
        "estimated_ns": estimate.estimated_ns,
    }
    numbers = {
        "defocus_um": estimate.defocus_um,
        "z_um": estimate.z_um,
        "z_offset_um": estimate.z_offset_um,
        "confidence": estimate.confidence,
        "foreground": estimate.foreground,
    }
    fault = not_finite(numbers) or _not_counter(counters)
    for name in ("confidence", "foreground"):
        # Sums of float32 may exceed 1 a little.
        if fault is None and not 0 <= (numbers[name] or 0) <= 1.001:
            fault = f"{name}={numbers[name]} is not from 0 to 1"
    if fault is not None:
        msg = f"estimate of frame {estimate.sequence}: {fault}"
        raise ProtocolError(msg, "range")


def end_fault(end: SeriesEnd) -> str | None:
    """Return what of the numbers at the end of a series cannot be, as a name."""
    numbers = {"camera_lost": end.camera_lost, "not_acquired": end.not_acquired}
    faults = (f"{k}={n}" for k, n in numbers.items() if not 0 <= n <= MOST_PLACES)
    return next(faults, None)


def readable_end(end: SeriesEnd) -> SeriesEnd:
    """Return the end of a series with words fit for a terminal and a report.

    Cut, not refused: whatever a publisher complains of, all its frames came.
    """
    warnings = tuple(map(printable, end.warnings[:MOST_WARNINGS]))
    if (more := len(end.warnings) - len(warnings)) > 0:
        warnings = (*warnings, f"{more} further warnings")
    return msgspec.structs.replace(end, reason=printable(end.reason), warnings=warnings)


def is_json(value: object) -> bool:
    """Tell whether what a peer says in JSON form can be written as that."""
    try:
        msgspec.json.encode(value)
    except (*FAULTS, TypeError):
        return False
    return True


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


def _check_numbers(header: FrameHeader, series: SeriesStart) -> None:
    """Check that the numbers of a header can be true; ProtocolError names the first."""
    counters = {
        "sequence": header.sequence,
        "captured_ns": header.captured_ns,
        "event_index": header.event_index or 0,
        "camera_image_number": header.camera_image_number or 0,
    }
    numbers = {
        "exposure_ms": header.exposure_ms,
        "z_um": header.z_um,
        "z_offset_um": header.z_offset_um,
        "planned_s": header.planned_s,
        "actual_s": header.actual_s,
    }
    fault = not_finite(numbers)
    if header.exposure_ms < 0:
        fault = f"exposure_ms={header.exposure_ms} is negative"
    fault = fault or _not_counter(counters) or _far_ahead(header, series)
    if fault is not None:
        msg = f"frame {header.sequence}: {fault}"
        raise ProtocolError(msg, "range")


def _far_ahead(header: FrameHeader, series: SeriesStart) -> str | None:
    """Return what in a header is further on in the plan than its frame can be."""
    places = _places(series)
    ahead = 2 * header.sequence + MOST_SKIPPED
    # An event that takes no image, such as an autofocus, may stand before each.
    most = ahead if places is None else 2 * places + 4096
    if (header.event_index or 0) > most:
        return f"event_index={header.event_index} is beyond {most}"
    if series.sizes.get("t", 1) is None and header.index.get("t", 0) > ahead:
        return f"t={header.index['t']} is beyond {ahead}"
    return None


def _places(series: SeriesStart) -> int | None:
    sizes = series.sizes.values()
    return None if None in sizes else math.prod(size or 1 for size in sizes)


def _not_counter(counters: Mapping[str, int]) -> str | None:
    """Return the first that is negative or does not fit a store's column."""
    for name, counter in counters.items():
        if not 0 <= counter < MOST_COUNT:
            return f"{name}={counter} is not from 0 to 2^63 - 1"
    return None


def not_finite(numbers: Mapping[str, float | None]) -> str | None:
    """Return the first number that is NaN or infinite, by name, as a fault."""
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            return f"{name} is not finite"
    return None
