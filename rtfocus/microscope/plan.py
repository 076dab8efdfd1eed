"""Plan: a useq acquisition plan laid out event by event.

Stage positions, grid tiles and wells become one axis p.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice, pairwise
from typing import Any, TypeVar

import msgspec
import numpy as np
import useq
from numpy.typing import NDArray

from rtfocus.errors import ConfigError
from rtfocus.frame import AXES, Position
from rtfocus.images.ome_xml import row_letters

EVENT_INDEX = "rtfocus_event_index"
"""Key of an MDA event's metadata: its ordinal among the images of the plan."""


@dataclass(frozen=True, slots=True)
class Well:
    """Place on a plate."""

    row: str
    """Letter, e.g. ``B``."""
    column: str
    """Two digits from 1, e.g. ``03``."""


@dataclass
class Sites:
    """Numbers the sites of a plan in the order of their first visit."""

    wells: list[Well | None] = field(default_factory=list)
    """By useq position; None, or absent, outside plates."""
    _numbers: dict[tuple[int, int | None], int] = field(default_factory=dict)
    _positions: list[Position] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)
    _fields: Counter[Well] = field(default_factory=Counter)

    @classmethod
    def of(cls, sequence: useq.MDASequence) -> "Sites":
        """Take the wells of a plan: of its plate, or as its positions name them."""
        positions = sequence.stage_positions
        if not isinstance(positions, useq.WellPlatePlan):
            return cls(wells=[_well_of(position) for position in positions])
        wells = [_parse_well(str(name)) for name in positions.selected_well_names]
        sites = range(positions.num_points_per_well)
        return cls(wells=[well for well in wells for _ in sites])

    def number(self, event: useq.MDAEvent) -> int:
        """Return the index p of an event's site."""
        key = (event.index.get("p", 0), event.index.get("g"))
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._positions.append(self._describe(event, *key))
        return self._numbers[key]

    def positions(self) -> list[Position]:
        """Return all sites met so far, by index p."""
        return list(self._positions)

    def _describe(self, event: useq.MDAEvent, p: int, tile: int | None) -> Position:
        name = event.pos_name or f"p{p}"
        if tile is not None:
            name = f"{name}_g{tile}"
        number = len(self._positions)
        while name in self._names:
            name, number = f"{name}_{number}", number + 1
        self._names.add(name)
        position = Position(name=name, x_um=event.x_pos, y_um=event.y_pos)
        well = self.wells[p] if p < len(self.wells) else None
        if well is None:
            return position
        # Points of a well, tiles of its grid and positions in it alike.
        number = self._fields[well]
        self._fields[well] += 1
        return msgspec.structs.replace(
            position, plate_row=well.row, plate_column=well.column, field=number
        )


def _parse_well(well: str) -> Well:
    """Split a well's name: ``B3`` is row ``B``, column ``03``."""
    match = re.fullmatch(r"([A-Za-z]+)(\d+)", well)
    if match is None:
        return Well(well, "01")
    return Well(match[1], f"{int(match[2]):02d}")


def _well_of(position: useq.Position) -> Well | None:
    """Name the well at a position's row and column, which count from 0."""
    row, column = position.plate_row, position.plate_col
    if row is None or column is None:
        return None
    return Well(row_letters(row), f"{column + 1:02d}")


@dataclass(frozen=True)
class AcquisitionPlan:
    """A plan whose every image has one place; places are counted, not guessed."""

    sequence: useq.MDASequence
    """What Micro-Manager is asked to do."""
    sizes: dict[str, int]
    """Length of axes t, p, c, z in acquisition order, slowest first."""
    positions: list[Position]
    """By index p: stage positions, grid tiles and wells alike."""
    channel_names: list[str]
    """By index c; empty where the plan names no channel."""
    places: NDArray[np.int32]
    """Axes (event, axis of `AXES`): the place of every planned image."""
    z_offsets_um: NDArray[np.float32]
    """By event: distance from the reference plane of its stack."""
    z_step_um: float | None
    intervals_s: tuple[float, ...]
    """Between two time points, each once; 0: as fast as possible."""

    @property
    def interval_s(self) -> float | None:
        """The interval of all time points; None: intervals differ, or there is none."""
        return (self.intervals_s[0] or None) if len(self.intervals_s) == 1 else None

    @property
    def is_timed(self) -> bool:
        """Whether a time point may be late."""
        return any(self.intervals_s)

    def index(self, event_index: int) -> dict[str, int]:
        """Return the place of one planned image."""
        place = self.places[event_index]
        return {axis: int(place[k]) for k, axis in enumerate(AXES)}

    def __len__(self) -> int:
        return len(self.places)


