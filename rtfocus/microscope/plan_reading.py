"""Plan reading: a useq plan read, and what of it would be passed over in silence.

useq ignores keys it does not know and settings that have no effect in a plan, and so
runs another experiment than the one written down. The keys are compared with useq's
own models, whatever version is installed.
"""

import copy
import difflib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import useq
from pydantic import AliasChoices, BaseModel, ValidationError

from rtfocus.config.loading import read_yaml
from rtfocus.errors import ConfigError

logger = logging.getLogger(__name__)

# Fields whose content is the user's own.
_FREE = {"metadata"}

Kind = type[BaseModel]


def unknown_keys(
    given: object, taken: BaseModel | type[BaseModel], path: str
) -> list[str]:
    """Say which keys of a plan useq does not know, each with the nearest it does.

    Parameters
    ----------
    given
        The plan as written: mappings, sequences and values.
    taken
        What useq made of it; its class where it could make nothing of it.
    path
        Name of the plan, which the keys' paths begin with.
    """
    kind, model = (taken, None) if isinstance(taken, type) else (type(taken), taken)
    found = list(_unknown(given, [kind], model, path))
    # A misspelt key may be why useq reads something else altogether.
    return [fault for fault in found if fault.startswith("unknown")] or found


def ineffective(sequence: useq.MDASequence, path: str) -> list[str]:
    """Say which settings of a valid plan useq or Micro-Manager would not follow."""
    return [*_ineffective(sequence, path, has_z=False)]


def _unknown(
    given: object, kinds: list[Kind], taken: object, path: str
) -> Iterator[str]:
    if isinstance(given, list | tuple):
        items = _items(taken, len(given))
        for number, value in enumerate(given):
            found = None if items is None else items[number]
            yield from _unknown(value, kinds, found, f"{path}[{number}]")
        return
    if not isinstance(given, dict) or not kinds:
        return
    kind = _meant(given, kinds, type(taken))
    if isinstance(taken, BaseModel) and given.keys() <= _keys(type(taken)).keys():
        kind = type(taken)
    valid = _keys(kind)
    for key, value in given.items():
        if key not in valid:
            yield _say(f"{path}.{key}", str(key), [*valid])
            continue
        if isinstance(taken, BaseModel) and key not in _keys(type(taken)):
            yield f"'{path}.{key}' is ignored: useq reads a {type(taken).__name__} here"
            continue
        name = valid[key]
        if name is None or name in _FREE:
            continue
        below = _models(kind.model_fields[name].annotation)
        yield from _unknown(value, below, getattr(taken, name, None), f"{path}.{key}")


def _meant(given: dict[object, object], kinds: list[Kind], taken: type) -> Kind:
    """Return the kind of plan that knows most of the keys, spelt rightly or nearly."""

    def strangers(kind: Kind) -> tuple[int, int, bool, int]:
        keys = _keys(kind)
        wrong = [str(key) for key in given if key not in keys]
        far = [key for key in wrong if not _nearest(key, [*keys])]
        return len(far), len(wrong), kind is not taken, len(keys)

    return min(kinds, key=strangers)


def _say(path: str, key: str, valid: list[str]) -> str:
    near = _nearest(key, valid)
    hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(valid)}"
    return f"unknown key '{path}'; {hint}"


def _nearest(key: str, valid: list[str]) -> list[str]:
    return difflib.get_close_matches(key.lower(), valid, n=1, cutoff=0.6)


def _items(taken: object, length: int) -> Sequence[object] | None:
    """Return what a list became: a sequence, or a model around one."""
    if isinstance(taken, BaseModel):
        inner = [getattr(taken, name) for name in type(taken).model_fields]
        lists = [v for v in inner if isinstance(v, list | tuple) and len(v) == length]
        return lists[0] if lists else None
    if isinstance(taken, list | tuple) and len(taken) == length:
        return taken
    return None


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


