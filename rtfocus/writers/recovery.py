"""Recovery: a journal that was damaged is made whole from the pixels on the disk.

A power cut may leave a journal short, torn or with blocks of zeros, though the frames
lie beside it. Sound lines stay as they are. A frame that no line names and whose
checksums are right gets a line again, marked ``recovered``; what the line knew besides
its place is lost. A sequence that nothing is left of is journalled as missing. Pixels
that are not whole, and the damaged journal itself, are set aside, never deleted.
"""

import shutil
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import BinaryIO

import msgspec

from rtfocus.errors import WriterError, number_of, writing
from rtfocus.files import replace
from rtfocus.writers.arrays import RunImages
from rtfocus.writers.header import JOURNAL_NAME, RAW, REJECTED_NAME, RESTORED, RunHeader
from rtfocus.writers.journal import (
    BLANK,
    MISSING,
    WRITTEN,
    Line,
    Record,
    scan_journal,
    write_journal,
)
from rtfocus.writers.places import Index, Plan, TakenPlaces, complete

ASIDE_NAME = "set_aside"

LOST = "neither its line nor its pixels are on the disk"
"""Reason of a sequence that nothing is left of."""

_MOST_LOST = 4096
"""Sequences or places that may be absent between two that are there; one that lies
further away is a damaged number."""
_SHORTEST_LINE = 40
"""Bytes: how many lines can be lost in so much damage."""


@dataclass(slots=True)
class _Row:
    """One line of the mended journal."""

    sequence: int | None
    index: Index | None
    status: str
    start: int = -1
    """Where its line lies in the old journal; -1: it gets a new one."""
    size: int = 0
    stored: list[str] = field(default_factory=list)
    is_placed: bool = False
    """A recovered frame that takes the place of a line that called it missing."""

    @property
    def is_new(self) -> bool:
        """Tell whether the old journal has no line of it."""
        return self.start < 0


def is_damaged(folder: Path, plan: Plan) -> bool:
    """Tell whether a journal is lost, or broken in a way that no kill does."""
    path = folder / JOURNAL_NAME
    if not path.exists():
        return True
    return any(record.is_damaged for record in scan_journal(path, plan))


def read_rejected(folder: Path) -> dict[str, int]:
    """Return the messages that were no frames, by reason, of all processes so far."""
    try:
        data = (folder / REJECTED_NAME).read_bytes()
        return msgspec.json.decode(data, type=dict[str, int])
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return {}


def mend_journal(
    folder: Path, header: RunHeader, images: RunImages, *, sequences: int | None = None
) -> list[str]:
    """Make the journal whole again; one that is whole stays as it is.

    Parameters
    ----------
    folder
        The run folder; nothing else writes it.
    header
        Of the run.
    images
        Its arrays, opened; they grow where frames lie beyond their length.
    sequences
        How many a finished run had, by its report; None: not known.

    Returns
    -------
    list of str
        What was done, for people; empty: nothing.

    Raises
    ------
    WriterError
        If something cannot be read or written.
    """
    path = folder / JOURNAL_NAME
    salvage = _Salvage(path, Plan(header.series))
    strays = _Strays(images, salvage)
    if salvage.is_whole and not strays.frames and not strays.unsound:
        return []
    rows = _merge(salvage.rows, strays.frames, salvage.plan, sequences)
    steps = []
    if not path.exists():
        steps.append("journal was lost; made it anew from the frames on the disk")
    elif salvage.damage:
        copy = _keep_copy(folder, path)
        steps.append(f"journal was damaged ({salvage.damage[0]}); it lies in '{copy}'")
    if salvage.is_unended:
        steps.append("ended the last line of the journal")
    if salvage.torn:
        steps.append(f"cut {salvage.torn} bytes of a torn line from the journal")
    write_journal(path, _texts(path, rows))
    if strays.frames:
        frames = number_of(len(strays.frames), "frame")
        steps.append(f"journalled {frames} that no line named")
    lost = sum(row.is_new and row.status == MISSING for row in rows)
    if lost:
        steps.append(f"journalled {number_of(lost, 'frame')} as missing: {LOST}")
    aside = set_aside(folder, strays.unsound)
    if aside is not None:
        shards = number_of(len(strays.unsound), "unfinished shard")
        steps.append(f"moved {shards} to '{aside}'")
    return steps


