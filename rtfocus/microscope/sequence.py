"""Sequence: a useq plan read from a config or a file of its own, and checked.

Settings that useq or Micro-Manager would pass over in silence are refused, and so is
what no microscope can follow.
"""

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import useq
from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rtfocus.config.loading import hint, models_in, near, read_yaml
from rtfocus.errors import ConfigError

DEEPEST = 64
_MOST = {"tcgz": (10_000_000, "images"), "g": (100_000, "positions, tiles and points")}
"""Of a plan, by axes: each image's place is held in memory, each position a folder."""
_MOST_FAULTS = 3
_PLANS = {
    "t": "time_plan",
    "p": "stage_positions",
    "g": "grid_plan",
    "c": "channels",
    "z": "z_plan",
}
# Fields whose content is the user's own.
_FREE = {"metadata"}
_NEAR = 0.6
Kind = type[BaseModel]
Place = tuple[int | str, ...]

logger = logging.getLogger(__name__)


def read_sequence(mda: dict[str, Any] | Path) -> useq.MDASequence:
    """Read a useq plan, written in the config or in a file of its own.

    Raises
    ------
    ConfigError
        If the file cannot be read, a value breaks useq's rules, or a key or setting
        would be passed over in silence.
    """
    origin = "acquisition.mda" if isinstance(mda, dict) else f"plan '{mda}'"
    # JSON is YAML, so that one reader takes both.
    given = (
        mda if isinstance(mda, dict) else read_yaml(mda, "plan", "give YAML or JSON")
    )
    if not isinstance(given, dict):
        msg = f"{origin} must be a mapping of useq fields, got {type(given).__name__}"
        raise ConfigError(msg)
    _refuse_impossible(given, origin)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # useq changes what it is given.
            sequence = useq.MDASequence.model_validate(copy.deepcopy(given))
            refuse_too_many(sequence, origin)
    except ZeroDivisionError as error:
        msg = f"{origin}.time_plan: a duration needs an interval of more than 0"
        raise ConfigError(msg) from error
    except (ValidationError, ValueError, TypeError, OverflowError) as error:
        # Most often a misspelt key is why a value is missing.
        unknown = _unknown_keys(given, useq.MDASequence, origin)
        fault = unknown[0] if unknown else f"{origin} is no valid useq plan: "
        raise ConfigError(fault + ("" if unknown else _one_line(error))) from error
    faults = [*_unknown_keys(given, sequence, origin), *_ineffective(sequence, origin)]
    faults += [f"{origin}: {text}" for text in _not_followed(caught)]
    if faults:
        raise ConfigError("; ".join(faults))
    return sequence


def _not_followed(caught: list[warnings.WarningMessage]) -> Iterator[str]:
    """Yield what useq warns of and does not follow; log the rest of its warnings."""
    for warning in caught:
        text = " ".join(str(warning.message).split())
        if "ignored" in text or "override" in text:
            yield text
        else:
            logger.warning("%s", text)


def _one_line(error: Exception) -> str:
    """Say what is wrong with a plan's values, where, and what was given."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    faults: dict[str, str] = {}
    lacking: dict[str, dict[object, list[str]]] = {}
    for detail in _of_kinds_meant(error.errors()):
        *place, last = detail["loc"] or ("",)
        if detail["type"] == "missing":
            kind = place[-1] if place and _is_kind(place[-1]) else None
            lacking.setdefault(_path(place), {}).setdefault(kind, []).append(str(last))
            continue
        key, value = _path(detail["loc"]), detail["input"]
        shown = "" if isinstance(value, dict | list) else f" (got {value!r})"
        faults.setdefault(key, f"{key}: {detail['msg']}{shown}")
    for key, kinds in lacking.items():
        names = " or ".join(" and ".join(names) for names in kinds.values())
        faults.setdefault(f"{key} lacks", f"{key} lacks {names}")
    return "; ".join(list(faults.values())[:_MOST_FAULTS])


def _path(place: Sequence[int | str]) -> str:
    # The name of the kind that was tried is no step of the path.
    steps = [
        f"[{step}]" if isinstance(step, int) else f".{step}"
        for step in place
        if not _is_kind(step)
    ]
    return "".join(steps).lstrip(".") or "plan"


def _is_kind(step: int | str) -> bool:
    """Tell whether a step of a fault's place is the class that useq tried there."""
    return isinstance(step, str) and not step.islower()


