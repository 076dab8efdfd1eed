"""Image series: planes of one image, whatever file they lie in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import InputError

NATIVE = ("|u1", "<u2", "<f4")
"""Pixel types that are processed as they are; all others are read as float32."""


def native_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """Return the little-endian type in which pixels of `dtype` are read."""
    little = np.dtype(dtype).newbyteorder("<")
    return little if little.str in NATIVE else np.dtype("<f4")


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
    pixel_size_um: float | None = None
    z_step_um: float | None = None
    channel_names: tuple[str, ...] = ()

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
