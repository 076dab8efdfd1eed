"""Devices of the virtual microscope: camera and stages, in a Micro-Manager core.

The camera's light comes from virtual specimens; its sensor turns expected light into
counts with the configured noise.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import ceil

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pymmcore_plus import FocusDirection
from pymmcore_plus.experimental.unicore import (
    SimpleCameraDevice,
    StageDevice,
    UniMMCore,
    XYStageDevice,
)

from rtfocus.channel import OpticalSystem
from rtfocus.config.sections import VirtualMicroscopeConfig, ZStageConfig
from rtfocus.errors import ConfigError
from rtfocus.microscope.delivery import READOUT_MS
from rtfocus.microscope.virtual_specimen import VirtualSpecimen
from rtfocus.optics.formation import CameraModel, Counts, NoisePool


class ZDrive:
    """A z-drive and what it carries, with its faults; both begin at 0.

    Parameters
    ----------
    config
        Its faults, which it does not tell: backlash, a reversed axis.
    """

    def __init__(self, config: ZStageConfig | None = None) -> None:
        self._config = config or ZStageConfig()
        self._carrier_um = 0.0

    @property
    def objective_um(self) -> float:
        """Where the plane of focus lies."""
        return -self._carrier_um if self._config.reversed else self._carrier_um

    def go_to(self, told_um: float) -> None:
        """Turn the drive to a place; what it carries may not quite come along."""
        # It pushes the carrier up at once, and down after the play is used up.
        highest_um = told_um + self._config.backlash_um
        self._carrier_um = min(max(self._carrier_um, told_um), highest_um)


class VirtualZStage(StageDevice):
    """z-stage that carries the objective; up is towards the specimen."""

    def __init__(self, config: ZStageConfig | None = None) -> None:
        super().__init__()
        self._drive = ZDrive(config)
        self._told_um = 0.0
        self._origin_um = 0.0

    @property
    def objective_um(self) -> float:
        """Where the plane of focus lies, whatever was called the origin."""
        return self._drive.objective_um

    def set_position_um(self, val: float) -> None:
        """Move the objective; the move is over when this returns."""
        self._told_um = val + self._origin_um
        self._drive.go_to(self._told_um)
        self.core.events.stagePositionChanged.emit(self.get_label(), val)

    def get_position_um(self) -> float:
        """Return the position relative to the origin."""
        return self._told_um - self._origin_um

    def get_focus_direction(self) -> FocusDirection:
        """Larger z brings the objective closer to the specimen."""
        return FocusDirection.TowardSample

    def home(self) -> None:
        """Go back to the origin."""
        self.set_position_um(0.0)

    def stop(self) -> None:
        """Do nothing: moves are over at once."""

    def set_origin(self) -> None:
        """Call the present position 0."""
        self._origin_um = self._told_um


class VirtualXYStage(XYStageDevice):
    """xy-stage that carries the specimen's frame of reference."""

    def __init__(self) -> None:
        super().__init__()
        self._x_um = self._y_um = 0.0
        self._origin_um = (0.0, 0.0)

    @property
    def centre_um(self) -> tuple[float, float]:
        """Where the frame lies on the specimen, whatever was called the origin."""
        return self._x_um, self._y_um

    def set_position_um(self, x: float, y: float) -> None:
        """Move to a place on the specimen; over when this returns."""
        self._x_um = x + self._origin_um[0]
        self._y_um = y + self._origin_um[1]
        self.core.events.XYStagePositionChanged.emit(self.get_label(), x, y)

    def get_position_um(self) -> tuple[float, float]:
        """Return the position relative to the origin."""
        return self._x_um - self._origin_um[0], self._y_um - self._origin_um[1]

    def home(self) -> None:
        """Go back to the origin."""
        self.set_position_um(0.0, 0.0)

    def stop(self) -> None:
        """Do nothing: moves are over at once."""

    def set_origin_x(self) -> None:
        """Call the present x 0."""
        self._origin_um = (self._x_um, self._origin_um[1])

    def set_origin_y(self) -> None:
        """Call the present y 0."""
        self._origin_um = (self._origin_um[0], self._y_um)


