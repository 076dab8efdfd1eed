"""Plan: the units of a batch, kept beside its output with what is done of them.

A unit is one image with all its planes: it owns a file, or arrays of its own, so that
no two processes ever write the same one. With the plan any unit can be done, in this
process, on a worker of a scheduler or as a job of an array, and marks it when its
pixels are in place. Killed at any moment, a batch loses the units that were under way.

Beside the output ``OUT`` lies, until the batch is done, the folder
``OUT.rtfocus-batch``: ``plan.json``, its ``key``, a file per unit in ``working/``,
``done/`` or ``failed/``, and what becomes the output at the end.
"""

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from rtfocus import files
from rtfocus.errors import InputError, OutputError, writing
from rtfocus.images.series import ImageSeries, writable_text
from rtfocus.images.zarr_writing import arrays_of

Command = Literal["restore", "classify"]
Form = Literal["folder", "file", "zarr", "rows"]
"""Output: a folder of TIFFs, one TIFF, an OME-Zarr, or what ``classify`` found."""
Fault = Literal["input", "changed", "output", "engine", "other"]
"""What a unit failed of; an input that changed under way is read by the next call."""

ENDING = ".rtfocus-batch"
"""Of the folder beside an output."""
_KINDS = ("working", "done", "failed", "findings", "errors")
_T = TypeVar("_T")


class BatchJob(msgspec.Struct, frozen=True):
    """What the user asks for, so that any process can do a part of it."""

    command: Command
    source: str
    """Input, absolute."""
    given: str
    """The input as the user gave it: so its files are called."""
    output: str
    """Absolute; of ``classify`` the JSON file, else the table."""
    settings: dict[str, Any]
    """The config, merged and checked."""
    optics: dict[str, Any] | None = None
    """What the user states of them, fields of `OpticalSystem`, not checked."""
    optics_origin: str = ""
    """Where they come from, as the user gave it."""
    free_choice: bool = False
    """No engine was named."""
    stretch: bool = False
    """8 bits for viewing."""
    table: str | None = None
    """CSV of ``classify``, absolute."""
    expected_error: str | None = None
    """Where the error left in restored images is written, absolute."""


class Unit(msgspec.Struct, frozen=True):
    """One image."""

    key: str
    """Of `image`, `content` and `facts`: the name of its marks."""
    image: str
    """Of input, place and target: which image it is, whatever its pixels are."""
    content: str
    """Digest of size and time of change of the files that its pixels lie in."""
    path: str
    """File or folder it is read from."""
    number: int
    """Among the images of `path`."""
    facts: str
    """Digest of all that is known of it: another image is never taken for it."""
    made: str
    """Digest of how: engines with their weights, optics. Who has others is refused."""
    target: str
    """Below the output: a file, or the group of a Zarr."""
    planes: int


class Failure(msgspec.Struct, frozen=True):
    """Why a unit is not done."""

    fault: Fault
    reason: str


class BatchPlan(msgspec.Struct, frozen=True):
    """The units of a job."""

    key: str
    """Of settings, weights and optics: what a second call must share."""
    made_by: str
    """Version of rtfocus."""
    form: Form
    job: BatchJob
    units: tuple[Unit, ...]
    broken: tuple[tuple[str, str], ...] = ()
    """Images of the input that cannot be opened at all, and why."""

    def part(self, number: int, of: int) -> tuple[Unit, ...]:
        """Return the units of part `number`, from 1, of so many equal parts."""
        return self.units[number - 1 :: of]


def facts_of(series: ImageSeries) -> str:
    """Return a digest of all that is known of an image."""
    known = [
        (field.name, getattr(series, field.name))
        for field in fields(series)
        if field.name != "read_plane"
    ]
    return digest(repr(known))


def digest_of_making(made: Mapping[str, str]) -> str:
    """Return a digest of engines with their weights, and optics."""
    return digest(repr(sorted(made.items())))


def content_of(series: ImageSeries, known: dict[Path, str] | None = None) -> str:
    """Return a digest of size and time of change of all files with an image's pixels.

    Parameters
    ----------
    series
        The image.
    known
        What is known of files and folders that other images share; filled.
    """
    known = {} if known is None else known
    places = series.files if series.pixels is None else (series.pixels,)
    states = []
    for place in places or (series.path,):
        if place not in known:
            known[place] = repr(sorted(_states(place)))
        states.append(known[place])
    return digest(repr(states))


