"""Plans: what a config and a useq plan ask of focus: limits, rules, places and light.

And what was found at the places of a plan: which search holds for an event, and the
surface through those in focus, on which others are likely to lie.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import useq
import yaml
from pymmcore_plus.core._sequencing import SequencedEvent

from rtfocus.autofocus.hold import Key, key_of_index
from rtfocus.autofocus.planes import FocusCalibration
from rtfocus.autofocus.policy import Limits, MoveRule
from rtfocus.autofocus.search import SearchRule
from rtfocus.config.loading import read_yaml
from rtfocus.config.model import AutofocusConfig
from rtfocus.errors import ConfigError
from rtfocus.images.metadata import TEXT_MARK

_SIDES = {"down": -1, "up": 1}
# Of a measured backlash, to be past it for certain; and the least that is believed, in
# depths of field.
_PAST_BACKLASH, _LEAST_BACKLASH = 1.5, 0.2
_DIRECTIONS = {"toward": 1, "away": -1, "unknown": 0}


def limits_at(config: AutofocusConfig, start_um: float) -> Limits:
    """Return the limits of a run that begins at a stage z.

    Raises
    ------
    ConfigError
        If the stage stands outside of the configured limits.
    """
    low = start_um - config.reach_um if config.low_um is None else config.low_um
    high = start_um + config.reach_um if config.high_um is None else config.high_um
    if not low <= start_um <= high:
        msg = (
            f"the stage stands at {start_um:g} um, outside of autofocus.low_um "
            f"{low:g} to high_um {high:g}; move it or correct the limits"
        )
        raise ConfigError(msg)
    return Limits(low, high).within(start_um, config.reach_um)


def save_calibration(path: Path, calibration: FocusCalibration) -> None:
    """Write a calibration as YAML."""
    values = {
        key: round(value, 5) if isinstance(value, float) else value
        for key, value in asdict(calibration).items()
    }
    text = yaml.safe_dump(values, sort_keys=False)
    path.write_text(f"{TEXT_MARK}\n{text}", encoding="utf-8")


def load_calibration(path: Path) -> FocusCalibration:
    """Read a calibration.

    Raises
    ------
    ConfigError
        If the file cannot be read or is none.
    """
    remedy = "make it with: rtfocus calibrate CONFIG"
    values = read_yaml(path, "autofocus.calibration", remedy)
    try:
        loaded = msgspec.convert(asdict(FocusCalibration(**values)), FocusCalibration)
        if not (0 < loaded.unit_um < math.inf and math.isfinite(loaded.backlash_um)):
            msg = "unit_um must be a number above 0, backlash_um a number"
            raise ValueError(msg)
    except (TypeError, ValueError) as error:
        msg = f"autofocus.calibration '{path}' cannot be used: {error}; {remedy}"
        raise ConfigError(msg) from error
    return loaded


def with_measured_backlash(config: AutofocusConfig) -> AutofocusConfig:
    """Return the config with the backlash that its calibration measured.

    What the user says of `backlash_um` stands, and a calibration that cannot be trusted
    says nothing. Without an `approach` the stage then always arrives upwards, as on the
    calibration's first way.

    Raises
    ------
    ConfigError
        If the calibration cannot be read.
    """
    if config.calibration is None or config.backlash_um > 0:
        return config
    found = load_calibration(config.calibration)
    backlash_um = abs(found.backlash_um)
    if not found.trusted or backlash_um < _LEAST_BACKLASH * found.unit_um:
        return config
    approach = "up" if config.approach == "either" else config.approach
    overshoot_um = _PAST_BACKLASH * backlash_um
    return config.model_copy(update={"approach": approach, "backlash_um": overshoot_um})


def is_calibrated(config: AutofocusConfig) -> bool:
    """Tell whether a calibration says that the optics can be relied on.

    Raises
    ------
    ConfigError
        If the calibration cannot be read.
    """
    if config.calibration is None:
        return False
    return load_calibration(config.calibration).trusted


def against_unknown_backlash(
    config: AutofocusConfig, unit_um: float
) -> AutofocusConfig:
    """Return the config with places reached upwards, past a depth of field of play.

    What the user says of `approach` and `backlash_um` stands.
    """
    given = {
        "approach": "up" if config.approach == "either" else config.approach,
        "backlash_um": config.backlash_um or unit_um,
    }
    return config.model_copy(update=given)


def move_rule(config: AutofocusConfig, limits: Limits, unit_um: float) -> MoveRule:
    """Return how the stage may be moved; `unit_um` is the depth of field.

    Unless the user, or a calibration that measured some, tells of backlash there may
    be: screws wear, and images do not tell it from other optics where it is small.
    """
    if "backlash_um" not in config.model_fields_set:
        config = against_unknown_backlash(config, unit_um)
    return MoveRule(
        limits=limits,
        deadband_um=config.deadband * unit_um,
        most_um=config.most_um,
        approach=_SIDES.get(config.approach, 0),
        overshoot_um=config.backlash_um,
    )


def search_rule(
    config: AutofocusConfig, direction: int, *, trusted: bool
) -> SearchRule:
    """Return what a search may do.

    Parameters
    ----------
    config
        Of autofocus.
    direction
        As `direction_of` gives.
    trusted
        A calibration says that the optics hold.
    """
    away = -direction if direction else -1
    return SearchRule(
        most_images=config.most_images,
        safe_side=_SIDES.get(config.safe_side, away),
        trust_sign=trusted,
        verify=not trusted,
    )


def direction_of(config: AutofocusConfig, of_core: int) -> int:
    """Return +1 where larger z brings the plane of focus to the specimen, -1 or 0.

    Parameters
    ----------
    config
        Its `direction` wins over the core's.
    of_core
        `core.getFocusDirection`: 0 where nobody has said.
    """
    return _DIRECTIONS.get(config.direction, of_core)


DEVICE = "rtfocus"
"""Name of an ``autofocus_device_name`` that rtfocus answers."""
ACTION = "rtfocus_autofocus"
"""Name of a ``CustomAction`` that rtfocus answers."""


def focus_plans(sequence: useq.MDASequence) -> list[useq.AxesBasedAF]:
    """Return what asks rtfocus for focus in a plan, or at a position of it."""
    plans = (level.autofocus_plan for level in levels(sequence))
    return [plan for plan in plans if plan and plan.autofocus_device_name == DEVICE]


def begin_anew(plan: useq.AxesBasedAF) -> None:
    """Let a plan ask for focus at its first event, whoever has gone through it before.

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


def focus_light(sequence: useq.MDASequence, wanted: str | None) -> useq.Channel | None:
    """Return the plan's channel whose images tell focus; None: not of the plan."""
    if wanted is None:
        return next(iter(sequence.channels), None)
    channels = [one for level in levels(sequence) for one in level.channels]
    return next((one for one in channels if one.config == wanted), None)


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
