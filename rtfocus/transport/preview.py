"""Preview: newest frames and numbers for viewers; never slows the recording.

A socket of its own that drops for whoever does not keep up, and copies nothing while
nobody looks. Messages: `rtfocus.transport.messages`.
"""

import logging
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from rtfocus.config.sections import PreviewConfig, TransportConfig
from rtfocus.errors import RtfocusError, TransportError
from rtfocus.frame import PROTOCOL_VERSION, Estimate, FrameHeader, FrameResult
from rtfocus.transport.io_thread import IoThread, Recent, Waker
from rtfocus.transport.sockets import (
    CLIENT,
    ClientList,
    Context,
    Socket,
    bound_to,
    preview_server,
    request_server,
)
from rtfocus.transport.viewer import (
    Answer,
    PlaneHeader,
    Point,
    PreviewHeader,
    PreviewStatus,
    ShownSeries,
    maps_of,
    saturation_blocks,
    unpack_request,
)
from rtfocus.workers import Newest

logger = logging.getLogger(__name__)

LOOP_SHARE = 0.005
"""Of the time of the loop's thread that pictures may take: after each it has its rest,
so that large frames and slow computers get fewer pictures, and no slower loop."""
_LONGEST_REST_S = 2.0
"""However busy the computer is, a picture is shown now and then."""
_ESTIMATE_SIDE_PX = 512
STATUS_S = 0.25
"""Interval of states while there are viewers."""
_POINTS = 512
_FOCUS_LINES = 128
_ALL_EVERY = 8
"""Of so many states one has all points and lines that are kept, for viewers that came
late or lost a state; the others have what is new since the state before the last."""


