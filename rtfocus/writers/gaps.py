"""Gaps: which places in the store lost frames had.

A lost frame says nothing about itself, so its place follows from its neighbours'
ranks in the plan, not from the order of arrival.
"""

from dataclasses import dataclass

from rtfocus.writers.plan import Index, Order, Plan, Planned

NOT_SENT = "not sent"


@dataclass(frozen=True, slots=True)
class Missing:
    """One place without a frame, or one lost frame without a known place."""

    sequence: int | None
    """None: the sender never had this frame."""
    index: Index | None
    """None: the place cannot be told, or the frame was an autofocus probe."""
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
        """Sequence and reason; no sequence once it was told without a place."""

    def lose(self, first: int, count: int, reason: str) -> None:
        """Note `count` lost frames from sequence `first` on."""
        self._lost.extend((first + i, reason) for i in range(count))

    def arrive(self, frame: Planned) -> list[Missing]:
        """Resolve what was lost before this planned frame."""
        found = self._resolve(frame)
        self._before = frame
        return found

    def postpone(self) -> list[Missing]:
        """Return lost frames without a place, because somebody waits for them.

        Their places follow with the next planned frame, without a sequence.
        """
        told = [
            Missing(sequence, None, reason)
            for sequence, reason in self._lost
            if sequence is not None
        ]
        self._lost = [(None, reason) for _, reason in self._lost]
        return told

    def end(self) -> list[Missing]:
        """Resolve what was lost last: the places that followed in the plan."""
        found = self._resolve(None)
        placed = [missing.index for missing in found if missing.index is not None]
        if placed and self._before is not None:
            rank = self._before.event_index
            rank = None if rank is None else rank + len(placed)
            self._before = Planned(rank, placed[-1])
        return found

    def _resolve(self, after: Planned | None) -> list[Missing]:
        lost, self._lost = self._lost, []
        places = self._places(after, len(lost))
        found = [
            Missing(sequence, places[i] if i < len(places) else None, reason)
            for i, (sequence, reason) in enumerate(lost)
        ]
        # The plan has more holes than frames were lost: never sent at all.
        found += [Missing(None, place, NOT_SENT) for place in places[len(lost) :]]
        return [m for m in found if m.sequence is not None or m.index is not None]

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
