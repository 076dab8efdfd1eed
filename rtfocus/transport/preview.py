"""Preview: newest frames and metrics for viewers; never slows the recording.

A PUB socket of its own; each message is ``[header, pixels]``, the header a
msgpack map. Whatever cannot be sent at once gives way to what comes later.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from rtfocus.config.processor import PreviewConfig, TransportConfig
from rtfocus.errors import ProtocolError, TransportError
from rtfocus.frame import PROTOCOL_VERSION, Estimate
from rtfocus.transport.io_thread import IoThread, Waker
from rtfocus.transport.sockets import (
    CLIENT,
    ClientList,
    Context,
    Socket,
    bound_to,
    connect,
    preview_client,
    preview_server,
)
from rtfocus.transport.validation import DTYPES
from rtfocus.workers import Newest

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Preview:
    """What a viewer sees."""

    header: PreviewHeader
    pixels: NDArray[np.generic]
    """Shape and dtype as in the header."""
    skipped: int
    """Older previews that were there too and gave way to this one."""


class PreviewPublisher:
    """Offers frames to whoever looks.

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
        self._newest: Newest[list[bytes]] = Newest()
        self._too_soon = 0
        self.endpoint: str | None = None
        """Where it is bound, with the port that was chosen."""
        self._thread: IoThread | None = None
        if config.endpoint is None:
            return
        endpoint = config.endpoint

        def open_loop(context: Context, waker: Waker) -> "_PreviewLoop":
            socket = preview_server(context, endpoint, curve_keys, insecure=insecure)
            self.endpoint = bound_to(socket)
            clients = ClientList(context, curve_keys, CLIENT) if curve_keys else None
            return _PreviewLoop(socket, waker, self, clients)

        self._thread = IoThread("preview", open_loop, lambda _: None)

    def offer(
        self,
        pixels: NDArray[np.generic],
        estimate: Estimate | None,
        metrics: dict[str, Any],
    ) -> None:
        """Show a frame unless the last one was shown just now; never blocks.

        Parameters
        ----------
        pixels
            Shape (y, x) or (y, x, 3); copied, reduced to `max_side_px`.
        estimate
            Of this frame; None: unknown.
        metrics
            Plain numbers for the viewer.
        """
        if self._thread is None:
            return
        self._thread.check()
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._too_soon += 1
            return
        self._next_s = now_s + self._config.interval_s
        step = -(-max(pixels.shape[:2]) // self._config.max_side_px)
        reduced = np.ascontiguousarray(pixels[::step, ::step])
        header = PreviewHeader(
            version=PROTOCOL_VERSION,
            shape=reduced.shape,
            dtype=reduced.dtype.str,
            reduced=step,
            estimate=estimate,
            metrics=metrics,
        )
        message = [msgspec.msgpack.encode(header), reduced.tobytes()]
        self._newest.put(message)
        self._thread.wake()

    def take(self) -> list[bytes] | None:
        """Return the newest offer that was not sent yet."""
        return self._newest.take()

    @property
    def dropped(self) -> int:
        """Offers that gave way to later ones, or came within `interval_s`."""
        return self._too_soon + self._newest.dropped

    def close(self) -> None:
        """Close the socket."""
        if self._thread is not None:
            self._thread.close()


@contextmanager
def open_preview(
    transport: TransportConfig, *, any_port: bool = False
) -> Iterator[PreviewPublisher]:
    """Open the preview; with `any_port` elsewhere, and told, if its port is in use."""

    def opened(config: PreviewConfig) -> PreviewPublisher:
        return PreviewPublisher(
            config, curve_keys=transport.curve_keys, insecure=transport.insecure
        )

    try:
        preview = opened(transport.preview)
    except TransportError:
        if not any_port:
            raise
        elsewhere = {"endpoint": "tcp://127.0.0.1:*"}
        preview = opened(transport.preview.model_copy(update=elsewhere))
        logger.warning(
            "the preview's endpoint %s is in use; this run shows at %s",
            *(transport.preview.endpoint, preview.endpoint),
        )
    with closing(preview):
        yield preview


class _PreviewLoop:
    """Sends offers from the thread that owns the socket."""

    def __init__(
        self,
        socket: Socket,
        waker: Waker,
        offers: PreviewPublisher,
        clients: ClientList | None,
    ) -> None:
        self._clients = clients
        self._socket = socket
        self._waker = waker
        self._offers = offers
        self._poller = zmq.Poller()
        self._poller.register(waker.fileno(), zmq.POLLIN)
        if clients is not None:
            self._poller.register(clients.socket, zmq.POLLIN)

    def turn(self) -> None:
        ready = dict(self._poller.poll())
        self._waker.clear()
        if self._clients is not None and self._clients.socket in ready:
            self._clients.answer()
        message = self._offers.take()
        if message is not None:
            # PUB never waits: it drops for a viewer that does not keep up.
            self._socket.send_multipart(message)

    def close(self) -> None:
        self._socket.close()
        if self._clients is not None:
            self._clients.socket.close()


class PreviewViewer:
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
        timeout_ms = None if timeout_s is None else int(timeout_s * 1000)
        if not self._socket.poll(timeout_ms):
            return None
        number, parts = 0, self._socket.recv_multipart()
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return _unpack(parts, number)
            number += 1

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=0)

    def __enter__(self) -> "PreviewViewer":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()


def _unpack(parts: list[bytes], skipped: int) -> Preview:
    try:
        header_part, pixel_part = parts
        header = msgspec.msgpack.decode(header_part, type=PreviewHeader)
        if header.dtype not in DTYPES:
            msg = f"preview of dtype {header.dtype!r}"
            raise ProtocolError(msg)
        pixels = np.frombuffer(pixel_part, header.dtype).reshape(header.shape)
    except (msgspec.MsgspecError, ValueError) as error:
        msg = f"not a preview of protocol version {PROTOCOL_VERSION}: {error}"
        raise ProtocolError(msg) from error
    return Preview(header, pixels, skipped)
