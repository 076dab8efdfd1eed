"""Delivery: frames copied into the sink's slots, numbered and counted to the end.

What Micro-Manager says of a frame travels with it in small JSON form.

How an acquisition went is counted where it happens; a series ends in one place when
things went well, and in the same one when they did not.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import MicroscopeError
from rtfocus.frame import (
    PROTOCOL_VERSION,
    FrameHeader,
    Role,
    SeriesStart,
    Slot,
)
from rtfocus.metrics import Histogram, Outcome

if TYPE_CHECKING:
    # A processor side knows reports and starts without Micro-Manager.
    from pymmcore_plus import CMMCorePlus
    from pymmcore_plus.experimental.unicore import UniMMCore

LOGGER = "pymmcore-plus"
"""Of its complaints, and of ours that belong with them."""


class FrameSink(Protocol):
    """Takes one series: `start`, then `acquire` and `publish` per frame, then `end`.

    All calls come from the acquisition's thread. The transport's publisher has
    this form; the two packages meet only in `rtfocus.app`.
    """

    def start(self, series: SeriesStart) -> None:
        """Begin a series; may wait for its recorder."""
        ...

    def acquire(self) -> Slot:
        """Return a free slot, waiting for one; raises when the wait is given up."""
        ...

    def publish(self, slot: Slot) -> None:
        """Hand over a filled slot; it is not the caller's any more."""
        ...

    def end(
        self,
        reason: str,
        *,
        camera_lost: int = 0,
        not_acquired: int = 0,
        warnings: tuple[str, ...] = (),
        focus_log: tuple[dict[str, Any], ...] = (),
    ) -> None:
        """End the series, once everything published is safe; see `SeriesEnd`."""
        ...


@dataclass(frozen=True, slots=True)
class Lateness:
    """Actual against planned start of the exposures, in ms."""

    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class AcquisitionReport:
    """Result of one series on the microscope side."""

    series_uid: str
    frames: int
    """Frames handed to the sink; images of searches for focus are not counted."""
    planned: int | None
    """Frames planned; None: no plan, or one without an end."""
    camera_lost: int
    """Frames the camera exposed, or should have, that never arrived."""
    not_acquired: int
    """Planned frames whose turn never came: planned = frames + lost + these."""
    reason: str
    """``completed``, ``canceled``, or why the series broke off."""
    seconds: float
    """From the first event to the last frame."""
    lateness: Lateness | None
    """None: the plan names no times."""
    most_waiting: int | None
    """Most images that waited in Micro-Manager's buffer; None: it was not used."""
    least_free: int | None
    """Fewest images that still had room in it."""
    warnings: tuple[str, ...] = ()
    """What Micro-Manager complained of without stopping."""
    focus_log: tuple[dict[str, Any], ...] = ()
    """What autofocus did after the last frame was sent."""

    @property
    def outcome(self) -> Outcome:
        """How much of the plan was handed to the sink."""
        lost = {"lost by the camera": self.camera_lost} if self.camera_lost else {}
        return Outcome(self.planned, self.frames, self.reason, lost, self.not_acquired)

    def __str__(self) -> str:
        """Sum up in a few lines for a terminal."""
        rate = self.frames / self.seconds if self.seconds > 0 else 0.0
        done = "completed: " if self.outcome.is_complete else ""
        if self.outcome.was_stopped:
            done = ""
        lines = [f"{done}{self.outcome}, in {self.seconds:.1f} s ({rate:.1f} frames/s)"]
        if self.lateness is not None:
            late = self.lateness
            lines.append(
                f"late by p50 {late.p50_ms:.0f}, p99 {late.p99_ms:.0f}, "
                f"max {late.max_ms:.0f} ms"
            )
        if self.most_waiting is not None:
            lines.append(
                f"Micro-Manager's buffer: at most {self.most_waiting} images waiting, "
                f"room for at least {self.least_free} more"
            )
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


