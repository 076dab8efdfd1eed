"""Surface: how high the specimen lies at each place and time.

Heights are counted like the z-stage: along the optical axis, away from the
objective. The z-stage carries the objective; moving it up by 1 um moves the plane
of focus 1 um towards the specimen, which Micro-Manager calls a focus direction of
+1. A surface at 5 um is in focus with the stage at 5 um, so

    defocus_um = height_um - z_um

is positive where the specimen is too far from the objective.
"""

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.microscope import SurfaceConfig


class Surface:
    """Height of a tilted, curved, drifting specimen."""

    def __init__(self, config: SurfaceConfig, shape: tuple[int, int]) -> None:
        self._config = config
        # -0.5 to +0.5 from edge to edge, so that a tilt is the rise over the frame.
        self._y = _edge_to_edge(shape[0])[:, None]
        self._x = _edge_to_edge(shape[1])[None, :]
        self._still = self._height(0.0, 0.0)

    def height_um(
        self, *, x_px: float = 0.0, y_px: float = 0.0, time_s: float = 0.0
    ) -> NDArray[np.float32]:
        """Return the height of every pixel, axes (y, x), in um.

        Parameters
        ----------
        x_px, y_px
            Where the frame's centre lies on the specimen; tilt and bow go on
            beyond the first frame.
        time_s
            Time since the microscope was made, for the drift.
        """
        rise = np.float32(self._config.drift_um_per_min * time_s / 60.0)
        if x_px == 0 and y_px == 0:
            return self._still + rise
        rows, columns = self._still.shape
        return self._height(x_px / columns, y_px / rows) + rise

    def _height(self, shift_x: float, shift_y: float) -> NDArray[np.float32]:
        config = self._config
        x, y = self._x + shift_x, self._y + shift_y
        # A parabola that is `bow` in the middle and 0 in the corners of the frame.
        bow = config.bow_um * (1.0 - 2.0 * (x**2 + y**2))
        height = config.z_um + config.tilt_x_um * x + config.tilt_y_um * y + bow
        return np.asarray(height, dtype=np.float32)


def _edge_to_edge(side: int) -> NDArray[np.float64]:
    return np.linspace(-0.5, 0.5, side) if side > 1 else np.zeros(1)