class PreviewPublisher:
    """Offers frames to viewers.

    Parameters
    ----------
    config
        With endpoint None nothing is published.
    curve_keys, insecure
        As in `TransportConfig`; one of them is required beyond loopback.
    """

    def __init__(
        self,
        config: PreviewConfig,
        *,
        curve_keys: Path | None = None,
        insecure: bool = False,
    ) -> None:
        self._config = config
        self._next_s = 0.0
        self._rests_until_s = 0.0
        self._next_picture_s: dict[int, float] = {}
        self._estimates: Newest[list[Any]] = Newest()
        self._pictures: dict[int, Newest[list[Any]]] = {}
        self._too_soon = 0
        self._failure_is_told = False
        self._shown: ShownSeries | None = None
        self._lock = threading.Lock()
        self._points: Recent[Point] = Recent(_POINTS)
        self._focus: Recent[tuple[int, dict[str, Any]]] = Recent(_FOCUS_LINES)
        self._states = 0
        self.watched = False
        """Whether a viewer is connected."""
        self.endpoint: str | None = None
        """Where it is bound, with the port that was chosen."""
        self.control: str | None = None
        """Where it takes requests; None: nowhere."""
        self._thread: IoThread | None = None
        if config.endpoint is None:
            return
        endpoint = config.endpoint

        def open_loop(context: Context, waker: Waker) -> "_PreviewLoop":
            socket = preview_server(context, endpoint, curve_keys, insecure=insecure)
            self.endpoint = bound_to(socket)
            requests = None
            if config.control is not None:
                requests = request_server(
                    context, config.control, curve_keys, insecure=insecure
                )
                self.control = bound_to(requests)
            clients = ClientList(context, curve_keys, CLIENT) if curve_keys else None
            return _PreviewLoop(socket, waker, self, clients, requests)

        self._thread = IoThread("preview", open_loop, lambda _: None)

    def begin(self, series: ShownSeries) -> None:
        """Show a series from here on."""
        with self._lock:
            self._points.clear()
            self._focus.clear()
        self._shown = series
        self._wake()

    def end(self) -> None:
        """Show that there is no series any more."""
        self._shown = None
        self._wake()

    def offer(
        self,
        pixels: NDArray[np.generic],
        estimate: Estimate | None,
        metrics: dict[str, Any],
    ) -> None:
        """Send an estimate with its frame unless one was sent just now; never blocks.

        Parameters
        ----------
        pixels
            Shape (y, x) or (y, x, 3); copied, reduced to `max_side_px`, and 512.
        estimate
            Of this frame; None: unknown.
        metrics
            Plain numbers for the viewer.
        """
        if not self._is_open():
            return
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._too_soon += 1
            return
        self._next_s = now_s + self._config.interval_s
        if not self.watched:
            return
        side_px = min(self._config.max_side_px, _ESTIMATE_SIDE_PX)
        step, reduced = _reduced(pixels, side_px)
        header = PreviewHeader(
            version=PROTOCOL_VERSION,
            shape=reduced.shape,
            dtype=reduced.dtype.str,
            reduced=step,
            estimate=estimate,
            metrics=metrics,
        )
        self._estimates.put([header, reduced])
        self._wake()

    def note(self, frame: FrameHeader, estimate: Estimate | None) -> None:
        """Take a frame into the traces; never blocks."""
        if self._thread is None:
            return
        reading = None if estimate is None else estimate.focus
        point = Point(
            sequence=frame.sequence,
            role=frame.role.value,
            index=frame.index,
            captured_ns=frame.captured_ns,
            z_um=frame.z_um,
            defocus_um=None if estimate is None else estimate.defocus_um,
            signed=estimate is not None and estimate.signed,
            confidence=0.0 if estimate is None else estimate.confidence,
            refusal=None if reading is None else reading.refusal,
        )
        with self._lock:
            self._points.append(point)

    def note_focus(self, lines: list[dict[str, Any]]) -> None:
        """Take what autofocus did into the traces; never blocks."""
        with self._lock:
            for line in lines:
                self._focus.append((self._focus.count, line))

    def show(
        self,
        frame: FrameHeader,
        pixels: NDArray[np.generic],
        result: FrameResult,
    ) -> None:
        """Show a frame with what was made of it; never blocks.

        At most one per channel and `interval_s`, and none without viewers.

        Parameters
        ----------
        frame
            Its header.
        pixels
            Shape (y, x) or (y, x, 3); copied, reduced to `max_side_px`, as the
            restored frame is.
        result
            Its arrays are copied too.
        """
        if not (self.watched and self._is_open()):
            return
        begun_s, channel = time.perf_counter(), frame.index.get("c", 0)
        if begun_s < max(self._rests_until_s, self._next_picture_s.get(channel, 0.0)):
            self._too_soon += 1
            return
        self._next_picture_s[channel] = begun_s + self._config.interval_s
        message = self._picture(frame, pixels, result)
        # By the wall: where all cores are busy, what the loop waits here is lost too.
        rest_s = (time.perf_counter() - begun_s) / LOOP_SHARE
        self._rests_until_s = begun_s + min(rest_s, _LONGEST_REST_S)
        self._pictures.setdefault(channel, Newest()).put(message)
        self._wake()

    def take(self) -> list[list[Any]]:
        """Return the newest of every kind not sent yet, each header and arrays."""
        held = [self._estimates, *list(self._pictures.values())]
        return [message for picture in held if (message := picture.take()) is not None]

    def status(self) -> PreviewStatus:
        """Return how the processor is now."""
        series = self._shown
        if series is None:
            return PreviewStatus(
                PROTOCOL_VERSION, "waiting", host=platform.node(), control=self.control
            )
        full = series.saturation_counts
        with self._lock:
            everything = self._states % _ALL_EVERY == 0
            points = self._points.news(everything=everything)
            focus = self._focus.news(everything=everything)
            self._states += 1
        return PreviewStatus(
            PROTOCOL_VERSION,
            "running",
            series=series.brief(),
            folder=str(series.folder),
            host=platform.node(),
            saturation_counts=full if np.isfinite(full) else None,
            metrics=series.metrics(),
            points=points,
            focus=focus,
            dropped=self.dropped,
            control=self.control,
            cannot=dict(series.cannot),
        )

    def welcome(self) -> None:
        """Send everything in the next state: there is a new viewer."""
        with self._lock:
            self._states = 0

    def answer(self, data: bytes) -> Answer:
        """Do what a viewer asks for, or say why not."""
        series = self._shown
        try:
            request = unpack_request(data)
            if series is None or request.series_uid != series.series.series_uid:
                return Answer(done=False, why="this series does not run any more")
            if (why := series.cannot.get(request.what)) is not None:
                return Answer(done=False, why=why)
            series.act(request.what)
        except RtfocusError as error:
            return Answer(done=False, why=str(error))
        return Answer(done=True)

    @property
    def dropped(self) -> int:
        """Offers that gave way to later ones, or came within `interval_s`."""
        held = (self._estimates, *list(self._pictures.values()))
        return self._too_soon + sum(newest.dropped for newest in held)

    def close(self) -> None:
        """Close the socket."""
        if self._thread is not None:
            self._thread.close()

    def _is_open(self) -> bool:
        """Tell whether previews leave; no fault of theirs ends a recording."""
        if self._thread is None:
            return False
        failure = self._thread.failure
        if failure is not None and not self._failure_is_told:
            self._failure_is_told = True
            logger.warning("no preview any more, the run goes on: %s", failure)
        return failure is None

    def _wake(self) -> None:
        if self._thread is not None:
            self._thread.wake()

    def _picture(
        self, frame: FrameHeader, pixels: NDArray[np.generic], result: FrameResult
    ) -> list[Any]:
        series = self._shown
        side_px = self._config.max_side_px
        step, reduced = _reduced(pixels, side_px)
        planes: list[tuple[PlaneHeader, NDArray[Any]]] = []

        def add(name: str, array: NDArray[Any], block_px: int = 0) -> None:
            header = PlaneHeader(name, array.shape, array.dtype.str, block_px)
            planes.append((header, array))

        if result.restored is not None:
            add("restored", _reduced(result.restored, side_px)[1])
        for name, tiles in maps_of(result).items():
            add(name, tiles.astype("<f4"))
        saturated = None
        if series is not None and np.isfinite(series.saturation_counts):
            saturated, blocks, block_px = saturation_blocks(
                pixels, series.saturation_counts
            )
            if blocks is not None:
                add("saturation", blocks, block_px)
        header = PreviewHeader(
            version=PROTOCOL_VERSION,
            shape=reduced.shape,
            dtype=reduced.dtype.str,
            reduced=step,
            estimate=result.estimate,
            metrics={},
            frame=msgspec.structs.replace(frame, frame_meta={}),
            planes=tuple(header for header, _ in planes),
            grid=None if result.defocus is None else result.defocus.grid,
            saturated=saturated,
        )
        return [header, reduced, *(array for _, array in planes)]


