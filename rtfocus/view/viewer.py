"""Viewer: one open page: what it looks at, what it may send, what it gets.

It gets one picture at a time: the next one leaves when it says that the last one is
there, and is then the newest. Whoever stops reading holds up nobody, and after a while
counts as nobody looking until it reads on. `snapshot` makes of a plane that is shown an
OME-TIFF that says what it is.
"""

import asyncio
import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket, WebSocketDisconnect

from rtfocus.errors import InputError, RtfocusError
from rtfocus.frame import Act
from rtfocus.images.metadata import OutputImage, PlaneFacts
from rtfocus.images.ome_xml import write_tiff
from rtfocus.images.series import ImageChannel, ImageSeries
from rtfocus.view.codec import PlaneKind, numbered
from rtfocus.view.scene import Packed, Scene
from rtfocus.view.stored_run import Cutout, Place

MOST_BYTES = 4096
"""Of a message of a page; none of ours comes near."""
MOST_MALFORMED = 20
"""After so many the page is sent away."""
MOST_ASKED = 4
"""Requests of a page that wait for their answer to leave: one of each kind."""
_STATE_S = 0.25

_Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Pixel = Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]


class _Message(msgspec.Struct, tag_field="type", forbid_unknown_fields=True):
    """What a page may send."""


class Ack(_Message, tag="ack"):
    """A picture is there; the next one may come."""

    number: _Index


class Select(_Message, tag="select"):
    """What the page looks at; None: any."""

    follow: bool
    t: _Index | None = None
    p: _Index | None = None
    c: _Index | None = None
    z: _Index | None = None


class Detail(_Message, tag="detail"):
    """All pixels of a region of what is shown."""

    y0: _Pixel
    x0: _Pixel
    y1: _Pixel
    x1: _Pixel
    t: _Index = 0
    p: _Index = 0
    c: _Index = 0
    z: _Index = 0


class AskAct(_Message, tag="ask"):
    """Something for the microscope to do."""

    what: Act


_decoder = msgspec.json.Decoder(Ack | Select | Detail | AskAct)