def _of_kinds_meant(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Keep the faults of the kinds of plan that were meant: useq tries every kind."""
    for depth in range(max((len(error["loc"]) for error in errors), default=0)):
        tried: dict[Place, dict[str, list[ErrorDetails]]] = {}
        for error in errors:
            if len(error["loc"]) > depth and _is_kind(step := error["loc"][depth]):
                kinds = tried.setdefault(error["loc"][:depth], {})
                kinds.setdefault(str(step), []).append(error)
        for place, kinds in tried.items():
            far = {name: _farness(name, kinds[name], depth) for name in kinds}
            nearest = min(far.values())
            others = {name for name in kinds if far[name] > nearest}
            errors = [
                error
                for error in errors
                if error["loc"][:depth] != place or error["loc"][depth] not in others
            ]
    return errors


def _farness(kind: str, faults: list[ErrorDetails], depth: int) -> tuple[int, int, int]:
    """Return how far a plan is from a kind, by what it lacks of it and has of it."""
    missing = [
        fault
        for fault in faults
        if fault["type"] == "missing" and len(fault["loc"]) == depth + 2
    ]
    if not missing:
        return 0, 0, 0
    known = _keys(getattr(useq, kind, BaseModel)).keys() & missing[0]["input"]
    return 1, -len(known), len(missing)


def _refuse_impossible(plan: object, key: str, depth: int = 0) -> None:
    """Refuse what a plan may hold for useq and no microscope can follow.

    Raises
    ------
    ConfigError
        Names `key`, of the first number that is not finite, of a step or interval that
        goes backwards or nowhere, of what is nested more than `DEEPEST` deep, or of a
        plate with too many points.
    """
    if depth > DEEPEST:
        msg = f"'{key[:99]}…' is nested more than {DEEPEST} deep"
        raise ConfigError(msg)
    if isinstance(plan, dict | list | tuple):
        given = plan if isinstance(plan, dict) else dict(enumerate(plan))
        if "plate" in given:
            _refuse_large_plate(given, key)
        for name, part in given.items():
            # A stack of one plane needs no step.
            if not (name == "step" and given.get("range") == part == 0):
                _refuse_impossible(part, f"{key}.{name}", depth + 1)
    elif isinstance(plan, int | float) and ".metadata." not in key:
        lowest = {"step": 1e-6, "interval": 0.0}.get(key.rpartition(".")[2], -math.inf)
        if not math.isfinite(plan) or plan < lowest:
            rule = "a finite number" if lowest == -math.inf else f"at least {lowest:g}"
            msg = f"'{key}': {rule} is needed (got {plan})"
            raise ConfigError(msg)


def _refuse_large_plate(given: dict[Any, Any], key: str) -> None:
    """Raise ConfigError for a plate of too many points: useq makes them all at once."""
    try:
        number = len(useq.WellPlatePlan.model_validate(copy.deepcopy(given)))
    except (ValueError, TypeError):  # reported with the rest of the plan
        return
    if number > (most := _MOST["g"][0]):
        msg = f"{key} has {number:,} points in wells, more than {most:,}; split it"
        raise ConfigError(msg)


def refuse_too_many(sequence: useq.MDASequence, key: str) -> None:
    """Raise ConfigError for a plan that is too large; walks through none."""
    for axes, (most, things) in _MOST.items():
        if (number := _number(sequence, {}, axes)) > most:
            msg = f"{key} has {number:,} {things}, more than {most:,}; split it"
            raise ConfigError(msg)


def _number(sequence: useq.MDASequence, outer: dict[str, int], axes: str) -> int:
    """Count by axes, at most; a grid whose edges the camera divides counts as one."""
    grid: Any = sequence.grid_plan
    times, heights = sequence.time_plan, sequence.z_plan
    own = {
        "t": 0 if times is None else times.num_timepoints(),
        "c": len(sequence.channels),
        "z": 0 if heights is None else heights.num_positions(),
        "g": grid.num_positions()
        if getattr(grid, "fov_width", None) or hasattr(grid, "rows")
        else getattr(grid, "num_points", 0),
    }
    lengths = outer | {axis: own[axis] for axis in axes if own[axis]}
    number, positions = math.prod(lengths.values()), sequence.stage_positions
    return number * (not positions) + sum(
        number
        if position.sequence is None
        else _number(position.sequence, lengths, axes)
        for position in positions
    )


def _unknown_keys(
    given: object, parsed: BaseModel | type[BaseModel], path: str
) -> list[str]:
    """Say which keys a model would pass over in silence, with the nearest it has.

    useq, of which plans are, ignores keys it does not know, and so runs another
    experiment than the one written down.

    Parameters
    ----------
    given
        As written: mappings, sequences and values.
    parsed
        What was made of it; its class where nothing could be made of it.
    path
        What the keys' paths begin with.
    """
    kind, model = (parsed, None) if isinstance(parsed, type) else (type(parsed), parsed)
    unknown = list(_unknown(given, [kind], model, path))
    # A misspelt key may be why something else altogether is read.
    return [fault for fault in unknown if fault.startswith("unknown")] or unknown


def _unknown(
    given: object, kinds: list[Kind], parsed: object, path: str
) -> Iterator[str]:
    if isinstance(given, list | tuple):
        items = _items(parsed, len(given)) or [None] * len(given)
        for number, (value, found) in enumerate(zip(given, items, strict=True)):
            yield from _unknown(value, kinds, found, f"{path}[{number}]")
        return
    if not isinstance(given, dict) or not kinds:
        return
    kind = _meant(given, kinds, type(parsed))
    if isinstance(parsed, BaseModel) and given.keys() <= _keys(type(parsed)).keys():
        kind = type(parsed)
    valid = _keys(kind)
    if fault := _why_other_kind(given, kind, parsed):
        yield f"'{path}' is no {kind.__name__}: {fault}"
        return
    for key, value in given.items():
        if key not in valid:
            meant = hint(str(key).lower(), [*valid], _NEAR)
            yield f"unknown key '{path}.{key}'; {meant}"
            continue
        if isinstance(parsed, BaseModel) and key not in _keys(type(parsed)):
            model = type(parsed).__name__
            yield f"'{path}.{key}' is ignored: useq reads a {model} here"
            continue
        name = valid[key]
        if name is None or name in _FREE:
            continue
        below = models_in(kind.model_fields[name].annotation)
        yield from _unknown(value, below, getattr(parsed, name, None), f"{path}.{key}")


def _why_other_kind(given: dict[Any, Any], kind: Kind, parsed: object) -> str | None:
    """Return the fault of a plan that only useq's other kinds can read; None: none."""
    if not isinstance(parsed, BaseModel) or isinstance(parsed, kind):
        return None
    if not given.keys() <= _keys(kind).keys():  # reported as unknown
        return None
    try:
        kind.model_validate(copy.deepcopy(given))
    except ValidationError as error:
        return _one_line(error)
    return None


def _meant(given: dict[object, object], kinds: list[Kind], taken: type) -> Kind:
    """Return the model that knows most of the keys, spelt rightly or nearly."""

    def strangers(kind: Kind) -> tuple[int, int, bool, int]:
        keys = _keys(kind)
        wrong = [str(key) for key in given if key not in keys]
        far = [key for key in wrong if not near(key.lower(), [*keys], _NEAR)]
        return len(far), len(wrong), kind is not taken, len(keys)

    return min(kinds, key=strangers)


def _items(parsed: object, length: int) -> Sequence[object] | None:
    """Return what a list became: a sequence, or a model around one."""
    if isinstance(parsed, BaseModel):
        inner = [getattr(parsed, name) for name in type(parsed).model_fields]
        lists = [v for v in inner if isinstance(v, list | tuple) and len(v) == length]
        return lists[0] if lists else None
    if isinstance(parsed, list | tuple) and len(parsed) == length:
        return parsed
    return None


@cache
def _keys(kind: Kind) -> dict[str, str | None]:
    """Return every key that a model takes, and the field behind it."""
    keys: dict[str, str | None] = {}
    for name, field in kind.model_fields.items():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        for key in (name, field.alias, *choices):
            if isinstance(key, str):
                keys[key] = name
    # Older names that a model still takes are properties that can be set.
    for base in kind.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, property) and value.fset and base is not BaseModel:
                keys.setdefault(name, None)
    return keys


