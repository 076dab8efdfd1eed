"""Plane model: planes of one specimen as measured and as any optics would show them.

Gain and offset are free in each plane, so bleaching and a light sheet do no harm.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem

Image = NDArray[np.float32]
Floats = NDArray[np.float64]


class PlaneModel(Protocol):
    """Planes as they were measured, and as any optics would show them."""

    @property
    def measured(self) -> Image:
        """The planes, axes (plane, y, x), cut to the pixels that are compared."""
        ...

    @property
    def z_um(self) -> Floats:
        """Their z; larger = specimen farther from the objective."""
        ...

    @property
    def sharpest_um(self) -> float:
        """Where they look sharpest; the focus is searched around it."""
        ...

    def predict(
        self, system: OpticalSystem, focus_um: float, planes: Sequence[int]
    ) -> Image:
        """Return some planes as seen by optics focused at `focus_um`.

        Their gains and offsets are arbitrary.
        """
        ...


def match_planes(predicted: Image, measured: Image) -> Image:
    """Return the predicted planes with the gain and offset of the measured ones."""
    result = np.empty_like(measured)
    for index, (first, second) in enumerate(zip(predicted, measured, strict=True)):
        centred = first - first.mean()
        gain = np.vdot(centred, second) / max(float(np.vdot(centred, centred)), 1e-30)
        result[index] = gain * centred + second.mean()
    return result


def unexplained(predicted: Image, measured: Image) -> tuple[float, float]:
    """Return the mean squared error after gain and offset, and the variance."""
    first = predicted - predicted.mean()
    second = measured - measured.mean()
    power = max(float(np.vdot(first, first)), 1e-30)
    total = float(np.vdot(second, second))
    # A negative gain would turn contrast round, which no defocus blur does here.
    shared = max(float(np.vdot(first, second)), 0.0) ** 2 / power
    return (total - shared) / measured.size, total / measured.size
