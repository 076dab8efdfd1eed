"""Preview viewer: receives what a processor shows, and asks it for something."""

import time
from pathlib import Path
from types import TracebackType

import msgspec
import zmq

from rtfocus.errors import ProtocolError
from rtfocus.transport.preview_messages import (
    Answer,
    Preview,
    PreviewStatus,
    Request,
    unpack_answer,
    unpack_preview,
)
from rtfocus.transport.sockets import (
    CLIENT,
    Context,
    connect,
    preview_client,
    request_client,
)


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
            came = self.received(left_s)
            if not came:
                return None
            pictures = [one for one in came if isinstance(one, Preview)]
            if pictures:
                last = pictures[-1]
                newest = Preview(
                    last.header, last.pixels, len(pictures) - 1, last.planes
                )
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
                return [unpack_preview(parts, 0) for parts in messages]

    def ask(self, control: str, request: Request, timeout_s: float = 5.0) -> Answer:
        """Ask the processor for something, and wait for its answer.

        Parameters
        ----------
        control
            As its status says.
        request
            What is asked for.
        timeout_s
            How long to wait.
        """
        socket = request_client(self._context)
        try:
            connect(socket, control, self._curve_keys, CLIENT)
            socket.send(msgspec.msgpack.encode(request))
            if not socket.poll(int(timeout_s * 1000)):
                return Answer(done=False, why="the processor does not answer")
            return unpack_answer(socket.recv())
        except ProtocolError as error:
            return Answer(done=False, why=str(error))
        finally:
            socket.close()

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
