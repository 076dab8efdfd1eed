"""Correction: counts to signal and back on the CPU."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.camera import CameraCorrection

Image = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Marks:
    """What is wrong with the pixels of one frame."""

    flags: tuple[str, ...]
    """``nan``, ``saturated``."""
    invalid: NDArray[np.bool_] | None
    """Pixels that are NaN or infinite, shape of the frame; None: none."""


class Correction:
    """Corrects frames of one shape and dtype.

    Parameters
    ----------
    camera
        What its config says.
    """

    def __init__(self, camera: CameraCorrection) -> None:
        self._camera = camera
        self._offset = np.float32(camera.offset_counts)

    def to_signal(self, pixels: NDArray[np.generic], out: Image) -> Marks:
        """Write the corrected frame to `out` (float32) and say what is wrong with it.

        Pixels that are no number take the median of the others.
        """
        invalid = self._camera.find_invalid(pixels)
        flags = [] if invalid is None else ["nan"]
        np.copyto(out, pixels, casting="unsafe")
        if invalid is not None:
            out[invalid] = 0.0 if invalid.all() else np.median(out[~invalid])
        if float(out.max()) >= self._camera.saturation_counts:
            flags.append("saturated")
        if self._offset:
            out -= self._offset
        if self._camera.divisor is not None:
            out /= self._camera.divisor
        return Marks(tuple(flags), invalid)

    def to_counts(
        self, signal: Image, out: NDArray[np.generic], invalid: NDArray[np.bool_] | None
    ) -> None:
        """Write a restored signal on the camera's scale; overwrites `signal`.

        Integers are rounded and clipped to the range of their type. Pixels that were no
        number stay NaN in float frames: nothing is known about them.
        """
        if self._offset:
            signal += self._offset
        if np.issubdtype(out.dtype, np.integer):
            np.rint(signal, out=signal)
            limits = np.iinfo(out.dtype)  # type: ignore[type-var]
            np.clip(signal, limits.min, limits.max, out=signal)
        elif invalid is not None:
            signal[invalid] = np.nan
        np.copyto(out, signal, casting="unsafe")
