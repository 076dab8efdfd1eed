"""Replay: recorded images sent as if they were being acquired.

Images of one or more files become the axes of one series. Single planes in files of
their own become time points in the order of their names; everything else becomes
positions. Channels are matched by name, so that files which keep them in another order
fall on the same index c.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from uuid import uuid4

from rtfocus.config import Config
from rtfocus.config.sections import ReplayConfig
from rtfocus.errors import InputError, number_of
from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, Position, SeriesStart
from rtfocus.images.reading import find_images
from rtfocus.images.series import ImageSeries
from rtfocus.machine import RUN_CLOCK
from rtfocus.metrics import CANCELED, COMPLETED
from rtfocus.microscope.delivery import (
    AcquisitionReport,
    Delivery,
    Exposure,
    FrameSink,
    Observations,
)
from rtfocus.microscope.series import find_pixel_size_um

# Files may state one size with different numbers of digits.
_SIZE_DIGITS = 3
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class RecordedPlane:
    """One plane of a recording and its place in the series."""

    image: ImageSeries
    source: dict[str, int]
    """Axes t, c, z within its own image."""
    index: dict[str, int]


class Recording:
    """The planes of a recording in the order in which they are played.

    Parameters
    ----------
    images
        In natural order of their names.
    config
        Its channels name those of images that name none.
    repeats
        How often to play it.
    """

    def __init__(
        self, images: Sequence[ImageSeries], config: Config, *, repeats: int = 1
    ) -> None:
        self.images = images
        self.repeats = repeats
        self.is_film = _is_film(images)
        names = [_channel_names(image, config) for image in images]
        self.channel_names = list(dict.fromkeys(name for own in names for name in own))
        """By index c."""
        self._channels = [
            [self.channel_names.index(name) for name in own] for own in names
        ]

    def require_one_geometry(self, *, pixel_size_um: float | None) -> None:
        """Refuse images that differ in what one series has one of.

        Parameters
        ----------
        pixel_size_um
            Size of all pixels where the user gives one; None: as the files say.

        Raises
        ------
        InputError
            Names the files by what they hold; or the pixels are not square.
        """
        planes = [
            (image, _plane(image, pixel_size_um or image.pixel_size_um))
            for image in self.images
        ]
        stacks = [
            (image, f"slices {_digits(image.z_step_um)} um apart")
            for image in self.images
            if image.sizes["z"] > 1
        ]
        _require_alike(planes)
        _require_alike(stacks)

    @property
    def sizes(self) -> dict[str, int | None]:
        """Lengths of the axes, slowest first."""
        count = len(self.images)
        channels = len(self.channel_names)
        if self.is_film:
            return {"t": self.repeats * count, "p": 1, "c": channels, "z": 1}
        longest = {
            axis: max(image.sizes[axis] for image in self.images) for axis in "tz"
        }
        return {
            "t": self.repeats * longest["t"],
            "p": count,
            "c": channels,
            "z": longest["z"],
        }

    @property
    def positions(self) -> list[Position]:
        """One per image, under its own name and in its own well."""
        if self.is_film:
            return [Position(name="p0")]
        plates = {image.place.plate if image.place else None for image in self.images}
        in_wells = len(plates) == 1 and None not in plates
        names = _unique([image.name for image in self.images])
        return [
            _position(image, name, in_well=in_wells)
            for image, name in zip(self.images, names, strict=True)
        ]

    def __len__(self) -> int:
        return self.repeats * sum(len(image) for image in self.images)

    def __iter__(self) -> Iterator[RecordedPlane]:
        """Yield all planes in the order of `sizes`."""
        for repeat in range(self.repeats):
            yield from self._film(repeat) if self.is_film else self._stacks(repeat)

    def _film(self, repeat: int) -> Iterator[RecordedPlane]:
        for number, image in enumerate(self.images):
            t, (c, *_) = repeat * len(self.images) + number, self._channels[number]
            index = {"t": t, "p": 0, "c": c, "z": 0}
            yield RecordedPlane(image, {"t": 0, "c": 0, "z": 0}, index)

    def _stacks(self, repeat: int) -> Iterator[RecordedPlane]:
        longest = max(image.sizes["t"] for image in self.images)
        for t in range(longest):
            for p, image in enumerate(self.images):
                if t >= image.sizes["t"]:
                    continue
                for own, z in product(*(range(image.sizes[axis]) for axis in "cz")):
                    c = self._channels[p][own]
                    place = {"t": repeat * longest + t, "p": p, "c": c, "z": z}
                    yield RecordedPlane(image, {"t": t, "c": own, "z": z}, place)


def _is_film(images: Sequence[ImageSeries]) -> bool:
    """Tell whether images are the time points of one place."""
    return (
        len(images) > 1
        and all(len(image) == 1 and image.place is None for image in images)
        # Several images of one file, or of named positions, are places.
        and len({image.path for image in images}) == len(images)
        and len({image.position for image in images}) == 1
    )


def _channel_names(image: ImageSeries, config: Config) -> list[str]:
    """Return the names of an image's channels, those of the config if it has none."""
    count = image.sizes["c"]
    names = [*image.channel_names] or [channel.name for channel in config.channels]
    names += [f"c{number}" for number in range(len(names), count)]
    return _unique(names[:count])


def _unique(names: list[str]) -> list[str]:
    """Give names that are there before a number."""
    taken: dict[str, None] = {}
    for number, name in enumerate(names):
        mine, more = name, number
        while mine in taken:
            mine, more = f"{name}_{more}", more + 1
        taken[mine] = None
    return list(taken)