def lay_out(sequence: useq.MDASequence) -> AcquisitionPlan:
    """Walk through a plan once, or one of equal time points; note every image's place.

    Grids, plates and sub-sequences of positions become positions.

    Raises
    ------
    ConfigError
        If the plan takes no image, or two images would fall on one place.
    """
    sites = Sites.of(sequence)
    channel_names = [channel.config for channel in sequence.channels]
    places: list[tuple[int, int, int, int]] = []
    z_offsets: list[float] = []
    stacks = _Stacks(sequence)
    one, repeats = _time_point(sequence)
    for event in filter(takes_image, walked(one)):
        if event.channel is None:
            c = 0
        else:
            if event.channel.config not in channel_names:
                channel_names.append(event.channel.config)
            c = channel_names.index(event.channel.config)
        index = event.index
        places.append((index.get("t", 0), sites.number(event), c, index.get("z", 0)))
        z_offsets.append(stacks.offset_um(index.get("p", 0), index.get("z")))
    if not places:
        msg = "the useq plan takes no image; give it a time_plan, channels or a z_plan"
        raise ConfigError(msg)
    table = np.array(places, dtype=np.int32)
    _refuse_doubles(table)
    number, table = len(table), np.tile(table, (repeats, 1))
    table[:, 0] += np.arange(len(table), dtype=np.int32) // number
    order = "".join(axis for axis in sequence.axis_order if axis in AXES)
    order = "".join(axis for axis in AXES if axis not in order) + order
    lengths = table.max(axis=0) + 1
    return AcquisitionPlan(
        sequence=sequence,
        sizes={axis: int(lengths[AXES.index(axis)]) for axis in order},
        positions=sites.positions(),
        channel_names=channel_names,
        places=table,
        z_offsets_um=np.tile(np.array(z_offsets, dtype=np.float32), repeats),
        z_step_um=_z_step_um(sequence),
        intervals_s=_intervals_s(sequence),
    )


def _time_point(
    sequence: useq.MDASequence, count: int = 1
) -> tuple[useq.MDASequence, int]:
    """Return a plan of the first time points, and how often it makes the whole.

    The whole plan, once, where a time point, or a copy, may differ from another.
    """
    plan, positions = sequence.time_plan, sequence.stage_positions
    if (
        plan is None
        or sequence.axis_order[0] != "t"
        or isinstance(positions, useq.WellPlatePlan)
        or any(position.sequence is not None for position in positions)
        or any(channel.acquire_every != 1 for channel in sequence.channels)
        or isinstance(sequence.grid_plan, useq.RandomPoints)
        # Phases share a time point where they meet, and useq counts it twice.
        or (number := sum(1 for _ in plan)) <= count
    ):
        return sequence, 1
    first = useq.TIntervalLoops(interval=timedelta(0), loops=count)
    return sequence.replace(time_plan=first), number // count


def walked(sequence: useq.MDASequence) -> Iterator[useq.MDAEvent]:
    """Yield a plan's events; ConfigError: useq itself fails on the way."""
    try:
        yield from sequence
    except IndexError as error:
        msg = (
            "the useq plan asks for focus amid a z-stack of a position's own that is "
            "longer than the plan's, which useq cannot do; leave z and the axes that "
            "change within it out of autofocus_plan.axes, or give the plan no z_plan"
        )
        raise ConfigError(msg) from error


def numbered(events: Iterable[useq.MDAEvent]) -> Iterator[useq.MDAEvent]:
    """Give every event the ordinal of the image that it is, or that it is for."""
    ordinal = 0
    for event in events:
        metadata = {**event.metadata, EVENT_INDEX: ordinal}
        yield event.model_copy(update={"metadata": metadata})
        ordinal += takes_image(event)


def left_alone(event: useq.MDAEvent) -> tuple[bool, ...]:
    """Tell what an event does not set: z, x, y, exposure.

    pymmcore-plus fails where such an event is to follow one that sets it in hardware.
    """
    places = (event.z_pos, event.x_pos, event.y_pos, event.exposure)
    return tuple(place is None for place in places)


def takes_image(event: useq.MDAEvent) -> bool:
    """Tell images from autofocus and custom actions."""
    return event.action is None or isinstance(event.action, useq.AcquireImage)


class _Stacks:
    """Distances of slices from their stack's reference plane, by useq position."""

    def __init__(self, sequence: useq.MDASequence) -> None:
        self._sequence = sequence
        self._offsets_um: dict[int, list[float]] = {}

    def offset_um(self, p: int, slice_number: int | None) -> float:
        if p not in self._offsets_um:
            self._offsets_um[p] = _slice_offsets_um(self._sequence, p)
        offsets = self._offsets_um[p]
        return 0.0 if slice_number is None or not offsets else offsets[slice_number]


