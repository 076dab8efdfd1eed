"""Parts: an evaluation as units that any process can do, and what comes of them.

A part is one contender on one field of a data set. A process keeps the contender it has
opened, with its weights, from one part to the next.
"""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from rtfocus.channel import OpticalSystem
from rtfocus.config import Config
from rtfocus.engines.registry import (
    FoundEngine,
    engine_places,
    find_engine,
)
from rtfocus.errors import ConfigError, EngineError, InputError
from rtfocus.evaluation.contenders import Contender, contender
from rtfocus.evaluation.data_sets import KNOWN, find_data_set
from rtfocus.evaluation.evaluate import SHOWN, Measured, Measuring, ScoreSheet
from rtfocus.evaluation.samples import DataSet
from rtfocus.machine import processor_name, usable_threads
from rtfocus.processing.restore import METHODS


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be evaluated, in words that mean the same to every process."""

    sets: tuple[str, ...]
    """Data sets by name, or folders."""
    data_folder: Path | None
    """With the published images."""
    optics: OpticalSystem | None
    """Of the sets that are folders."""
    offset_counts: float
    classifier: str
    """Finds the defocus for restorers."""
    folders: tuple[Path, ...]
    """With further engines."""
    threads: int
    precision: str
    call: str = ""
    """Tells calls apart: files may be others since, so nothing is kept for the next."""

    def data_sets(self) -> list[DataSet]:
        """Find the data sets.

        Raises
        ------
        InputError
            If one is not there.
        ConfigError
            If two have one name: a table could not tell them apart.
        """
        sets = [self.data_set(number) for number in range(len(self.sets))]
        for data in sets:
            if sum(one.name == data.name for one in sets) > 1:
                msg = (
                    f"two data sets are called '{data.name}' in a table; give each "
                    "once, or rename a folder"
                )
                raise ConfigError(msg)
        return sets

    def data_set(self, number: int) -> DataSet:
        """Find one of the data sets; raises as `data_sets`."""
        return find_data_set(
            self.sets[number],
            self.data_folder,
            self.optics,
            offset_counts=self.offset_counts,
        )

    def contender(self, name: str, *, blind: bool) -> Contender:
        """Find what a name stands for; raises as `contenders.contender`."""
        return contender(
            name, classifier=self.classifier, blind=blind, folders=self.folders
        )

    def contenders(
        self, names: Sequence[str], blind: Sequence[bool]
    ) -> list[Contender]:
        """Find every contender once; one that needs no optics is the same either way.

        Parameters
        ----------
        names
            As for `contender`.
        blind
            Whether the optics are kept from it, for each way it is to run.

        Raises
        ------
        ConfigError
            If two engines have one name.
        """
        contenders = [self.contender(one, blind=way) for one in names for way in blind]
        rows: dict[str, Contender] = {}
        for one in contenders:
            same = rows.setdefault(one.title, one)
            folders = [c.engine and c.engine.folder.resolve() for c in (same, one)]
            if folders[0] != folders[1]:
                msg = (
                    f"'{folders[0]}' and '{folders[1]}' are both called '{one.name}' "
                    "in a table; rename one of the folders"
                )
                raise ConfigError(msg)
        return list(rows.values())

    def config(self, one: Contender, data: DataSet) -> Config:
        """Return the live loop's config of a contender for a data set."""
        return one.config(
            data,
            folders=self.folders,
            threads=self.threads,
            precision=self.precision,
        )

    def anywhere(self) -> "Wish":
        """Return the same for processes that stand in other folders."""
        classifier, images = self.classifier, self.data_folder
        # What no contender needs need not be there.
        with suppress(EngineError):
            classifier = _anywhere(find_engine(classifier, self.folders), self.folders)
        return replace(
            self,
            sets=tuple(
                name if name in KNOWN else os.path.abspath(name) for name in self.sets
            ),
            data_folder=images and Path(os.path.abspath(images)),
            classifier=classifier,
            folders=tuple(Path(os.path.abspath(one)) for one in self.folders),
            call=uuid4().hex,
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One contender on one field of a data set."""

    key: str
    row: tuple[int, int]
    """Data set and contender, by number."""
    number: int
    """Of the field in its set."""
    field: str
    """Name of it."""
    engine: str
    """By name, or an absolute folder."""
    blind: bool
    identity: str
    """Digest of the engines with their weights: who has others is refused."""


class Done(NamedTuple):
    """What a process found in a part."""

    frames: list[Measured]
    machine: str
    """Milliseconds depend on it."""


def parts_of(
    wish: Wish, contenders: Sequence[Contender], sets: Sequence[DataSet]
) -> list[Part]:
    """Return an evaluation in parts, those of one contender on one set in a row.

    Raises
    ------
    EngineError
        If an engine, or the classifier of a restorer, is not there.
    """
    engines = [
        one.name if one.engine is None else _anywhere(one.engine, wish.folders)
        for one in contenders
    ]
    identities = [_identity(one, wish) for one in contenders]
    return [
        Part(f"{d}-{c}-{n}", (d, c), n, place.name, engine, one.blind, identity)
        for d, data in enumerate(sets)
        for c, (one, engine, identity) in enumerate(
            zip(contenders, engines, identities, strict=True)
        )
        for n, place in enumerate(data.fields)
    ]


def measure_part(wish: Wish, part: Part, _threads: int | None = None) -> Done:
    """Do a part in this process.

    Parameters
    ----------
    wish
        From `Wish.anywhere`.
    part
        Of it.
    _threads
        What the process may take; the wish says how many there are, so that figures
        are the same wherever it is done.

    Raises
    ------
    EngineError
        If this process has not the same engines, or they cannot run.
    InputError
        If the field is not there or cannot be read.
    """
    with _ONE_AT_A_TIME:
        opened = _opened(wish, part)
        fields = opened.data.fields
        if part.number >= len(fields) or fields[part.number].name != part.field:
            msg = (
                f"'{part.field}' of {opened.data.name} is not there, or another one; "
                "do all processes see the same folder?"
            )
            raise InputError(msg)
        frames: list[Measured] = []
        for sample in fields[part.number].samples():
            try:
                one = opened.measuring.measure(sample)
            except EngineError:
                close_opened()  # its state is not known
                raise
            # Only the first frames of a set are drawn: no other pixels travel.
            is_shown = part.number < SHOWN and len(frames) < SHOWN
            frames.append(one if is_shown else replace(one, image=None))
        return Done(frames, f"{processor_name()}, {usable_threads()} usable threads")


class _Opened(NamedTuple):
    """What a process keeps from one part to the next."""

    of: tuple[object, ...]
    data: DataSet
    measuring: Measuring


_kept: _Opened | None = None
_ONE_AT_A_TIME = threading.Lock()
"""A process does one part at a time, however many threads a worker has."""


def _opened(wish: Wish, part: Part) -> _Opened:
    global _kept
    of = (wish, part.engine, part.blind, part.identity, part.row)
    if _kept is None or _kept.of != of:
        close_opened()
        one = wish.contender(part.engine, blind=part.blind)
        if _identity(one, wish) != part.identity:
            msg = (
                f"engine '{one.name}' or its classifier is another one here; give all "
                "processes the same engines"
            )
            raise EngineError(msg)
        data = wish.data_set(part.row[0])
        _kept = _Opened(of, data, Measuring(one, data, wish.config(one, data)))
    return _kept


def close_opened() -> None:
    """Free the engines that this process keeps for parts to come."""
    global _kept
    if _kept is not None:
        _kept.measuring.close()
    _kept = None


class Gathering:
    """Puts together what parts found, in their order whatever order they come in.

    Parameters
    ----------
    parts, contenders, sets
        Of one evaluation.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        contenders: Sequence[Contender],
        sets: Sequence[DataSet],
    ) -> None:
        self.machines: set[str] = set()
        """Where parts were done."""
        self.done = 0
        """Parts that were."""
        self._parts = parts
        self._places = {part.key: place for place, part in enumerate(parts)}
        self._rows = {
            (d, c): ScoreSheet(one, data)
            for d, data in enumerate(sets)
            for c, one in enumerate(contenders)
        }
        self._early: dict[int, list[Measured]] = {}
        self._next = 0

    def take(self, part: Part, done: Done | None) -> None:
        """Add what a part found; None: it failed."""
        frames: list[Measured] = []
        if done is not None:
            self.done += 1
            self.machines.add(done.machine)
            frames = done.frames
        self._early[self._places[part.key]] = frames
        while self._next in self._early:
            for one in self._early.pop(self._next):
                self.row(self._parts[self._next]).take(one)
            self._next += 1

    def row(self, part: Part) -> ScoreSheet:
        """Return the score sheet that a part belongs to."""
        return self._rows[part.row]

    def sheets(self) -> list[ScoreSheet]:
        """Return the score sheets once all parts are there."""
        return [one.finish() for one in self._rows.values()]


def _identity(one: Contender, wish: Wish) -> str:
    """Return a digest of a contender's engines; their cards hold those of weights."""
    names = [name for name in (one.classifier, one.method) if name]
    networks = [name for name in names if name != "none" and name not in METHODS]
    cards = [find_engine(name, wish.folders).card for name in networks]
    return sha256(repr(cards).encode()).hexdigest()


def _anywhere(engine: FoundEngine, folders: Sequence[Path]) -> str:
    """Return the name of an engine that others find by it, else its folder."""
    is_here = engine.folder == Path(engine.name)
    places = engine_places(folders)
    if not is_here and any(place / engine.name == engine.folder for place in places):
        return engine.name
    return os.path.abspath(engine.folder)
