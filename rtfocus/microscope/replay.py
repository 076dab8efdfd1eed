"""Replay: recorded images sent as if they were being acquired."""

import threading
import time
from collections.abc import Callable
from uuid import uuid4

from rtfocus.config import Config
from rtfocus.config.microscope import ReplayConfig
from rtfocus.errors import InputError
from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, SeriesStart
from rtfocus.images.reading import find_images
from rtfocus.microscope.delivery import Delivery, Exposure
from rtfocus.microscope.ending import end_series
from rtfocus.microscope.metadata import now_ns
from rtfocus.microscope.recording import Recording
from rtfocus.microscope.report import AcquisitionReport, Observations
from rtfocus.microscope.series import find_pixel_size_um
from rtfocus.microscope.sink import FrameSink
from rtfocus.outcome import CANCELED, COMPLETED

_MOST_WARNINGS = 20


class Replay:
    """One recording from its first plane to its report."""

    def __init__(
        self,
        config: Config,
        replay: ReplayConfig,
        sink: FrameSink,
        on_frame: Callable[[FrameHeader], None],
    ) -> None:
        self._replay = replay
        self._sink = sink
        found = find_images(replay.path)
        self._unreadable = [broken.reason for broken in found.broken]
        self._notes = [note for image in found.series for note in image.notes]
        self._recording = Recording(found.series, config, repeats=replay.repeats)
        self._recording.require_one_geometry(pixel_size_um=replay.pixel_size_um)
        # Of a file that cannot be opened, nobody knows how many planes it has.
        self._planned = len(self._recording) + len(found.broken)
        self._observations = Observations()
        series = self._describe(config)
        self._z_step_um = series.z_step_um or 0.0
        self._delivery = Delivery(series, sink, on_frame)

    def run(self, stop: threading.Event) -> AcquisitionReport:
        """Play to the end or to `stop`; planes that cannot be read are left out.

        Raises
        ------
        RtfocusError
            What went wrong, after the sink was told the end.
        """
        started = time.monotonic()
        failure: Exception | None = None
        try:
            reason = self._play(stop, started)
        except Exception as error:  # raised below, once the sink knows
            failure, reason = error, str(error)
        seconds = time.monotonic() - started
        report = AcquisitionReport(
            series_uid=self._delivery.series.series_uid,
            frames=self._delivery.sent,
            planned=self._planned,
            camera_lost=0,
            not_acquired=self._planned - self._delivery.sent,
            reason=reason,
            seconds=seconds,
            lateness=self._observations.lateness(),
            most_waiting=None,
            least_free=None,
            warnings=self._warnings(),
        )
        end_series(self._sink, report, failure)
        if failure is not None:
            raise failure
        return report

    def _play(self, stop: threading.Event, started: float) -> str:
        rate = self._replay.frames_per_s
        for number, plane in enumerate(self._recording):
            planned_s = None if rate is None else number / rate
            wait_s = 0.0 if planned_s is None else planned_s - _since(started)
            if stop.wait(wait_s) if wait_s > 0 else stop.is_set():
                return CANCELED
            actual_s = _since(started)
            if planned_s is not None:
                self._observations.note_start(planned_s, actual_s)
            try:
                pixels = plane.image.read(**plane.source)
            except InputError as error:
                self._unreadable.append(str(error))
                continue
            z_um = plane.source["z"] * self._z_step_um
            exposure = Exposure(
                index=plane.index,
                captured_ns=now_ns(),
                exposure_ms=0.0,
                z_um=z_um if self._z_step_um else None,
                z_offset_um=z_um,
                event_index=number,
                planned_s=planned_s,
                actual_s=actual_s,
                frame_meta={"file": plane.image.path.name, "plane": plane.source},
            )
            self._delivery.deliver(pixels, exposure)
        if not self._unreadable:
            return COMPLETED
        more = len(self._unreadable) - 1
        return self._unreadable[0] + (f" (and {more} more)" if more else "")

    def _warnings(self) -> tuple[str, ...]:
        said = dict.fromkeys([*self._unreadable, *self._notes])
        more = len(said) - _MOST_WARNINGS
        shown = list(said)[:_MOST_WARNINGS]
        return (*shown, f"and {more} more") if more > 0 else tuple(shown)

    def _describe(self, config: Config) -> SeriesStart:
        first = self._recording.images[0]
        names = self._recording.channel_names
        channels = [config.channel(name).channel for name in names]
        found_um = self._replay.pixel_size_um or first.pixel_size_um
        rate = self._replay.frames_per_s
        planes = len(self._recording) / (self._recording.sizes["t"] or 1)
        return SeriesStart(
            version=PROTOCOL_VERSION,
            series_uid=uuid4().hex,
            name=config.run.name,
            started_ns=now_ns(),
            shape=first.shape,
            dtype=first.dtype.str,
            sizes=self._recording.sizes,
            channels=channels,
            positions=self._recording.positions,
            pixel_size_um=find_pixel_size_um(config, found_um, channels),
            z_step_um=first.z_step_um,
            interval_s=None if rate is None else planes / rate,
            summary={"source": "replay", "file": self._replay.path.name},
            planned=self._planned,
        )


def _since(started: float) -> float:
    return time.monotonic() - started