class Viewer:
    """One page, from its connection to its end.

    Parameters
    ----------
    socket
        Accepted.
    scene
        What is shown.
    """

    def __init__(self, socket: WebSocket, scene: Scene) -> None:
        self._socket, self._scene = socket, scene
        self._changed = asyncio.Event()
        self._select = Select(follow=True)
        self._detail: Detail | None = None
        self._number = 0
        self._taken = asyncio.Event()
        self._taken.set()
        self._shown: tuple[Any, ...] | None = None
        self._generation = -1
        self._rows = self._marks = 0
        self._malformed = 0
        self._replies: list[dict[str, Any]] = []
        self._answers: list[dict[str, Any]] = []
        self._asked = 0
        """Requests whose answer has not left yet."""
        self._working: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Serve until the page goes away."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._changed.set)

        looking = asyncio.create_task(self._look(wake))
        sending = asyncio.create_task(self._send())
        try:
            await self._receive()
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            for task in (looking, sending, *self._working):
                task.cancel()
            await asyncio.gather(looking, sending, return_exceptions=True)

    async def _look(self, wake: Callable[[], None]) -> None:
        """Count as a viewer, but not while a picture is left untaken."""
        while True:
            end = self._scene.listen(wake)
            try:
                await self._stalls()
            finally:
                end()
            await self._taken.wait()

    async def _stalls(self) -> None:
        left: int | None = None
        while self._taken.is_set() or left != self._number:
            left = None if self._taken.is_set() else self._number
            await asyncio.sleep(self._scene.stalled_s)

    async def _receive(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                if message.get("code") == 1009:
                    self._scene.refused["oversize"] += 1
                return
            if not self._take(message):
                await self._socket.close(1008, "too many messages not understood")
                return

    def _take(self, message: Any) -> bool:  # noqa: ANN401 (of ASGI)
        """Take a message in; False: the page is to go."""
        text = message.get("text") or message.get("bytes") or ""
        if len(text) > MOST_BYTES:
            return self._refuse("oversize", f"more than {MOST_BYTES} bytes")
        try:
            request = _decoder.decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            return self._refuse("malformed", str(error))
        if isinstance(request, Ack):
            if request.number == self._number:
                self._taken.set()
        elif isinstance(request, Select):
            self._select, self._shown = request, None
        elif isinstance(request, Detail):
            self._detail = request
        else:
            self._take_request(request.what)
        self._changed.set()
        return True

    def _refuse(self, kind: str, why: str) -> bool:
        self._scene.refused[kind] += 1
        self._malformed += 1
        if len(self._replies) < MOST_MALFORMED:
            self._replies.append({"type": "refused", "why": why[:300]})
        self._changed.set()
        return self._malformed < MOST_MALFORMED

    def _take_request(self, act: Act) -> None:
        """Begin to ask; refuse it at once while the page has asked for too much."""
        if self._asked < MOST_ASKED:
            self._asked += 1
            task = asyncio.create_task(self._ask(act))
            self._working.add(task)
            task.add_done_callback(self._working.discard)
            return
        self._scene.refused["request"] += 1
        # A page that takes no answers gets no more of them.
        if len(self._replies) < MOST_MALFORMED:
            why = f"{MOST_ASKED} requests wait for their answers: ask again after them"
            self._replies.append({"type": "answer", "what": act, "why": why})

    async def _ask(self, what: Act) -> None:
        if not self._scene.may_ask:
            self._scene.refused["request"] += 1
            why = "the config of this run allows no requests from a viewer"
        else:
            why = await run_in_threadpool(self._scene.act, what)
        self._answers.append({"type": "answer", "what": what, "why": why})
        self._changed.set()

    async def _send(self) -> None:
        """Send what is new, then wait for something new; at least every state."""
        while True:
            await self._send_news()
            if self._taken.is_set():
                await self._send_picture()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _STATE_S)
            self._changed.clear()

    async def _send_news(self) -> None:
        scene = self._scene
        while self._replies:
            await self._json(self._replies.pop(0))
        while self._answers:
            await self._json(self._answers.pop(0))
            self._asked -= 1
        about = scene.about()
        if about is not None and scene.generation != self._generation:
            self._generation = scene.generation
            self._rows = self._marks = 0
            self._shown = None
            await self._json(about)
        await self._json(scene.told())
        while (new := scene.traces.since(self._rows, self._marks)) is not None:
            if self._generation != scene.generation:
                break
            self._rows += len(new["rows"])
            self._marks += len(new["marks"])
            await self._json({"type": "traces", **new})

    async def _send_picture(self) -> None:
        try:
            shown = await self._next()
        except RtfocusError as error:
            await self._json({"type": "refused", "why": str(error)})
            return
        if shown is None:
            return
        self._number = self._number % 0x7FFFFFFF + 1
        self._taken.clear()
        await self._socket.send_bytes(numbered(shown.packed, self._number))

    async def _next(self) -> Packed | None:
        """Return the picture to show next; None: what is shown is right."""
        scene, select = self._scene, self._select
        if scene.series is None:
            return None
        if self._detail is not None:
            wanted, self._detail = self._detail, None
            place = (wanted.t, wanted.p, wanted.c, wanted.z)
            region = Cutout(wanted.y0, wanted.x0, wanted.y1, wanted.x1)
            return await run_in_threadpool(scene.read, place, region)
        if not select.follow:
            place = (select.t or 0, select.p or 0, select.c or 0, select.z or 0)
            stored = scene.stored
            there = stored is not None and stored.line(place) is not None
            return await self._unless_shown(place, there)
        return await self._followed()

    async def _followed(self) -> Packed | None:
        scene, select = self._scene, self._select
        wanted = (select.p, select.c, select.z)
        live = scene.newest(*wanted)
        place = scene.stored.newest(*wanted) if scene.stored is not None else None
        # While pictures come through the socket, the folder is left alone.
        comes = scene.is_live() and select.p is None and select.z is None
        if live is not None and (comes or place is None or live.place >= place):
            key = ("live", live.picture.sequence)
            if self._shown == key:
                return None
            self._shown = key
            return live
        return None if place is None else await self._unless_shown(place, there=True)

    async def _unless_shown(self, place: Place, there: bool) -> Packed | None:
        key = ("stored", place, there)
        if self._shown == key:  # or was tried
            return None
        self._shown = key
        return await run_in_threadpool(self._scene.read, place)

    async def _json(self, message: dict[str, Any]) -> None:
        await self._socket.send_text(msgspec.json.encode(message).decode())


