"""Places: where planned frames belong in the store, and where lost ones did.

A lost frame says nothing about itself, so its place follows from its neighbours'
ranks in the plan, not from the order of arrival. Positions have a path each.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import WriterError
from rtfocus.files import is_reserved_name, same_name
from rtfocus.frame import AXES, Position, SeriesStart

if TYPE_CHECKING:
    import useq

NOT_SENT = "not sent"
"""Why a place is empty that the sender never had a frame for."""

Index = dict[str, int]
"""Complete index: every one of `AXES`."""
Pixels = Mapping[str, NDArray[Any]]
"""Arrays of one frame by image name."""
Sampled = tuple[Index, NDArray[Any] | None]
"""Place of a frame and values of it; None: they are not known."""

MOST_HOLES = 2**20
"""Most planned frames in a row, never sent, whose places are listed one by one."""
MOST_EVENTS = 100_000
"""Longest plan of a series without an end that is expanded to find lost frames."""
MOST_SAMPLED = 8
"""Frames looked at per channel; one of 2048 x 2048 is read in some 10 ms."""
_MOST_PIXELS = 1 << 14
"""Looked at per plane, evenly spread; 16 of them beyond each percentile."""
_BLOCK_BITS = 1 << 15
"""Places per block: a damaged journal may name places far away."""

Order = Callable[[int], Index | None]
"""Maps a frame's ordinal in the plan to its place."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What a frame says about its place in the plan."""

    event_index: int | None
    """Ordinal of the MDA event; None outside a plan."""
    index: Index
    """Place in the store."""


def complete(index: dict[str, int]) -> Index:
    """Return `index` with 0 for the axes that it leaves out."""
    return {axis: index.get(axis, 0) for axis in AXES}


class Plan:
    """The planned places, by ordinal: the frame's rank in the acquisition."""

    def __init__(self, series: SeriesStart) -> None:
        self.sizes: dict[str, int | None] = {
            axis: series.sizes.get(axis, 1) for axis in AXES
        }
        self._order = [axis for axis in series.sizes if axis in AXES]
        self._mda_sequence = series.mda_sequence
        self._planned = series.planned

    @property
    def places(self) -> int | None:
        """Number of planned places; None: unbounded."""
        sizes = [size for size in self.sizes.values() if size is not None]
        return prod(sizes) if len(sizes) == len(AXES) else None

    @property
    def images(self) -> int | None:
        """Number of planned images; None: without an end, or not known.

        A plan may leave places out: a channel at every third time point, stacks of
        different heights.
        """
        if self._planned is not None or self._mda_sequence is not None:
            return self._planned
        return self.places

    def contains(self, index: Index) -> bool:
        """Tell whether the store has a place for `index`."""
        return all(
            index[axis] >= 0 and (size is None or index[axis] < size)
            for axis, size in self.sizes.items()
        )

    def flat(self, index: Index) -> int:
        """Return a unique number of a place, dense and growing with t."""
        number = index["t"]
        for axis in ("p", "c", "z"):
            size = self.sizes[axis]
            number = number * (size or 1) + index[axis]
        return number

    def rank(self, index: Index) -> int:
        """Return where a place stands in the order of acquisition.

        Of a place that the plan does not have: its number in the store.
        """
        listed = self._ranks.get(self.flat(index))
        if listed is not None:
            return listed
        ordinal = self.ordinal(Planned(None, index))
        return self.flat(index) if ordinal is None else ordinal

    def place(self, rank: int) -> Index | None:
        """Return the place of this rank in the order of acquisition; None: none."""
        if self._ranks:
            return _item(self._image_places, rank)
        index = self._regular(rank)
        return index if index is not None and self.contains(index) else None

    def ordinal(self, frame: Planned) -> int | None:
        """Return the frame's rank in the plan; None where it cannot be known."""
        if frame.event_index is not None:
            return frame.event_index
        if None in [self.sizes[axis] for axis in self._order[1:]]:
            return None
        rank = 0
        for axis in self._order:
            rank = rank * (self.sizes[axis] or 1) + frame.index[axis]
        return rank

    def agreeing_order(self, known: list[Planned]) -> Order | None:
        """Return the first order of events that explains the `known` frames."""
        orders: list[Order] = [self._regular, self._acquired, self._all_events]
        for order in orders:
            if known and all(self._explains(order, frame) for frame in known):
                return order
        return None

    def _explains(self, order: Order, frame: Planned) -> bool:
        ordinal = self.ordinal(frame)
        return ordinal is not None and order(ordinal) == frame.index

    def _regular(self, ordinal: int) -> Index | None:
        """All combinations of the axes, the last one fastest."""
        index = complete({})
        for axis in reversed(self._order):
            size = self.sizes[axis]
            if size is None:
                index[axis], ordinal = ordinal, 0
            else:
                ordinal, index[axis] = divmod(ordinal, size)
        return index if ordinal == 0 else None

    def _acquired(self, ordinal: int) -> Index | None:
        """Return the place of the n-th event that takes an image (irregular plans)."""
        return _item(self._image_places, ordinal)

    def _all_events(self, ordinal: int) -> Index | None:
        """Return the place of the n-th event, autofocus and others included."""
        return _item([place for place, _ in self._events], ordinal)

    @cached_property
    def _ranks(self) -> dict[int, int]:
        """Rank of every place by its number, where a plan lists the places."""
        try:
            return {self.flat(p): rank for rank, p in enumerate(self._image_places)}
        except ValueError:  # a plan that this useq does not read
            return {}

    @cached_property
    def _image_places(self) -> list[Index]:
        return [place for place, is_image in self._events if is_image]

    @cached_property
    def _events(self) -> list[tuple[Index, bool]]:
        """Read the useq plan, only when the regular order does not fit."""
        if self._mda_sequence is None:
            return []
        # Imported late: irregular plans are rare, and useq takes a while.
        import useq

        try:
            sequence = useq.MDASequence.model_validate(self._mda_sequence)
        except ValueError:
            # It came over the wire, and nothing but the places of gaps needs it.
            return []
        if not _is_modest(sequence, self.places):
            return []
        return [
            (complete(dict(event.index)), event.action.type == "acquire_image")
            for event in sequence
        ]


