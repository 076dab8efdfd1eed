"""Camera: a Micro-Manager camera whose light comes from virtual specimens."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike
from pymmcore_plus.experimental.unicore import SimpleCameraDevice

from rtfocus.config.microscope import VirtualMicroscopeConfig
from rtfocus.microscope.virtual.sensor import Sensor
from rtfocus.microscope.virtual.specimen import VirtualSpecimen
from rtfocus.microscope.virtual.stages import VirtualXYStage, VirtualZStage

_EXPOSURE_MS = 10.0
CHANNEL = "Channel"
"""Property that picks the light; presets of the group of this name set it."""
BIT_DEPTH = "BitDepth"


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
        time.sleep(max(0.0, start - time.monotonic()))
        self._last_start = start
        z_um = self._z_stage.objective_um
        x_um, y_um = self._xy_stage.centre_um
        specimen = self._specimens[str(self.get_property_value(CHANNEL))]
        light = specimen.image(z_um, x_um=x_um, y_um=y_um, time_s=start - self._started)
        buffer[...] = self._sensor.expose(light, self._exposure_ms)
        time.sleep(max(0.0, start + self._exposure_ms / 1e3 - time.monotonic()))
        return {"Z-um": f"{z_um:.4f}"}

    def start_sequence(
        self,
        n: int | None,
        get_buffer: Callable[[Sequence[int], DTypeLike], np.ndarray],
    ) -> Iterator[Mapping[str, str]]:
        """Expose frames one after the other, as fast as they are taken."""

        def paced(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
            if n != 1:
                self.wait_for_room()
            return get_buffer(shape, dtype)

        yield from super().start_sequence(n, paced)