def _models(annotation: object) -> list[Kind]:
    """Return all models inside an annotation such as ``tuple[A, ...] | B | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _ineffective(
    sequence: useq.MDASequence, path: str, *, has_z: bool
) -> Iterator[str]:
    plans = {
        "t": "time_plan",
        "p": "stage_positions",
        "g": "grid_plan",
        "c": "channels",
        "z": "z_plan",
    }
    order = "".join(sequence.axis_order)
    for axis, name in plans.items():
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
    if not isinstance(sequence.stage_positions, useq.WellPlatePlan):
        yield from _of_positions(sequence.stage_positions, path, has_z=has_z)


def _of_positions(
    positions: Sequence[useq.Position], path: str, *, has_z: bool
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
            yield from _ineffective(position.sequence, f"{place}.sequence", has_z=has_z)


# A union of five kinds of plan complains five times of one value.
_MOST_FAULTS = 3


def read_sequence(mda: dict[str, Any] | Path) -> useq.MDASequence:
    """Read a useq plan, written in the config or in a file of its own.

    Raises
    ------
    ConfigError
        If the file cannot be read, a value breaks useq's rules, or a key or setting
        would be passed over in silence; see `plan_check`.
    """
    origin = "acquisition.mda" if isinstance(mda, dict) else f"plan '{mda}'"
    given = mda if isinstance(mda, dict) else _load(mda)
    if not isinstance(given, dict):
        msg = f"{origin} must be a mapping of useq fields, got {type(given).__name__}"
        raise ConfigError(msg)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            # useq changes what it is given.
            sequence = useq.MDASequence.model_validate(copy.deepcopy(given))
    except (ValidationError, ValueError, TypeError) as error:
        # Most often a misspelt key is why a value is missing.
        unknown = unknown_keys(given, useq.MDASequence, origin)
        fault = unknown[0] if unknown else f"{origin} is no valid useq plan: "
        raise ConfigError(fault + ("" if unknown else _one_line(error))) from error
    faults = unknown_keys(given, sequence, origin) + ineffective(sequence, origin)
    faults += [f"{origin}: {text}" for text in _not_followed(said)]
    if faults:
        raise ConfigError("; ".join(faults))
    return sequence


def anchored(sequence: useq.MDASequence, z_um: float | None) -> useq.MDASequence:
    """Give relative z-stacks a reference: where the z-stage is now.

    useq and pymmcore-plus take 0 where a position has no z, which would drive the
    objective to the stage's origin.
    """
    plan = sequence.z_plan
    if plan is None or not plan.is_relative or z_um is None:
        return sequence
    positions = list(sequence.stage_positions)
    if not positions:
        return sequence.replace(stage_positions=[useq.Position(z=z_um)])
    if all(position.z is not None for position in positions):
        return sequence
    return sequence.replace(
        stage_positions=[
            p if p.z is not None else p.model_copy(update={"z": z_um})
            for p in positions
        ]
    )


def _load(path: Path) -> object:
    try:
        # JSON is YAML, so that one reader takes both.
        return read_yaml(path)
    except OSError as error:
        msg = (
            f"plan '{path}' cannot be read: {error.strerror}; give a useq YAML or "
            "JSON file"
        )
        raise ConfigError(msg) from error
    except ValueError as error:
        msg = f"plan '{path}' {error}"
        raise ConfigError(msg) from error


def _not_followed(said: list[warnings.WarningMessage]) -> Iterator[str]:
    """Yield what useq warns of and does not follow; log the rest of its warnings."""
    for warning in said:
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
    # Of the kinds of plan that were tried, the one meant lacks the least.
    for detail in sorted(error.errors(), key=lambda fault: fault["type"] == "missing"):
        # The name of the kind that was tried is no step of the path.
        steps = [
            f"[{step}]" if isinstance(step, int) else f".{step}"
            for step in detail["loc"]
            if isinstance(step, int) or str(step).islower()
        ]
        key = "".join(steps).lstrip(".") or "plan"
        value = detail["input"]
        shown = "" if isinstance(value, dict | list) else f" (got {value!r})"
        faults.setdefault(key, f"{key}: {detail['msg']}{shown}")
    return "; ".join(list(faults.values())[:_MOST_FAULTS])
