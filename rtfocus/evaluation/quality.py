"""Quality: how close an image is to the truth, one implementation for all figures.

PSNR and SSIM depend on the data range, which therefore is never guessed.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

Floats = NDArray[np.float64]

# Window of Wang et al. 2004: Gaussian, sigma 1.5, cut to 11 x 11 pixels.
_SIGMA_PX = 1.5
_TRUNCATE = 3.5
_BORDER_PX = 5


def mse(truth: ArrayLike, image: ArrayLike) -> float:
    """Return the mean squared error."""
    return float(np.mean((_floats(truth) - _floats(image)) ** 2))


def psnr(truth: ArrayLike, image: ArrayLike, *, data_range: float) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite for equal images."""
    error = mse(truth, image)
    return float("inf") if error == 0 else 10.0 * np.log10(data_range**2 / error)


def ssim(truth: ArrayLike, image: ArrayLike, *, data_range: float) -> float:
    """Return the mean structural similarity; colour: the mean over channels.

    Gaussian window 11 x 11, sigma 1.5, population covariance, K1 0.01, K2 0.03.

    Raises
    ------
    ValueError
        If a side is shorter than the window.

    References
    ----------
    .. [1] Z. Wang et al., "Image quality assessment", IEEE TIP 13, 2004.
    """
    a, b = _floats(truth), _floats(image)
    if a.ndim == 3:
        per_channel = [
            ssim(a[..., c], b[..., c], data_range=data_range)
            for c in range(a.shape[-1])
        ]
        return float(np.mean(per_channel))
    if min(a.shape) <= 2 * _BORDER_PX:
        msg = f"image of {a.shape} is smaller than the 11 px window of SSIM"
        raise ValueError(msg)
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a * a) - mean_a**2
    var_b = _window_mean(b * b) - mean_b**2
    cov = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    inner = slice(_BORDER_PX, -_BORDER_PX)
    return float(np.mean((luminance * structure)[inner, inner]))


def pearson(truth: ArrayLike, image: ArrayLike) -> float:
    """Return Pearson's correlation coefficient; NaN where an image is constant."""
    a = _floats(truth).ravel()
    b = _floats(image).ravel()
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b) / spread) if spread > 0 else float("nan")


def match_intensity(truth: ArrayLike, image: ArrayLike) -> Floats:
    """Return gain * image + offset, the least-squares fit to the truth.

    Figures computed after it must say so: it hides a wrong brightness.
    """
    a, b = _floats(truth), _floats(image)
    spread = float(np.mean((b - b.mean()) ** 2))
    if spread == 0:
        return np.full_like(b, a.mean())
    gain = float(np.mean((a - a.mean()) * (b - b.mean()))) / spread
    return np.asarray(gain * (b - b.mean()) + a.mean())


def _floats(image: ArrayLike) -> Floats:
    return np.asarray(image, dtype=np.float64)


def _window_mean(image: Floats) -> Floats:
    return np.asarray(gaussian_filter(image, _SIGMA_PX, truncate=_TRUNCATE))
