"""Windows: equal overlapping pieces of a frame, and how their results are joined.

Neighbouring windows overlap by two halos. In the middle of the overlap one fades
into the other, so that no seam is left where they differ, and the outer half of
each halo is context only.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AxisWindows:
    """Windows along one axis; window i starts at ``i * own_px``."""

    count: int
    own_px: int
    """Distance between neighbouring windows."""
    halo_px: int
    """Context on either side of the own pixels."""

    @property
    def size_px(self) -> int:
        """Length of a window."""
        return self.own_px + 2 * self.halo_px

    @property
    def length_px(self) -> int:
        """Length that all windows together cover."""
        return self.count * self.own_px + 2 * self.halo_px

    def span(self, index: int) -> slice:
        """Return the pixels of a window."""
        start = index * self.own_px
        return slice(start, start + self.size_px)

    def weights(self) -> Image:
        """Compute how much every window counts in its own pixels.

        Returns
        -------
        Image
            Axes (window, pixel of the window); over all windows that cover a pixel
            they sum to 1.
        """
        pixels = np.arange(self.size_px)
        # Fades over one halo around the border between two windows' own pixels, but
        # never so wide that three windows would meet.
        width = max(min(self.halo_px, self.own_px), 1)
        rise = (pixels + 0.5 - self.halo_px) / width + 0.5
        rising = np.clip(rise, 0, 1).astype(np.float32)
        result = np.ones((self.count, self.size_px), np.float32)
        result[1:] *= rising
        result[:-1] *= rising[::-1]
        return result


def windows_of_size(length_px: int, size_px: int, halo_px: int) -> AxisWindows:
    """Cover an axis with windows of a given size; it gains a halo on both sides."""
    own_px = size_px - 2 * halo_px
    return AxisWindows(max(1, ceil(length_px / own_px)), own_px, halo_px)


def fewest_windows(
    length_px: int, largest_px: int, halo_px: int, multiple_px: int
) -> AxisWindows:
    """Cover an axis with as few equal windows as a largest size allows.

    Parameters
    ----------
    length_px
        Of the axis; one window holds it where it may be so large.
    largest_px
        Longest window.
    halo_px
        Context where two windows meet, rounded up to the multiple.
    multiple_px
        Windows start, and are long, in multiples of it.
    """
    if length_px <= largest_px:
        return AxisWindows(1, length_px, 0)
    halo_px = ceil(halo_px / multiple_px) * multiple_px
    inner = length_px - 2 * halo_px
    count = ceil(inner / (largest_px - 2 * halo_px))
    own_px = ceil(inner / count / multiple_px) * multiple_px
    return AxisWindows(count, own_px, halo_px)
