"""Validation: a peer's words against the protocol, once, where they come in.

Numbers above all: NaN and infinity are no measurements, and an integer of a peer
decides how long a loop runs and how much memory a list takes. What is rejected is
counted by its reason.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
from pydantic import TypeAdapter, ValidationError

from rtfocus.channel import Channel
from rtfocus.errors import ProtocolError, TransportError
from rtfocus.frame import Estimate, FrameHeader, SeriesEnd, SeriesStart
from rtfocus.transport.messages import DTYPES, printable

MOST_CHANNELS = 256
MOST_POSITIONS = 100_000
MOST_PLACES = 2**40
"""Of all planned frames together; disks end long before."""
MOST_LOST = 2**20
"""Longest hole in a series without an end."""
MOST_SKIPPED = 100_000
"""Most time points or events, beyond two per frame, that a frame may lie ahead."""
MOST_WARNINGS = 100
"""Warnings kept of what a publisher says at the end; the rest is counted."""
_INT64 = 2**63

_channel = TypeAdapter(Channel)
logger = logging.getLogger(__name__)


class Rejections:
    """Counts by reason; logs the 1st, 10th, 100th ... of each.

    Parameters
    ----------
    source
        Appears in the log, e.g. ``frames``.
    on_count
        Called with the reason of every rejected message.
    """

    def __init__(
        self, source: str, on_count: Callable[[str], None] = lambda _: None
    ) -> None:
        self._source = source
        self._on_count = on_count
        self.counts: dict[str, int] = {}
        self.last: str | None = None
        """What was wrong with the newest."""

    def reject(self, reason: str, detail: str) -> None:
        """Count one message that cannot be used."""
        number = self.counts.get(reason, 0) + 1
        self.counts[reason] = number
        self._on_count(reason)
        self.last = detail
        # A flood of bad messages must not become a flood of log lines.
        if str(number).strip("0") == "1":
            logger.warning(
                "%s: rejected message, %s (number %d of these): %s",
                *(self._source, reason, number, detail),
            )


def check_welcome(topic: str, start: SeriesStart, max_frame_bytes: int) -> None:
    """Check what a publisher welcomes a recorder with.

    Raises
    ------
    TransportError
        If frames like this cannot be received; names the value and the rule.
    """
    fault = "its topic is empty" if not topic else _series_fault(start, max_frame_bytes)
    if fault is not None:
        msg = f"the publisher announces a series that cannot be received: {fault}"
        raise TransportError(msg)


def most_lost(series: SeriesStart) -> int:
    """Return how many frames may be missing in a row: more is no loss but a mistake."""
    places = _places(series)
    # Probes of an autofocus count in the sequence, but not among the places.
    return MOST_LOST if places is None else min(2 * places + 4096, MOST_LOST + places)


def check_header(header: FrameHeader, series: SeriesStart) -> None:
    """Check that a header belongs to the series.

    Raises
    ------
    ProtocolError
        If it does not; its shape and dtype are not looked at here.
    """
    if header.series_uid != series.series_uid:
        msg = f"frame of series '{header.series_uid}', not '{series.series_uid}'"
        raise ProtocolError(msg, "series")
    if header.sequence < 0 or (header.event_index or 0) < 0:
        msg = f"sequence={header.sequence} or event_index={header.event_index} < 0"
        raise ProtocolError(msg)
    for axis, place in header.index.items():
        size = series.sizes.get(axis, 1)
        # size is None where an axis has no end.
        if axis not in "tpcz" or place < 0 or (size is not None and place >= size):
            msg = f"frame {header.sequence}: no {axis}={place} in sizes {series.sizes}"
            raise ProtocolError(msg, "index")
    _check_numbers(header, series)


def check_estimate(estimate: Estimate) -> None:
    """Check an estimate before anything is focused by it; ProtocolError names it."""
    counters = {
        "sequence": estimate.sequence,
        "captured_ns": estimate.captured_ns,
        "estimated_ns": estimate.estimated_ns,
    }
    numbers = {
        "defocus_um": estimate.defocus_um,
        "z_um": estimate.z_um,
        "z_offset_um": estimate.z_offset_um,
        "confidence": estimate.confidence,
        "foreground": estimate.foreground,
    }
    fault = _not_finite(numbers)
    fault = f"{fault} is not finite" if fault is not None else _not_counter(counters)
    for name in ("confidence", "foreground"):
        # Sums of float32 may exceed 1 a little.
        if fault is None and not 0 <= (numbers[name] or 0) <= 1.001:
            fault = f"{name}={numbers[name]} is not from 0 to 1"
    if fault is not None:
        msg = f"estimate of frame {estimate.sequence}: {fault}"
        raise ProtocolError(msg, "range")


def end_fault(end: SeriesEnd) -> str | None:
    """Return what of the numbers at the end of a series cannot be, as a name."""
    numbers = {"camera_lost": end.camera_lost, "not_acquired": end.not_acquired}
    for name, number in numbers.items():
        if not 0 <= number <= MOST_PLACES:
            return f"{name}={number}"
    return None


def readable_end(end: SeriesEnd) -> SeriesEnd:
    """Return the end of a series with words fit for a terminal and a report.

    They are cut, not refused: whatever a publisher complains of, all its frames
    came.
    """
    kept = tuple(map(printable, end.warnings[:MOST_WARNINGS]))
    if (more := len(end.warnings) - len(kept)) > 0:
        kept = (*kept, f"{more} further warnings")
    return msgspec.structs.replace(end, reason=printable(end.reason), warnings=kept)


def is_alike(header: FrameHeader, series: SeriesStart) -> bool:
    """Tell whether a frame has the series' shape and dtype."""
    return header.shape == series.shape and header.dtype == series.dtype