class _Salvage:
    """What is left of a journal.

    Parameters
    ----------
    path
        The journal; it may be lost.
    plan
        Of the run.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.plan = plan
        self.taken = TakenPlaces(plan)
        self.rows: list[_Row] = []
        self.damage: list[str] = []
        self.torn = 0
        """Bytes of a torn last line."""
        self.is_unended = False
        """The last line is there but for its end."""
        self.extent = 0
        self._next = 0
        self._damaged_bytes = 0
        if not path.exists():
            self.damage.append("it is lost")
            return
        for record in scan_journal(path, plan):
            self._add(record)

    @property
    def is_whole(self) -> bool:
        """Tell whether every piece of it is a line in its place."""
        return not (self.damage or self.torn or self.is_unended)

    def _add(self, record: Record) -> None:
        line = record.line
        fault = record.fault
        if line is not None and (misfit := self._misfit(line)) is not None:
            line, fault = None, misfit
        if line is not None:
            self._take(record, line)
        if fault is None:
            return
        if record.is_torn and not record.is_damaged:
            self.is_unended = line is not None
            self.torn = 0 if self.is_unended else len(record.text)
            return
        self.damage.append(f"line {record.number}: {fault}")
        self._damaged_bytes += len(record.text)

    def _misfit(self, line: Line) -> str | None:
        """Return why a line cannot stand where it does."""
        sequence = line["sequence"]
        if sequence is not None:
            most = self._next + _MOST_LOST + self._damaged_bytes // _SHORTEST_LINE
            if not self._next <= sequence <= most:
                return f"sequence {sequence} where {self._next} was expected"
        if line["index"] is None:
            return None
        index = complete(line["index"])
        if index["t"] > self.extent + _MOST_LOST + self._damaged_bytes:
            return f"t={index['t']} is far beyond the other frames"
        if line["status"] == WRITTEN and index in self.taken:
            return f"a second frame at {index}"
        return None

    def _take(self, record: Record, line: Line) -> None:
        index = None if line["index"] is None else complete(line["index"])
        if line["status"] == WRITTEN and index is not None:
            self.taken.take(index)
        if index is not None:
            self.extent = max(self.extent, index["t"] + 1)
        if line["sequence"] is not None:
            self._next = line["sequence"] + 1
        row = _Row(line["sequence"], index, line["status"], record.start)
        row.size = len(record.text)
        self.rows.append(row)


class _Strays:
    """Pixels on the disk that no journal line names.

    Parameters
    ----------
    images
        Where they lie.
    salvage
        The lines that there are.
    """

    def __init__(self, images: RunImages, salvage: _Salvage) -> None:
        self._images = images
        self._plan = salvage.plan
        self._taken = salvage.taken
        shards = list(images.shards())
        self._limit = salvage.extent + len(shards) + _MOST_LOST
        stray: dict[int, tuple[Index, set[str]]] = {}
        alone: list[tuple[list[int], Path]] = []
        for name, position, shard in shards:
            places = shard.places(position)
            free = [place for place in places if self._is_free(place)]
            for place in free:
                stray.setdefault(self._plan.flat(place), (place, set()))[1].add(name)
            if len(free) == sum(map(self._plan.contains, places)):
                alone.append(([self._plan.flat(place) for place in free], shard.path))
        self.frames = self._whole_frames(list(stray.values()))
        sound = {self._plan.flat(row.index) for row in self.frames if row.index}
        self.unsound = [path for flats, path in alone if not sound.intersection(flats)]
        """Shards without a frame that is, or now gets, in the journal."""

    def _is_free(self, place: Index) -> bool:
        return self._plan.contains(place) and place not in self._taken

    def _whole_frames(self, stray: list[tuple[Index, set[str]]]) -> list[_Row]:
        """Return a row for every place that holds a whole frame."""
        plausible = [one for one in stray if one[0]["t"] < self._limit]
        longest = max((index["t"] + 1 for index, _ in plausible), default=0)
        if longest > self._images.frames:
            self._images.reserve(longest)
        needed = [name for name in (RAW, RESTORED) if name in self._images.names][:1]
        rows = []
        for index, names in plausible:
            stored = [
                name
                for name in self._images.names
                if name in names and self._images.holds(name, index)
            ]
            if stored and set(needed) <= set(stored):
                rows.append(_Row(None, index, WRITTEN, stored=stored))
        return rows


def _merge(
    known: list[_Row], recovered: list[_Row], plan: Plan, stop: int | None
) -> list[_Row]:
    """Return all rows in the order of their sequences, with none left out.

    A recovered frame gets the sequence that its rank among its neighbours says.
    """
    merging = _Merging(_fill_gaps(known, recovered, plan), recovered, plan)
    return merging.rows(stop)


def _fill_gaps(known: list[_Row], recovered: list[_Row], plan: Plan) -> list[_Row]:
    """Put recovered frames where the journal says that they are missing."""
    by_place = {plan.flat(row.index): row for row in recovered if row.index}
    rows = []
    for row in known:
        if row.status == MISSING and row.index is not None:
            gap = by_place.get(plan.flat(row.index))
            if gap is not None and not gap.is_placed:
                gap.sequence, gap.is_placed = row.sequence, True
                row = gap
        rows.append(row)
    return rows


class _Merging:
    """Puts recovered frames between the lines that are known."""

    def __init__(self, known: list[_Row], recovered: list[_Row], plan: Plan) -> None:
        self._known = known
        self._plan = plan
        free = [row for row in recovered if not row.is_placed]
        self._waiting = sorted(free, key=self._rank)
        self._ranks = [self._rank(row) for row in self._waiting]
        self._used = TakenPlaces(plan)
        for row in (*known, *recovered):
            if row.index is not None:
                self._used.take(row.index)
        self._sequence = 0
        """First one that has no row yet."""
        self._before = -1
        """Rank of the last known frame before it."""
        self._done = 0
        """Recovered frames that have their row."""

    def rows(self, stop: int | None) -> list[_Row]:
        """Return all rows; a finished run had `stop` sequences."""
        rows: list[_Row] = []
        for row in self._known:
            if row.sequence is not None:
                if row.sequence > self._sequence:
                    rows += self._fill(self._take_before(row), row.sequence)
                self._sequence = row.sequence + 1
            if row.index is not None:
                self._before = max(self._before, self._rank(row))
            rows.append(row)
        if stop is not None and stop > self._sequence + _MOST_LOST:
            stop = None
        return rows + self._fill(self._waiting[self._done :], stop)

    def _rank(self, row: _Row) -> int:
        return -1 if row.index is None else self._plan.rank(row.index)

    def _take_before(self, row: _Row) -> list[_Row]:
        """Return the recovered frames that belong before a known one."""
        if row.index is None:
            return []
        first = self._done
        self._done = max(first, bisect_left(self._ranks, self._rank(row)))
        return self._waiting[first : self._done]

    def _fill(self, frames: list[_Row], stop: int | None) -> list[_Row]:
        """Give the next sequences, up to `stop`, to these frames or to lost ones."""
        rows: list[_Row] = []
        first, before = self._sequence, self._before

        def lose(until: int) -> None:
            for sequence in range(self._sequence, until):
                place = self._plan.place(before + 1 + sequence - first)
                if place is not None and place in self._used:
                    place = None
                rows.append(_Row(sequence, place, MISSING))
            self._sequence = max(self._sequence, until)

        for number, frame in enumerate(frames):
            left = len(frames) - number - 1
            guess = first + self._rank(frame) - before - 1
            most = self._sequence + _MOST_LOST if stop is None else stop - 1 - left
            if not self._sequence <= guess <= most:
                guess = self._sequence
            # More frames than sequences: the last ones are kept without.
            if stop is None or guess < stop:
                lose(guess)
                frame.sequence = guess
                self._sequence = guess + 1
            rows.append(frame)
        if stop is not None:
            lose(stop)
        return rows


def _keep_copy(folder: Path, path: Path) -> str:
    """Copy a damaged journal to where nothing touches it; return that place."""
    for number in count(1):
        copy = folder / ASIDE_NAME / f"{path.name}.{number}"
        if not copy.exists():
            break
    with writing(copy, WriterError):
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    return str(copy)


def _texts(path: Path, rows: list[_Row]) -> Iterator[bytes]:
    """Yield the lines of the mended journal; the old one is closed at the end."""
    with path.open("rb") if path.exists() else BytesIO() as old:
        for row in rows:
            yield _text(row, old)


def _text(row: _Row, old: BinaryIO) -> bytes:
    if not row.is_new:
        old.seek(row.start)
        return old.read(row.size).strip(BLANK)
    line: Line = {
        "sequence": row.sequence,
        "status": row.status,
        "index": row.index,
        "event_index": None,
        "stored": row.stored,
        "recovered": True,
    }
    if row.status == MISSING:
        line["reason"] = LOST
    return msgspec.json.encode(line)


def set_aside(folder: Path, files: list[Path]) -> Path | None:
    """Move files of a run folder to ``set_aside/N``, each at its own relative path.

    Returns
    -------
    Path or None
        Where they are now; None: there were none.

    Raises
    ------
    WriterError
        If one cannot be moved.
    """
    if not files:
        return None
    target = next(
        path
        for number in count(1)
        if not (path := folder / ASIDE_NAME / str(number)).exists()
    )
    with writing(target, WriterError):
        for file in files:
            moved = target / file.relative_to(folder)
            moved.parent.mkdir(parents=True, exist_ok=True)
            replace(file, moved)
    return target
