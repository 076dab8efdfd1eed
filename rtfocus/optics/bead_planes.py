"""Bead planes: a z-stack of one small bead, predicted from the optics alone.

A bead is a known object: a ball no wider than the PSF, at a place between the
pixels that the fit finds by itself.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter, maximum_filter

from rtfocus.channel import OpticalSystem
from rtfocus.optics.psf import compute_psf

Image = NDArray[np.float32]
Floats = NDArray[np.float64]

_FEWEST = 5
_SMALLEST_PX = 9
# A bead stands out of the noise of the projection by this many deviations.
_CLEAR = 12.0
# Blur before beads are looked for, so that one bright pixel is no bead.
_SEARCH_BLUR_PX = 1.0


class BeadPlanes:
    """One bead prepared for many trials; a `rtfocus.optics.plane_model.PlaneModel`.

    Parameters
    ----------
    stack
        One bead near the centre, axes (z, y, x), sides odd.
    z_um
        z of every plane; larger = specimen farther from the objective.
    pixel_size_um
        Of the stack.
    diameter_um
        Of the bead; 0: a point.

    Raises
    ------
    ValueError
        If there are too few planes or pixels or there is no bead.
    """

    def __init__(
        self,
        stack: ArrayLike,
        z_um: ArrayLike,
        *,
        pixel_size_um: float,
        diameter_um: float = 0.0,
    ) -> None:
        planes = np.asarray(stack, dtype=np.float32)
        z = np.asarray(z_um, dtype=np.float64)
        if planes.ndim != 3 or len(planes) < _FEWEST or z.shape != (len(planes),):
            msg = (
                f"a bead stack of shape {planes.shape} with {z.size} z positions; need "
                f"axes (z, y, x), at least {_FEWEST} planes and one z for each"
            )
            raise ValueError(msg)
        side = min(planes.shape[1:])
        if side < _SMALLEST_PX:
            msg = (
                f"a bead in {planes.shape[1:]} pixels is cut off; need sides of at "
                f"least {_SMALLEST_PX} px: beads farther apart and from the border"
            )
            raise ValueError(msg)
        self.measured = planes
        """The planes, axes (z, y, x)."""
        self.z_um = z
        """Their z."""
        brightest = int(np.argmax(planes.max(axis=(1, 2))))
        self.sharpest_um = float(z[brightest])
        """z of the plane with the brightest pixel."""
        self._centre = _centroid(planes[brightest])
        # Twice the window: what the PSF has beyond it must not come in again.
        self._sides = [fft.next_fast_len(2 * n, real=True) for n in planes.shape[1:]]
        self._psf_px = 2 * (max(planes.shape[1:]) // 2) + 1
        self._pixel_size_um = pixel_size_um
        self._diameter_um = diameter_um

    def predict(
        self, system: OpticalSystem, focus_um: float, planes: Sequence[int]
    ) -> Image:
        """Return some planes of the bead as these optics show them."""
        ramp = self._object_spectrum()
        rows, columns = self.measured.shape[1:]
        result = np.empty((len(planes), rows, columns), dtype=np.float32)
        for place, plane in enumerate(planes):
            psf = compute_psf(
                system, float(self.z_um[plane]) - focus_um, size_px=self._psf_px
            )
            canvas = fft.rfft2(psf, self._sides)
            result[place] = fft.irfft2(canvas * ramp, self._sides)[:rows, :columns]
        return result

    def centre_on(self, system: OpticalSystem, focus_um: float) -> Self:
        """Move the assumed place of the bead to where these optics fit it best.

        One Gauss-Newton step: a small shift adds the image's slopes to it.
        """
        every = range(len(self.z_um))
        predicted = self.predict(system, focus_um, every)
        normal, slope = np.zeros((2, 2)), np.zeros(2)
        for model, plane in zip(predicted, self.measured, strict=True):
            down, across = np.gradient(model.astype(np.float64))
            columns = np.stack(
                [np.ones(model.size), model.ravel(), -down.ravel(), -across.ravel()], 1
            )
            solved, *_ = np.linalg.lstsq(columns, plane.ravel(), rcond=None)
            gain = max(float(solved[1]), 0.0)
            weight = gain**2 * columns[:, 2:].T @ columns[:, 2:]
            normal += weight
            slope += gain * columns[:, 2:].T @ columns[:, 2:] @ solved[2:]
        step = np.linalg.solve(normal + 1e-12 * np.eye(2), slope)
        moved = np.asarray(self._centre) + np.clip(step, -2.0, 2.0)
        self._centre = (float(moved[0]), float(moved[1]))
        return self

    def _object_spectrum(self) -> NDArray[np.complex64]:
        """Transform of the bead at its place, relative to the PSF's centre pixel."""
        down = fft.fftfreq(self._sides[0])[:, None]
        across = fft.rfftfreq(self._sides[1])[None, :]
        shift = (c - self._psf_px // 2 for c in self._centre)
        phase = sum(f * s for f, s in zip((down, across), shift, strict=True))
        spectrum = np.exp(-2j * np.pi * phase)
        if self._diameter_um:
            radius_px = self._diameter_um / self._pixel_size_um / 2.0
            argument = 2.0 * np.pi * radius_px * np.hypot(down, across)
            spectrum = spectrum * _ball(argument)
        return np.asarray(spectrum, dtype=np.complex64)


def find_beads(
    stack: ArrayLike, *, half_px: int, most: int = 3
) -> list[tuple[int, int]]:
    """Find bright beads with nothing else as bright in their window.

    Parameters
    ----------
    stack
        Axes (z, y, x).
    half_px
        Half side of the window of each bead, which must lie inside the image.
    most
        Beads returned at most, brightest first.

    Returns
    -------
    list[tuple[int, int]]
        Rows and columns of their centres; empty where there is none.
    """
    projection = np.asarray(stack, dtype=np.float32).max(axis=0)
    smooth = gaussian_filter(projection, _SEARCH_BLUR_PX)
    level = float(np.median(smooth))
    noise = 1.4826 * float(np.median(np.abs(smooth - level)))
    peaks = smooth == maximum_filter(smooth, size=2 * half_px + 1)
    peaks &= smooth > level + _CLEAR * max(noise, 1e-12)
    inside = np.zeros_like(peaks)
    inside[half_px : -half_px or None, half_px : -half_px or None] = True
    places = np.argwhere(peaks & inside)
    order = np.argsort(-smooth[places[:, 0], places[:, 1]])[:most]
    return [(int(places[i, 0]), int(places[i, 1])) for i in order]


def _centroid(plane: Image) -> tuple[float, float]:
    """Centre of what is brighter than half the peak."""
    weight = np.maximum(plane - (plane.max() + np.median(plane)) / 2.0, 0.0)
    total = float(weight.sum())
    rows, columns = np.indices(plane.shape)
    return (
        float((weight * rows).sum()) / total,
        float((weight * columns).sum()) / total,
    )


def _ball(argument: Floats) -> Floats:
    """Transform of a ball's projection: 3 (sin u - u cos u) / u^3."""
    safe = np.maximum(argument, 1e-3)
    value = 3.0 * (np.sin(safe) - safe * np.cos(safe)) / safe**3
    return np.where(argument < 1e-3, 1.0, value)