def pixel_bytes(header: FrameHeader) -> int:
    """Return how many bytes the pixels of this frame must have.

    Raises
    ------
    ProtocolError
        If its shape or dtype is none.
    """
    if header.dtype not in DTYPES or not header.shape or min(header.shape) < 1:
        msg = f"frame {header.sequence}: shape={header.shape} dtype={header.dtype!r}"
        raise ProtocolError(msg)
    return math.prod(header.shape) * np.dtype(header.dtype).itemsize


def _series_fault(start: SeriesStart, max_frame_bytes: int) -> str | None:
    """Return the first fault of a series, as value and rule."""
    fault = _form_fault(start, max_frame_bytes) or _sizes_fault(start)
    return fault or _numbers_fault(start) or _channels_fault(start)


def _form_fault(start: SeriesStart, max_frame_bytes: int) -> str | None:
    grey, rgb = len(start.shape) == 2, len(start.shape) == 3 and start.shape[2] == 3
    if not start.series_uid:
        return "series_uid is empty"
    if not (grey or rgb) or min(start.shape) < 1:
        return f"shape={start.shape} is not (y, x) or (y, x, 3)"
    if start.dtype not in DTYPES:
        return f"dtype={start.dtype!r} is none of {', '.join(DTYPES)}"
    frame_bytes = math.prod(start.shape) * np.dtype(start.dtype).itemsize
    if frame_bytes > max_frame_bytes:
        return (
            f"shape={start.shape} {start.dtype} is {frame_bytes / 1e6:.0f} MB a frame, "
            f"more than transport.max_frame_mb={max_frame_bytes / 1e6:g}"
        )
    return None


def _sizes_fault(start: SeriesStart) -> str | None:
    sizes = start.sizes
    if not set(sizes) <= set("tpcz"):
        return f"sizes={sizes} has an axis that is not t, p, c or z"
    endless = [axis for axis, size in sizes.items() if size is None and axis != "t"]
    if endless:
        return f"sizes={sizes}: only t may be without an end, not {endless[0]}"
    if any(size is not None and size < 1 for size in sizes.values()):
        return f"sizes={sizes}: every length must be >= 1"
    if math.prod(size or 1 for size in sizes.values()) > MOST_PLACES:
        return f"sizes={sizes} are more than {MOST_PLACES} places"
    for axis, name, number, most in (
        ("c", "channels", len(start.channels), MOST_CHANNELS),
        ("p", "positions", len(start.positions), MOST_POSITIONS),
    ):
        if not 1 <= number <= most:
            return f"{name} has {number} entries, must have 1 to {most}"
        if sizes.get(axis, 1) != number:
            return f"sizes={sizes}, but {name} has {number} entries"
    return None


