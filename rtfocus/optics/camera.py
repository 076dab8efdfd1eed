"""Camera: from expected light to the counts a real sensor delivers.

``counts = offset + (Poisson(electrons) + Normal(0, read noise)) / gain``, rounded
and clipped at the full scale: electrons are what arrives, counts what is stored,
the gain is in electrons per count as in a camera's data sheet.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Image = NDArray[np.float32]
Counts = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class CameraModel:
    """Noise and quantisation of one sensor; images come in as fractions, 0 to 1."""

    photons: float = 1000.0
    """Expected photo-electrons in a pixel of value 1.0."""
    gain_e_per_count: float = 0.5
    """Photo-electrons per count."""
    offset_counts: float = 100.0
    """Counts in the dark."""
    read_noise_e: float = 1.5
    """Standard deviation of the Gaussian read noise."""
    bit_depth: int = 16
    """Full scale is 2^bit_depth - 1; up to 8 bits are delivered as uint8."""

    def __post_init__(self) -> None:
        if self.photons <= 0 or self.gain_e_per_count <= 0:
            msg = (
                f"photons={self.photons}, gain_e_per_count={self.gain_e_per_count} "
                "give no signal; both must be > 0"
            )
            raise ValueError(msg)
        if self.read_noise_e < 0:
            msg = f"read_noise_e={self.read_noise_e} must be >= 0"
            raise ValueError(msg)
        if not 1 <= self.bit_depth <= 16:
            msg = f"bit_depth={self.bit_depth} fits no frame; choose 1 to 16"
            raise ValueError(msg)

    @property
    def full_scale_counts(self) -> int:
        """Largest count; a pixel that holds it is saturated."""
        return int(2**self.bit_depth - 1)

    def expected_electrons(self, image: ArrayLike) -> Image:
        """Return the mean electrons of an image; negative round-off becomes 0."""
        return np.maximum(np.asarray(image, np.float32), 0) * np.float32(self.photons)

    def expose(self, image: ArrayLike, rng: np.random.Generator) -> Counts:
        """Expose one frame with exact Poisson noise.

        Parameters
        ----------
        image
            Expected light, 1.0 = `photons` electrons; any shape.
        rng
            Source of the noise; the same state gives the same frame.

        Returns
        -------
        Counts
            Shape of `image`; uint8 up to 8 bits, else uint16.
        """
        electrons = rng.poisson(self.expected_electrons(image)).astype(np.float32)
        if self.read_noise_e > 0:
            noise = rng.standard_normal(electrons.shape, dtype=np.float32)
            electrons += noise * np.float32(self.read_noise_e)
        return self.digitise(electrons)

    def expose_without_noise(self, image: ArrayLike) -> Counts:
        """Return what the camera delivers on average: rounded and clipped only."""
        return self.digitise(self.expected_electrons(image))

    def digitise(self, electrons: Image) -> Counts:
        """Turn electrons into counts: gain, offset, rounding, clipping; in place."""
        electrons *= np.float32(1.0 / self.gain_e_per_count)
        # Half a count more makes the truncating cast round to the nearest.
        electrons += np.float32(self.offset_counts + 0.5)
        np.clip(electrons, 0, self.full_scale_counts, out=electrons)
        if self.bit_depth <= 8:
            return electrons.astype(np.uint8)
        return electrons.astype(np.uint16)


class NoisePool:
    """Pre-drawn noise for rate tests: about ten times cheaper than exact Poisson.

    The noise is normal with the right variance at every pixel, taken from a pool
    at a random place per frame. It is **not** exact: below some ten electrons
    the Poisson distribution is skewed and this is not, and frames whose places
    are close share shifted noise. Quality figures use `CameraModel.expose`.
    """

    def __init__(
        self, camera: CameraModel, rng: np.random.Generator, size: int = 1 << 22
    ) -> None:
        """Draw `size` standard normal values, 4 bytes each."""
        if size < 1:
            msg = f"size={size} holds no noise; need >= 1"
            raise ValueError(msg)
        self._camera = camera
        self._rng = rng
        self._pool = rng.standard_normal(size, dtype=np.float32)

    def expose(self, image: ArrayLike) -> Counts:
        """Expose one frame with noise from the pool; see `CameraModel.expose`."""
        electrons = self._camera.expected_electrons(image)
        noise = self._take(electrons.size).reshape(electrons.shape)
        spread = electrons + np.float32(self._camera.read_noise_e**2)
        np.sqrt(spread, out=spread)
        spread *= noise
        electrons += spread
        return self._camera.digitise(electrons)

    def _take(self, count: int) -> Image:
        """Return `count` values from a random place on; the pool is a ring."""
        start = int(self._rng.integers(self._pool.size))
        if start + count <= self._pool.size:
            return self._pool[start : start + count]
        return np.take(self._pool, np.arange(start, start + count), mode="wrap")