# Photon numbers in the config hold for this exposure.
_REFERENCE_MS = 10.0


class Sensor:
    """The virtual camera's chip; seeded, its frames repeat with the same order."""

    def __init__(self, config: VirtualMicroscopeConfig) -> None:
        self._photons = config.photons
        self._background = config.background_photons
        self._noise = config.noise
        # Images come in as electrons, so one unit of light is one electron.
        self.model = CameraModel(
            photons=1.0,
            gain_e_per_count=config.gain_e_per_count,
            offset_counts=config.offset_counts,
            read_noise_e=config.read_noise_e,
            bit_depth=config.bit_depth,
        )
        self._rng = np.random.default_rng(config.seed)
        self._pool = (
            NoisePool(self.model, self._rng) if config.noise == "pool" else None
        )

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Of the counts."""
        return np.uint8 if self.model.bit_depth <= 8 else np.uint16

    def electrons(
        self, light: NDArray[np.float32], exposure_ms: float
    ) -> NDArray[np.float32]:
        """Return the mean electrons of a scene; light 1.0 is its brightest part."""
        share = exposure_ms / _REFERENCE_MS
        scaled = light * np.float32(self._photons * share)
        scaled += np.float32(self._background * share)
        return scaled

    def expose(self, light: NDArray[np.float32], exposure_ms: float) -> Counts:
        """Expose one frame."""
        electrons = self.electrons(light, exposure_ms)
        if self._pool is not None:
            return self._pool.expose(electrons)
        if self._noise == "none":
            return self.model.expose_without_noise(electrons)
        return self.model.expose(electrons, self._rng)


_EXPOSURE_MS = 10.0
CHANNEL = "Channel"
"""Property that picks the light; presets of the group of this name set it."""
BIT_DEPTH = "BitDepth"
_SHORT_S = 0.05
"""A wait that need not be cut short."""


class VirtualCamera(SimpleCameraDevice):
    """Exposes the specimen of the chosen channel from where the stages stand.

    Parameters
    ----------
    specimens
        By channel name; the first is chosen at the start.
    z_stage, xy_stage
        The stages that stand under this camera.
    """

    def __init__(
        self,
        config: VirtualMicroscopeConfig,
        specimens: Mapping[str, VirtualSpecimen],
        z_stage: VirtualZStage,
        xy_stage: VirtualXYStage,
    ) -> None:
        super().__init__()
        self._config = config
        self._specimens = dict(specimens)
        self._z_stage = z_stage
        self._xy_stage = xy_stage
        self.wait_for_room: Callable[[], None] = lambda: None
        """Called before every frame of a sequence; returns when it may come."""
        self.stopping = threading.Event()
        """Set while no sequence is wanted: a running one waits for nothing and ends."""
        self._until = threading.Event()
        self._sensor = Sensor(config)
        self._exposure_ms = _EXPOSURE_MS
        self._first_s: float | None = None
        self._last_start = -np.inf
        names = list(self._specimens)
        self.register_property(CHANNEL, default_value=names[0], allowed_values=names)
        self.register_property(
            BIT_DEPTH, default_value=config.bit_depth, is_read_only=True
        )

    def sensor_shape(self) -> tuple[int, int] | tuple[int, int, int]:
        """Return (height, width) or (height, width, 3)."""
        shape = (self._config.height_px, self._config.width_px)
        return (*shape, 3) if self._config.rgb else shape

    def dtype(self) -> DTypeLike:
        """Return the type of the counts."""
        return self._sensor.dtype

    def get_exposure(self) -> float:
        """Return the exposure time in ms."""
        return self._exposure_ms

    def set_exposure(self, exposure: float) -> None:
        """Set the exposure time in ms."""
        if exposure <= 0:
            msg = f"exposure of {exposure} ms; it must be > 0"
            raise ValueError(msg)
        self._exposure_ms = exposure

    def snap(self, buffer: np.ndarray) -> Mapping[str, str]:
        """Expose one frame into `buffer`; takes at least the exposure time."""
        period_s = self._exposure_ms / 1e3
        if self._config.frames_per_s is not None:
            period_s = max(period_s, 1.0 / self._config.frames_per_s)
        start = max(time.perf_counter(), self._last_start + period_s)
        self._wait(start)
        self._last_start = start
        z_um = self._z_stage.objective_um
        x_um, y_um = self._xy_stage.centre_um
        specimen = self._specimens[str(self.get_property_value(CHANNEL))]
        self._first_s = start if self._first_s is None else self._first_s
        time_s = start - self._first_s
        light = specimen.image(z_um, x_um=x_um, y_um=y_um, time_s=time_s)
        buffer[...] = self._sensor.expose(light, self._exposure_ms)
        end = start + self._exposure_ms / 1e3
        self._wait(end)
        # The core dates an image by when it gets it, however long it was drawn.
        readout_ms = (time.perf_counter() - end) * 1e3
        return {"Z-um": f"{z_um:.4f}", READOUT_MS: f"{readout_ms:.3f}"}

    def start_sequence(
        self,
        n: int | None,
        get_buffer: Callable[[Sequence[int], DTypeLike], np.ndarray],
    ) -> Iterator[Mapping[str, str]]:
        """Expose frames one after the other, as fast as they are taken."""
        # A snap finds the event as the last sequence left it: nothing stops that.
        self._until = threading.Event() if self.stopping.is_set() else self.stopping
        return self._frames(n, get_buffer)

    def _frames(
        self,
        n: int | None,
        get_buffer: Callable[[Sequence[int], DTypeLike], np.ndarray],
    ) -> Iterator[Mapping[str, str]]:
        def paced(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
            if n != 1:
                self.wait_for_room()
            return get_buffer(shape, dtype)

        with suppress(_StoppedError):
            yield from super().start_sequence(n, paced)

    def _wait(self, until_s: float) -> None:
        """Sleep until `until_s` of ``time.perf_counter``, unless the sequence ends."""
        long_s = until_s - time.perf_counter() - _SHORT_S
        if long_s > 0 and self._until.wait(long_s):
            raise _StoppedError
        # More exact than an event's wait, on Windows above all.
        time.sleep(max(0.0, until_s - time.perf_counter()))


class _StoppedError(Exception):
    """The sequence was stopped amid an exposure, which gives no image then."""


CAMERA, Z_STAGE, XY_STAGE = "Camera", "Z", "XY"
# Micro-Manager's buffer holds this many times the backlog, at least this much.
_BUFFER_BACKLOGS = 4
_LEAST_BUFFER_MB = 16
# A buffer that is cleared, without a notice, has room again as well.
_LONGEST_WAIT_S = 0.1


def load_virtual_microscope(
    core: UniMMCore,
    config: VirtualMicroscopeConfig,
    channels: Sequence[tuple[str, OpticalSystem | None]],
    *,
    room: "BufferRoom | None" = None,
) -> dict[str, VirtualSpecimen]:
    """Load camera, z-stage and xy-stage and a preset per channel.

    Parameters
    ----------
    core
        A core without devices of these labels: ``Camera``, ``Z``, ``XY``.
    config
        The microscope; its `optics`, where given, hold for all channels.
    channels
        Preset names with the optics to image through.
    room
        The camera waits for it before each frame of a sequence; the core's buffer is
        made just large enough. None: the buffer overflows like any camera's.

    Returns
    -------
    dict[str, VirtualSpecimen]
        What each channel looks at, for comparisons with the truth.

    Raises
    ------
    ConfigError
        If a channel has no optics, or the channels' pixel sizes differ.
    """
    specimens: dict[str, VirtualSpecimen] = {}
    pixel_sizes_um: set[float] = set()
    for number, (name, known) in enumerate(channels):
        optics = config.optics or known
        if optics is None:
            msg = (
                f"the virtual microscope has no optics for channel '{name}'; give "
                "microscope.optics or the channel's optics"
            )
            raise ConfigError(msg)
        pixel_sizes_um.add(optics.pixel_size_um)
        specimens[name] = VirtualSpecimen(config, optics, channel=number)
    if len(pixel_sizes_um) > 1:
        msg = (
            f"channels have pixel sizes of {sorted(pixel_sizes_um)} um; one camera "
            "has one: give all channels' optics the same pixel_size_um"
        )
        raise ConfigError(msg)
    _load_devices(core, config, specimens, room)
    _define_presets(core, list(specimens), pixel_sizes_um.pop())
    return specimens


def _load_devices(
    core: UniMMCore,
    config: VirtualMicroscopeConfig,
    specimens: dict[str, VirtualSpecimen],
    room: "BufferRoom | None",
) -> None:
    z_stage, xy_stage = VirtualZStage(config.z_stage), VirtualXYStage()
    camera = VirtualCamera(config, specimens, z_stage, xy_stage)
    # Only this event tells that a sequence is to stop before it has: see `BufferRoom`.
    camera.stopping = core._stop_event  # noqa: SLF001
    if room is not None:
        camera.wait_for_room = room.wait
    devices = {CAMERA: camera, Z_STAGE: z_stage, XY_STAGE: xy_stage}
    for label, device in devices.items():
        core.loadPyDevice(label, device)
        core.initializeDevice(label)
    core.setCameraDevice(CAMERA)
    core.setFocusDevice(Z_STAGE)
    core.setXYStageDevice(XY_STAGE)
    # Without a shutter, automatic shuttering costs time and does nothing.
    core.setAutoShutter(False)
    if room is not None:
        backlog_mb = room.backlog_frames * core.getImageBufferSize() / 1e6
        wanted_mb = _BUFFER_BACKLOGS * backlog_mb
        core.setCircularBufferMemoryFootprint(max(_LEAST_BUFFER_MB, ceil(wanted_mb)))


def _define_presets(core: UniMMCore, names: list[str], pixel_size_um: float) -> None:
    for name in names:
        core.defineConfig(CHANNEL, name, CAMERA, CHANNEL, name)
    core.setChannelGroup(CHANNEL)
    core.setConfig(CHANNEL, names[0])
    core.definePixelSizeConfig("virtual")
    core.setPixelSizeUm("virtual", pixel_size_um)


class BufferRoom:
    """Room for one more frame in the core's sequence buffer.

    The buffer of `UniMMCore` calls itself full when its end is reached while frames
    wait, although its beginning is free; so at its end one waits until it is empty.

    Parameters
    ----------
    core
        Of the buffer.
    backlog_frames
        Frames that may wait.
    taken
        Set by the core for every frame that was taken out, and when it stops.
    """

    def __init__(
        self, core: UniMMCore, backlog_frames: int, taken: threading.Event
    ) -> None:
        # The core owns the camera that owns this: a plain reference keeps all alive.
        self._core = weakref.ref(core)
        self.backlog_frames = backlog_frames
        self._taken = taken
        self._since_empty = 0

    def wait(self) -> None:
        """Return when there is room, or the sequence was stopped."""
        while (core := self._core()) is not None:
            # Before the look: what is taken after it ends the wait.
            self._taken.clear()
            # The core joins the camera's thread before it says that the sequence
            # has stopped; only this event tells earlier.
            if core._stop_event.is_set():  # noqa: SLF001
                return
            if self._has_room(core):
                self._since_empty += 1
                return
            self._taken.wait(_LONGEST_WAIT_S)

    def _has_room(self, core: UniMMCore) -> bool:
        capacity = core.getBufferTotalCapacity()
        if core.getBufferFreeCapacity() == capacity:
            self._since_empty = 0
            return True
        waiting = core.getRemainingImageCount()
        return waiting < self.backlog_frames and self._since_empty + 1 < capacity
