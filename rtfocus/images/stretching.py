"""Stretching: an image's grey values spread over the whole range of 8 bits."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def stretch_histogram(image: ArrayLike) -> NDArray[np.uint8]:
    """Map the smallest value to 0 and the largest to 255, linearly, for viewing.

    ``g = (f - f_min) / (f_max - f_min) * 255``: Cardot, Marxer and Snozzi, EPFL
    cornea report, equation 1. Intensities of different images can no longer be
    compared afterwards; a constant image becomes 0.

    Examples
    --------
    >>> stretch_histogram([[10, 20], [30, 20]]).tolist()
    [[0, 128], [255, 128]]
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    scale = 255 / (high - low) if high > low else 0.0
    return np.rint((values - low) * scale).astype(np.uint8)