_KINDS = {"raw": PlaneKind.RAW, "restored": PlaneKind.RESTORED}


def snapshot(
    scene: Scene, kind: str, place: Place, region: Cutout | None = None
) -> bytes:
    """Return a plane as a TIFF: what is stored, or what the newest picture has.

    Parameters
    ----------
    scene
        What is shown.
    kind
        ``raw`` or ``restored``.
    place
        t, p, c, z.
    region
        In pixels of the frame; None: all of it.

    Raises
    ------
    InputError
        If there is no such plane.
    """
    if kind not in _KINDS:
        msg = f"no plane '{kind}'; choose raw or restored"
        raise InputError(msg)
    stored = scene.stored
    line = None if stored is None else stored.line(place)
    if stored is not None and line is not None and kind in (line.get("stored") or ()):
        pixels, step = stored.plane("raw" if kind == "raw" else "restored", place), 1
    else:
        pixels, step = _newest(scene, kind, place)
    if region is not None:
        pixels = pixels[
            region.y0 // step : -(-region.y1 // step),
            region.x0 // step : -(-region.x1 // step),
        ]
    if not pixels.size:
        msg = f"the region {region} is not in the frame"
        raise InputError(msg)
    memory = io.BytesIO()
    write_tiff(memory, [_described(scene, kind, place, step, region, pixels)])
    return memory.getvalue()


def _newest(scene: Scene, kind: str, place: Place) -> tuple[NDArray[np.generic], int]:
    packed = scene.newest(place[1], place[2], place[3])
    if packed is not None and packed.place == place:
        for plane in packed.picture.planes:
            if plane.kind is _KINDS[kind]:
                return plane.pixels, int(plane.step)
    msg = f"there is no {kind} plane at t, p, c, z = {place}"
    raise InputError(msg)


def _described(
    scene: Scene,
    kind: str,
    place: Place,
    step: int,
    region: Cutout | None,
    pixels: NDArray[np.generic],
) -> OutputImage:
    """Return a plane with what is known of it, as an image to write."""
    series = scene.series
    assert series is not None
    t, p, c, z = place
    facts = {
        "run": scene.folder,
        "series": series.series_uid,
        "image": kind,
        **{axis: str(i) for axis, i in zip("tpcz", place, strict=True)},
        "every pixel": str(step),
    }
    if region is not None:
        facts["region y0 x0 y1 x1"] = f"{region.y0} {region.x0} {region.y1} {region.x1}"
    line = None if scene.stored is None else scene.stored.line(place)
    if line is not None:
        facts["sequence"] = str(line["sequence"])
        facts["captured_ns"] = str(line.get("captured_ns"))
        facts["defocus_um"] = str((line.get("estimate") or {}).get("defocus_um"))
    line = line or {}
    return OutputImage(
        like=ImageSeries(
            name=f"{series.name} {kind} t{t} p{p} c{c} z{z}",
            path=Path(scene.folder),
            sizes={"t": 1, "c": 1, "z": 1},
            shape=pixels.shape,
            dtype=pixels.dtype,
            read_plane=lambda _t, _c, _z: pixels,
            pixel_size_y_um=series.pixel_size_um * step,
            pixel_size_x_um=series.pixel_size_um * step,
            channels=(ImageChannel(name=series.channels[c].name),),
            position=series.positions[p].name,
        ),
        dtype=pixels.dtype,
        planes=iter([np.ascontiguousarray(pixels)]),
        made=facts,
        taken=[PlaneFacts(exposure_ms=line.get("exposure_ms"), z_um=line.get("z_um"))],
    )
