"""Stack planes: a z-stack of any flat specimen, predicted from its sharpest plane.

All planes show the same unknown object, each through its own transfer function
H. The ratio of two of them turns the sharpest plane into any other one, with
the sharpest plane's own blur accounted for.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.ndimage import gaussian_laplace

from rtfocus.channel import OpticalSystem
from rtfocus.optics.blur import transfer_function
from rtfocus.optics.psf import compute_psf

Image = NDArray[np.float32]
Floats = NDArray[np.float64]

# Power of H of the sharpest plane below which its frequencies are not divided
# by: they hold noise, and every other plane transfers even less of them.
_REGULARISATION = 3e-3
_FEWEST = 4
# Scale of the detail that tells the sharpest plane: above the noise of one pixel.
_DETAIL_PX = 1.5


class StackPlanes:
    """A z-stack prepared for many trials; a `rtfocus.optics.plane_model.PlaneModel`.

    Parameters
    ----------
    stack
        Axes (z, y, x), any number type.
    z_um
        z of every plane; larger = specimen farther from the objective.
    half_px
        Reach of the widest PSF: so much of every border is not compared.

    Raises
    ------
    ValueError
        If there are fewer than four planes, they are too small for the PSF or
        show no structure.
    """

    def __init__(self, stack: ArrayLike, z_um: ArrayLike, *, half_px: int) -> None:
        planes = np.asarray(stack, dtype=np.float32)
        z = np.asarray(z_um, dtype=np.float64)
        if planes.ndim != 3 or len(planes) < _FEWEST or z.shape != (len(planes),):
            msg = (
                f"a stack of shape {planes.shape} with {z.size} z positions; need axes "
                f"(z, y, x), at least {_FEWEST} planes and one z for each"
            )
            raise ValueError(msg)
        if min(planes.shape[1:]) < 3 * half_px:
            msg = (
                f"planes of {planes.shape[1:]} are too small for PSFs that reach "
                f"{half_px} px; need sides of at least {3 * half_px} px, or planes "
                "nearer to focus"
            )
            raise ValueError(msg)
        self._inner = (slice(half_px, -half_px), slice(half_px, -half_px))
        compared = planes[:, *self._inner]
        if not float(np.ptp(compared, axis=(1, 2)).min()) > 0.0:
            msg = (
                "a plane shows no structure inside its borders; choose a part of the "
                "stack with cells"
            )
            raise ValueError(msg)
        sharpest = sharpest_plane(compared)
        others = np.delete(np.arange(len(planes)), sharpest)
        self.sharp = compared[sharpest]
        """The plane from which the others are predicted."""
        self.measured = compared[others]
        """The other planes without their borders, axes (z, y, x)."""
        self.z_um = z[others]
        """Their z."""
        self.sharpest_um = float(z[sharpest])
        """z of the sharpest plane."""
        self._shape = (planes.shape[1], planes.shape[2])
        self._side_px = 2 * half_px + 1
        self._spectrum = np.asarray(fft.rfft2(planes[sharpest]))

    def predict(
        self, system: OpticalSystem, focus_um: float, planes: Sequence[int]
    ) -> Image:
        """Turn the sharpest plane into others, by ratios of transfer functions."""
        own = self._transfer(system, self.sharpest_um - focus_um)
        power = np.square(own.real) + np.square(own.imag)
        undone = self._spectrum * np.conj(own) / (power + np.float32(_REGULARISATION))
        result = np.empty((len(planes), *self.sharp.shape), dtype=np.float32)
        for place, plane in enumerate(planes):
            transfer = self._transfer(system, float(self.z_um[plane]) - focus_um)
            whole = fft.irfft2(undone * transfer, self._shape)
            result[place] = whole[self._inner]
        return result

    def _transfer(
        self, system: OpticalSystem, defocus_um: float
    ) -> NDArray[np.complex64]:
        psf = compute_psf(system, defocus_um, size_px=self._side_px)
        return transfer_function(psf, self._shape)


def sharpest_plane(planes: Image) -> int:
    """Return the index of the plane with most fine detail for its brightness."""
    detail = [
        float(np.std(gaussian_laplace(plane, _DETAIL_PX)) / max(plane.mean(), 1e-12))
        for plane in planes
    ]
    return int(np.argmax(detail))
