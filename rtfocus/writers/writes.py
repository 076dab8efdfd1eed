"""Writes: decides what becomes of each frame, and starts its writes shard by shard.

Frames that share a shard are held and written together: tensorstore rewrites a shard
at every write. One frame per shard is written at once.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

from rtfocus.frame import FrameResult, Slot
from rtfocus.writers.arrays import Commit, RunImages
from rtfocus.writers.commit import CommitQueue, CommitSink, Entry
from rtfocus.writers.journal import IN_ERROR, WRITTEN, frame_line, missing_line
from rtfocus.writers.places import (
    GapFinder,
    Index,
    Missing,
    Plan,
    Planned,
    TakenPlaces,
    complete,
)

Column = tuple[int, int, int]
"""(p, c, z): frames that differ only in t share shards."""


class Intake:
    """Takes frames and gaps in their order of arrival.

    Parameters
    ----------
    images
        Where pixels go.
    plan
        Which places there are.
    taken
        Which of them hold a frame already.
    before
        The last place known from an earlier process.
    sink
        Told about every entry that is committed or lost.
    outstanding
        Entries under way.
    shard_frames
        Frames along t per shard.
    """

    def __init__(
        self,
        images: RunImages,
        plan: Plan,
        taken: TakenPlaces,
        before: Planned | None,
        sink: CommitSink,
        *,
        outstanding: int,
        shard_frames: int,
    ) -> None:
        self._images = images
        self._plan = plan
        self._taken = taken
        self._gaps = GapFinder(plan, before)
        self._unplaced: list[Entry] = []
        """Gaps that wait for their places."""
        # The commit thread may start what is held back: see `_start_held`.
        self._order = threading.RLock()
        self.commits = CommitQueue(outstanding, sink, self._start_held)
        """What is under way; whoever takes a frame in waits for room there."""
        self._shards = OpenShards(images, shard_frames, self.commits.seal)

    def store(self, slot: Slot, result: FrameResult | None, error: str | None) -> None:
        """Start the writes of a frame, or journal why it has no place.

        Raises
        ------
        WriterError
            If the pixels are not what their image holds.
        """
        header = slot.frame()
        index = complete(header.index)
        with self._order:
            if not self._plan.contains(index):
                self._refuse(slot, result, "index", error)
                return
            if index in self._taken:
                # The first frame of a place stays: silence would overwrite it.
                self._refuse(slot, result, "duplicate", error)
                return
            self._place(self._gaps.arrive(Planned(header.event_index, index)))
            pixels = self._images.pixels(slot.pixels, result)
            if not pixels:
                self._refuse(slot, result, "restore", error)
                return
            self._taken.take(index)
            received_ns, stored = _unix_ns(slot), tuple(pixels)
            line = frame_line(
                header, WRITTEN, received_ns, result, stored=stored, error=error
            )
            size_bytes = sum(array.nbytes for array in pixels.values())
            entry = Entry(_one(header.sequence), [line], slot, size_bytes=size_bytes)
            self.commits.put(entry)
            self._shards.add(Held(entry, index, pixels))

    def note(
        self,
        slot: Slot,
        status: str,
        result: FrameResult | None,
        *,
        place: str | None = None,
        error: str | None = None,
    ) -> None:
        """Journal a frame without storing it."""
        header = slot.frame()
        line = frame_line(
            header, status, _unix_ns(slot), result, place=place, error=error
        )
        self.commits.put(Entry(_one(header.sequence), [line], slot, sealed=True))

    def lose(self, first: int, count: int, reason: str) -> None:
        """Note frames that never arrived; they are journalled with their places."""
        entry = Entry(sequences=range(first, first + count))
        with self._order:
            self._gaps.lose(first, count, reason)
            self._unplaced.append(entry)
            self.commits.put(entry)

    def settle(self) -> None:
        """Start all that is held back and wait until nothing is under way."""
        with self._order:
            self._shards.flush()
            self._place(self._gaps.end())
        self.commits.drain()

    def _start_held(self) -> None:
        """Start all that is held back, because somebody waits; from any thread."""
        with self._order:
            self._shards.flush()
            self._place(self._gaps.postpone())

    def _refuse(
        self, slot: Slot, result: FrameResult | None, place: str, error: str | None
    ) -> None:
        self.note(slot, IN_ERROR, result, place=place, error=error)

    def _place(self, found: list[Missing]) -> None:
        """Journal lost frames, now that their places are known as well as can be."""
        unplaced, self._unplaced = self._unplaced, []
        for entry in unplaced:
            entry.lines += [
                missing_line(missing)
                for missing in found
                if missing.sequence is not None and missing.sequence in entry.sequences
            ]
            self.commits.seal(entry, [])
        lines = [missing_line(missing) for missing in found if missing.sequence is None]
        if lines:
            self.commits.put(Entry(range(0), lines, sealed=True))


def _one(sequence: int) -> range:
    return range(sequence, sequence + 1)


def _unix_ns(slot: Slot) -> int:
    """Return the frame's arrival as Unix time; the slot has the monotonic clock."""
    return time.time_ns() - (time.monotonic_ns() - slot.received_ns)


@dataclass(frozen=True, slots=True)
class Held:
    """One frame that waits for its shard; the arrays stay in its slot."""

    entry: Entry
    index: Index
    pixels: dict[str, NDArray[Any]]
    """By image name."""


class OpenShards:
    """At most one open shard per column.

    Parameters
    ----------
    images
        Where the frames go.
    shard_frames
        Frames along t per shard.
    on_started
        Called with an entry and its futures when its writes have been started.
    """

    def __init__(
        self,
        images: RunImages,
        shard_frames: int,
        on_started: Callable[[Entry, list[Commit]], None],
    ) -> None:
        self._images = images
        self._shard_frames = shard_frames
        self._on_started = on_started
        self._held: dict[Column, list[Held]] = {}

    def add(self, held: Held) -> None:
        """Take a frame; its shard is written when its last frame is there."""
        index = held.index
        column = (index["p"], index["c"], index["z"])
        waiting = self._held.get(column, [])
        if waiting and self._shard(waiting[0].index) != self._shard(index):
            self._flush(column)
        self._held.setdefault(column, []).append(held)
        if (index["t"] + 1) % self._shard_frames == 0:
            self._flush(column)

    def flush(self) -> None:
        """Write all open shards as they are; they are rewritten if more comes."""
        for column in list(self._held):
            self._flush(column)

    def _shard(self, index: Index) -> int:
        return index["t"] // self._shard_frames

    def _flush(self, column: Column) -> None:
        for run in _consecutive(self._held.pop(column)):
            futures = [
                self._images.write(
                    name, part[0].index, [held.pixels[name] for held in part]
                )
                for name in self._images.names
                for part in _consecutive([h for h in run if name in h.pixels])
            ]
            for held in run:
                self._on_started(held.entry, futures)


def _consecutive(frames: list[Held]) -> list[list[Held]]:
    """Split into runs of neighbours along t."""
    frames = sorted(frames, key=lambda held: held.index["t"])
    runs = [frames[:1]] if frames else []
    for before, frame in pairwise(frames):
        if frame.index["t"] == before.index["t"] + 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return runs
