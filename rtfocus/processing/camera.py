"""Camera: what its config says of counts, and of the signal they stand for.

The signal keeps the unit of counts: the offset is removed and the even field
flattened, so that a restored frame can be put back on the camera's own scale.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import CameraConfig
from rtfocus.errors import ConfigError, InputError

Image = NDArray[np.float32]

# Below this share of its mean a flat field is dust or a shadow: not divided by.
_DARKEST_FLAT = 0.05


@dataclass(frozen=True, slots=True)
class Marks:
    """What is wrong with the pixels of one frame."""

    flags: tuple[str, ...] = ()
    """``nan``, ``saturated``."""
    invalid: NDArray[np.bool_] | None = None
    """Pixels that are NaN or infinite, shape of the frame; None: none."""


class CameraCorrection:
    """How frames of one shape and dtype are corrected; here on a CPU.

    A GPU does the same by the same numbers.

    Parameters
    ----------
    camera
        Offset, flat field and saturation.
    shape
        (y, x) or (y, x, colour).
    bit_depth
        Significant bits of an integer camera; None: all of the dtype.

    Raises
    ------
    ConfigError
        If the flat field cannot be used or has another shape.
    """

    def __init__(
        self,
        camera: CameraConfig,
        shape: tuple[int, ...],
        dtype: np.dtype[np.generic],
        bit_depth: int | None = None,
    ) -> None:
        self.integer = bool(np.issubdtype(dtype, np.integer))
        self.quantum = 1.0 if self.integer else 0.0
        self.offset_counts = float(np.float32(camera.offset_counts))
        """Counts in the dark."""
        self.saturation_counts = saturation_counts(camera, dtype, bit_depth)
        """Counts from which on a pixel is saturated; infinite for float frames."""
        self.divisor = _divisor(camera, shape)
        """Flat field with mean 1, shaped to divide a frame; None: none."""

    def pedestal(self, pixels: NDArray[np.generic]) -> float:
        """Return what lifts a frame with negative values to a signal from 0 on.

        Restoration takes light, which is never negative, and would cut off what a
        background subtraction or a standardisation left below 0. Its sums are linear,
        so that a constant can be added before and taken off afterwards.

        Parameters
        ----------
        pixels
            As the camera or a file gives them.

        Returns
        -------
        float
            Constant to add to pixels or signal; 0 for frames without negative values.

        Raises
        ------
        InputError
            If there is a flat field, which would bend the constant.
        """
        if pixels.dtype.kind not in "if":
            return 0.0
        lowest = float(np.min(pixels, where=np.isfinite(pixels), initial=0))
        if lowest >= 0:
            return 0.0
        if self.divisor is not None:
            msg = (
                f"the image has values down to {lowest:g}; camera.flat_field is for "
                "counts of a camera, leave it out for images that are processed already"
            )
            raise InputError(msg)
        return self.offset_counts - lowest

    def find_invalid(self, pixels: NDArray[np.generic]) -> NDArray[np.bool_] | None:
        """Return which pixels are NaN or infinite; None: all are numbers."""
        if self.integer:
            return None
        finite = np.isfinite(pixels)
        return None if finite.all() else ~finite

    def mark(self, pixels: NDArray[np.generic]) -> Marks:
        """Say what is wrong with a frame."""
        invalid = self.find_invalid(pixels)
        if invalid is None:
            flags, highest = [], pixels.max()
        else:
            flags, highest = ["nan"], np.max(pixels, where=~invalid, initial=-np.inf)
        # Rounded as the signal is.
        if float(np.float32(highest)) >= self.saturation_counts:
            flags.append("saturated")
        return Marks(tuple(flags), invalid)

    def to_signal(self, pixels: NDArray[np.generic], out: Image) -> Marks:
        """Write the corrected frame to `out` (float32) and say what is wrong with it.

        Pixels that are no number take the median of the others.
        """
        marks = self.mark(pixels)
        np.copyto(out, pixels, casting="unsafe")
        if marks.invalid is not None:
            fill(out, marks.invalid)
        if self.offset_counts:
            out -= np.float32(self.offset_counts)
        if self.divisor is not None:
            out /= self.divisor
        return marks

    def to_counts(
        self, signal: Image, out: NDArray[np.generic], invalid: NDArray[np.bool_] | None
    ) -> None:
        """Write a restored signal on the camera's scale, see `write_counts`."""
        if self.offset_counts:
            signal += np.float32(self.offset_counts)
        write_counts(signal, out, invalid)


def fill(pixels: Image, invalid: NDArray[np.bool_]) -> None:
    """Give pixels that are no number the median of the others; 0: there are none."""
    pixels[invalid] = 0.0 if invalid.all() else np.median(pixels[~invalid])


def write_counts(
    signal: Image, out: NDArray[np.generic], invalid: NDArray[np.bool_] | None
) -> None:
    """Write a signal on the camera's scale into a frame; overwrites `signal`.

    Integers are rounded and clipped to the range of their type. Pixels that were no
    number stay NaN in float frames: nothing is known about them.

    Parameters
    ----------
    signal
        Offset added.
    out
        Frame of any integer or float type, shape of `signal`.
    invalid
        Pixels that were no number; None: all were.
    """
    if np.issubdtype(out.dtype, np.integer):
        np.rint(signal, out=signal)
        limits = np.iinfo(out.dtype)  # type: ignore[type-var]
        highest = np.float32(limits.max)
        if int(highest) > limits.max:
            # Of wide integers the highest is no float32: the next one above wraps.
            highest = np.nextafter(highest, np.float32(0))
        np.clip(signal, np.float32(limits.min), highest, out=signal)
    elif invalid is not None:
        signal[invalid] = np.nan
    if out is not signal:
        np.copyto(out, signal, casting="unsafe")


def saturation_counts(
    camera: CameraConfig, dtype: np.dtype[np.generic], bit_depth: int | None
) -> float:
    """Return the counts from which on a pixel is saturated; infinite: none is."""
    if camera.saturation_counts:
        return float(camera.saturation_counts)
    if not np.issubdtype(dtype, np.integer):
        return float("inf")
    if bit_depth is not None:
        return float(2**bit_depth - 1)
    return float(np.iinfo(dtype).max)  # type: ignore[type-var]


def _divisor(camera: CameraConfig, shape: tuple[int, ...]) -> Image | None:
    """Flat field with mean 1, shaped to divide a frame."""
    if camera.flat_field is None:
        return None
    # Here, because it takes long to import and many a run needs none.
    from rtfocus.images.reading import read_even_field

    field = read_even_field(camera.flat_field, camera.offset_counts)
    if field.shape[:2] != shape[:2]:
        msg = (
            f"camera.flat_field '{camera.flat_field}' is {field.shape[:2]}, the frames "
            f"are {shape[:2]}; record an even field with the same ROI and binning"
        )
        raise ConfigError(msg)
    np.maximum(field, _DARKEST_FLAT, out=field)
    return field[..., None] if field.ndim < len(shape) else field
