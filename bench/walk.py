"""Walk: one frame's way through both sides: the files it enters, who holds its slot.

A series runs in this process, every call of rtfocus is noted, and those about one
frame of its middle are kept: a call that is given its event, header or slot (or a
ticket, a job, an entry, a journal line that stands for it), or returns one of these,
and all that it calls, until the frame is durable.

The frame is its slot. A *room* holds it when it hands the slot on or is handed it: a
call that goes down and comes back is no return, as coming back is no call; and what is
told of the frame (an estimate, a preview, that it is durable) is not the frame.

Run: python -m bench.house --walk
"""

import sys
import tempfile
import threading
from functools import cache
from importlib import import_module
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path
from types import CodeType, FrameType

from useq import MDAEvent

import rtfocus
from rtfocus.app import acquire, process
from rtfocus.config import load_config
from rtfocus.frame import FrameHeader, Slot
from rtfocus.launch import on_free_ports
from rtfocus.processing.device import Job, Ticket
from rtfocus.writers.commit import Entry

ROOT = Path(rtfocus.__file__).parent
LOOP = Path(__file__).with_name("loop.yaml")
SMALL = (
    "microscope.width_px=192",
    "microscope.height_px=192",
    "transport.preview.endpoint=tcp://127.0.0.1:*",
    "processing.device=cpu",
)
FRAMES = 12
FOLLOWED = 7
"""Sequence of the frame: the first ones compile and fill caches."""
THREADS = {
    "MainThread": "acquire",
    "publish": "publish",
    "receive-io": "receive-io",
    "receive": "receive",
    "rtfocus-device": "device",
    "rtfocus-estimate": "estimate",
    "estimate": "tell",
    "rtfocus-restore": "restore",
    "write": "write",
    "commit": "commit",
}
"""By their names in a process, as the architecture calls them."""
ROOMS = ("microscope", "transport", "processing", "runtimes", "optics", "writers")
"""Of the files that are listed; the others are vocabulary, or look on."""
CAMERA = {"microscope/virtual_devices", "microscope/core"}
"""Files that stand for a camera, and for the core that its images wait in."""


class Walk:
    """Notes the calls about one frame in every thread; a context manager.

    Parameters
    ----------
    sequence
        Of the frame, below 128.
    """

    def __init__(self, sequence: int) -> None:
        self._sequence = sequence
        # As msgpack packs it: a header crosses the wire, and some calls, as bytes.
        self._packed = b"\xa8sequence" + bytes([sequence])
        self._turns = count()
        self._here = threading.local()
        self._first: dict[str, dict[str, int]] = {}
        """By thread and file the turn of the first call."""
        self._rooms: dict[int, list[str]] = {}
        """Those that hold the frame, by its slot: each side has one of its own."""
        self._durable = False

    def files(self) -> dict[str, list[str]]:
        """Return the files by thread, in the order of their first call."""
        return {
            says: sorted(self._first[name], key=self._first[name].__getitem__)
            for name, says in THREADS.items()
            if name in self._first
        }

    def carrying(self) -> set[str]:
        """Return the files of `ROOMS` that it enters, but for those of `CAMERA`."""
        entered = {file for files in self.files().values() for file in files}
        return {file for file in entered if file.startswith(ROOMS)} - CAMERA

    def table(self) -> dict[str, str]:
        """Return what the architecture says of each thread: its files by room."""
        found = {}
        for thread, files in self.files().items():
            places = [file.partition("/") for file in files if file.startswith(ROOMS)]
            rooms = groupby(places, key=itemgetter(0))
            found[thread] = "; ".join(
                f"`{room}/` {', '.join(name for *_, name in those)}"
                for room, those in rooms
            )
        return found

    def rooms(self) -> list[list[str]]:
        """Return the rooms that hold the frame, in order, for each side."""
        return list(self._rooms.values())

    def note(self, frame: FrameType, event: str, given: object) -> None:
        """Be told of a call, as `sys.setprofile` does."""
        if event not in ("call", "return") or self._durable:
            return
        if (file := _file(frame.f_code)) is None:
            return
        here = self._here
        if not hasattr(here, "begun"):
            here.begun, here.calls = [], []
        if file == "app" and frame.f_code.co_name == "_durable":
            self._durable = frame.f_locals["sequence"] == self._sequence
        if event == "call":
            values = _arguments(frame)
            about = any(map(self._is_about, values))
            about = about or bool(here.begun and here.begun[-1][1])
            here.begun.append((len(here.calls), about))
            here.calls.append((next(self._turns), file))
            self._note_rooms(frame, file, values)
        elif here.begun:
            start, about = here.begun.pop()
            if about or self._is_about(given):
                self._keep(here.calls[start:])
            if not here.begun:
                here.calls.clear()

    def _keep(self, calls: list[tuple[int, str]]) -> None:
        name = threading.current_thread().name.rstrip("-0123456789")
        first = self._first.setdefault(name, {})
        for turn, file in calls:
            first.setdefault(file, turn)

    def _note_rooms(self, frame: FrameType, file: str, values: list[object]) -> None:
        """Note who hands on the slot, and who is handed it."""
        for slot in map(_slot_of, values):
            if slot is None or not self._is_about(slot):
                continue
            before = frame.f_back and _file(frame.f_back.f_code)
            held = self._rooms.setdefault(id(slot), [])
            for place in (before, file):
                room, _, inside = (place or "").partition("/")
                if inside and held[-1:] != [room]:
                    held.append(room)

    def _is_about(self, value: object) -> bool:
        """Tell whether a value is the frame, or stands for it."""
        match value:
            case Slot():
                # One that is being made has no header yet.
                return self._is_about(getattr(value, "header", None))
            case Ticket() | Job() | Entry():
                return self._is_about(value.slot)
            case FrameHeader():
                return value.sequence == self._sequence
            case MDAEvent():
                return value.index.get("t") == self._sequence
            case bytes():
                return b"\xa5frame" in value and self._packed in value
            case dict():
                return value.get("sequence") == self._sequence
            case list() | tuple():
                return any(map(self._is_about, value))
        return False

    def __enter__(self) -> "Walk":
        threading.setprofile(self.note)
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


@cache
def _file(code: CodeType) -> str | None:
    """Return the file of a function, below the package; None: not in it."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT):
        return None
    return path.relative_to(ROOT).with_suffix("").as_posix()


def _arguments(frame: FrameType) -> list[object]:
    code, values = frame.f_code, frame.f_locals
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return [values[name] for name in names if name in values]


def _slot_of(value: object) -> Slot | None:
    if isinstance(value, Ticket | Job | Entry):
        return value.slot
    return value if isinstance(value, Slot) else None


def walk() -> Walk:
    """Send a series through both sides, in this process, and follow a frame."""
    # Before calls are noted: noted imports outlast the patience of the sides.
    for module in ("focusing", "holding", "microscope.acquisition", "report.page"):
        import_module(f"rtfocus.{module}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        loops = f"acquisition.mda.time_plan.loops={FRAMES}"
        config = on_free_ports(
            load_config(LOOP, [loops, f"run.folder={folder}", *SMALL])
        )
        stop = threading.Event()
        with Walk(FOLLOWED) as followed:
            side = threading.Thread(
                target=process, args=(config,), kwargs={"stop": stop}
            )
            side.start()
            try:
                acquire(config, stop=stop)
            except BaseException:
                stop.set()
                raise
            finally:
                side.join()
    return followed
