"""Plans: what a useq plan asks of focus, and what was found at its places.

Which events ask for focus, with which light and at which z; which search holds for an
event, and the surface through the places in focus, on which others are likely to lie.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import useq
from pymmcore_plus.core._sequencing import SequencedEvent

from rtfocus.autofocus.hold import Key, key_of_index

DEVICE = "rtfocus"
"""Name of an ``autofocus_device_name`` that rtfocus answers."""
ACTION = "rtfocus_autofocus"
"""Name of a ``CustomAction`` that rtfocus answers."""


def focus_plans(sequence: useq.MDASequence) -> list[useq.AxesBasedAF]:
    """Return what asks rtfocus for focus in a plan, or at a position of it."""
    plans = (level.autofocus_plan for level in levels(sequence))
    return [plan for plan in plans if plan and plan.autofocus_device_name == DEVICE]


def begin_anew(plan: useq.AxesBasedAF) -> None:
    """Let a plan ask for focus at its first event, also in a second round.

    useq compares every event with the one before, that of an earlier round too: a
    plan of one position asked for focus in the first round only.
    """
    plan._previous = {}  # noqa: SLF001 useq has no other way


def levels(sequence: useq.MDASequence) -> Iterator[useq.MDASequence]:
    """Yield a plan and the sub-sequences of its positions."""
    yield sequence
    for position in sequence.stage_positions:
        if position.sequence is not None:
            yield position.sequence


def focus_light(sequence: useq.MDASequence, name: str | None) -> useq.Channel | None:
    """Return the plan's channel whose images tell focus; None: not of the plan."""
    if name is None:
        return next(iter(sequence.channels), None)
    channels = [channel for level in levels(sequence) for channel in level.channels]
    return next((channel for channel in channels if channel.config == name), None)


def _sub_sequence(event: useq.MDAEvent) -> useq.MDASequence | None:
    """Return the sub-sequence of an event's position, where it has one."""
    number, sequence = event.index.get("p"), event.sequence
    if sequence is None or number is None or number >= len(sequence.stage_positions):
        return None
    return sequence.stage_positions[number].sequence


def autofocus_plan(event: useq.MDAEvent) -> useq.AxesBasedAF | None:
    """Return the autofocus plan that holds for an event; None: it has none of ours."""
    for level in (_sub_sequence(event), event.sequence):
        if level is not None and (plan := level.autofocus_plan) is not None:
            return plan if plan.autofocus_device_name == DEVICE else None
    return None


def _stack_level(event: useq.MDAEvent) -> useq.MDASequence | None:
    """Return the plan, or sub-sequence, whose z-stack an event is part of."""
    inner = _sub_sequence(event)
    level = inner if inner is not None and inner.z_plan is not None else event.sequence
    return None if level is None or level.z_plan is None else level


def channel_offset_um(event: useq.MDAEvent, channel: useq.EventChannel | None) -> float:
    """Return what useq adds to the z of a channel's images in an event's stack."""
    level = _stack_level(event)
    if level is None or channel is None:
        return 0.0
    offsets = (one.z_offset for one in level.channels if one.config == channel.config)
    return next(offsets, None) or 0.0


def reference_um(event: useq.MDAEvent) -> float | None:
    """Return the planned z of the stack that an event is part of; None: no z.

    Neither slice nor channel are in it. For an event that asks for focus, useq has
    taken off the slice already, but of the outer plan only: with a z-stack of the
    position's own it leaves the first slice.
    """
    z_um, level, number = event.z_pos, _stack_level(event), event.index.get("z")
    if z_um is None or level is None or number is None:
        return z_um
    z_um += _taken_off_um(event) - channel_offset_um(event, event.channel)
    plan = cast("useq.AnyZPlan", level.z_plan)
    heights = list(plan)
    middle_um = 0.0 if plan.is_relative else sum(heights) / len(heights)
    return z_um - (heights[number] - middle_um)


def _taken_off_um(event: useq.MDAEvent) -> float:
    """Return what useq took off the z of an image where it asks for focus there."""
    plan = None if event.sequence is None else event.sequence.z_plan
    number = event.index.get("z")
    if image_count(event) or plan is None or not plan.is_relative or number is None:
        return 0.0
    heights = list(plan)
    # Of a longer stack of the position's own it has none.
    return float(heights[number]) if number < len(heights) else 0.0


def beside_held(event: useq.MDAEvent, held_um: float | None) -> useq.MDAEvent:
    """Return an event whose z is an offset: what the hardware holds, and its slice."""
    reference = reference_um(event)
    slice_um = 0.0
    if event.z_pos is not None and reference is not None:
        slice_um = event.z_pos - reference
    return event.model_copy(update={"z_pos": (held_um or 0.0) + slice_um})


def asking_for_focus(event: useq.MDAEvent) -> useq.MDAEvent:
    """Return the event that asks for focus where an image is taken, as useq asks."""
    asking = event.model_copy(update={"action": useq.CustomAction(name=ACTION)})
    if event.z_pos is None:
        return asking
    return asking.model_copy(update={"z_pos": event.z_pos - _taken_off_um(asking)})


