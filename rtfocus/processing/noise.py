"""Noise: how strong it is in a frame, told from the frame and the camera's gain."""

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]

# Share of the finest details that are taken for edges and left out.
_EDGES = 0.01
# Below this share of the brightest power nothing is noise but round-off.
ROUND_OFF = 1e-9


def diagonal_detail(image: Image) -> Image:
    """Return the finest diagonal Haar detail: unit gain on white noise.

    A defocused image has almost nothing there, so what is seen is noise.
    """
    height, width = (side // 2 * 2 for side in image.shape)
    a, b = image[:height:2, :width:2], image[:height:2, 1:width:2]
    c, d = image[1:height:2, :width:2], image[1:height:2, 1:width:2]
    return np.asarray((a - b - c + d) * np.float32(0.5))


def noise_variance(image: Image, quantum: float = 0.0) -> float:
    """Estimate the mean variance of the noise, in squared units of the image.

    The mean rather than the median over pixels, because photon noise sits in the
    bright parts.

    Parameters
    ----------
    image
        Axes (y, x).
    quantum
        Step between representable values: 1 for integer cameras, whose noise is
        never below that of rounding; 0 for float frames.
    """
    floor = quantum**2 / 12.0 + ROUND_OFF * float(np.max(image, initial=0.0)) ** 2
    if min(image.shape) < 2:
        return floor
    power = np.square(diagonal_detail(image)).ravel()
    kept = max(1, int((1.0 - _EDGES) * power.size))
    return max(float(np.partition(power, kept - 1)[:kept].mean()), floor)


def photon_variance(image: Image, gain_e_per_count: float) -> float:
    """Return the mean variance of photon noise, in counts squared.

    Parameters
    ----------
    image
        Counts above the camera's offset.
    gain_e_per_count
        Photo-electrons per count.
    """
    return float(np.maximum(image, 0).mean()) / gain_e_per_count