def _ineffective(
    sequence: useq.MDASequence, path: str, outer: str = "", *, has_z: bool = False
) -> Iterator[str]:
    """Say which settings of a valid plan useq or Micro-Manager would not follow."""
    order = "".join(sequence.axis_order)
    for axis, name in _PLANS.items():
        if getattr(sequence, name) and axis not in order:
            yield (
                f"{path}.{name} is ignored because '{axis}' is not in axis_order "
                f"'{order}'; add it there, or remove {name}"
            )
    has_z = has_z or sequence.z_plan is not None
    for number, channel in enumerate(sequence.channels):
        place = f"{path}.channels[{number}]"
        if channel.z_offset and not has_z:
            yield (
                f"{place}.z_offset={channel.z_offset:g} is ignored without a z_plan; "
                "for one plane add z_plan: {relative: [0]}"
            )
        if channel.camera is not None:
            yield (
                f"{place}.camera='{channel.camera}' is ignored by Micro-Manager's "
                "engine; choose the camera in the channel's preset (Core-Camera)"
            )
    focus, axes = sequence.autofocus_plan, outer + _axes(sequence)
    if focus is not None and not set(focus.axes) & set(axes):
        yield (
            f"{path}.autofocus_plan focuses whenever {' or '.join(focus.axes)} "
            f"changes, which is never: the plan has {axes or 'no axis'}; give its axes"
        )
    if not isinstance(sequence.stage_positions, useq.WellPlatePlan):
        yield from _of_positions(sequence.stage_positions, path, axes, has_z=has_z)


