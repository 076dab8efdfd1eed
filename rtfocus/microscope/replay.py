"""Replay: recorded images sent as if they were being acquired."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from uuid import uuid4

from rtfocus.config import Config
from rtfocus.config.microscope import ReplayConfig
from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, Position, SeriesStart
from rtfocus.images.reading import open_images
from rtfocus.images.series import ImageSeries
from rtfocus.microscope.delivery import Delivery, Exposure, SeriesChangedError
from rtfocus.microscope.ending import end_series
from rtfocus.microscope.metadata import now_ns
from rtfocus.microscope.report import AcquisitionReport, Observations
from rtfocus.microscope.series import find_pixel_size_um
from rtfocus.microscope.sink import FrameSink
from rtfocus.outcome import CANCELED, COMPLETED


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of a recording and its place in the series."""

    image: ImageSeries
    source: dict[str, int]
    """Axes t, c, z within its own image."""
    index: dict[str, int]


class Recording:
    """Images of one or more files as the axes of one series.

    Single planes become time points in name order; images with axes of their own
    become positions.
    """

    def __init__(self, images: Sequence[ImageSeries], repeats: int) -> None:
        self.images = images
        self.repeats = repeats
        self.is_film = len(images) > 1 and all(len(image) == 1 for image in images)

    @property
    def sizes(self) -> dict[str, int | None]:
        """Lengths of the axes, slowest first."""
        if self.is_film:
            return {"t": self.repeats * len(self.images), "p": 1, "c": 1, "z": 1}
        longest = {
            axis: max(image.sizes[axis] for image in self.images) for axis in "tcz"
        }
        return {
            "t": self.repeats * longest["t"],
            "p": len(self.images),
            "c": longest["c"],
            "z": longest["z"],
        }

    @property
    def positions(self) -> list[Position]:
        """One per image, under its own name."""
        if self.is_film:
            return [Position(name="p0")]
        names = [image.name for image in self.images]
        return [
            Position(name=name if names.count(name) == 1 else f"{name}_{p}")
            for p, name in enumerate(names)
        ]

    def __len__(self) -> int:
        return self.repeats * sum(len(image) for image in self.images)

    def __iter__(self) -> Iterator[Plane]:
        """Yield all planes in the order of `sizes`."""
        for repeat in range(self.repeats):
            yield from self._film(repeat) if self.is_film else self._stacks(repeat)

    def _film(self, repeat: int) -> Iterator[Plane]:
        for number, image in enumerate(self.images):
            index = {"t": repeat * len(self.images) + number, "p": 0, "c": 0, "z": 0}
            yield Plane(image, {"t": 0, "c": 0, "z": 0}, index)

    def _stacks(self, repeat: int) -> Iterator[Plane]:
        longest = max(image.sizes["t"] for image in self.images)
        for t in range(longest):
            for p, image in enumerate(self.images):
                for source in image.indices():
                    if source["t"] == t:
                        place = {**source, "t": repeat * longest + t, "p": p}
                        yield Plane(image, source, place)


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
        self._recording = Recording(open_images(replay.path), replay.repeats)
        self._observations = Observations()
        series = self._describe(config)
        self._z_step_um = series.z_step_um or 0.0
        self._delivery = Delivery(series, sink, on_frame)

    def run(self, stop: threading.Event) -> AcquisitionReport:
        """Play to the end, to `stop`, or to an image of another shape.

        Raises
        ------
        RtfocusError
            What went wrong, after the sink was told the end.
        """
        started = time.monotonic()
        failure: Exception | None = None
        try:
            reason = self._play(stop, started)
        except SeriesChangedError as change:
            reason = str(change)
        except Exception as error:  # raised below, once the sink knows
            failure, reason = error, str(error)
        seconds = time.monotonic() - started
        planned = len(self._recording)
        report = AcquisitionReport(
            series_uid=self._delivery.series.series_uid,
            frames=self._delivery.sent,
            planned=planned,
            camera_lost=0,
            not_acquired=planned - self._delivery.sent,
            reason=reason,
            seconds=seconds,
            lateness=self._observations.lateness(),
            most_waiting=None,
            least_free=None,
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
            self._delivery.deliver(plane.image.read(**plane.source), exposure)
        return COMPLETED

    def _describe(self, config: Config) -> SeriesStart:
        first = self._recording.images[0]
        count = self._recording.sizes["c"] or 1
        # Without names of their own, channels take the config's in order.
        names = [*first.channel_names] or [c.name for c in config.channels]
        names += [f"c{number}" for number in range(len(names), count)]
        channels = [config.channel(name).channel for name in names[:count]]
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
            pixel_size_um=find_pixel_size_um(config, first.pixel_size_um, channels),
            z_step_um=first.z_step_um,
            interval_s=None if rate is None else planes / rate,
            summary={"source": "replay", "file": self._replay.path.name},
            planned=len(self._recording),
        )


def _since(started: float) -> float:
    return time.monotonic() - started
