"""Messages: the control part of wire protocol version 1, typed.

`PROTOCOL.md` says when each one is sent. All are msgpack maps whose ``type`` is
the tag below; unknown keys are ignored, so that later versions may add some.
"""

from typing import Any, TypeVar

import msgspec

from rtfocus.errors import ProtocolError
from rtfocus.frame import (
    PROTOCOL_VERSION,
    Act,
    Estimate,
    FrameHeader,
    SeriesEnd,
    SeriesStart,
)

T = TypeVar("T")


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
        message = decoder.decode(data)
    # msgspec raises these for bad msgpack, wrong types and invalid text.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        version = _version(data)
        if version not in (None, PROTOCOL_VERSION):
            raise _wrong_version(version) from error
        msg = f"not a message of protocol version {PROTOCOL_VERSION}: {error}"
        raise ProtocolError(msg, "malformed") from error
    version = getattr(message, "version", PROTOCOL_VERSION)
    if version != PROTOCOL_VERSION:
        raise _wrong_version(version)
    return message


def _version(data: bytes) -> object:
    try:
        return msgspec.msgpack.decode(data, type=_Probe).version
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _wrong_version(version: object) -> ProtocolError:
    msg = (
        f"protocol version {version}, this side speaks {PROTOCOL_VERSION}; "
        "install the same rtfocus on both sides"
    )
    return ProtocolError(msg, "version")