def is_autofocus(event: useq.MDAEvent) -> bool:
    """Tell events that ask rtfocus for focus from all others."""
    action = event.action
    if isinstance(action, useq.HardwareAutofocus):
        return action.autofocus_device_name == DEVICE
    return isinstance(action, useq.CustomAction) and action.name == ACTION


def key_of(event: useq.MDAEvent) -> Key:
    """Return the place of an event: position and grid tile."""
    return key_of_index(event.index)


def with_place(event: useq.MDAEvent) -> useq.MDAEvent:
    """Return an event that says its place; pymmcore-plus gives a sequenced one none.

    All images of a hardware sequence are of one place, as `FocusActions.stacks` parts
    the plan.
    """
    if not isinstance(event, SequencedEvent):
        return event
    first = event.events[0]
    return event.model_copy(update={"index": first.index, "sequence": first.sequence})


def image_count(event: useq.MDAEvent) -> int:
    """Return how many images an event takes, alone or as a hardware sequence."""
    parts = event.events if isinstance(event, SequencedEvent) else (event,)
    return sum(
        e.action is None or isinstance(e.action, useq.AcquireImage) for e in parts
    )


def unfocused(key: Key, reason: str) -> str:
    """Say in words that a place is not in focus."""
    place = "" if key[0] is None else f" at position {key[0]}"
    place += "" if key[1] is None else f" tile {key[1]}"
    return f"autofocus{place}: not focused, {reason}"


class Site(NamedTuple):
    """A place that was focused: where it is, and how far from its planned z."""

    x_um: float
    y_um: float
    planned_um: float
    off_um: float
    place: Key


def surface_at(
    known: Sequence[tuple[float, float, float]], x_um: float | None, y_um: float | None
) -> float:
    """Return the height of the plane through known places, at another one.

    Parameters
    ----------
    known
        x, y and height of one place or more, in um.
    x_um, y_um
        None: 0.

    Examples
    --------
    >>> round(surface_at([(0, 0, 1.0), (100, 0, 2.0), (0, 100, 1.0)], 200, 50), 6)
    3.0
    """
    x, y, height = np.array(known, dtype=np.float64).T
    centre = np.array([x.mean(), y.mean()])
    # Of places on one line the slope across is not known: 0, as lstsq answers.
    places = np.column_stack([x, y]) - centre
    slope = np.linalg.lstsq(places, height - height.mean(), rcond=1e-6)[0]
    away = np.array([x_um or 0.0, y_um or 0.0]) - centre
    return float(height.mean() + away @ slope)


class PlacesFound:
    """What the searches of a plan found, by place, and for which events each holds."""

    def __init__(self) -> None:
        self.off_um: dict[Key, float] = {}
        """How far from its planned z the focus of a place lies; also guesses."""
        self.verdicts: dict[Key, dict[str, Any]] = {}
        """How the newest search of each place ended."""
        self.unfocused: set[Key] = set()
        """Places whose newest search failed, or could not even be tried."""
        self.sites: dict[Key, Site] = {}
        """Places in focus, for the plate's surface."""
        self._beside_um: dict[Key, float] = {}
        self._newest: dict[int | None, Key] = {}
        """The place searched last, by position."""
        self._newest_of_all: Key | None = None

    def search(self, event: useq.MDAEvent) -> Key:
        """Begin the search that an event asks for; return its place."""
        key = key_of(event)
        self._newest[key[0]] = self._newest_of_all = key
        beside_um = getattr(event.action, "autofocus_motor_offset", None)
        self._beside_um[key] = beside_um or 0.0
        return key

    def holding_for(self, event: useq.MDAEvent) -> Key | None:
        """Return the place whose search holds for an event; None: none does.

        A plan that focuses once a position means all its tiles, and one that focuses
        once a time point means all its positions.
        """
        key = key_of(event)
        if key in self.verdicts or key in self.unfocused:
            return key
        if key[0] in self._newest:
            return self._newest[key[0]]
        plan = autofocus_plan(event)
        is_for_all = plan is not None and not {"p", "g"} & set(plan.axes)
        return self._newest_of_all if is_for_all else None

    def found_um(self, event: useq.MDAEvent) -> float:
        """Return how far from its planned z an event's place was found to be.

        With a plan's ``autofocus_motor_offset``, but for images that tell focus.
        """
        found_by = self.holding_for(event)
        if found_by is None:
            return self.off_um.get(key_of(event), 0.0)
        beside_um = 0.0 if is_autofocus(event) else self._beside_um.get(found_by, 0.0)
        return self.off_um.get(found_by, 0.0) + beside_um

    def add(self, key: Key, off_um: float) -> None:
        """Add to what a place is off."""
        self.off_um[key] = self.off_um.get(key, 0.0) + off_um