@dataclass
class Observations:
    """What is noted while frames come in."""

    camera_lost: int = 0
    most_waiting: int | None = None
    least_free: int | None = None
    late: Histogram = field(default_factory=Histogram)

    def note_buffer(self, waiting: int, free: int) -> None:
        """Note how full Micro-Manager's buffer is."""
        self.most_waiting = max(self.most_waiting or 0, waiting)
        self.least_free = (
            free if self.least_free is None else min(self.least_free, free)
        )

    def note_start(self, planned_s: float, actual_s: float) -> None:
        """Note when an exposure should have started, and did."""
        self.late.add(max(0.0, actual_s - planned_s) * 1e3)

    def lateness(self) -> Lateness | None:
        """Return the distribution; None when no exposure had a planned time."""
        p50, p99 = self.late.percentile(50), self.late.percentile(99)
        if p50 is None or p99 is None:
            return None
        return Lateness(p50, p99, self.late.max_ms)


def overflow_error(core: "UniMMCore") -> MicroscopeError:
    """Say that Micro-Manager's buffer ran over, and what helps."""
    size_mb = core.getCircularBufferMemoryFootprint()
    msg = (
        f"Micro-Manager's buffer of {size_mb} MB overflowed: frames came faster than "
        "they were processed. Lower the frame rate, make the processing faster "
        "(processing.restoration.method: none), or set a larger "
        "microscope.sequence_buffer_mb"
    )
    return MicroscopeError(msg)


def pixel_size_change(before_um: float, now_um: float) -> str | None:
    """Name a change of the core's pixel size, as of its objective; None: the same."""
    if before_um == now_um:
        return None
    return f"the core's pixel size changed from {before_um} to {now_um} um"


def refuse_overflow(core: "CMMCorePlus") -> None:
    """Raise MemoryError, as pymmcore-plus does, where the core's buffer ran over."""
    if core.isBufferOverflowed():
        msg = "the core's image buffer overflowed"
        raise MemoryError(msg)


def camera_lost_images(core: "UniMMCore", fault: str | None) -> str:
    """Return the reason of a series that ran to its end with images missing."""
    why = "" if fault is None else f": {fault}"
    return f"camera '{core.getCameraDevice()}' gave fewer images than asked for{why}"


class SeriesChangedError(Exception):
    """The frames do not fit this series any more; never reaches the user."""


@dataclass(frozen=True)
class Exposure:
    """What is known about one frame before it is sent; see `FrameHeader`."""

    index: dict[str, int]
    captured_ns: int
    exposure_ms: float
    z_um: float | None = None
    z_offset_um: float = 0.0
    event_index: int | None = None
    camera_image_number: int | None = None
    planned_s: float | None = None
    actual_s: float | None = None
    frame_meta: dict[str, Any] = field(default_factory=dict)
    role: Role = Role.RECORD


def untold(_header: FrameHeader) -> None:
    """Ignore that a frame was handed over."""


class Delivery:
    """The frames of one series on their way into a sink.

    Parameters
    ----------
    series
        Announced to the sink at once.
    """

    def __init__(
        self,
        series: SeriesStart,
        sink: FrameSink,
        on_frame: Callable[[FrameHeader], None],
    ) -> None:
        self.series = series
        self.sent = 0
        """All frames, those of searches for focus too; the next one's sequence."""
        self.recorded = 0
        self._sink = sink
        self._on_frame = on_frame
        sink.start(series)

    def deliver(self, pixels: NDArray[np.generic], exposure: Exposure) -> None:
        """Copy one frame into a slot and hand it over.

        Parameters
        ----------
        pixels
            Axes (y, x) or (y, x, rgb).

        Raises
        ------
        SeriesChangedError
            If shape or pixel type differ from the series'; nothing was sent.
        """
        dtype = pixels.dtype.newbyteorder("<").str
        if pixels.shape != self.series.shape or dtype != self.series.dtype:
            msg = (
                f"frames changed from {self.series.shape} {self.series.dtype} to "
                f"{pixels.shape} {dtype}"
            )
            raise SeriesChangedError(msg)
        header = FrameHeader(
            version=PROTOCOL_VERSION,
            series_uid=self.series.series_uid,
            sequence=self.sent,
            shape=self.series.shape,
            dtype=self.series.dtype,
            **vars(exposure),
        )
        slot = self._sink.acquire()
        slot.prepare(header)[...] = pixels
        self._sink.publish(slot)
        self.sent += 1
        self.recorded += exposure.role is Role.RECORD
        self._on_frame(header)

    def end(
        self,
        observations: Observations,
        *,
        planned: int | None,
        not_acquired: int,
        reason: str,
        seconds: float,
        failure: Exception | None,
        warnings: tuple[str, ...],
        focus_log: tuple[dict[str, Any], ...] = (),
    ) -> AcquisitionReport:
        """Tell the sink the end; its own failure counts unless there was one before.

        Raises
        ------
        Exception
            `failure`, if there is one, or what the sink raises.
        """
        ending: dict[str, Any] = {
            "camera_lost": observations.camera_lost,
            "not_acquired": not_acquired,
            "warnings": warnings,
            "focus_log": focus_log,
        }
        try:
            self._sink.end(reason, **ending)
        except Exception as error:
            if failure is None:
                raise
            # Most often the same cause: the recorder is gone.
            failure.add_note(f"ending the series failed too: {error}")
        if failure is not None:
            raise failure
        return AcquisitionReport(
            series_uid=self.series.series_uid,
            frames=self.recorded,
            planned=planned,
            reason=reason,
            seconds=seconds,
            lateness=observations.lateness(),
            most_waiting=observations.most_waiting,
            least_free=observations.least_free,
            **ending,
        )


