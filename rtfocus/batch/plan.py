"""Plan: the units of a batch, kept beside its output with what is done of them.

A unit is one image with all its planes: it owns a file, or arrays of its own, so that
no two processes ever write the same one. Whoever has the plan can do any unit, in this
process, on a worker of a scheduler or as a job of an array, and marks it when its
pixels are in place. Killed at any moment, a batch loses the units that were under way.

Beside the output ``OUT`` lies, until the batch is done, the folder
``OUT.rtfocus-batch``: ``plan.json``, its ``key``, a file per unit in ``working/``,
``done/`` or ``failed/``, and what becomes the output at the end.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from rtfocus import __version__, files
from rtfocus.errors import ConfigError, OutputError
from rtfocus.images.series import ImageSeries

Command = Literal["restore", "classify"]
Form = Literal["folder", "file", "zarr", "rows"]
"""Output: a folder of TIFFs, one TIFF, an OME-Zarr, or the JSON of ``classify``."""
Fault = Literal["input", "output", "engine", "other"]
"""What a unit failed of."""

_ENDING = ".rtfocus-batch"
_KINDS = ("working", "done", "failed", "rows")
_T = TypeVar("_T")


class Job(msgspec.Struct, frozen=True):
    """What the user asks for, so that any process can do a part of it."""

    command: Command
    source: str
    """Input, absolute."""
    given: str
    """The input as the user gave it: so its files are called."""
    output: str
    """Absolute; of ``classify`` the JSON file."""
    settings: dict[str, Any]
    """The config, merged and checked."""
    optics: str | None = None
    """As the user states them."""
    free_choice: bool = False
    """Nobody named an engine."""
    stretch: bool = False
    """8 bits for viewing."""


class Unit(msgspec.Struct, frozen=True):
    """One image."""

    key: str
    """Of input, place and target: the name of its marks."""
    path: str
    """File or folder it is read from."""
    number: int
    """Among the images of `path`."""
    facts: str
    """Digest of all that is known of it: another image is never taken for it."""
    target: str
    """Below the output: a file, or the group of a Zarr."""
    planes: int


class Failure(msgspec.Struct, frozen=True):
    """Why a unit is not done."""

    fault: Fault
    reason: str


class Plan(msgspec.Struct, frozen=True):
    """The units of a job."""

    key: str
    """Of settings, weights and optics: what a second call must share."""
    made_by: str
    """Version of rtfocus."""
    form: Form
    job: Job
    units: tuple[Unit, ...]
    broken: tuple[tuple[str, str], ...] = ()
    """Images of the input that cannot be opened at all, and why."""

    def part(self, number: int, of: int) -> tuple[Unit, ...]:
        """Return the units of part `number`, from 1, of so many equal parts."""
        return self.units[number - 1 :: of]


def facts_of(series: ImageSeries) -> str:
    """Return a digest of all that is known of an image."""
    known = [
        (one.name, getattr(series, one.name))
        for one in fields(series)
        if one.name != "read_plane"
    ]
    return digest(repr(known))


def digest(text: str) -> str:
    """Return a short name for a text; equal texts have equal ones."""
    return sha256(text.encode(errors="surrogatepass")).hexdigest()[:20]


def part_of(text: str) -> tuple[int, int]:
    """Read ``K/N``: the K-th, from 1, of N parts.

    Raises
    ------
    ConfigError
        If it is none.
    """
    number, _, of = text.partition("/")
    if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
        return int(number), int(of)
    msg = f"--unit '{text}' is no part: K/N with K from 1 to N, such as 3/40"
    raise ConfigError(msg)


class Ledger:
    """The folder beside an output: the plan, and the state of every unit.

    Parameters
    ----------
    output
        Of the batch.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + _ENDING)
        self.store = self.folder / "store.ome.zarr"
        """OME-Zarr that is being filled."""

    def plan(self) -> Plan | None:
        """Return the plan; None: there is none.

        Raises
        ------
        OutputError
            If the folder is not of a batch, or damaged.
        """
        path = self.folder / "plan.json"
        if not path.exists():
            return None
        return _read(path, Plan, "remove the folder, or give --overwrite")

    def begin(self, plan: Plan, prepare: Callable[[Path], None] | None) -> None:
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
        files.remove(self.folder / "plan.json")
        self._clear()
        for kind in _KINDS:
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        if prepare is not None:
            prepare(self.store)
        with files.whole(self.folder / "key", overwrite=True) as part:
            part.write_text(plan.key)
        self.extend(plan)

    def holds(self, plan_key: str) -> bool:
        """Tell whether this plan is still everybody's: neither ended nor begun anew."""
        try:
            return (self.folder / "key").read_text() == plan_key
        except OSError:
            return False

    def extend(self, plan: Plan) -> None:
        """Keep a plan in place of that which began; what was done stays done."""
        with files.whole(self.folder / "plan.json", overwrite=True) as part:
            part.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1))

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

    def notes(self, plan: Plan) -> list[str]:
        """Return what units had to say, each once."""
        done = self._marked("done")
        said = dict.fromkeys(
            note
            for unit in plan.units
            if unit.key in done
            for note in _read(self.folder / "done" / unit.key, _Done).notes
        )
        return list(said)

    def failures(self, plan: Plan) -> list[tuple[Unit, Failure]]:
        """Return the units that failed, and why."""
        marked = self._marked("failed")
        # Two may have done the same unit, and one have come too late.
        marked -= self._marked("done")
        return [
            (unit, _read(self.folder / "failed" / unit.key, Failure))
            for unit in plan.units
            if unit.key in marked
        ]

    def rows(self, unit: Unit) -> Path:
        """Return where ``classify`` keeps what it finds in a unit."""
        return self.folder / "rows" / unit.key

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
        known = {*_KINDS, "key", "parts", self.store.name, "rest.ome.zarr"}
        inside = list(self.folder.iterdir()) if self.folder.is_dir() else []
        foreign = [
            one.name
            for one in inside
            # What `files.whole` leaves of a killed process is hidden and of rtfocus.
            if one.name not in known and not one.name.startswith(".rtfocus-")
        ]
        if foreign or (self.folder.exists() and not self.folder.is_dir()):
            what = f"holds '{foreign[0]}'" if foreign else "is no folder"
            msg = f"'{self.folder}' {what}; choose another output"
            raise OutputError(msg)
        for one in inside:
            files.remove(one)

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
            part.write_bytes(msgspec.json.encode(content))
        except OSError as error:
            msg = f"'{target}' cannot be written: {error.strerror or error}"
            raise OutputError(msg) from error
        files.replace(part, target)

    def _unmark(self, unit: Unit, *kinds: str) -> None:
        for kind in kinds:
            files.remove(self.folder / kind / unit.key)


