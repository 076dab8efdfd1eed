"""Samples: frames with what is known about them, as every data set gives them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Aberrations, OpticalSystem

Image = NDArray[np.float32]

BBBC006 = OpticalSystem(
    0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.38)
)
"""Optics fitted to the training rows of the BBBC006 pairs, their planes called 10 um
taken as 10 um; `rtfocus psf fit --exact-defocus` finds them again."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One frame."""

    name: str
    pixels: NDArray[np.generic]
    """What the camera delivered, axes (y, x) or (y, x, colour)."""
    sharp: NDArray[np.generic] | None
    """The same field in focus, in the same unit; None: unknown."""
    defocus_um: tuple[float, float] | None
    """Lowest and highest defocus it may have in the optics of its set, equal where
    it is known exactly; None: unknown."""
    group: str
    """What its figures are gathered under besides the whole set, e.g. a level."""
    data_range: float
    """Of PSNR and SSIM."""
    sided: bool = False
    """The sign of the defocus is known too."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """Frames with one camera and one set of optics."""

    name: str
    title: str
    """What it holds, which of it, and the data range, for the reader of a table."""
    optics: OpticalSystem
    offset_counts: float
    """Of the camera."""
    samples: Callable[[], Iterator[Sample]]
    """Reads or makes the frames, the same ones every time."""


def plane_name(series: str, index: Mapping[str, int]) -> str:
    """Return a name of its own for each plane of a series.

    Examples
    --------
    >>> plane_name("cells", {"t": 0, "c": 0}), plane_name("cells", {"t": 3, "c": 1})
    ('cells', 'cells t3 c1')
    """
    return series + "".join(f" {axis}{n}" for axis, n in index.items() if n)


def middle(length_px: int, most_px: int) -> slice:
    """Return the middle of an axis, at most so many pixels.

    Examples
    --------
    >>> middle(10, 4), middle(3, 4)
    (slice(3, 7, None), slice(0, 3, None))
    """
    side = min(length_px, most_px)
    return slice((length_px - side) // 2, (length_px + side) // 2)
