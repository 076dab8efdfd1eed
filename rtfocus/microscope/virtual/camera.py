"""Camera: a Micro-Manager camera whose light comes from virtual specimens.

Its sensor turns expected light into counts with the configured noise.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pymmcore_plus.experimental.unicore import SimpleCameraDevice

from rtfocus.config.microscope import VirtualMicroscopeConfig
from rtfocus.microscope.virtual.specimen import VirtualSpecimen
from rtfocus.microscope.virtual.stages import VirtualXYStage, VirtualZStage
from rtfocus.optics.camera import CameraModel, Counts, NoisePool

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
"""A wait that nobody needs to cut short."""


class VirtualCamera(SimpleCameraDevice):
    """Exposes the specimen of the chosen channel from where the stages stand.

    Parameters
    ----------
    config
        Frame size, noise and rate.
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
        self._started = time.monotonic()
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
        start = max(time.monotonic(), self._last_start + period_s)
        self._wait(start)
        self._last_start = start
        z_um = self._z_stage.objective_um
        x_um, y_um = self._xy_stage.centre_um
        specimen = self._specimens[str(self.get_property_value(CHANNEL))]
        light = specimen.image(z_um, x_um=x_um, y_um=y_um, time_s=start - self._started)
        buffer[...] = self._sensor.expose(light, self._exposure_ms)
        self._wait(start + self._exposure_ms / 1e3)
        return {"Z-um": f"{z_um:.4f}"}

    def start_sequence(
        self,
        n: int | None,
        get_buffer: Callable[[Sequence[int], DTypeLike], np.ndarray],
    ) -> Iterator[Mapping[str, str]]:
        """Expose frames one after the other, as fast as they are taken."""
        # A snap finds the event as the last sequence left it: nobody stops that.
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

        try:
            yield from super().start_sequence(n, paced)
        except _StoppedError:
            return

    def _wait(self, until_s: float) -> None:
        """Sleep until `until_s` on the monotonic clock, unless the sequence ends."""
        long_s = until_s - time.monotonic() - _SHORT_S
        if long_s > 0 and self._until.wait(long_s):
            raise _StoppedError
        # More exact than an event's wait, on Windows above all.
        time.sleep(max(0.0, until_s - time.monotonic()))


class _StoppedError(Exception):
    """The sequence was stopped amid an exposure, which gives no image then."""
