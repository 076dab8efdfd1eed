"""Correction: counts to signal and back on the device."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from rtfocus.errors import EngineError
from rtfocus.processing.camera import CameraCorrection
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work

# As in kernels/common.cu.
KINDS: dict[np.dtype[Any], int] = {
    np.dtype("|u1"): 0,
    np.dtype("<u2"): 1,
    np.dtype("<f4"): 2,
    np.dtype("<f2"): 3,
}


class Correction:
    """Corrects frames of one shape, as its like on the CPU.

    Parameters
    ----------
    memory
        Where the flat field lies.
    correction
        What the camera's config says.
    shape
        (y, x) or (y, x, colour).
    """

    def __init__(
        self, memory: DeviceMemory, correction: CameraCorrection, shape: tuple[int, ...]
    ) -> None:
        self._offset = correction.offset_counts
        self._saturation = correction.saturation_counts
        self._channels = shape[2] if len(shape) == 3 else 1
        self._divisor: DeviceArray | None = None
        self._divisor_channels = 0
        if correction.divisor is not None:
            field = np.ascontiguousarray(correction.divisor, np.float32)
            self._divisor = memory.upload(field, "the flat field")
            self._divisor_channels = field.size // (shape[0] * shape[1])

    def to_signal(
        self,
        work: Work,
        frame: DeviceArray,
        signal: DeviceArray,
        saturated: DeviceArray,
    ) -> None:
        """Enqueue the correction of a frame without NaN.

        Parameters
        ----------
        work
            Stream.
        frame
            Counts of the camera.
        signal
            Result, float32.
        saturated
            One int32: 1 where any pixel is saturated.
        """
        work.zero(saturated)
        work.launch(
            "to_signal",
            frame.count,
            frame,
            kind_of(frame.dtype),
            frame.count,
            self._channels,
            self._offset,
            self._saturation,
            self._divisor,
            self._divisor_channels,
            signal,
            saturated,
        )

    def to_counts(self, work: Work, signal: DeviceArray, out: DeviceArray) -> None:
        """Enqueue the way back to the camera's scale, rounded and clipped."""
        work.launch(
            "to_counts",
            out.count,
            signal,
            out.count,
            self._offset,
            out,
            kind_of(out.dtype),
        )


def kind_of(dtype: DTypeLike) -> int:
    """Return the kernels' number of an element type.

    Raises
    ------
    EngineError
        If the kernels do not know it.
    """
    found = KINDS.get(np.dtype(dtype))
    if found is None:
        known = ", ".join(kind.str for kind in KINDS)
        msg = (
            f"frames of {np.dtype(dtype)} cannot be processed on a GPU; known: {known}"
        )
        raise EngineError(msg)
    return found