def _states(place: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of change of a file, or of all below a folder."""
    below = [place] if not place.is_dir() else _files_below(place)
    for path in below:
        with suppress(OSError):  # gone: reading says so
            status = path.stat()
            yield str(path), status.st_size, status.st_mtime_ns


def _files_below(folder: Path) -> Iterator[Path]:
    for inside, _, names in os.walk(folder):
        yield from (Path(inside) / name for name in names)


def digest(text: str) -> str:
    """Return a short name for a text; equal texts have equal ones."""
    return sha256(text.encode(errors="surrogatepass")).hexdigest()[:20]


def units_of(
    images: Iterable[tuple[ImageSeries, str, Mapping[str, str]]],
) -> tuple[Unit, ...]:
    """Return the units of some images, each given with its target and how."""
    met: Counter[Path] = Counter()
    known: dict[Path, str] = {}
    units = []
    for series, target, made in images:
        number = met[series.path]
        met[series.path] += 1
        image = digest(f"{series.path}\n{number}\n{target}")
        content, facts = content_of(series, known), facts_of(series)
        units.append(
            Unit(
                key=digest(image + content + facts),
                image=image,
                content=content,
                path=text_of(series.path),
                number=number,
                facts=facts,
                made=digest_of_making(made),
                target=target,
                planes=len(series),
            )
        )
    return tuple(units)


def text_of(path: Path) -> str:
    """Return a path as a plan holds it; InputError: its name is no UTF-8."""
    try:
        return str(path).encode().decode()
    except UnicodeEncodeError as error:
        name = writable_text(str(path))
        msg = f"'{name}': a batch takes names in UTF-8; rename it, or use one process"
        raise InputError(msg) from error


class Ledger:
    """The folder beside an output: the plan, and the state of every unit.

    Parameters
    ----------
    output
        Of the batch.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ENDING)
        self.store = self.folder / "store.ome.zarr"
        """OME-Zarr that is being filled."""

    def plan(self) -> BatchPlan | None:
        """Return the plan; None: not begun.

        Raises
        ------
        OutputError
            If the folder is not of a batch, or damaged.
        """
        path = self.folder / "plan.json"
        if not path.exists():
            return None
        return read_state(path, BatchPlan, "remove the folder, or give --overwrite")

    def begin(self, plan: BatchPlan, prepare: Callable[[Path], None] | None) -> None:
        """Keep a new plan; what an earlier one left is removed.

        Parameters
        ----------
        plan
            From now on everybody's.
        prepare
            Makes the OME-Zarr that units will fill; None: they write files.

        Raises
        ------
        OutputError
            If something else has the folder's name, or the disk refuses it.
        """
        self._clear()
        for kind in _KINDS:
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        if prepare is not None:
            prepare(self.store)
        with files.whole(self.folder / "key", overwrite=True) as part:
            part.write_text(plan.key)
        # A store of many images has more files than can be waited for one by one.
        files.sync_everything()
        self._write(plan)

    def holds(self, plan_key: str) -> bool:
        """Tell whether this plan is still everybody's: neither ended nor begun anew."""
        try:
            return (self.folder / "key").read_bytes() == plan_key.encode()
        except OSError:
            return False

    def extend(self, begun: BatchPlan, plan: BatchPlan) -> tuple[Unit, ...]:
        """Keep a plan in place of that which began.

        What was done stays done, unless the pixels it was made of have changed.

        Returns
        -------
        tuple of Unit
            Those that were done, and are to be done anew.
        """
        before = {unit.image: unit for unit in begun.units}
        changed = []
        for unit in plan.units:
            old = before.get(unit.image, unit)
            if old.key != unit.key:
                if self.is_done(old):
                    changed.append(unit)
                self._unmark(old, *_KINDS)
                self._take_away(old)
        self._write(plan)
        return tuple(changed)

    def _write(self, plan: BatchPlan) -> None:
        with files.whole(self.folder / "plan.json", overwrite=True) as part:
            part.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1))
            files.sync(part)
        files.sync_names(self.folder)

    def _take_away(self, unit: Unit) -> None:
        """Remove the pixels that a unit has put into the OME-Zarr."""
        if self.store.is_dir():
            for array in arrays_of(self.store / unit.target):
                files.remove(array / "c")

    def start(self, unit: Unit) -> None:
        """Mark a unit as under way here."""
        at = {"host": platform.node(), "process": os.getpid(), "since": time.time()}
        self._mark("working", unit, at)

    def done(self, unit: Unit, notes: list[str]) -> None:
        """Mark a unit as done: its pixels are in place."""
        self._mark("done", unit, {"notes": notes})
        self._unmark(unit, "failed", "working")

    def failed(self, unit: Unit, failure: Failure) -> None:
        """Mark a unit as failed; it is tried again by the next call."""
        self._mark("failed", unit, msgspec.to_builtins(failure))
        self._unmark(unit, "working")

    def is_done(self, unit: Unit) -> bool:
        """Tell whether a unit's pixels are in place."""
        return (self.folder / "done" / unit.key).exists()

    def left(self, units: tuple[Unit, ...]) -> tuple[Unit, ...]:
        """Return those of some units that are not done."""
        done = self._marked("done")
        return tuple(unit for unit in units if unit.key not in done)

    def notes(self, plan: BatchPlan) -> list[str]:
        """Return what units had to say, each once."""
        done = self._marked("done")
        notes = dict.fromkeys(
            note
            for unit in plan.units
            if unit.key in done
            for note in read_state(self.folder / "done" / unit.key, _Done).notes
        )
        return list(notes)

    def failures(self, plan: BatchPlan) -> list[tuple[Unit, Failure]]:
        """Return the units that failed, and why."""
        marked = self._marked("failed")
        # Two may have done the same unit, and one have come too late.
        marked -= self._marked("done")
        return [
            (unit, read_state(self.folder / "failed" / unit.key, Failure))
            for unit in plan.units
            if unit.key in marked
        ]

    def findings(self, unit: Unit) -> Path:
        """Return where ``classify`` keeps what it finds in a unit."""
        return self.folder / "findings" / unit.key

    def errors(self, unit: Unit) -> Path:
        """Return where ``restore`` keeps the errors that are stated of a unit."""
        return self.folder / "errors" / unit.key

    @contextmanager
    def part(self, unit: Unit) -> Iterator[Path]:
        """Yield a folder of this process alone, for a unit's pixels on their way."""
        mine = f"{unit.key}-{platform.node()}-{os.getpid()}"
        folder = self.folder / "parts" / mine
        files.remove(folder)
        try:
            yield folder
        finally:
            files.remove(folder)

    def remove(self) -> None:
        """Remove the folder: the batch is done."""
        files.remove(self.folder)

    def _clear(self) -> None:
        """Remove what is in the folder, unless it is not of a batch."""
        known = {*_KINDS, "plan.json", "key", "parts", self.store.name, "rest.ome.zarr"}
        inside = list(self.folder.iterdir()) if self.folder.is_dir() else []
        foreign = [
            path.name
            for path in inside
            # What `files.whole` leaves of a killed process is hidden and of rtfocus.
            if path.name not in known and not path.name.startswith(".rtfocus-")
        ]
        if foreign or (self.folder.exists() and not self.folder.is_dir()):
            fault = f"holds '{foreign[0]}'" if foreign else "is no folder"
            msg = f"'{self.folder}' {fault}; choose another output"
            raise OutputError(msg)
        # The plan first: what is left of the others then is of no batch.
        for path in (self.folder / "plan.json", *inside):
            files.remove(path)

    def _marked(self, kind: str) -> set[str]:
        try:
            names = os.listdir(self.folder / kind)
        except FileNotFoundError:
            return set()
        return {name for name in names if not name.startswith(".")}

    def _mark(self, kind: str, unit: Unit, content: dict[str, Any]) -> None:
        target = self.folder / kind / unit.key
        part = target.with_name(f".{unit.key}-{platform.node()}-{os.getpid()}")
        try:
            with writing(target, OutputError):
                part.write_bytes(msgspec.json.encode(content))
                if kind == "done":
                    files.sync(part)
        except OutputError:
            with suppress(OSError):
                part.unlink()
            raise
        files.replace(part, target)
        if kind == "done":
            files.sync_names(target.parent)

    def _unmark(self, unit: Unit, *kinds: str) -> None:
        for kind in kinds:
            files.remove(self.folder / kind / unit.key)


class _Done(msgspec.Struct):
    notes: list[str]


def read_state(path: Path, kind: type[_T], remedy: str = "run the batch again") -> _T:
    """Read a file of a batch's folder; OutputError says what helps."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        msg = f"'{path}' cannot be read as the state of a batch: {error}; {remedy}"
        raise OutputError(msg) from error