def _reduced(
    pixels: NDArray[np.generic], side_px: int
) -> tuple[int, NDArray[np.generic]]:
    """Return every how many pixels one was taken, and those, copied: slots go on."""
    step = -(-max(pixels.shape[:2]) // side_px)
    return step, pixels[::step, ::step].copy(order="C")


@contextmanager
def open_preview(
    transport: TransportConfig, *, any_port: bool = False
) -> Iterator[PreviewPublisher]:
    """Open the preview; with `any_port` elsewhere, logged, if its port is in use."""

    def opened(config: PreviewConfig) -> PreviewPublisher:
        return PreviewPublisher(
            config, curve_keys=transport.curve_keys, insecure=transport.insecure
        )

    try:
        preview = opened(transport.preview)
    except TransportError:
        if not any_port:
            raise
        names = ("endpoint", "control") if transport.preview.control else ("endpoint",)
        elsewhere = dict.fromkeys(names, "tcp://127.0.0.1:*")
        preview = opened(transport.preview.model_copy(update=elsewhere))
        logger.warning(
            "the preview's endpoint %s is in use; this run shows at %s",
            *(transport.preview.endpoint, preview.endpoint),
        )
    with closing(preview):
        yield preview


class _PreviewLoop:
    """Sends offers from the thread that owns the sockets."""

    def __init__(
        self,
        socket: Socket,
        waker: Waker,
        offers: PreviewPublisher,
        clients: ClientList | None,
        requests: Socket | None,
    ) -> None:
        self._clients = clients
        self._socket = socket
        self._waker = waker
        self._offers = offers
        self._requests = requests
        self._next_status_s = 0.0
        self._poller = zmq.Poller()
        self._poller.register(waker.fileno(), zmq.POLLIN)
        self._poller.register(socket, zmq.POLLIN)
        for other in (clients.socket if clients is not None else None, requests):
            if other is not None:
                self._poller.register(other, zmq.POLLIN)

    def turn(self) -> None:
        ready = dict(self._poller.poll(self._wait_ms()))
        self._waker.clear()
        if self._clients is not None and self._clients.socket in ready:
            self._clients.answer()
        if self._socket in ready:
            self._note_viewers()
        if self._requests is not None and self._requests in ready:
            self._answer(self._requests)
        for header, *arrays in self._offers.take():
            parts = [msgspec.msgpack.encode(header), *arrays]
            # It never waits: it drops for a viewer that does not keep up.
            self._socket.send_multipart(parts, copy=False)
        if self._offers.watched and time.monotonic() >= self._next_status_s:
            self._next_status_s = time.monotonic() + STATUS_S
            self._socket.send(msgspec.msgpack.encode(self._offers.status()))

    def _wait_ms(self) -> int | None:
        if not self._offers.watched:
            return None
        return int(max(1000 * (self._next_status_s - time.monotonic()), 0)) + 1

    def _note_viewers(self) -> None:
        # The first subscription and the end of the last one are what XPUB tells.
        subscription = self._socket.recv()
        self._offers.watched = subscription[:1] == b"\1"
        self._offers.welcome()
        self._next_status_s = 0.0

    def _answer(self, requests: Socket) -> None:
        peer, *parts = requests.recv_multipart()
        if len(parts) == 1:
            answer = self._offers.answer(parts[0])
            requests.send_multipart([peer, msgspec.msgpack.encode(answer)])

    def close(self) -> None:
        self._socket.close()
        if self._requests is not None:
            self._requests.close()
        if self._clients is not None:
            self._clients.socket.close()