def _is_modest(sequence: "useq.MDASequence", places: int | None) -> bool:
    """Tell whether a plan fits its series: it is expanded in memory."""
    # The count is an upper bound where positions have plans of their own.
    most = MOST_EVENTS if places is None else 64 * places + 4096
    try:
        return _most_events(sequence) <= most
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        # Endless or nonsensical; useq itself would not come to an end either.
        return False


def _most_events(sequence: "useq.MDASequence") -> float:
    """Return how many events a useq plan can have, without making one."""
    own = 1.0
    if sequence.time_plan is not None:
        own *= max(sequence.time_plan.num_timepoints(), 1)
    if sequence.z_plan is not None:
        own *= max(sequence.z_plan.num_positions(), 1)
    if sequence.grid_plan is not None:
        own *= max(sequence.grid_plan.num_positions(), 1)
    own *= max(len(sequence.channels), 1)
    below = [_most_events(p.sequence) for p in sequence.stage_positions if p.sequence]
    plain = len(sequence.stage_positions) - len(below)
    return own * max(plain + sum(below), 1.0)


def _item(places: list[Index], ordinal: int) -> Index | None:
    return places[ordinal] if 0 <= ordinal < len(places) else None


class TakenPlaces:
    """Which places of the store hold a frame; one bit each, in blocks that are used."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._blocks: defaultdict[int, bytearray] = defaultdict(
            lambda: bytearray(_BLOCK_BITS // 8)
        )

    def __contains__(self, index: Index) -> bool:
        block, bit = divmod(self._plan.flat(index), _BLOCK_BITS)
        bits = self._blocks.get(block)
        return bits is not None and bool(bits[bit // 8] >> bit % 8 & 1)

    def take(self, index: Index) -> None:
        """Mark a place as holding a frame."""
        block, bit = divmod(self._plan.flat(index), _BLOCK_BITS)
        self._blocks[block][bit // 8] |= 1 << bit % 8


def thinned(plane: NDArray[Any]) -> NDArray[Any]:
    """Return some of a plane's finite values, evenly spread, as an array of its own."""
    step = max(1, int(np.sqrt(plane.size / _MOST_PIXELS)))
    sample = plane[::step, ::step].flatten()
    return sample[np.isfinite(sample)] if sample.dtype.kind == "f" else sample


