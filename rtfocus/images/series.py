"""Image series: planes of one image, whatever file they lie in.

What the metadata do not say is None or empty, never a guess: a caller that needs
a pixel size asks the user for it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import InputError

NATIVE = ("|u1", "<u2", "<f4")
"""Pixel types that are processed as they are; all others are read as float32."""

SQUARE_TOLERANCE = 1e-3
"""Relative difference of the two pixel sizes up to which pixels count as square."""


def native_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """Return the little-endian type in which pixels of `dtype` are read."""
    little = np.dtype(dtype).newbyteorder("<")
    return little if little.str in NATIVE else np.dtype("<f4")


@dataclass(frozen=True)
class ContrastWindow:
    """Grey values a viewer shows between black and full colour."""

    start: float
    """Shown black."""
    end: float
    """Shown in full colour."""
    low: float | None = None
    """Smallest value the window can be set to."""
    high: float | None = None
    """Largest value the window can be set to."""


@dataclass(frozen=True)
class ImageChannel:
    """What the metadata say of one channel."""

    name: str | None = None
    color: str | None = None
    """Red, green, blue as six hexadecimal digits, ``00FF00``."""
    window: ContrastWindow | None = None
    emission_nm: float | None = None
    excitation_nm: float | None = None


@dataclass(frozen=True)
class StagePosition:
    """Where the stage stood, in the coordinates of the stage."""

    x_um: float | None = None
    y_um: float | None = None
    z_um: float | None = None


@dataclass(frozen=True)
class PlatePlace:
    """Well and field of an image in a multi-well plate."""

    plate: str
    """Name of the plate; images of one plate have the same."""
    rows: tuple[str, ...]
    """Names of all rows of the plate, whether imaged or not, top to bottom."""
    columns: tuple[str, ...]
    """Names of all columns of the plate, left to right."""
    row: int
    """Index into `rows`."""
    column: int
    """Index into `columns`."""
    field: int
    """Number of the field within the well, from 0."""
    acquisition: int | None = None
    """Number of the run over the plate that made it, where there are several."""


@dataclass(frozen=True)
class ImageSeries:
    """One image with axes t, c, z, y, x and perhaps rgb; planes are read on demand."""

    name: str
    """File name without ending, with the series' own name where there are several."""
    path: Path
    """File or folder it lies in."""
    sizes: dict[str, int]
    """Lengths of axes t, c, z, in this order."""
    shape: tuple[int, ...]
    """Of one plane: (y, x) or (y, x, 3)."""
    dtype: np.dtype[np.generic]
    """As read: uint8, uint16 or float32, little-endian."""
    read_plane: Callable[[int, int, int], NDArray[np.generic]]
    """Plane (t, c, z), as stored."""
    files: tuple[Path, ...] = ()
    """Every file or folder that pixels or metadata come from, `path` among them.

    The other files of an OME-TIFF set or a Micro-Manager stack, the folder of an
    NDTiff set, the outermost Zarr group that holds the image.
    """
    pixel_size_y_um: float | None = None
    pixel_size_x_um: float | None = None
    z_step_um: float | None = None
    time_step_s: float | None = None
    channels: tuple[ImageChannel, ...] = ()
    """One for each index of axis c, in the order of the file; empty: unknown."""
    numerical_aperture: float | None = None
    """Of the objective."""
    refractive_index: float | None = None
    """Of the medium between objective and specimen."""
    position: str | None = None
    """Name of the stage position."""
    stage: StagePosition | None = None
    """Where the stage stood at the first plane."""
    place: PlatePlace | None = None
    notes: tuple[str, ...] = ()
    """What reading leaves out or fills in, one sentence each, for the user."""

    @property
    def pixel_size_um(self) -> float | None:
        """Size of square pixels; None if unknown.

        Raises
        ------
        InputError
            If the pixels are not square: no single number is right then.
        """
        y_um, x_um = self.pixel_size_y_um, self.pixel_size_x_um
        if y_um is None or x_um is None:
            return None
        if not math.isclose(y_um, x_um, rel_tol=SQUARE_TOLERANCE):
            msg = (
                f"'{self.path}': image '{self.name}' has pixels of {y_um:g} um (y) by "
                f"{x_um:g} um (x); the optics need square ones, resample it"
            )
            raise InputError(msg)
        return x_um

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names in the order of axis c; empty if no channel has one.

        A channel without a name among named ones is called ``c`` and its index.
        """
        if not any(channel.name for channel in self.channels):
            return ()
        return tuple(
            channel.name or f"c{number}" for number, channel in enumerate(self.channels)
        )

    def read(self, t: int = 0, c: int = 0, z: int = 0) -> NDArray[np.generic]:
        """Return plane (t, c, z) with `shape` and `dtype`.

        Raises
        ------
        InputError
            If the file cannot be decoded; names file and plane.
        """
        try:
            plane = self.read_plane(t, c, z)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            msg = f"'{self.path}': plane t={t} c={c} z={z} cannot be read: {error}"
            raise InputError(msg) from error
        return np.ascontiguousarray(plane, dtype=self.dtype)

    def indices(self) -> Iterator[dict[str, int]]:
        """Yield the index of every plane, t slowest, z fastest."""
        for t in range(self.sizes["t"]):
            for c in range(self.sizes["c"]):
                for z in range(self.sizes["z"]):
                    yield {"t": t, "c": c, "z": z}

    def __len__(self) -> int:
        return self.sizes["t"] * self.sizes["c"] * self.sizes["z"]
