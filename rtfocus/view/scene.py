"""Scene: what all viewers are shown: the newest pictures, the traces, the numbers.

Sources fill it from their threads, viewers read it from the server's loop; whoever
is slow misses what came between.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rtfocus.errors import RtfocusError
from rtfocus.frame import Act, SeriesStart
from rtfocus.view.codec import Picture, pack
from rtfocus.view.source_run import Place, Region, StoredRun
from rtfocus.view.traces import Traces

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
