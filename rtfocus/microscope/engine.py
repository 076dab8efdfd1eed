"""Engine: pymmcore-plus' acquisition engine with honest places for its frames.

And what the planned events make of the camera, known before the first exposure. A
series has one geometry. A preset of a channel may change binning, region, pixel type
or camera; the camera alone can tell what comes of it. So every step from one set-up to
the next is taken once without an exposure, and only in what can matter: properties of
cameras and the choice of the camera. Filters, lamps and stages do not move.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import numpy as np
import useq
from numpy.typing import NDArray
from pymmcore_plus import DeviceType, Keyword
from pymmcore_plus._logger import logger as core_logger
from pymmcore_plus.core._sequencing import SequencedEvent
from pymmcore_plus.experimental.unicore import UniMMCore
from pymmcore_plus.mda import MDAEngine, SkipEvent
from pymmcore_plus.metadata import SummaryMetaV1

from rtfocus.errors import ConfigError, MicroscopeError, number_of
from rtfocus.microscope.delivery import number_on, refuse_overflow
from rtfocus.microscope.plan import (
    each_step,
    image_events,
    left_alone,
    numbered,
    takes_image,
)
from rtfocus.microscope.series import Geometry, camera_geometry, with_field_of_view
from rtfocus.workers import Wait

Payload = Any
"""Image, MDA event and metadata; None for an image that never came."""

_POLL_S = 0.001


class SequenceEngine(MDAEngine):
    """Pairs the images of a hardware sequence with its events, and misses none.

    pymmcore-plus pairs the n-th image it *gets* with the n-th event, so that one lost
    image shifts all that follow. Here the event is found by the image's own number.
    Of cameras that are joined, it is left to pymmcore-plus.
    """

    standing_z_um: float | None = None
    """z during the present hardware sequence; None: planned per image."""

    def z_um(self, event: useq.MDAEvent) -> float | None:
        """Return where the stage is sent for an event: here as planned."""
        return event.z_pos

    def lose(self, number: int) -> None:
        """Tell of images of a hardware sequence that never came."""
        camera, lost = self.mmcore.getCameraDevice(), number_of(number, "image")
        core_logger.warning("camera '%s' lost %s of a hardware sequence", camera, lost)

    def is_stopped(self) -> bool:
        """Tell whether the plan was canceled, so that no trigger is waited for."""
        return self.mmcore.mda.status.cancel_requested

    def stacks(
        self, events: Iterable[useq.MDAEvent]
    ) -> Iterator[Iterable[useq.MDAEvent]]:
        """Part the plan where nothing is hardware-sequenced across: here nowhere."""
        yield events

    def event_iterator(self, events: Iterable[useq.MDAEvent]) -> Iterator[Any]:
        """Combine events where possible: such as set the same, or leave the same."""
        for stack in self.stacks(events):
            for _, alike in groupby(stack, left_alone):
                yield from super().event_iterator(alike)

    def exec_sequenced_event(
        self, event: SequencedEvent
    ) -> Generator[Payload, Any, None]:
        """Acquire a hardware sequence."""
        # A z-stage that is not triggered stands still throughout the sequence.
        moves = bool(event.z_sequence) or not self.mmcore.getFocusDevice()
        self.standing_z_um = None if moves else self.mmcore.getPosition()
        yield from super().exec_sequenced_event(event)

    def _exec_single_camera_sequence(
        self, event: SequencedEvent, t0_ms: float
    ) -> Generator[Payload, Any, None]:
        """Take the images of a running hardware sequence, each to its own event.

        That of pymmcore-plus asks whether images wait and then whether the camera
        runs; the last image, coming in between, was lost. Here it is asked the other
        way round. There a consumer that takes long for an image uses up the camera's
        time for the next one; here that begins when the camera is waited for.
        """
        core, count, following, is_told = self.mmcore, 0, 0, False
        wait, timeout_s = Wait(), self._initial_timeout(event)
        while True:
            running = core.isSequenceRunning()
            if waiting := core.getRemainingImageCount():
                image, tags = core.popNextImageAndMD()
                number = number_on(core, dict(tags), following, len(event.events))
                if number is None:  # its place, and those of the rest, nobody knows
                    core.stopSequenceAcquisition()
                    break
                own, following = event.events[number], number + 1
                signal = yield self._create_seqimg_payload_from_popped(
                    image, tags, own, channel=0, event_t0=t0_ms, remaining=waiting - 1
                )
                count += 1
                # Only now: until here it was the consumer that took its time.
                timeout_s = self._frame_timeout(event)
                wait.restart()
                if signal == "cancel":
                    core.stopSequenceAcquisition()
                    return
                if signal == "pause" and not is_told:
                    is_told = True
                    core_logger.warning("a hardware sequence ends before the pause")
            elif not running:
                break
            elif self.is_stopped():
                core.stopSequenceAcquisition()
                return
            elif wait.look() > timeout_s:
                core.stopSequenceAcquisition()
                self._tell_of_silence(timeout_s, count, len(event.events))
                break
            else:
                time.sleep(_POLL_S)
        refuse_overflow(core)
        if missing := len(event.events) - count:
            self.lose(missing)
        yield from [None] * missing

    def _tell_of_silence(self, silent_s: float, received: int, planned: int) -> None:
        msg = (
            f"camera '{self.mmcore.getCameraDevice()}' gave no image for {silent_s:g} "
            f"s, after {received} of {planned} of a hardware sequence; check its "
            "trigger and its connection"
        )
        if self.timeout_action == "raise":
            raise MicroscopeError(msg)
        core_logger.warning("%s", msg)


class RecordingEngine(SequenceEngine):
    """Numbers the planned images and counts lost ones.

    For one camera: several joined ones are refused by `camera_geometry`.

    Parameters
    ----------
    core
        With its devices loaded.
    on_start
        Called with the plan and the summary metadata when the first event's channel
        and camera are set up and before the clock of the plan starts.
    on_lost
        Called with the number of images that were planned and never came.
    """

    def __init__(
        self,
        core: UniMMCore,
        *,
        on_start: Callable[[useq.MDASequence, SummaryMetaV1 | None], None],
        on_lost: Callable[[int], None],
    ) -> None:
        super().__init__(core)
        self._on_start = on_start
        self._on_lost = on_lost
        self._planned: useq.MDASequence | None = None
        self.send_focus_image: Callable[[NDArray[np.generic], str, float], int]
        """Sends an image outside the plan, of a channel and z; returns its sequence."""
        self.failed_settings: Callable[[], int] = lambda: 0
        """Returns how many settings have failed so far; pymmcore-plus only logs it."""
        self.place_of: Callable[[useq.MDAEvent], tuple[int, float]]
        """Returns the index p in the store of a planned image's event, and its
        distance from the reference plane of its stack in um."""

    def setup_sequence(self, sequence: useq.MDASequence) -> SummaryMetaV1 | None:
        """Set up the hardware of the first event, then announce the series.

        Raises
        ------
        ConfigError, MicroscopeError
            If the planned events do not fit in one series, or cannot be set up;
            nothing is exposed or announced then.
        """
        super().setup_sequence(sequence)
        set_ups = SetUps(cast("UniMMCore", self.mmcore))
        set_ups.require_one_geometry(sequence)
        set_ups.begin(sequence)
        *_, width, height = self.mmcore.getROI()
        size_um = self.mmcore.getPixelSizeUm()
        self._planned = with_field_of_view(sequence, width, height, size_um)
        summary = self.get_summary_metadata(mda_sequence=self._planned)
        self._on_start(self._planned, summary)
        return summary

    def setup_event(self, event: useq.MDAEvent) -> None:
        """Set up an event; raise SkipEvent where a device does not take it.

        Its image would be of another channel or place than it is stored as.
        """
        before = self.failed_settings()
        try:
            super().setup_event(event)
        except (RuntimeError, OSError) as error:  # of a stage; others are told already
            core_logger.warning("Failed to set position. %s", error)
        if self.failed_settings() == before:
            return
        # Half of a preset may be set: the one before does not hold any more either.
        self.mmcore._last_config = ("", "")  # noqa: SLF001
        images = event.events if isinstance(event, SequencedEvent) else (event,)
        number = sum(map(takes_image, images))
        raise SkipEvent(num_frames=number)

    def lose(self, number: int) -> None:
        """Count images that never came."""
        self._on_lost(number)

    def focus_notes(self) -> list[dict[str, Any]]:
        """Return what autofocus did since it was asked last: here nothing."""
        return []

    def _update_grid_fov_sizes(
        self, px_size: float, sequence: useq.MDASequence
    ) -> None:
        """Leave the plan as it is: that of pymmcore-plus replaces the user's sizes."""

    def event_iterator(self, events: Iterable[useq.MDAEvent]) -> Iterator[Any]:
        """Give every image its ordinal, then combine events where possible."""
        # Of a plan, what was made of it at its set-up is run.
        is_plan = isinstance(events, useq.MDASequence)
        planned = self._planned if is_plan and self._planned is not None else events
        yield from super().event_iterator(numbered(planned))

    def exec_single_event(self, event: useq.MDAEvent) -> Iterator[Payload]:
        """Expose one image; an exposure that failed is counted."""
        has_image = False
        for payload in super().exec_single_event(event):
            has_image = True
            yield payload
        if not has_image:
            self.lose(1)


