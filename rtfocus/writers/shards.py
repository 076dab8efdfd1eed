"""Shards: frames that share a shard are held and written together.

tensorstore rewrites a shard at every write, so with several frames per shard the
writer waits for all of them. One frame per shard is written at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

from rtfocus.writers.arrays import Commit
from rtfocus.writers.commit import Entry
from rtfocus.writers.images import RunImages
from rtfocus.writers.places import Index


@dataclass(frozen=True, slots=True)
class Held:
    """One frame that waits for its shard; the arrays stay in its slot."""

    entry: Entry
    index: Index
    pixels: dict[str, NDArray[Any]]
    """By image name."""


Column = tuple[int, int, int]
"""(p, c, z): frames that differ only in t share shards."""


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
