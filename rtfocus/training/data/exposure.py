"""Exposure: a camera drawn at random, from very dim to bright, 8 to 16 bits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Exposure:
    """Camera and light of one picture.

    The noise is Gaussian with the variance of Poisson plus read noise (models of
    one draw per pixel train ten times faster), rounded and clipped like a camera's.
    """

    photons: float
    """At the brightest point of the scene."""
    glow: float
    """Background, in photons."""
    read_noise_e: float
    gain: float
    """Counts per electron."""
    full: float
    """First count that the camera cannot tell: 2^bits."""

    def counts(self, light: Image) -> Image:
        """Return what a noiseless camera would read of `light` (1 = brightest)."""
        electrons = light * np.float32(self.photons) + np.float32(self.glow)
        return np.asarray(electrons * np.float32(self.gain))

    def take(self, light: Image, rng: np.random.Generator) -> Image:
        """Take a picture of `light`, in counts."""
        electrons = light * np.float32(self.photons) + np.float32(self.glow)
        spread = np.sqrt(np.maximum(electrons, 0) + self.read_noise_e**2)
        electrons += spread * rng.standard_normal(light.shape, dtype=np.float32)
        counts = np.rint(electrons * np.float32(self.gain))
        return np.asarray(np.clip(counts, 0, self.full - 1, out=counts))

    def dark_noise(self, scene_noise: float = 0.0) -> float:
        """Return the deviation in the dark, in counts.

        `scene_noise` is the noise that the scene itself holds, as a share of 1.
        """
        electrons = self.glow + self.read_noise_e**2 + (scene_noise * self.photons) ** 2
        return float(np.sqrt(self.gain**2 * electrons + 1 / 12))


def draw_exposure(
    rng: np.random.Generator, photons: tuple[float, float] = (400, 10_000)
) -> Exposure:
    """Draw a camera; `photons` is the range at the brightest point."""
    light = float(np.exp(rng.uniform(*np.log(photons))))
    glow = float(np.exp(rng.uniform(np.log(0.003), np.log(0.25)))) * light
    read_noise = float(rng.uniform(0.8, 4.0))
    # Counts at the brightest point: from a poorly filled 8-bit range to 16 bits.
    full = float(2 ** rng.choice([8, 12, 16], p=[0.4, 0.35, 0.25]))
    fill = float(rng.uniform(0.3, 1.1) if full == 256 else rng.uniform(0.1, 1.1))
    return Exposure(light, glow, read_noise, fill * full / (light + glow), full)
