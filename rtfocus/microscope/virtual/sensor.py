"""Sensor: turns expected light into counts with the configured noise."""

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.microscope import VirtualMicroscopeConfig
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
