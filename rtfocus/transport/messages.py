"""Messages: wire protocol version 1, typed: control, previews, what viewers ask for.

`PROTOCOL.md` says when each one is sent. All are msgpack maps whose ``type`` is
the tag below; unknown keys are ignored, so that later versions may add some.
A picture is ``[header, pixels, plane, ...]``, a state ``[header]``. What a viewer asks
for goes the other way, on a socket of its own, and only where the config has one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import ProtocolError
from rtfocus.frame import (
    PROTOCOL_VERSION,
    Act,
    Estimate,
    FrameHeader,
    SeriesEnd,
    SeriesStart,
    TileGrid,
)

T = TypeVar("T")
DTYPES = ("|u1", "<u2", "<u4", "|i1", "<i2", "<i4", "<f4", "<f8")
"""Pixel types of version 1: little-endian numbers."""
# What msgspec raises for bad msgpack, wrong types and invalid text.
_FAULTS = (msgspec.MsgspecError, ValueError, RecursionError)


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


class Ended(_Message, frozen=True, tag="ended"):
    """Receipt of the end of the series."""

    uid: str
    series_uid: str


class Ask(_Message, frozen=True, tag="ask"):
    """Somebody who looks at the run asks for something; done if this side allows it."""

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
InStream = FrameHeader | SeriesEnd | Ping | Rewind

_encoder = msgspec.msgpack.Encoder()
_from_recorder: msgspec.msgpack.Decoder[FromRecorder] = msgspec.msgpack.Decoder(
    FromRecorder
)
_from_publisher: msgspec.msgpack.Decoder[FromPublisher] = msgspec.msgpack.Decoder(
    FromPublisher
)
_in_stream: msgspec.msgpack.Decoder[InStream] = msgspec.msgpack.Decoder(InStream)


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
    """Decode what a publisher sent; ProtocolError names the fault."""
    return _unpack(_from_publisher, data)


def unpack_in_stream(data: bytes) -> InStream:
    """Decode the header part of a frames message; ProtocolError names the fault."""
    return _unpack(_in_stream, data)


def _unpack(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        message = _understood(decoder, data, "a message")
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
    except _FAULTS:
        return None


def _wrong_version(version: object) -> ProtocolError:
    msg = (
        f"protocol version {version}, this side speaks {PROTOCOL_VERSION}; "
        "install the same rtfocus on both sides"
    )
    return ProtocolError(msg, "version")


class PlaneHeader(msgspec.Struct, frozen=True):
    """One further plane of a picture, beside its pixels."""

    name: str
    """``restored``, ``defocus`` (um per tile, NaN = background) or ``saturation``
    (blocks of `block_px` pixels, 1 = at least one of them is saturated)."""
    shape: tuple[int, ...]
    dtype: str
    block_px: int = 0


class PreviewHeader(msgspec.Struct, frozen=True, tag="preview", tag_field="type"):
    """What is known about the pixels beside it."""

    version: int
    shape: tuple[int, ...]
    """Of the reduced frame: (y, x) or (y, x, 3)."""
    dtype: str
    reduced: int
    """Every so many pixels of the frame, along y and x, one was taken."""
    estimate: Estimate | None
    metrics: dict[str, Any]
    frame: FrameHeader | None = None
    """Of a whole picture, sent when its result is there; without ``frame_meta``."""
    planes: tuple[PlaneHeader, ...] = ()
    """Of the parts after the pixels, in order."""
    grid: TileGrid | None = None
    """Where the tiles of the defocus map lie in the frame."""
    saturated: int | None = None
    """Saturated pixels of the whole frame; None: not known."""


class Point(msgspec.Struct, frozen=True, array_like=True):
    """One frame of the traces."""

    sequence: int
    role: str
    index: dict[str, int]
    captured_ns: int
    z_um: float | None
    defocus_um: float | None
    signed: bool
    confidence: float
    refusal: str | None
    """Why autofocus refused the frame; None: it did not, or was not asked."""


class PreviewStatus(msgspec.Struct, frozen=True, tag="status", tag_field="type"):
    """How the processor is; sent several times a second while somebody looks."""

    version: int
    state: Literal["waiting", "running"]
    series: SeriesStart | None = None
    """Without plan and summary, and at most a thousand positions."""
    folder: str = ""
    """The run folder, on `host`."""
    host: str = ""
    saturation_counts: float | None = None
    """Counts from which on a pixel is saturated; None: none is."""
    metrics: dict[str, Any] = {}
    points: list[Point] = []
    """The newest frames, oldest first; overlaps with the status before, and has now and
    then all that are kept."""
    focus: list[tuple[int, dict[str, Any]]] = []
    """The newest lines of ``focus.ndjson``, numbered; as `points`."""
    dropped: int = 0
    """Pictures that were not shown: they came too soon, or gave way to later ones."""
    control: str | None = None
    """Where requests are taken; None: nowhere."""


class Request(msgspec.Struct, frozen=True, tag="request", tag_field="type"):
    """A viewer asks for something."""

    version: int
    series_uid: str
    what: Act


class Answer(msgspec.Struct, frozen=True, tag="answer", tag_field="type"):
    """What became of a request."""

    done: bool
    """It was passed on; a refusal has its reason."""
    why: str = ""


@dataclass(frozen=True)
class Shown:
    """A series as viewers are told of it."""

    series: SeriesStart
    folder: Path
    metrics: Callable[[], dict[str, Any]]
    """Plain numbers, asked for in the preview's own thread."""
    saturation_counts: float = np.inf
    """Counts from which on a pixel is saturated."""
    act: Callable[[Act], None] = lambda _: None
    """Does what a viewer asked for; RtfocusError: why it cannot."""

    def brief(self) -> SeriesStart:
        """Return the series without what is long."""
        return msgspec.structs.replace(
            self.series,
            mda_sequence=None,
            summary={},
            positions=self.series.positions[:_POSITIONS],
        )


