"""Delivery: copies frames into the sink's slots and numbers them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, Role, SeriesStart
from rtfocus.microscope.sink import FrameSink


class SeriesChangedError(Exception):
    """The frames do not fit this series any more; never reaches the user."""


@dataclass(frozen=True, slots=True)
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


class Delivery:
    """The frames of one series on their way into a sink.

    Parameters
    ----------
    series
        Announced to the sink at once.
    sink
        Gives and takes the slots.
    on_frame
        Called after each frame with its header.
    """

    def __init__(
        self,
        series: SeriesStart,
        sink: FrameSink,
        on_frame: Callable[[FrameHeader], None] = lambda _: None,
    ) -> None:
        self.series = series
        self.sent = 0
        self._sink = sink
        self._on_frame = on_frame
        sink.start(series)

    def deliver(self, pixels: NDArray[np.generic], exposure: Exposure) -> None:
        """Copy one frame into a slot and hand it over.

        Parameters
        ----------
        pixels
            Axes (y, x) or (y, x, rgb).
        exposure
            Its place and times.

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
            captured_ns=exposure.captured_ns,
            exposure_ms=exposure.exposure_ms,
            index=exposure.index,
            role=exposure.role,
            z_um=exposure.z_um,
            z_offset_um=exposure.z_offset_um,
            event_index=exposure.event_index,
            camera_image_number=exposure.camera_image_number,
            planned_s=exposure.planned_s,
            actual_s=exposure.actual_s,
            frame_meta=exposure.frame_meta,
        )
        slot = self._sink.acquire()
        slot.prepare(header)[...] = pixels
        self._sink.publish(slot)
        self.sent += 1
        self._on_frame(header)
