"""Server: one static page, one socket for it, and snapshots; it never writes.

What it serves is listed here by name: no path of a request is ever looked up on a
disk. Beyond this machine a token is required, which the page keeps as a cookie.
"""

import contextlib
import secrets
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from rtfocus.errors import ConfigError, InputError, RtfocusError, TransportError
from rtfocus.transport.sockets import is_local
from rtfocus.view.scene import Scene
from rtfocus.view.stored_run import Cutout, Place
from rtfocus.view.viewer import Viewer, snapshot

COOKIE = "rtfocus_token"
MOST_VIEWERS = 32
_SOCKET_BYTES = 1 << 16
"""Above what a viewer may send, so that it is counted; beyond it the socket closes."""
_ADDRESS_BYTES = 1024
_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/view.css": ("view.css", "text/css; charset=utf-8"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("main", "codec", "stage", "drawing", "histogram", "traces", "maps")
    },
    "/uPlot.js": ("vendor/uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    "/uPlot.css": ("vendor/uPlot.min.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Listening:
    """Where the page is served."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""
    token: str | None = None
    """Required of every visitor; None: of none, on this machine alone."""

    @property
    def is_local(self) -> bool:
        """Tell whether only this machine can connect."""
        return is_local(f"tcp://{_bracketed(self.host)}:1")

    def protected(self) -> "Listening":
        """Return the same with a token, where one is required."""
        if self.is_local or self.token is not None:
            return self
        return Listening(self.host, self.port, secrets.token_urlsafe(24))


def page_app(scene: Scene, listening: Listening) -> ASGIApp:
    """Return what serves a scene."""

    async def static(request: Request) -> Response:
        name, kind = _FILES[request.url.path]
        content = await run_in_threadpool((_PAGE / name).read_bytes)
        return Response(content, media_type=kind, headers=_HEADERS)

    async def tiff(request: Request) -> Response:
        try:
            kind, place, region = _asked_plane(request.query_params)
            content = await run_in_threadpool(snapshot, scene, kind, place, region)
        except RtfocusError as error:
            return PlainTextResponse(str(error), 404, headers=_HEADERS)
        name = f"{kind}_t{place[0]}_p{place[1]}_c{place[2]}_z{place[3]}.ome.tif"
        headers = {
            **_HEADERS,
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        return Response(content, media_type="image/tiff", headers=headers)

    async def state(_request: Request) -> Response:
        return JSONResponse(scene.told(), headers=_HEADERS)

    async def talk(websocket: WebSocket) -> None:
        if scene.viewers >= MOST_VIEWERS:
            scene.refused["viewers"] += 1
            await websocket.close(1013, "too many viewers")
            return
        await websocket.accept()
        await Viewer(websocket, scene).serve()

    app = Starlette(
        routes=[
            *(Route(path, static) for path in _FILES),
            Route("/snapshot.tif", tiff),
            Route("/state", state),
            WebSocketRoute("/socket", talk),
        ]
    )
    return _Guard(app, scene, listening)


def _asked_plane(
    query: Mapping[str, str],
) -> tuple[str, Place, Cutout | None]:
    try:
        t, p, c, z = (int(query.get(axis, "0")) for axis in "tpcz")
        corners = (
            [int(n) for n in query["region"].split(",")] if "region" in query else []
        )
        region = Cutout(*corners) if corners else None
    except (ValueError, TypeError) as error:
        msg = "a plane is named by whole numbers t, p, c, z and region=y0,x0,y1,x1"
        raise InputError(msg) from error
    if region is not None and min(corners) < 0:
        msg = f"the region {region} begins before the frame"
        raise InputError(msg)
    return query.get("kind", "raw"), (t, p, c, z), region


class _Guard:
    """Lets in visitors of this page, with the token where there is one."""

    def __init__(self, app: ASGIApp, scene: Scene, listening: Listening) -> None:
        self._app, self._scene, self._listening = app, scene, listening

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        token = self._token_in_query(scope)
        if token is not None and scope["type"] == "http" and scope["path"] == "/":
            if self._is_token(token):
                await self._welcome(send)
                return
        reason = self._fault(scope, headers)
        if reason is None:
            await self._app(scope, receive, send)
            return
        self._scene.refused[reason] += 1
        await _refuse(scope, receive, send, reason)

    def _fault(self, scope: Scope, headers: Headers) -> str | None:
        if len(scope["path"]) + len(scope["query_string"]) > _ADDRESS_BYTES:
            return "oversize"
        host = headers.get("host", "")
        if self._listening.is_local and not _is_local_name(host):
            return "host"
        origin = headers.get("origin")
        is_socket = scope["type"] == "websocket"
        # A script of another page can open sockets, and browsers say whose it is.
        if (origin is not None or is_socket) and not _is_own(origin, host):
            return "origin"
        if not is_socket and scope["method"] not in ("GET", "HEAD"):
            return "method"
        if self._listening.token is None:
            return None
        cookie: SimpleCookie = SimpleCookie()
        with contextlib.suppress(Exception):
            cookie.load(headers.get("cookie", ""))
        token = cookie.get(COOKIE)
        return None if token is not None and self._is_token(token.value) else "token"

    def _is_token(self, token: str) -> bool:
        own = self._listening.token
        return own is not None and secrets.compare_digest(token.encode(), own.encode())

    @staticmethod
    def _token_in_query(scope: Scope) -> str | None:
        query = parse_qs(bytes(scope["query_string"]).decode("latin-1"))
        return query["token"][0] if "token" in query else None

    async def _welcome(self, send: Send) -> None:
        """Put the token into a cookie, so that it leaves the address bar."""
        cookie = f"{COOKIE}={self._listening.token}; HttpOnly; SameSite=Strict; Path=/"
        await send(
            {
                "type": "http.response.start",
                "status": 303,
                "headers": [
                    (b"location", b"/"),
                    (b"set-cookie", cookie.encode("ascii")),
                    (b"cache-control", b"no-store"),
                ],
            }
        )
        await send({"type": "http.response.body", "body": b""})


async def _refuse(scope: Scope, receive: Receive, send: Send, reason: str) -> None:
    if scope["type"] == "websocket":
        message: Message = {"type": "websocket.close", "code": 1008, "reason": reason}
        await send(message)
        return
    text = {
        "token": "This page needs the token of its address: open the whole link that "
        "`rtfocus view` has printed.",
    }.get(reason, f"refused: {reason}")
    status = {"method": 405, "oversize": 414}.get(reason, 403)
    await PlainTextResponse(text, status, headers=_HEADERS)(scope, receive, send)


def _is_own(origin: str | None, host: str) -> bool:
    if origin is None:
        return False
    parts = urlsplit(origin)
    return parts.scheme in ("http", "https") and parts.netloc == host


def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return bool(name) and is_local(f"tcp://{_bracketed(name)}:1")
    except (ValueError, ConfigError):
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class PageServer:
    """Serves a scene from a thread of its own. A context manager.

    Parameters
    ----------
    scene
        What is shown.
    listening
        Where; beyond this machine with a token.

    Raises
    ------
    TransportError
        If the port is in use.
    ConfigError
        If there is no such host.
    """

    def __init__(self, scene: Scene, listening: Listening) -> None:
        self.listening = listening.protected()
        self._socket = _listen(self.listening)
        config = uvicorn.Config(
            page_app(scene, self.listening),
            log_level="error",
            access_log=False,
            lifespan="off",
            http="h11",
            loop="asyncio",
            ws="websockets-sansio",
            ws_max_size=_SOCKET_BYTES,
            ws_per_message_deflate=False,
            server_header=False,
            limit_concurrency=4 * MOST_VIEWERS,
            h11_max_incomplete_event_size=1 << 14,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="view page")

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """What to open in a browser, with the token if there is one."""
        host = self.listening.host
        if host in ("0.0.0.0", "::", ""):
            host = socket.gethostname()
        token = self.listening.token
        query = "" if token is None else f"?token={token}"
        return f"http://{_bracketed(host)}:{self.port}/{query}"

    def __enter__(self) -> "PageServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])


def _listen(listening: Listening) -> socket.socket:
    family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
    try:
        return socket.create_server((listening.host, listening.port), family=family)
    except socket.gaierror as error:
        msg = f"'{listening.host}' is no address of this machine: {error.strerror}"
        raise ConfigError(msg) from error
    except OSError as error:
        msg = (
            f"cannot listen at {listening.host}:{listening.port}: "
            f"{error.strerror or error}; choose another with --port"
        )
        raise TransportError(msg) from error


def usual_or_free(scene: Scene, listening: Listening, *, told: bool) -> PageServer:
    """Return a server at a port, or at any free one if the port was not asked for.

    Raises
    ------
    TransportError
        If the port was asked for and is in use.
    """
    try:
        return PageServer(scene, listening)
    except TransportError:
        if told:
            raise
        return PageServer(scene, Listening(listening.host, 0, listening.token))