def _axes(sequence: useq.MDASequence) -> str:
    """Return the axes that a plan's events are numbered by, and those of positions."""
    axes = {axis for axis, name in _PLANS.items() if getattr(sequence, name)}
    positions, stack = sequence.stage_positions, sequence.z_plan
    if not isinstance(positions, useq.WellPlatePlan):
        inner = (one.sequence for one in positions if one.sequence is not None)
        axes.update(*map(_axes, inner))
    if not positions and stack is not None and stack.is_relative:
        axes.add("p")  # it is taken at a position: where the stage stands
    return "".join(axis for axis in sequence.axis_order if axis in axes)


def _of_positions(
    positions: Sequence[useq.Position], path: str, axes: str, *, has_z: bool
) -> Iterator[str]:
    in_wells = [position.plate_row is not None for position in positions]
    if any(in_wells) and not all(in_wells):
        yield (
            f"{path}.stage_positions[{in_wells.index(False)}] names no well and others "
            "do; give plate_row and plate_col to all of them or to none"
        )
    for number, position in enumerate(positions):
        place = f"{path}.stage_positions[{number}]"
        if (position.plate_row is None) != (position.plate_col is None):
            yield f"{place} has only one of plate_row and plate_col; give both or none"
        if position.sequence is not None:
            inner = f"{place}.sequence"
            yield from _ineffective(position.sequence, inner, axes, has_z=has_z)
