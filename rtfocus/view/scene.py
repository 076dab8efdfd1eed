"""Scene: what all viewers are shown: the newest pictures, the traces, the numbers.

Sources fill it from their threads, viewers read it from the server's loop; whoever
is slow misses what came between. `snapshot` makes of it one plane as a 16-bit OME-TIFF
that says what it is.
"""

import io
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

from rtfocus.errors import InputError, RtfocusError
from rtfocus.frame import Act, SeriesStart
from rtfocus.images.metadata import NAMESPACE, SOFTWARE
from rtfocus.images.series import writable_text
from rtfocus.view.codec import Kind, Picture, pack
from rtfocus.view.source_run import Place, Region, StoredRun, Traces

State = Literal["gone", "waiting", "running", "recording", "finished"]
"""``gone``: no processor answers; ``recording``: a folder that is not finished."""

_OVERDUE_S = 2.5
"""Longer than the processor ever rests; then the newest is read from the folder."""
_CACHE_BYTES = 128 << 20


@dataclass(frozen=True)
class Shown:
    """A picture, packed once for all viewers."""

    place: Place
    picture: Picture
    packed: bytes


@dataclass
class Scene:
    """What is shown; one for the process."""

    state: State = "gone"
    numbers: dict[str, Any] = field(default_factory=dict)
    """Of the loop, as `rtfocus.monitor.Monitor.observed` names them."""
    series: SeriesStart | None = None
    stored: StoredRun | None = None
    """The run folder, where it lies on this machine."""
    traces: Traces = field(default_factory=Traces)
    folder: str = ""
    host: str = ""
    saturation_counts: float = np.inf
    generation: int = 0
    """Counts the series shown."""
    may_ask: bool = False
    """Whether the processor takes requests."""
    act: Callable[[Act], str] = lambda _: "nothing takes requests here"
    """Passes a request on; returns why not, empty: it was passed on."""
    viewers: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Connections and messages refused, by reason."""
    skipped: int = 0
    """Pictures that came and gave way to newer ones before they were packed."""
    stalled_s: float = 5.0
    """A page that leaves its picture untaken for so long does not look: it sleeps."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._came_s = 0.0
        self._newest: dict[int, Shown] = {}
        self._cache: OrderedDict[tuple[Any, ...], Shown] = OrderedDict()
        self._listeners: list[Callable[[], None]] = []
        self.watched = threading.Event()
        """Set while a page is open."""

    def begin(
        self,
        series: SeriesStart,
        stored: StoredRun | None,
        traces: Traces,
        saturation_counts: float = np.inf,
    ) -> None:
        """Show another series from here on."""
        with self._lock:
            self.series, self.stored, self.traces = series, stored, traces
            self.saturation_counts = saturation_counts
            if stored is not None:
                self.folder = str(stored.run.folder)
            self._newest.clear()
            self._cache.clear()
            self.generation += 1
        self.changed()

    def show(self, place: Place, picture: Picture) -> None:
        """Make a picture the newest of its channel."""
        shown = Shown(place, picture, pack(picture))
        with self._lock:
            self._newest[place[2]] = shown
            self._came_s = time.monotonic()
        self.changed()

    def is_live(self) -> bool:
        """Tell whether pictures come through the socket, and none is overdue."""
        late_s = time.monotonic() - self._came_s
        return self.state == "running" and late_s < _OVERDUE_S

    def newest(self, p: int | None, c: int | None, z: int | None) -> Shown | None:
        """Return the newest live picture at a place; None: there is none."""
        with self._lock:
            found = [
                shown
                for shown in self._newest.values()
                if p in (None, shown.place[1])
                and c in (None, shown.place[2])
                and z in (None, shown.place[3])
            ]
        return max(found, key=lambda one: one.picture.sequence, default=None)

    def read(self, place: Place, region: Region | None = None) -> Shown:
        """Read a picture from the run folder; packed once for all viewers.

        Raises
        ------
        InputError
            If the run has no such place.
        """
        stored = self.stored
        key = (self.generation, place, region, stored and stored.line(place) is None)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        if stored is None:
            msg = "the run folder is not on this machine; the newest frames alone are"
            raise RtfocusError(msg)
        picture = stored.picture(place, region)
        shown = Shown(place, picture, pack(picture))
        with self._lock:
            self._cache[key] = shown
            while sum(len(one.packed) for one in self._cache.values()) > _CACHE_BYTES:
                self._cache.popitem(last=False)
        return shown

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener`, from any thread, when something changed; returns its end."""
        with self._lock:
            self._listeners.append(listener)
            self.viewers = len(self._listeners)
        self.watched.set()

        def end() -> None:
            with self._lock:
                self._listeners.remove(listener)
                self.viewers = len(self._listeners)
                if not self._listeners:
                    self.watched.clear()

        return end

    def changed(self) -> None:
        """Tell every viewer to look."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def about(self) -> dict[str, Any] | None:
        """Return what a page must know of the series; None: there is none yet."""
        series = self.series
        if series is None:
            return None
        return {
            "type": "series",
            "uid": series.series_uid,
            "name": series.name,
            "shape": series.shape,
            "dtype": series.dtype,
            "bit_depth": series.bit_depth,
            "sizes": series.sizes,
            "channels": [channel.name for channel in series.channels],
            "positions": [position.name for position in series.positions[:1000]],
            "pixel_size_um": series.pixel_size_um,
            "z_step_um": series.z_step_um,
            "planned": series.planned,
            "started_ns": series.started_ns,
            "saturation": _finite(self.saturation_counts),
            "folder": self.folder,
            "host": self.host,
            "browse": self.stored is not None,
            "control": self.may_ask,
        }

    def told(self) -> dict[str, Any]:
        """Return the numbers of the moment."""
        stored = self.stored
        return {
            "type": "state",
            "state": self.state,
            "numbers": self.numbers,
            "written": None if stored is None else stored.written,
            "newest": None if stored is None else stored.newest(),
            "viewers": self.viewers,
            "refused": dict(self.refused),
            "skipped": self.skipped,
            "browse": stored is not None,
            "control": self.may_ask,
        }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


_KINDS = {"raw": Kind.RAW, "restored": Kind.RESTORED}


def snapshot(
    scene: Scene, kind: str, place: Place, region: Region | None = None
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
    return _tiff(pixels, _facts(scene, kind, place, step, region))


def _newest(scene: Scene, kind: str, place: Place) -> tuple[NDArray[np.generic], int]:
    shown = scene.newest(place[1], place[2], place[3])
    if shown is not None and shown.place == place:
        for plane in shown.picture.planes:
            if plane.kind is _KINDS[kind]:
                return plane.pixels, int(plane.step)
    msg = f"there is no {kind} plane at t, p, c, z = {place}"
    raise InputError(msg)


def _facts(
    scene: Scene, kind: str, place: Place, step: int, region: Region | None
) -> dict[str, Any]:
    series = scene.series
    assert series is not None
    pixel_um = series.pixel_size_um * step
    t, p, c, z = place
    told = {
        "rtfocus": SOFTWARE,
        "run": scene.folder,
        "series": series.series_uid,
        "image": kind,
        **{axis: str(i) for axis, i in zip("tpcz", place, strict=True)},
        "position": series.positions[p].name,
        "every pixel": str(step),
    }
    if region is not None:
        told["region y0 x0 y1 x1"] = f"{region.y0} {region.x0} {region.y1} {region.x1}"
    line = None if scene.stored is None else scene.stored.line(place)
    plane: dict[str, Any] = {}
    if line is not None:
        told["sequence"] = str(line["sequence"])
        told["captured_ns"] = str(line.get("captured_ns"))
        estimate = line.get("estimate") or {}
        told["defocus_um"] = str(estimate.get("defocus_um"))
        if line.get("exposure_ms") is not None:
            plane |= {"ExposureTime": [line["exposure_ms"]], "ExposureTimeUnit": ["ms"]}
        if line.get("z_um") is not None:
            plane |= {"PositionZ": [line["z_um"]], "PositionZUnit": ["µm"]}
    return {
        "Name": writable_text(f"{series.name} {kind} t{t} p{p} c{c} z{z}"),
        "PhysicalSizeX": pixel_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": pixel_um,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": [writable_text(series.channels[c].name)]},
        **({"Plane": plane} if plane else {}),
        "MapAnnotation": {
            "Namespace": NAMESPACE,
            "Value": {key: writable_text(text) for key, text in told.items()},
        },
    }


def _tiff(pixels: NDArray[np.generic], facts: dict[str, Any]) -> bytes:
    is_colour = pixels.ndim == 3
    memory = io.BytesIO()
    with tifffile.TiffWriter(memory, ome=True) as file:
        file.write(
            np.ascontiguousarray(pixels),
            photometric="rgb" if is_colour else "minisblack",
            compression="zlib",
            software=SOFTWARE,
            metadata={"axes": "YXS" if is_colour else "YX", **facts},
        )
    return memory.getvalue()
