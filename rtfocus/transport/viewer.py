"""Viewer: what those who look at a run are sent and may ask for, and their socket.

A picture is ``[header, pixels, plane, ...]``, a state ``[header]``. What a viewer asks
for goes the other way, on a socket of its own, and only where the config has one.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from rtfocus.config import Config
from rtfocus.errors import ProtocolError
from rtfocus.frame import (
    PROTOCOL_VERSION,
    Act,
    Estimate,
    FrameHeader,
    FrameResult,
    SeriesStart,
    TileGrid,
)
from rtfocus.transport.messages import DTYPES, FAULTS, understood
from rtfocus.transport.sockets import (
    CLIENT,
    Context,
    connect,
    preview_client,
    request_client,
)
from rtfocus.workers import Closing


class PlaneHeader(msgspec.Struct, frozen=True):
    """One further plane of a picture, beside its pixels."""

    name: str
    """``restored``; ``defocus`` and its ``deviation`` (um per tile, NaN = background)
    and ``expected_error`` (counts per tile), as far as they are stated; or
    ``saturation`` (blocks of `block_px` pixels, 1 = one of them is saturated)."""
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


class _FocusLine(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What every line of ``focus.ndjson`` says."""

    time_ns: int
    """Unix time."""
    p: int | None = None
    """Position; None: of no plan."""


class LookLine(_FocusLine, frozen=True, kw_only=True, tag="look"):
    """An image of a search."""

    z_um: float
    refusal: str | None
    """Why autofocus refused the image; None: it did not."""
    decision: str
    """What it led to: ``Stay``, ``Move``, ``Probe`` or ``GiveUp``."""
    way_um: float
    """That the stage was moved."""


class VerdictLine(_FocusLine, frozen=True, kw_only=True, tag="verdict"):
    """The end of a search."""

    focused: bool
    reason: str
    end_um: float
    """z where the stage was sent last."""
    images: int


class FailureLine(_FocusLine, frozen=True, kw_only=True, tag="failure"):
    """A search that broke off."""

    reason: str


class HoldLine(_FocusLine, frozen=True, kw_only=True, tag="hold"):
    """A decision of hold at the beginning of a stack."""

    step_um: float
    """That the stage was moved."""
    error_um: float
    """Focus as predicted minus where the stage would stand."""
    drift_um: float
    reason: str


class RequestLine(_FocusLine, frozen=True, kw_only=True, tag="request"):
    """What a viewer of the run asked for."""

    what: str


FocusLine = LookLine | VerdictLine | FailureLine | HoldLine | RequestLine


def focus_line(line: object) -> FocusLine | None:
    """Read a line of ``focus.ndjson``; None: it has another form, as of a peer."""
    try:
        parsed: FocusLine = msgspec.convert(line, FocusLine)
    except FAULTS:
        return None
    return parsed


def in_words(line: FocusLine) -> str | None:
    """Return a line in words, where it moved the stage or ended a search."""
    place = "" if line.p is None else f" at position {line.p}"
    match line:
        case HoldLine(step_um=step_um) if step_um:
            return f"held{place}: {step_um:+.2f} um ({line.reason})"
        case VerdictLine():
            word = "focused" if line.focused else f"not focused: {line.reason}"
            return f"{word}{place}, z {line.end_um:.2f} um, {line.images} images"
        case RequestLine():
            return f"asked for by who looks at the run: {line.what}"
        case FailureLine():
            return f"failed{place}: {line.reason}"
    return None


class PreviewStatus(msgspec.Struct, frozen=True, tag="status", tag_field="type"):
    """How the processor is; sent several times a second while there are viewers."""

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
    cannot: dict[Act, str] = {}
    """Requests that this run refuses, and why."""


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
class ShownSeries:
    """A series as viewers see it."""

    series: SeriesStart
    folder: Path
    metrics: Callable[[], dict[str, Any]]
    """Plain numbers, asked for in the preview's own thread."""
    saturation_counts: float = np.inf
    """Counts from which on a pixel is saturated."""
    act: Callable[[Act], None] = lambda _: None
    """Does what a viewer asked for; RtfocusError: why it cannot."""
    cannot: Mapping[Act, str] = field(default_factory=dict)
    """What it does not do in this run, and why."""

    def brief(self) -> SeriesStart:
        """Return the series without what is long."""
        return msgspec.structs.replace(
            self.series,
            mda_sequence=None,
            summary={},
            positions=self.series.positions[:_POSITIONS],
        )


def requests_refused(config: Config, series: SeriesStart) -> dict[Act, str]:
    """Return what a run does not do for a viewer, and why."""
    if config.autofocus.mode == "hold":
        return {}
    why = "this run holds no focus: it was started without autofocus.mode=hold"
    refused: dict[Act, str] = {"hold_on": why, "hold_off": why}
    if series.mda_sequence is None:
        refused["autofocus"] = (
            "without a plan focus is searched only where it is held: start the run "
            "with autofocus.mode=hold"
        )
    return refused


@dataclass(frozen=True)
class Preview:
    """What a viewer sees."""

    header: PreviewHeader
    pixels: NDArray[np.generic]
    """Shape and dtype as in the header."""
    planes: dict[str, NDArray[np.generic]]
    """Further planes by name."""


