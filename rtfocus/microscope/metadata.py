"""Metadata: pymmcore-plus' summary and frame metadata in small JSON form."""

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pymmcore_plus.metadata.serialize import to_builtins

# A frame's metadata travels with every frame: a few hundred bytes, not devices'
# whole state.
_MOST_ENTRIES = 24
_MOST_CHARACTERS = 64

# A time stamp of the core counts as the end of exposure if it is no older: a wrong
# one (clock set, summer time ending) would be worse than none.
_OLDEST_S = 1800.0


def summary_json(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a ``SummaryMetaV1`` as JSON, without the plan: it has its own field."""
    kept = {k: v for k, v in (summary or {}).items() if k != "mda_sequence"}
    return dict(to_builtins(kept))


def frame_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``FrameMetaV1`` as JSON, long values cut, the MDA event left out."""
    kept = {key: value for key, value in meta.items() if key != "mda_event"}
    kept["property_values"] = [
        {"dev": entry["dev"], "prop": entry["prop"], "val": _short(entry["val"])}
        for entry in list(meta.get("property_values", ()))[:_MOST_ENTRIES]
    ]
    if "camera_metadata" in meta:
        entries = list(meta["camera_metadata"].items())[:_MOST_ENTRIES]
        kept["camera_metadata"] = {str(key): _short(value) for key, value in entries}
    return dict(to_builtins(kept))


def received_ns(camera_metadata: Mapping[str, Any], now_ns: int) -> int | None:
    """Return when the core received an image, Unix time; None where it cannot tell.

    The tag is the core's local time, microseconds, taken when the camera hands
    the image over: the end of its exposure plus readout.
    """
    stamp = camera_metadata.get("TimeReceivedByCore")
    if stamp is None:
        return None
    try:
        received = int(datetime.fromisoformat(str(stamp)).timestamp() * 1e9)
    except ValueError:
        return None
    age_s = (now_ns - received) / 1e9
    return received if -1.0 < age_s < _OLDEST_S else None


def image_number(camera_metadata: Mapping[str, Any]) -> int | None:
    """Return the core's count of an image within its sequence, from 0."""
    number = camera_metadata.get("ImageNumber")
    return None if number is None else int(number)


def now_ns() -> int:
    """Return the Unix time; the sender's clock of all frames."""
    return time.time_ns()


def _short(value: object) -> str | bool | int | float | None:
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
