"""Plan: where each planned frame belongs in the store."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from rtfocus.frame import SeriesStart

if TYPE_CHECKING:
    import useq

AXES = ("t", "p", "c", "z")

Index = dict[str, int]
"""Complete index: every one of `AXES`."""

MOST_EVENTS = 100_000
"""Longest plan of a series without an end that is expanded to find lost frames."""

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