def _numbers_fault(start: SeriesStart) -> str | None:
    if not 1e-3 <= start.pixel_size_um <= 1e3:
        return f"pixel_size_um={start.pixel_size_um} is not from 0.001 to 1000"
    if start.z_step_um is not None and not 0 < start.z_step_um < math.inf:
        return f"z_step_um={start.z_step_um} is not > 0"
    if start.interval_s is not None and not 0 <= start.interval_s < math.inf:
        return f"interval_s={start.interval_s} is not >= 0"
    bits = 8 * np.dtype(start.dtype).itemsize
    if start.bit_depth is not None and not 1 <= start.bit_depth <= bits:
        return f"bit_depth={start.bit_depth} is not from 1 to {bits}, as {start.dtype}"
    if start.planned is not None and not 0 <= start.planned <= MOST_PLACES:
        return f"planned={start.planned} is not from 0 to {MOST_PLACES}"
    if not 0 <= start.started_ns < _INT64:
        return f"started_ns={start.started_ns} is not from 0 to 2^63 - 1"
    for number, position in enumerate(start.positions):
        place = {"x_um": position.x_um, "y_um": position.y_um}
        if (name := _not_finite(place)) is not None:
            return f"positions[{number}].{name} is not finite"
        if not 0 <= position.field < _INT64:
            return f"positions[{number}].field={position.field} is not >= 0"
    return None


def _channels_fault(start: SeriesStart) -> str | None:
    """Hold the channels to the rules of the config."""
    names = Counter(channel.name for channel in start.channels)
    if (doubled := names.most_common(1)[0])[1] > 1:
        return f"channels: '{doubled[0]}' is there twice; names must be unique"
    for number, channel in enumerate(start.channels):
        try:
            _channel.validate_python(msgspec.to_builtins(channel))
        except ValidationError as error:
            detail = error.errors()[0]
            key = ".".join(str(part) for part in detail["loc"])
            rule = f"{detail['msg']} (got {detail['input']!r})"
            return f"channels[{number}].{key}: {rule}"
    return None


def _check_numbers(header: FrameHeader, series: SeriesStart) -> None:
    """Check that the numbers of a header can be true; ProtocolError names the first."""
    counters = {
        "sequence": header.sequence,
        "captured_ns": header.captured_ns,
        "event_index": header.event_index or 0,
        "camera_image_number": header.camera_image_number or 0,
    }
    numbers = {
        "exposure_ms": header.exposure_ms,
        "z_um": header.z_um,
        "z_offset_um": header.z_offset_um,
        "planned_s": header.planned_s,
        "actual_s": header.actual_s,
    }
    fault = _not_finite(numbers)
    fault = f"{fault} is not finite" if fault is not None else None
    if header.exposure_ms < 0:
        fault = f"exposure_ms={header.exposure_ms} is negative"
    fault = fault or _not_counter(counters) or _far_ahead(header, series)
    if fault is not None:
        msg = f"frame {header.sequence}: {fault}"
        raise ProtocolError(msg, "range")


def _far_ahead(header: FrameHeader, series: SeriesStart) -> str | None:
    """Return what in a header is further on in the plan than its frame can be."""
    places = _places(series)
    ahead = 2 * header.sequence + MOST_SKIPPED
    # An event that takes no image, such as an autofocus, may stand before each.
    most = ahead if places is None else 2 * places + 4096
    if (header.event_index or 0) > most:
        return f"event_index={header.event_index} is beyond {most}"
    if series.sizes.get("t", 1) is None and header.index.get("t", 0) > ahead:
        return f"t={header.index['t']} is beyond {ahead}"
    return None


def _places(series: SeriesStart) -> int | None:
    sizes = series.sizes.values()
    return None if None in sizes else math.prod(size or 1 for size in sizes)


def _not_counter(counters: Mapping[str, int]) -> str | None:
    """Return the first that is negative or does not fit a store's column."""
    for name, counter in counters.items():
        if not 0 <= counter < _INT64:
            return f"{name}={counter} is not from 0 to 2^63 - 1"
    return None


def _not_finite(numbers: Mapping[str, float | None]) -> str | None:
    """Return the name of the first number that is NaN or infinite."""
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            return name
    return None
