"""Intake: decides what becomes of each frame, and starts its writes."""

import threading
import time

from rtfocus.frame import FrameResult
from rtfocus.slots import Slot
from rtfocus.writers.commit import CommitQueue, CommitSink, Entry
from rtfocus.writers.images import RunImages
from rtfocus.writers.journal import IN_ERROR, WRITTEN, frame_line, missing_line
from rtfocus.writers.places import (
    GapFinder,
    Missing,
    Plan,
    Planned,
    TakenPlaces,
    complete,
)
from rtfocus.writers.shards import Held, OpenShards


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