class _Done(msgspec.Struct):
    notes: list[str]


def _read(path: Path, kind: type[_T], remedy: str = "run the batch again") -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        msg = f"'{path}' cannot be read as the state of a batch: {error}; {remedy}"
        raise OutputError(msg) from error


def new_plan(
    form: Form,
    job: Job,
    images: list[tuple[ImageSeries, str, dict[str, str]]],
    broken: tuple[tuple[str, str], ...],
) -> Plan:
    """Make a plan.

    Parameters
    ----------
    form, job
        Of the output; what is asked for.
    images
        All of them, with their targets, and how each is made: engines with the hashes
        of their weights, optics.
    broken
        Others that cannot be opened, and why.
    """
    met: dict[Path, int] = {}
    units = []
    for series, target, _ in images:
        number = met.get(series.path, 0)
        met[series.path] = number + 1
        units.append(
            Unit(
                key=digest(f"{series.path}\n{number}\n{target}"),
                path=str(series.path),
                number=number,
                facts=facts_of(series),
                target=target,
                planes=len(series),
            )
        )
    shared = [__version__, form, msgspec.to_builtins(job)]
    # Files may come and go, each for itself; the images of one Zarr are set.
    made = (
        [how for *_, how in images]
        if form == "zarr"
        else sorted({repr(sorted(how.items())) for *_, how in images})
    )
    own = [unit.key for unit in units] if form == "zarr" else []
    return Plan(
        key=digest(repr([shared, made, own])),
        made_by=__version__,
        form=form,
        job=job,
        units=tuple(units),
        broken=broken,
    )