def _position(image: ImageSeries, name: str, *, in_well: bool) -> Position:
    place, stage = image.place if in_well else None, image.stage
    return Position(
        name=name,
        x_um=None if stage is None else stage.x_um,
        y_um=None if stage is None else stage.y_um,
        plate_row=None if place is None else place.rows[place.row],
        plate_column=None if place is None else place.columns[place.column],
        field=0 if place is None else place.field,
    )


def _require_alike(described: list[tuple[ImageSeries, str]]) -> None:
    """Refuse images of which different things are said."""
    groups: dict[str, list[str]] = {}
    for image, description in described:
        groups.setdefault(description, []).append(image.path.name)
    if len(groups) <= 1:
        return
    parts = [
        f"{description}: {_list_files(files)}" for description, files in groups.items()
    ]
    msg = (
        f"the images to replay differ: {'; '.join(parts)}. One series has one "
        "geometry: replay each kind in a run of its own (a pixel size alone can be "
        "set: microscope.pixel_size_um); nothing was sent"
    )
    raise InputError(msg)


def _plane(image: ImageSeries, pixel_size_um: float | None) -> str:
    height, width, *colours = image.shape
    kind = f"{image.dtype.str}{' RGB' if colours else ''}"
    return f"{width} x {height} px {kind}, {_digits(pixel_size_um)} um per pixel"


def _digits(size_um: float | None) -> str:
    return "unknown" if size_um is None else f"{size_um:.{_SIZE_DIGITS}g}"


def _list_files(files: list[str]) -> str:
    """Name files, many of them by the first ones and their number."""
    listed = ", ".join(list(dict.fromkeys(files))[:_MOST_NAMED])
    return (
        listed if len(files) <= _MOST_NAMED else f"{listed} ... ({len(files)} images)"
    )


_MOST_WARNINGS = 20


class Replay:
    """One recording from its first plane to its report."""

    def __init__(self, config: Config, replay: ReplayConfig) -> None:
        self._replay = replay
        if not replay.path.exists():
            msg = (
                f"microscope.path: there is no '{replay.path}'; set it to an image "
                "file, an OME-Zarr or a folder"
            )
            raise InputError(msg)
        images = find_images(replay.path)
        self._unreadable = [broken.reason for broken in images.broken]
        self._notes = [note for image in images.series for note in image.notes]
        self._black, self._first_black = 0, ""
        self._recording = Recording(images.series, config, repeats=replay.repeats)
        self._recording.require_one_geometry(pixel_size_um=replay.pixel_size_um)
        # It is not known how many planes a file has that cannot be opened.
        self._planned = len(self._recording) + len(images.broken)
        self._observations = Observations()
        self.series = self._describe(config)
        """What is announced."""
        self._z_step_um = self.series.z_step_um or 0.0

    def run(
        self,
        sink: FrameSink,
        stop: threading.Event,
        on_frame: Callable[[FrameHeader], None],
    ) -> AcquisitionReport:
        """Play to the end or to `stop`; planes that cannot be read are left out.

        Raises
        ------
        RtfocusError
            What went wrong, after the sink has the end.
        """
        self._delivery = Delivery(self.series, sink, on_frame)
        started = time.perf_counter()
        failure: Exception | None = None
        try:
            reason = self._play(stop, started)
        except Exception as error:  # raised below, once the sink knows
            failure, reason = error, str(error)
        seconds = time.perf_counter() - started
        return self._delivery.end(
            self._observations,
            planned=self._planned,
            not_acquired=self._planned - self._delivery.sent,
            reason=reason,
            seconds=seconds,
            failure=failure,
            warnings=self._warnings(),
        )

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
            # Of nearly all planes the first row says it.
            if not pixels[0].any() and not pixels.any():
                place = " ".join(f"{axis}={n}" for axis, n in plane.source.items())
                self._first_black = self._first_black or f"{self._file(plane)} {place}"
                self._black += 1
            z_um = plane.source["z"] * self._z_step_um
            exposure = Exposure(
                index=plane.index,
                captured_ns=RUN_CLOCK.now_ns(),
                exposure_ms=0.0,
                z_um=z_um if self._z_step_um else None,
                z_offset_um=z_um,
                event_index=number,
                planned_s=planned_s,
                actual_s=actual_s,
                frame_meta={"file": self._file(plane), "plane": plane.source},
            )
            self._delivery.deliver(pixels, exposure)
        if not self._unreadable:
            return COMPLETED
        more = len(self._unreadable) - 1
        return self._unreadable[0] + (f" (and {more} more)" if more else "")

    def _file(self, plane: RecordedPlane) -> str:
        """Return a plane's file as a path below what is replayed."""
        path, root = plane.image.path, self._replay.path
        if path != root and path.is_relative_to(root):
            return path.relative_to(root).as_posix()
        return path.name

    def _warnings(self) -> tuple[str, ...]:
        warnings = [*self._unreadable, *self._notes]
        if self._black:
            number = number_of(self._black, "frame")
            where = f"the first: {self._first_black}"
            warnings.insert(
                0,
                f"{number} replayed with nothing but 0 (a run has 0 where "
                f"no frame was recorded), {where}",
            )
        distinct = dict.fromkeys(warnings)
        more = len(distinct) - _MOST_WARNINGS
        shown = list(distinct)[:_MOST_WARNINGS]
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
            started_ns=RUN_CLOCK.restart(),
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
    return time.perf_counter() - started