def maps_of(result: FrameResult) -> dict[str, NDArray[np.float32]]:
    """Return what is stated of a frame's tiles, by the names of planes."""
    if (tiles := result.defocus) is None:
        return {}
    maps = {
        "defocus": tiles.defocus_um,
        "deviation": tiles.stated_um,
        "expected_error": result.expected_error,
    }
    return {name: values for name, values in maps.items() if values is not None}


_POSITIONS = 1000
_ANSWER_MS = 5000


_preview: msgspec.msgpack.Decoder[PreviewHeader | PreviewStatus] = (
    msgspec.msgpack.Decoder(PreviewHeader | PreviewStatus)
)


_request = msgspec.msgpack.Decoder(Request)


_answer = msgspec.msgpack.Decoder(Answer)


def unpack_preview(parts: list[bytes]) -> Preview | PreviewStatus:
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
    except (*FAULTS, IndexError) as error:
        msg = f"not a preview of protocol version {PROTOCOL_VERSION}: {error}"
        raise ProtocolError(msg) from error
    return Preview(header, pixels, planes)


def unpack_request(data: bytes) -> Request:
    """Decode a request; ProtocolError names the fault."""
    return understood(_request, data, "a request")


def unpack_answer(data: bytes) -> Answer:
    """Decode an answer; ProtocolError names the fault."""
    return understood(_answer, data, "an answer")


def _array(part: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    if dtype not in DTYPES:
        msg = f"preview of dtype {dtype!r}"
        raise ProtocolError(msg)
    # NumPy would take -1 for whatever fits.
    if any(side < 0 for side in shape):
        msg = f"preview of shape {shape}"
        raise ProtocolError(msg)
    return np.frombuffer(part, dtype).reshape(shape)


class PreviewViewer(Closing):
    """Receives previews; for use in one thread. A context manager.

    Parameters
    ----------
    endpoint
        Where the processor publishes, e.g. ``tcp://127.0.0.1:5573``.
    curve_keys
        Folder of keys, where the processor has them: its ``client.key``, and a
        ``client.key_secret`` of which the processor admits the public half.
    """

    def __init__(self, endpoint: str, curve_keys: Path | None = None) -> None:
        self._context: Context = zmq.Context()
        self._curve_keys = curve_keys
        try:
            self._socket = connect(
                preview_client(self._context), endpoint, curve_keys, CLIENT
            )
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def newest(self, timeout_s: float | None = None) -> Preview | None:
        """Return the newest preview, waiting for one; None on time-out.

        Raises
        ------
        ProtocolError
            If it cannot be understood.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        newest: Preview | None = None
        while newest is None:
            left_s = None if until_s is None else max(until_s - time.monotonic(), 0.0)
            arrived = self.received(left_s)
            if not arrived:
                return None
            pictures = (one for one in reversed(arrived) if isinstance(one, Preview))
            newest = next(pictures, None)
        return newest

    def received(self, timeout_s: float | None = None) -> list[Preview | PreviewStatus]:
        """Return all that has come, oldest first, waiting for one; empty on time-out.

        Raises
        ------
        ProtocolError
            If something cannot be understood; the rest is gone too.
        """
        timeout_ms = None if timeout_s is None else int(timeout_s * 1000)
        if not self._socket.poll(timeout_ms):
            return []
        messages = [self._socket.recv_multipart()]
        while True:
            try:
                messages.append(self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return [unpack_preview(parts) for parts in messages]

    def ask(self, control: str, request: Request) -> Answer:
        """Ask for something where the status says, and wait for the answer."""
        socket = request_client(self._context)
        try:
            connect(socket, control, self._curve_keys, CLIENT)
            socket.send(msgspec.msgpack.encode(request))
            if not socket.poll(_ANSWER_MS):
                return Answer(done=False, why="the processor does not answer")
            return unpack_answer(socket.recv())
        except ProtocolError as error:
            return Answer(done=False, why=str(error))
        finally:
            socket.close()

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=0)


def saturation_blocks(
    pixels: NDArray[np.generic], level: float
) -> tuple[int, NDArray[np.uint8] | None, int]:
    """Count the saturated pixels of a frame, and say where they are.

    Parameters
    ----------
    pixels
        Shape (y, x) or (y, x, 3).
    level
        Counts from which on a pixel is saturated.

    Returns
    -------
    tuple
        Number of them; blocks of the frame, 1 where there is one, None: nowhere;
        side of a block in pixels.
    """
    block_px = -(-max(pixels.shape[:2]) // 128)
    # Most frames have none, and the largest count is found soonest.
    if not float(pixels.max()) >= level:
        return 0, None, block_px
    # Whole numbers are compared with a whole number: no copy as floats.
    limit = pixels.dtype.type(np.ceil(level)) if pixels.dtype.kind in "ui" else level
    high: NDArray[np.bool_] = np.zeros(pixels.shape, bool)
    np.greater_equal(pixels, limit, out=high)
    if high.ndim == 3:
        high = np.asarray(high.any(axis=2), bool)
    number = int(np.count_nonzero(high))
    rows, columns = (-(-side // block_px) for side in high.shape)
    whole = np.zeros((rows * block_px, columns * block_px), bool)
    whole[: high.shape[0], : high.shape[1]] = high
    blocks = whole.reshape(rows, block_px, columns, block_px).any(axis=(1, 3))
    return number, np.asarray(blocks, np.uint8), block_px