def _slice_offsets_um(sequence: useq.MDASequence, p: int) -> list[float]:
    """Return the slices' distances from the reference plane at useq position p."""
    plan = _z_plan(sequence, p)
    if plan is None:
        return []
    heights = list(plan)
    if not heights:
        msg = "the useq plan's z_plan names no height; give it one, or leave it out"
        raise ConfigError(msg)
    # An absolute stack names no reference; its middle is one.
    reference = 0.0 if plan.is_relative else sum(heights) / len(heights)
    return [height - reference for height in heights]


def _z_plan(sequence: useq.MDASequence, p: int) -> useq.AnyZPlan | None:
    positions = sequence.stage_positions
    if p < len(positions):
        inner = positions[p].sequence
        if inner is not None and inner.z_plan is not None:
            return inner.z_plan
    return sequence.z_plan


def _z_step_um(sequence: useq.MDASequence) -> float | None:
    """Return the distance of all slices; None: there is one alone, or they differ."""
    positions = range(max(1, len(sequence.stage_positions)))
    plans = {id(plan): plan for plan in (_z_plan(sequence, p) for p in positions)}
    heights = [list(plan) for plan in plans.values() if plan is not None]
    steps = {round(abs(b - a), 6) for stack in heights for a, b in pairwise(stack)}
    return steps.pop() if len(steps) == 1 else None


def _intervals_s(sequence: useq.MDASequence) -> tuple[float, ...]:
    inner = (position.sequence for position in sequence.stage_positions)
    plans = (level.time_plan for level in (sequence, *inner) if level is not None)
    phases = (phase for plan in plans for phase in getattr(plan, "phases", (plan,)))
    starts = (list(islice(phase or (), 2)) for phase in phases)
    intervals = {round(times[1] - times[0], 6) for times in starts if len(times) > 1}
    return tuple(sorted(intervals))


def _refuse_doubles(places: NDArray[np.int32]) -> None:
    distinct, counts = np.unique(places, axis=0, return_counts=True)
    if (counts > 1).any():
        t, p, c, z = distinct[counts > 1][0]
        msg = (
            f"the useq plan takes two images at t={t} p={p} c={c} z={z}; give each "
            "a position or channel of its own"
        )
        raise ConfigError(msg)


def sequence_json(sequence: useq.MDASequence) -> dict[str, Any]:
    """Return a plan as JSON that useq reads again, without what nobody has set."""
    found = sequence.model_dump(mode="json", exclude_unset=True)
    if sequence.setup is not None:
        # useq sets the kind of its action by itself, and does not read it without.
        found["setup"] = sequence.setup.model_dump(mode="json", exclude_none=True)
    return found


def image_events(sequence: useq.MDASequence) -> Iterator[useq.MDAEvent]:
    """Yield the events that take an image, each set-up after each that it follows.

    One tile per grid: tiles set up nothing. Two of time points that are all alike.
    """
    some = _without_grids(_time_point(sequence, count=2)[0])
    return filter(takes_image, walked(some))


def _without_grids(
    sequence: useq.MDASequence, *, is_whole: bool = True
) -> useq.MDASequence:
    positions = sequence.stage_positions
    if not isinstance(positions, useq.WellPlatePlan):
        positions = tuple(
            position
            if position.sequence is None or position.sequence.grid_plan is None
            else position.model_copy(
                update={"sequence": _without_grids(position.sequence, is_whole=False)}
            )
            for position in positions
        )
        if sequence.grid_plan is not None and not positions and is_whole:
            # A plan of nothing but a grid still takes an image.
            positions = (useq.Position(x=0, y=0),)
    # A copy would keep the id by which useq remembers the tiles.
    return sequence.replace(grid_plan=None, stage_positions=positions)


SetUp = TypeVar("SetUp", bound=Hashable)


def each_step(set_ups: Iterable[SetUp]) -> Iterator[tuple[int, SetUp]]:
    """Yield each step from one set-up to another once, with the image's number.

    A preset sets some properties and leaves the others as the one before it did: what
    an event gets depends on where it comes from.
    """
    yielded: set[tuple[SetUp | None, SetUp]] = set()
    before: SetUp | None = None
    for number, set_up in enumerate(set_ups):
        if (before, set_up) not in yielded:
            yielded.add((before, set_up))
            yield number, set_up
        before = set_up