# A frame's metadata travels with every frame: a few hundred bytes, not devices'
# whole state.
_MOST_ENTRIES = 24
_MOST_CHARACTERS = 64

# A time stamp of the core counts as the end of exposure if it is no older: a wrong
# one (clock set, summer time ending) would be worse than none.
_OLDEST_S = 1800.0

READOUT_MS = "ReadoutTime-ms"
"""Tag of an image whose camera tells how long after its exposure it handed it over."""


def frame_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``FrameMetaV1`` as JSON, long values cut, the MDA event left out."""
    # Here: the reports above are read on machines without Micro-Manager.
    from pymmcore_plus.metadata.serialize import to_builtins

    values = {key: value for key, value in meta.items() if key != "mda_event"}
    values["property_values"] = [
        {"dev": entry["dev"], "prop": entry["prop"], "val": _short(entry["val"])}
        for entry in list(meta.get("property_values", ()))[:_MOST_ENTRIES]
    ]
    if "camera_metadata" in meta:
        entries = list(meta["camera_metadata"].items())[:_MOST_ENTRIES]
        values["camera_metadata"] = {str(key): _short(value) for key, value in entries}
    return dict(to_builtins(values))


def age_ns(camera_metadata: Mapping[str, Any], told_ns: int) -> int | None:
    """Return how long ago the exposure of an image ended; None: the core cannot tell.

    The core's tag is the machine's local time, microseconds, taken when the camera
    hands the image over: that is after the readout, which few cameras tell.

    Parameters
    ----------
    camera_metadata
        Of the image.
    told_ns
        Now, by the machine's clock.
    """
    stamp = camera_metadata.get("TimeReceivedByCore")
    if stamp is None:
        return None
    try:
        received_ns = int(datetime.fromisoformat(str(stamp)).timestamp() * 1e9)
        readout_ns = int(float(camera_metadata.get(READOUT_MS, 0.0)) * 1e6)
    except (ValueError, OverflowError):
        return None
    age = told_ns - received_ns + readout_ns
    return age if -1.0 < age / 1e9 < _OLDEST_S else None


def image_number(camera_metadata: Mapping[str, Any]) -> int | None:
    """Return the core's count of an image within its sequence, from 0."""
    number = camera_metadata.get("ImageNumber")
    return None if number is None else int(number)


def number_on(
    core: "CMMCorePlus", camera: Mapping[str, Any], following: int, end: int
) -> int | None:
    """Return the number of an image within its sequence, from `following` on.

    None, and a warning that `Complaints` hears, where it came before or is `end` or
    more: then it is not known which image it is.
    """
    number = image_number(camera)
    if number is None:
        return following
    if following <= number < end:
        return number
    logging.getLogger(LOGGER).warning(
        "camera '%s' numbers an image %d where %d was to come, as when somebody clears "
        "Micro-Manager's buffer; what was lost then is not known",
        *(core.getCameraDevice(), number, following),
    )
    return None


def _short(value: object) -> str | bool | int | float | None:
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
