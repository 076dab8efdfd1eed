"""Image series: planes of one image, whatever file they lie in.

What the metadata do not say is None or empty, never a guess: a caller that needs
a pixel size asks the user for it.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import InputError, one_line
from rtfocus.machine import memory

NATIVE = ("|u1", "<u2", "<f4")
"""Pixel types that are processed as they are; all others are read as float32."""

_FLOAT32_EXACT = 2**24
"""Up to here float32 holds every whole number."""
_COMPUTED = 1e-15, 1e15
"""Largest value of an image: beyond, squares and their sums leave float32."""

MOST_PLANES, MOST_IMAGES = 10_000_000, 100_000
"""Planes of one image, images of one file; metadata that ask for more are broken."""

SQUARE_TOLERANCE = 1e-3
"""Relative difference of the two pixel sizes up to which pixels count as square."""

_UNWRITABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"
)


def writable_text(text: str) -> str:
    """Return text that UTF-8, XML and JSON can all hold.

    Control characters, and the bytes of a file name that are no UTF-8, become the
    replacement character: a result with them in its metadata could not be read again.
    """
    return _UNWRITABLE.sub("\ufffd", text)


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

    def __post_init__(self) -> None:
        """Keep text that every format of a result can hold."""
        if self.name is not None:
            object.__setattr__(self, "name", writable_text(self.name))


@dataclass(frozen=True)
class StagePosition:
    """Where the stage stood, in the coordinates of the stage."""

    x_um: float | None = None
    y_um: float | None = None
    z_um: float | None = None

    def moved(self, y_um: float, x_um: float) -> "StagePosition":
        """Return what lies so far off: a map begins at the middle of its first tile.

        Where the stage's place is not known the image begins at 0.
        """
        y, x = (
            um if um is not None and math.isfinite(um) else 0.0
            for um in (self.y_um, self.x_um)
        )
        return replace(self, x_um=x + x_um, y_um=y + y_um)


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


class Facts(TypedDict, total=False):
    """Fields of `ImageSeries` that metadata fill, as a reader hands them on."""

    pixel_size_y_um: float | None
    pixel_size_x_um: float | None
    z_step_um: float | None
    time_step_s: float | None
    channels: tuple[ImageChannel, ...]
    numerical_aperture: float | None
    refractive_index: float | None
    position: str | None
    stage: StagePosition | None
    z_rises: bool | None
    place: PlatePlace | None


def slices_um(facts: Facts, count: int) -> list[float | None]:
    """Return z of the stage at every slice of a stack; None: unknown."""
    stage, step_um = facts.get("stage"), facts.get("z_step_um")
    first_um, rises = None if stage is None else stage.z_um, facts.get("z_rises")
    if first_um is None or step_um is None or rises is None:
        return [first_um] + [None] * (count - 1)
    signed_um = step_um if rises else -step_um
    return [round(first_um + z * signed_um, 6) for z in range(count)]


def rising(places: Sequence[float | None]) -> bool | None:
    """Tell whether places grow from each to the next, or fall; None: neither.

    >>> rising([1.0, 1.5, 2.5]), rising([3.0, 2.0]), rising([1.0, 1.0]), rising([1.0])
    (True, False, None, None)
    """
    if None in places or len(places) < 2:
        return None
    steps = np.diff(np.array(places, np.float64))
    return bool(steps[0] > 0) if (steps * steps[0] > 0).all() else None


class IncompleteSetError(InputError):
    """Some images of a set of files cannot be read.

    Parameters
    ----------
    message
        Which, and why.
    readable
        The others.
    """

    def __init__(self, message: str, readable: "list[ImageSeries]") -> None:
        super().__init__(message)
        self.readable = readable


def stem_of(path: Path) -> str:
    """Return a file's name without the ending of its format.

    Examples
    --------
    >>> stem_of(Path("day.1/well.A1.ome.tif")), stem_of(Path("x.zarr"))
    ('well.A1', 'x')
    """
    stem = path.stem
    return stem[:-4] if stem.lower().endswith(".ome") and len(stem) > 4 else stem


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
    """Every file or folder of its pixels and metadata, `path` among them: the others of
    an OME-TIFF set or a Micro-Manager stack, an NDTiff folder, the outermost group.
    """
    pixels: Path | None = None
    """Folder of this image's own pixels, where `files` hold those of others too."""
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
    z_rises: bool | None = None
    """Whether its z grows from slice to slice, or falls; None: unknown."""
    place: PlatePlace | None = None
    unnamed_axes: str = ""
    """Of ``tcz`` those that the file does not call so."""
    notes: tuple[str, ...] = ()
    """What reading leaves out or fills in, one sentence each, for the user."""

    def __post_init__(self) -> None:
        """Keep text that every format of a result can hold."""
        object.__setattr__(self, "name", writable_text(self.name))
        if self.position is not None:
            object.__setattr__(self, "position", writable_text(self.position))

    @property
    def pixel_size_um(self) -> float | None:
        """Size of square pixels; None if unknown.

        Pixels of which one side is stated are taken as square.

        Raises
        ------
        InputError
            If the pixels are not square: no single number is right then.
        """
        y_um, x_um = self.pixel_size_y_um, self.pixel_size_x_um
        if y_um is None or x_um is None:
            return x_um or y_um
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
            If the file cannot be decoded, or its values do not fit `dtype`; names
            file and plane.
        """
        place = f"'{self.path}': plane t={t} c={c} z={z}"
        try:
            plane = self.read_plane(t, c, z)
        # Decoders of damaged files raise whatever they stumble over.
        except Exception as error:
            msg = f"{place} cannot be read: {one_line(error)}"
            raise InputError(msg) from error
        if plane.shape != self.shape:
            msg = f"{place} has shape {plane.shape}, the others {self.shape}"
            raise InputError(msg)
        loss = loss_of(plane)
        if loss:
            msg = f"{place} {loss}"
            raise InputError(msg)
        return np.ascontiguousarray(plane, dtype=self.dtype)

    @cached_property
    def slices_um(self) -> list[float | None]:
        """Z of the stage at every slice; None: unknown."""
        facts = Facts(stage=self.stage, z_step_um=self.z_step_um, z_rises=self.z_rises)
        return slices_um(facts, self.sizes["z"])

    def indices(self) -> Iterator[dict[str, int]]:
        """Yield the index of every plane, t slowest, z fastest."""
        for t in range(self.sizes["t"]):
            for c in range(self.sizes["c"]):
                for z in range(self.sizes["z"]):
                    yield {"t": t, "c": c, "z": z}

    def __len__(self) -> int:
        return self.sizes["t"] * self.sizes["c"] * self.sizes["z"]


def pixels_of(image: object) -> NDArray[np.generic]:
    """Return what a user gives for an image as an array.

    Raises
    ------
    InputError
        If it is no image, pixels of it are masked (no result says which), or it is more
        than the memory of this machine: its result would be too.
    """
    if isinstance(image, (str, bytes, Path)):
        msg = (
            f"an image is an array of numbers, this is a {type(image).__name__}; read "
            "a file first, e.g. tifffile.imread(path)"
        )
        raise InputError(msg)
    if np.ma.is_masked(image):
        msg = (
            "the image has masked pixels, which would count like the others; fill "
            "them, e.g. image.filled(0)"
        )
        raise InputError(msg)
    try:
        pixels = np.asarray(image)
        # Mixed lists and Python's own large numbers.
        pixels = pixels.astype(np.float64) if pixels.dtype.kind == "O" else pixels
    # Arrays of other libraries raise whatever they like.
    except Exception as error:
        kind, why = type(image).__name__, one_line(error)
        msg = f"an image is an array of numbers, this {kind} gives none: {why}"
        raise InputError(msg) from error
    # A broadcast array of any size takes no memory, and what is made of it does.
    if pixels.nbytes > (most := memory().total):
        msg = (
            f"an array of {pixels.shape} has {pixels.nbytes / 1e9:.0f} GB, this "
            f"machine {most / 1e9:.0f} GB of memory; give planes one by one, or parts"
        )
        raise InputError(msg)
    return pixels


def checked_image(given: object, *, of_stack: bool) -> NDArray[np.generic]:
    """Return one image in a type that frames have; planes `of_stack` may show nothing.

    Raises
    ------
    InputError
        If it has no shape of an image, loses values in these types, or shows nothing.
    """
    image = pixels_of(given)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        msg = f"an image has axes (y, x) or (y, x, 3), this array is {image.shape}"
        msg += "; give the planes of a stack one by one" if image.ndim > 2 else ""
        raise InputError(msg)
    if 0 in image.shape:
        msg = f"the image of shape {image.shape} has no pixels"
        raise InputError(msg)
    if (loss := loss_of(image)) is not None:
        msg = f"the image {loss}"
        raise InputError(msg)
    if not of_stack and shows_nothing(image):
        raise InputError(nothing_shown("the image"))
    low, high = _COMPUTED
    largest = _largest(image) if image.dtype.kind == "f" else 0.0
    # Of a stack one plane may hold next to nothing.
    if largest > high or (0 < largest < low and not of_stack):
        msg = f"the image has values up to {largest:g}; {low:g} to {high:g} can be"
        msg += " computed with, scale it"
        raise InputError(msg)
    return np.ascontiguousarray(image, dtype=native_dtype(image.dtype))


def loss_of(plane: NDArray[np.generic]) -> str | None:
    """Say what float32 would lose of an image; NaN and infinity stay.

    Rounding to the 24 bits of float32 is no loss for measured real numbers; whole
    numbers are counts or labels, which must stay what they are.
    """
    if plane.dtype.kind == "c":
        return "is complex; save its magnitude or its parts as real images"
    if plane.dtype.kind not in "biuf":
        return f"is of type {plane.dtype}, which is no number; save it as float32"
    if plane.dtype.itemsize <= 2 or plane.size == 0:
        return None
    if plane.dtype.kind in "iu":
        low, high = int(plane.min()), int(plane.max())
        if (top := max(-low, high)) > _FLOAT32_EXACT and not _is_exact(plane, top):
            return (
                f"has whole numbers from {low} to {high}; beyond +-{_FLOAT32_EXACT} "
                "float32 is not exact, scale or save it as float32"
            )
    if plane.dtype.kind == "f" and plane.dtype.itemsize > 4:
        largest = _largest(plane)
        limits = np.finfo(np.float32)
        tiny, huge = float(limits.tiny), float(limits.max)
        if largest > huge or 0 < largest < tiny:
            return (
                f"has values up to {largest:g}, beyond the range of float32 "
                f"({tiny:.2g} to {huge:.2g}); scale it"
            )
    return None


def _largest(plane: NDArray[np.generic]) -> float:
    """Return the largest size of the numbers of a plane; 0: there are none."""
    return float(np.abs(plane).max(initial=0, where=np.isfinite(plane)))


def shows_nothing(pixels: NDArray[np.generic]) -> bool:
    """Tell whether not one pixel of a plane is a number.

    Registered stacks have such planes; an image of nothing else is broken.
    """
    return pixels.dtype.kind == "f" and not np.isfinite(pixels).any()


def nothing_shown(what: str) -> str:
    """Say why an image of such planes alone is refused."""
    return (
        f"{what} shows nothing: every pixel is NaN or infinite; export it again from "
        "its source, as numbers"
    )


def _is_exact(plane: NDArray[np.generic], top: int) -> bool:
    """Tell whether float32 holds every whole number of a plane, up to +-`top`."""
    if top > 2**53:  # not even float64 tells them apart there
        return False
    wide = plane.astype(np.float64)
    return bool(np.array_equal(wide.astype(np.float32).astype(np.float64), wide))