class FrameSample:
    """Stored frames, evenly spread, however many there are: what contrast is from.

    Of frames that are noted with their pixels the values are kept: reading them back
    when a run ends would take longer than all the rest of its end.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], list[Sampled]] = {}
        self._strides: dict[tuple[str, int], tuple[int, int]] = {}

    def note(self, images: Iterable[str], index: Index, pixels: Pixels) -> None:
        """Take in a frame that is stored in these images; `pixels` may lack some."""
        for name in images:
            self._keep((name, index["c"]), index, pixels.get(name))

    def frames(self, image: str, channel: int) -> list[Sampled]:
        """Return the places to look at, with the values where they are known."""
        return self._kept.get((image, channel), [])

    def _keep(
        self, key: tuple[str, int], index: Index, plane: NDArray[Any] | None
    ) -> None:
        """Keep every n-th; n doubles when there are too many."""
        stride, count = self._strides.get(key, (1, 0))
        sample = self._kept.setdefault(key, [])
        if count % stride == 0:
            sample.append((index, None if plane is None else thinned(plane)))
        if len(sample) > MOST_SAMPLED:
            del sample[1::2]
            stride *= 2
        self._strides[key] = stride, count + 1


@dataclass(frozen=True, slots=True)
class Missing:
    """One place without a frame, or one lost frame without a known place."""

    sequence: int | None
    """None: the sender never had this frame."""
    index: Index | None
    """None: the place is not known, or the frame was an autofocus probe."""
    reason: str


class GapFinder:
    """Collects lost sequences until a neighbour tells where they belonged.

    Parameters
    ----------
    plan
        Ranks and places of the series.
    before
        The last place known from an earlier process.
    """

    def __init__(self, plan: Plan, before: Planned | None = None) -> None:
        self._plan = plan
        self._before = before
        self._lost: list[tuple[int | None, str]] = []
        """Sequence and reason; no sequence once it was reported without a place."""

    def lose(self, first: int, count: int, reason: str) -> None:
        """Note `count` lost frames from sequence `first` on."""
        self._lost.extend((first + i, reason) for i in range(count))

    def arrive(self, frame: Planned) -> list[Missing]:
        """Resolve what was lost before this planned frame."""
        gaps = self._resolve(frame)
        self._before = frame
        return gaps

    def postpone(self) -> list[Missing]:
        """Return lost frames without a place, because they are waited for.

        Their places follow with the next planned frame, without a sequence.
        """
        gaps = [
            Missing(sequence, None, reason)
            for sequence, reason in self._lost
            if sequence is not None
        ]
        self._lost = [(None, reason) for _, reason in self._lost]
        return gaps

    def end(self) -> list[Missing]:
        """Resolve what was lost last: the places that followed in the plan."""
        gaps = self._resolve(None)
        placed = [missing.index for missing in gaps if missing.index is not None]
        if placed and self._before is not None:
            rank = self._before.event_index
            rank = None if rank is None else rank + len(placed)
            self._before = Planned(rank, placed[-1])
        return gaps

    def _resolve(self, after: Planned | None) -> list[Missing]:
        lost, self._lost = self._lost, []
        places = self._places(after, len(lost))
        gaps = [
            Missing(sequence, places[i] if i < len(places) else None, reason)
            for i, (sequence, reason) in enumerate(lost)
        ]
        # The plan has more holes than frames were lost: never sent at all.
        gaps += [Missing(None, place, NOT_SENT) for place in places[len(lost) :]]
        return [m for m in gaps if m.sequence is not None or m.index is not None]

    def _places(self, after: Planned | None, lost: int) -> list[Index]:
        """Return the places between the neighbours, at least those of `lost` frames."""
        known = [frame for frame in (self._before, after) if frame is not None]
        if not self._may_have_holes(after, lost):
            return []
        order = self._plan.agreeing_order(known)
        if order is None:
            return []
        start = 0 if self._before is None else self._rank(self._before) + 1
        stop = start + lost if after is None else self._rank(after)
        if stop - start > lost + MOST_HOLES:
            # A frame that names a place so far on is a mistake, or meant to hurt.
            return []
        return _existing(order, range(start, stop), self._plan)

    def _may_have_holes(self, after: Planned | None, lost: int) -> bool:
        """Spare the usual frame, next in rank, the search for an order."""
        if lost or after is None:
            return lost > 0
        # Without a plan the index says nothing about frames never exposed.
        if after.event_index is None:
            return False
        start = -1 if self._before is None else self._rank(self._before)
        return after.event_index > start + 1

    def _rank(self, frame: Planned) -> int:
        rank = self._plan.ordinal(frame)
        return -1 if rank is None else rank


def _existing(order: Order, ranks: range, plan: Plan) -> list[Index]:
    places = (order(rank) for rank in ranks)
    return [place for place in places if place is not None and plan.contains(place)]


def is_plate(positions: list[Position]) -> bool:
    """Tell whether all positions lie in wells."""
    return all(p.plate_row and p.plate_column for p in positions)


def position_paths(positions: list[Position]) -> list[str]:
    """Return the path of each position's image inside its OME-Zarr.

    One position is the OME-Zarr itself (``""``), several are numbered as in
    bioformats2raw, positions in wells are ``ROW/COLUMN/FIELD``.

    Raises
    ------
    WriterError
        If two positions claim the same field of the same well, or some file systems
        cannot hold the wells.
    """
    if not is_plate(positions):
        return [str(i) for i in range(len(positions))] if len(positions) != 1 else [""]
    paths = [f"{p.plate_row}/{p.plate_column}/{p.field}" for p in positions]
    rows = {p.plate_row or "" for p in positions}
    wells = {path.rpartition("/")[0] for path in paths}
    # Some file systems take the folder ``a`` for ``A``.
    number = Counter(map(same_name, [*paths, *wells, *rows]))
    doubled = {path for path in [*paths, *wells, *rows] if number[same_name(path)] > 1}
    if doubled:
        msg = (
            f"positions share the well fields {sorted(doubled)} (a letter's case makes "
            "no difference); give each position its own plate_row, plate_column and "
            "field"
        )
        raise WriterError(msg)
    if reserved := sorted(filter(is_reserved_name, rows)):
        msg = f"Windows takes no folders called {reserved}; give rows other names"
        raise WriterError(msg)
    return paths
