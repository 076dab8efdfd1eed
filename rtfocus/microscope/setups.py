"""Set-ups: what the planned events make of the camera, known before the first exposure.

A series has one geometry. A preset of a channel may change binning, region, pixel type
or camera; the camera alone can tell what comes of it. So every step from one set-up to
the next is taken once without an exposure, and only in what can matter: properties of
cameras and the choice of the camera. Filters, lamps and stages do not move.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import useq
from pymmcore_plus import DeviceType, Keyword
from pymmcore_plus.experimental.unicore import UniMMCore

from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.microscope.plan import takes_image
from rtfocus.microscope.series import Geometry, camera_geometry

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
            Of all its images; None: that of the camera as it is.

        Raises
        ------
        ConfigError
            If the geometries differ; says which events have which.
        MicroscopeError
            If a setting cannot be made, or its camera cannot be used.
        """
        steps = list(_steps(self._of(event) for event in _images(sequence)))
        if not any(set_up.settings for _, set_up in steps):
            return None
        found: dict[tuple[Geometry, str | None], tuple[int, SetUp]] = {}
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
                found.setdefault((geometry, self._calibration(state)), (number, set_up))
        if len(found) > 1:
            raise ConfigError(_difference(found))
        return next(iter(found))[0]

    def begin(self, sequence: useq.MDASequence) -> None:
        """Set up the channel and camera of the first event; stages stay.

        Raises
        ------
        MicroscopeError
            If it cannot be set.
        """
        first = next(_images(sequence), None)
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
                found = _settings(self._core.getConfigData(*channel))
                self._presets[channel] = tuple(s for s in found if self._matters(s))
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


def _images(sequence: useq.MDASequence) -> Iterator[useq.MDAEvent]:
    """Yield the events that take an image, one tile per grid: tiles set up nothing."""
    return (event for event in _without_grids(sequence) if takes_image(event))


def _without_grids(
    sequence: useq.MDASequence, *, is_whole: bool = True
) -> useq.MDASequence:
    positions = sequence.stage_positions
    if not isinstance(positions, useq.WellPlatePlan):
        positions = tuple(
            position
            if position.sequence is None or position.sequence.grid_plan is None
            else position.model_copy(
                update={"sequence": _without_grids(position.sequence, is_whole=False)}
            )
            for position in positions
        )
        if sequence.grid_plan is not None and not positions and is_whole:
            # A plan of nothing but a grid still takes an image.
            positions = (useq.Position(x=0, y=0),)
    # A copy would keep the id by which useq remembers the tiles.
    return sequence.replace(grid_plan=None, stage_positions=positions)


def _steps(set_ups: Iterable[SetUp]) -> Iterator[tuple[int, SetUp]]:
    """Yield each step from one set-up to another once, with the image's number.

    A preset sets some properties and leaves the others as the one before it did: what
    an event gets depends on where it comes from.
    """
    seen: set[tuple[SetUp | None, SetUp]] = set()
    before: SetUp | None = None
    for number, set_up in enumerate(set_ups):
        if (before, set_up) not in seen:
            seen.add((before, set_up))
            yield number, set_up
        before = set_up


def _settings(configuration: Iterable[tuple[str, str, str]]) -> tuple[Setting, ...]:
    return tuple((str(d), str(p), str(v)) for d, p, v in configuration)


def _difference(found: dict[tuple[Geometry, str | None], tuple[int, SetUp]]) -> str:
    pixel_sizes = {calibration for _, calibration in found}
    parts = []
    for (geometry, calibration), (number, set_up) in found.items():
        scale = f", pixel size {calibration}" if len(pixel_sizes) > 1 else ""
        parts.append(f"{set_up.origin} (first at image {number}): {geometry}{scale}")
    return (
        "acquisition.mda: the camera does not give the same in all planned events: "
        f"{'; '.join(parts)}. One series has one geometry: let the presets agree, or "
        "give each a run of its own; nothing was exposed"
    )