@dataclass(frozen=True)
class Preview:
    """What a viewer sees."""

    header: PreviewHeader
    pixels: NDArray[np.generic]
    """Shape and dtype as in the header."""
    skipped: int
    """Older previews that were there too and gave way to this one."""
    planes: dict[str, NDArray[np.generic]]
    """Further planes by name."""


_POSITIONS = 1000
_preview: msgspec.msgpack.Decoder[PreviewHeader | PreviewStatus] = (
    msgspec.msgpack.Decoder(PreviewHeader | PreviewStatus)
)
_request = msgspec.msgpack.Decoder(Request)
_answer = msgspec.msgpack.Decoder(Answer)


def unpack_preview(parts: list[bytes], skipped: int) -> Preview | PreviewStatus:
    """Decode what came from a preview socket.

    Raises
    ------
    ProtocolError
        If it cannot be understood.
    """
    try:
        header = _preview.decode(parts[0])
        if isinstance(header, PreviewStatus):
            return header
        pixels = _array(parts[1], header.dtype, header.shape)
        # More parts than are named: of a later version.
        planes = {
            plane.name: _array(part, plane.dtype, plane.shape)
            for plane, part in zip(header.planes, parts[2:], strict=False)
        }
    except (*_FAULTS, IndexError) as error:
        msg = f"not a preview of protocol version {PROTOCOL_VERSION}: {error}"
        raise ProtocolError(msg) from error
    return Preview(header, pixels, skipped, planes)


def unpack_request(data: bytes) -> Request:
    """Decode a request; ProtocolError names the fault."""
    return _understood(_request, data, "a request")


def unpack_answer(data: bytes) -> Answer:
    """Decode an answer; ProtocolError names the fault."""
    return _understood(_answer, data, "an answer")


def _understood(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    try:
        return decoder.decode(data)
    except _FAULTS as error:
        msg = f"not {what} of protocol version {PROTOCOL_VERSION}: {error}"
        raise ProtocolError(msg, "malformed") from error


def _array(part: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    if dtype not in DTYPES:
        msg = f"preview of dtype {dtype!r}"
        raise ProtocolError(msg)
    # NumPy would take -1 for whatever fits.
    if any(side < 0 for side in shape):
        msg = f"preview of shape {shape}"
        raise ProtocolError(msg)
    return np.frombuffer(part, dtype).reshape(shape)