Setting = tuple[str, str, str]
"""Device, property, value."""

_CORE_CAMERA = ("Core", "Camera")
# Setting one property may change another: each is set back until all of them are.
_RESTORE_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class SetUp:
    """What an event sets of all that can change the geometry."""

    settings: tuple[Setting, ...]
    origin: str
    """Who sets it, for people."""


class SetUps:
    """The set-ups of a plan on one core."""

    def __init__(self, core: UniMMCore) -> None:
        self._core = core
        self._cameras = set(core.getLoadedDevicesOfType(DeviceType.Camera))
        self._calibrations = {
            name: _settings(core.getPixelSizeConfigData(name))
            for name in core.getAvailablePixelSizeConfigs()
        }
        self._calibrated = {
            device
            for settings in self._calibrations.values()
            for device, _, _ in settings
        }
        self._presets: dict[tuple[str, str], tuple[Setting, ...]] = {}

    def require_one_geometry(self, sequence: useq.MDASequence) -> Geometry | None:
        """Refuse a plan whose events differ in what the camera gives.

        The microscope is as before when this returns or raises.

        Returns
        -------
        Geometry or None
            Of all its images; None: that of the camera now.

        Raises
        ------
        ConfigError
            If the geometries differ; says which events have which.
        MicroscopeError
            If a setting cannot be made, or its camera cannot be used.
        """
        steps = list(each_step(self._of(event) for event in image_events(sequence)))
        if not any(set_up.settings for _, set_up in steps):
            return None
        kinds: dict[tuple[Geometry, str | None], tuple[int, SetUp]] = {}
        state: dict[tuple[str, str], str] = {}
        with self._left_as_it_is(steps):
            for number, set_up in steps:
                self._apply(set_up)
                state |= self._state_after(set_up)
                try:
                    geometry = camera_geometry(self._core)
                except MicroscopeError as error:
                    msg = f"image {number} of the plan, {set_up.origin}: {error}"
                    raise MicroscopeError(msg) from error
                kinds.setdefault((geometry, self._calibration(state)), (number, set_up))
        if len(kinds) > 1:
            raise ConfigError(_difference(kinds))
        return next(iter(kinds))[0]

    def begin(self, sequence: useq.MDASequence) -> None:
        """Set up the channel and camera of the first event; stages stay.

        Raises
        ------
        MicroscopeError
            If it cannot be set.
        """
        first = next(image_events(sequence), None)
        if first is None:
            return
        if first.channel is not None:
            group, preset = first.channel.group, first.channel.config
            try:
                self._core.setConfig(group, preset)
            except (RuntimeError, ValueError) as error:
                msg = f"preset '{preset}' of group '{group}' cannot be set: {error}"
                raise MicroscopeError(msg) from error
        self._apply(self._of(first))
        self._core.waitForSystem()

    def _of(self, event: useq.MDAEvent) -> SetUp:
        settings: list[Setting] = []
        origin = "no channel"
        if event.channel is not None:
            channel = (event.channel.group, event.channel.config)
            if channel not in self._presets:
                preset = _settings(self._core.getConfigData(*channel))
                self._presets[channel] = tuple(s for s in preset if self._matters(s))
            settings += self._presets[channel]
            origin = f"channel '{channel[1]}' of group '{channel[0]}'"
        for device, name, value in event.properties or ():
            setting = (device, name, str(value))
            if self._matters(setting):
                settings.append(setting)
                origin += f", {device}-{name}={value}"
        return SetUp(tuple(settings), origin)

    def _matters(self, setting: Setting) -> bool:
        device, name, _ = setting
        is_camera = device in self._cameras or (device, name) == _CORE_CAMERA
        return is_camera or device in self._calibrated

    def _apply(self, set_up: SetUp) -> None:
        for device, name, value in set_up.settings:
            if device not in self._cameras and (device, name) != _CORE_CAMERA:
                continue
            try:
                self._core.setProperty(device, name, value)
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())
                msg = f"{set_up.origin} cannot set {device}-{name}={value}: {reason}"
                raise MicroscopeError(msg) from error

    def _state_after(self, set_up: SetUp) -> dict[tuple[str, str], str]:
        """Return what a set-up sets, a turret's position also by its other name."""
        state: dict[tuple[str, str], str] = {}
        for device, name, value in set_up.settings:
            state[device, name] = value
            if self._core.getDeviceType(device) is not DeviceType.State:
                continue
            labels = [str(label) for label in self._core.getStateLabels(device)]
            if name == Keyword.State and value.isdigit() and int(value) < len(labels):
                state[device, str(Keyword.Label)] = labels[int(value)]
            elif name == Keyword.Label and value in labels:
                state[device, str(Keyword.State)] = str(labels.index(value))
        return state

    def _calibration(self, state: dict[tuple[str, str], str]) -> str | None:
        """Return which pixel size calibration fits, without moving an objective."""

        def fits(setting: Setting) -> bool:
            device, name, value = setting
            now = state.get((device, name))
            if now is None:
                now = self._core.getPropertyFromCache(device, name)
            return now == value

        for name, settings in self._calibrations.items():
            if all(fits(setting) for setting in settings):
                return name
        return None

    @contextmanager
    def _left_as_it_is(self, steps: list[tuple[int, SetUp]]) -> Iterator[None]:
        core = self._core
        touched = dict.fromkeys(
            (device, name)
            for _, set_up in steps
            for device, name, _ in set_up.settings
            if device in self._cameras or (device, name) == _CORE_CAMERA
        )
        before = {place: core.getProperty(*place) for place in touched}
        roi = tuple(core.getROI())
        try:
            yield
        finally:
            for _ in range(_RESTORE_ROUNDS):
                for (device, name), value in reversed(before.items()):
                    if core.getProperty(device, name) != value:
                        core.setProperty(device, name, value)
            if tuple(core.getROI()) != roi:
                core.clearROI()
                core.setROI(*roi)
            core.waitForSystem()


def _settings(configuration: Iterable[tuple[str, str, str]]) -> tuple[Setting, ...]:
    return tuple((str(d), str(p), str(v)) for d, p, v in configuration)


def _difference(kinds: dict[tuple[Geometry, str | None], tuple[int, SetUp]]) -> str:
    pixel_sizes = {calibration for _, calibration in kinds}
    parts = []
    for (geometry, calibration), (number, set_up) in kinds.items():
        scale = f", pixel size {calibration}" if len(pixel_sizes) > 1 else ""
        parts.append(f"{set_up.origin} (first at image {number}): {geometry}{scale}")
    return (
        "acquisition.mda: the camera does not give the same in all planned events: "
        f"{'; '.join(parts)}. One series has one geometry: let the presets agree, or "
        "give each a run of its own; nothing was exposed"
    )
