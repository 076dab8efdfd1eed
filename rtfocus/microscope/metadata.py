"""Metadata: what pymmcore-plus says of a run and its frames, in small JSON form.

What it only logs although a frame may be wrong counts too. A stage or channel that
cannot be set is a log line there and the run goes on: the lines are collected for the
report, so that nobody has to read a log to learn it.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


LOGGER = "pymmcore-plus"
_MOST_KINDS = 20
# Said at every cancellation, which the report states anyway.
_NO_COMPLAINT = "MDA Canceled"
# Begins what is said of a channel, stage, exposure or property that is not set.
_FAILED_SETTING = "Failed to set "
# pymmcore-plus' thread that takes the images of a camera written in Python.
_CAMERA_THREAD = "AcquisitionThread"


class Complaints(logging.Handler):
    """Distinct warnings with their counts, at most `_MOST_KINDS` of them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._counts: Counter[str] = Counter()
        self.fault: str | None = None
        """What a camera written in Python died of during a hardware sequence; its
        thread tells nobody else."""
        self.failed_settings = 0
        """How often a device did not take what an event sets."""
        self.first_failed: str | None = None
        """What was said of the first of them."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The warnings in the order of their first appearance."""
        return tuple(
            text if count == 1 else f"{text} ({count} times)"
            for text, count in self._counts.items()
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Note one warning."""
        text = " ".join(record.getMessage().split())
        if text.startswith(_FAILED_SETTING):
            self.failed_settings += 1
            self.first_failed = self.first_failed or text
        if not text.startswith(_NO_COMPLAINT):
            self._note(text)

    def _note(self, text: str) -> None:
        if text in self._counts or len(self._counts) < _MOST_KINDS:
            self._counts[text] += 1
        else:
            self._counts["further warnings"] += 1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen while the block runs, and keep the terminal free of log lines.

        The logger is also told to leave out its line per MDA event, which costs as
        much as the event itself.
        """
        logger = logging.getLogger(LOGGER)
        level = logger.level
        terminals = [
            (handler, handler.level)
            for handler in logger.handlers
            if type(handler) is logging.StreamHandler
        ]
        logger.addHandler(self)
        logger.setLevel(logging.WARNING)
        for handler, _ in terminals:
            handler.setLevel(logging.CRITICAL)
        hook, threading.excepthook = threading.excepthook, self._note_thread
        self._next_hook = hook
        try:
            yield
        finally:
            threading.excepthook = hook
            logger.removeHandler(self)
            logger.setLevel(level)
            for handler, before in terminals:
                handler.setLevel(before)

    def _note_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Note what a sequence of images died of; pass on everything else."""
        if type(failed.thread).__name__ != _CAMERA_THREAD:
            self._next_hook(failed)
            return
        self.fault = " ".join(str(failed.exc_value).split())
        self._note(self.fault)
