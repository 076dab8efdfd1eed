"""Inputs: pairs and z-stacks for a calibration, read and checked.

What cannot be fitted is refused here, with the file's name and the remedy,
before minutes are spent on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import fourier_shift, uniform_filter

from rtfocus.errors import InputError
from rtfocus.images.reading import open_images
from rtfocus.images.series import ImageSeries

Image = NDArray[np.float32]
Floats = NDArray[np.float64]

MOST_SIDE_PX = 640
"""Larger images are cut to the part of this side with most structure."""

# Smaller shifts are undone: the border that this spoils is not compared anyway.
_LARGEST_SHIFT_PX = 4.0
_LOWEST_CORRELATION = 0.3


@dataclass(frozen=True, slots=True)
class ImagePair:
    """One field, sharp and defocused."""

    name: str
    sharp: Image
    defocused: Image
    full_scale: float
    """Range of its counts: 255 for 8 bit, else what the sharp image spans."""
    shift_px: tuple[float, float]
    """How far (y, x) the defocused image lay from the sharp one; undone."""


@dataclass(frozen=True, slots=True)
class ZStack:
    """One stack with the z of its planes."""

    name: str
    planes: Image
    """Axes (z, y, x)."""
    z_um: Floats
    pixel_size_um: float | None
    """What the file says; None: nothing."""


def read_pairs(
    sharp: Path, defocused: Path, *, most: int, only: Sequence[str] = ("*",)
) -> list[ImagePair]:
    """Read pairs from two files or from two folders with equal file names.

    Parameters
    ----------
    sharp, defocused
        Files, or folders whose images are matched by name.
    most
        Of a folder's pairs as many, evenly spread over the names.
    only
        Patterns of the names that may be taken.

    Raises
    ------
    InputError
        If names do not match, or a pair is not one registered field.
    """
    first = {series.name: series for series in open_images(sharp)}
    second = {series.name: series for series in open_images(defocused)}
    if sharp.is_file() and defocused.is_file():
        second = dict(zip(first, second.values(), strict=False))
    names = [
        name
        for name in sorted(first.keys() & second.keys())
        if any(fnmatch(name, pattern) for pattern in only)
    ]
    if not names:
        msg = (
            f"no image '{' or '.join(only)}' of '{sharp}' has a partner of the same "
            f"name in '{defocused}'; "
            "give two files, or two folders with equal file names"
        )
        raise InputError(msg)
    places = np.linspace(0, len(names) - 1, min(most, len(names)))
    return [
        _read_pair(name, first[name], second[name])
        for name in (names[round(place)] for place in places)
    ]


def read_stack(
    path: Path,
    *,
    z_csv: Path | None = None,
    step_um: float | None = None,
    channel: int = 0,
    descending: bool = False,
) -> ZStack:
    """Read a z-stack: one image with a z axis, or a folder of planes in name order.

    Parameters
    ----------
    path
        File or folder; the only stack axis counts as z whatever it is called.
    z_csv
        One z in um per line and plane; text lines are skipped.
    step_um
        Distance of the planes where there is no CSV; None: what the file says.
    channel
        Which channel.
    descending
        A larger z is nearer to the objective: every z changes its sign.

    Raises
    ------
    InputError
        If this is no stack or nothing tells its z.
    """
    series = open_images(path)
    stacked = _planes(path, series, channel)
    if z_csv is not None:
        z_um = _read_z(z_csv, len(stacked))
    else:
        step = step_um or series[0].z_step_um
        if not step:
            msg = (
                f"'{path}' does not say how far its planes lie apart; give --step-um "
                "or --z-csv"
            )
            raise InputError(msg)
        z_um = np.arange(len(stacked), dtype=np.float64) * step
    if descending:
        z_um = -z_um
    return ZStack(path.name, stacked, z_um, series[0].pixel_size_um)


def structured_window(image: Image, side_px: int) -> tuple[slice, slice]:
    """Return the window of at most `side_px` with the most variance."""
    sides = [min(side_px, length) for length in image.shape]
    mean = uniform_filter(image, sides, mode="nearest")
    variance = uniform_filter(image * image, sides, mode="nearest") - mean**2
    starts = [side // 2 for side in sides]
    inner = tuple(
        slice(start, start + length - side + 1)
        for start, length, side in zip(starts, image.shape, sides, strict=True)
    )
    row, column = np.unravel_index(np.argmax(variance[inner]), variance[inner].shape)
    return (
        slice(int(row), int(row) + sides[0]),
        slice(int(column), int(column) + sides[1]),
    )


def registration_shift(first: Image, second: Image) -> tuple[float, float]:
    """Return how far `second` lies from `first` in pixels (y, x), to a tenth.

    The peak of the cross-correlation; a symmetric blur does not move it.
    """
    spectra = [fft.rfft2(_tapered(image)) for image in (first, second)]
    product = np.conj(spectra[0]) * spectra[1]
    correlation = fft.irfft2(product, first.shape)
    peak = np.unravel_index(np.argmax(correlation), first.shape)
    return (
        _vertex(correlation[:, peak[1]], int(peak[0])),
        _vertex(correlation[peak[0], :], int(peak[1])),
    )


def _read_pair(name: str, first: ImageSeries, second: ImageSeries) -> ImagePair:
    sharp, defocused = _grey(first.read()), _grey(second.read())
    where = f"pair '{name}' ('{first.path}', '{second.path}')"
    if sharp.shape != defocused.shape:
        msg = f"{where}: shapes {sharp.shape} and {defocused.shape} differ"
        raise InputError(msg)
    for image, path in ((sharp, first.path), (defocused, second.path)):
        if float(np.ptp(image)) == 0.0:
            msg = f"'{path}' is flat, every pixel is {image.flat[0]:g}; choose another"
            raise InputError(msg)
    window = structured_window(sharp, MOST_SIDE_PX)
    sharp, defocused = sharp[window], defocused[window]
    shift = registration_shift(sharp, defocused)
    _check_registered(where, sharp, defocused, shift)
    spectrum = fourier_shift(fft.rfft2(defocused), np.negative(shift), sharp.shape[1])
    defocused = np.asarray(fft.irfft2(spectrum, sharp.shape), dtype=np.float32)
    scale = 255.0 if first.dtype.str == "|u1" else float(np.ptp(sharp))
    return ImagePair(name, sharp, defocused, scale, shift)


def _check_registered(
    where: str, sharp: Image, defocused: Image, shift: tuple[float, float]
) -> None:
    """Refuse a pair that is shifted far or does not show one field."""
    down, across = shift
    if np.hypot(down, across) > _LARGEST_SHIFT_PX:
        msg = (
            f"{where}: the defocused image seems to lie {down:+.1f} px in y and "
            f"{across:+.1f} px in x from the sharp one: other fields, or not "
            f"registered to within {_LARGEST_SHIFT_PX:g} px (smaller shifts are found)"
        )
        raise InputError(msg)
    correlation = float(np.corrcoef(sharp.ravel(), defocused.ravel())[0, 1])
    if correlation < _LOWEST_CORRELATION:
        msg = (
            f"{where}: correlation {correlation:.2f}; these do not seem to be the same "
            "field, or the defocus is too strong for a fit"
        )
        raise InputError(msg)


def _planes(path: Path, series: Sequence[ImageSeries], channel: int) -> Image:
    """Stack the planes of one image, or the single planes of several."""
    first = series[0]
    if channel >= first.sizes["c"]:
        msg = f"'{path}' has {first.sizes['c']} channels; channel {channel} is none"
        raise InputError(msg)
    if len(series) > 1:
        shapes = {one.shape for one in series}
        if len(shapes) > 1 or any(len(one) != one.sizes["c"] for one in series):
            msg = f"'{path}' holds several images that are no planes of one stack"
            raise InputError(msg)
        return np.stack([_grey(one.read(c=channel)) for one in series])
    # Writers that know no z axis call it time.
    axis = "z" if first.sizes["z"] > 1 else "t"
    if first.sizes[axis] < 2:
        msg = f"'{path}' is a single plane; a stack through focus is needed"
        raise InputError(msg)
    indices = range(first.sizes[axis])
    return np.stack([_grey(first.read(c=channel, **{axis: i})) for i in indices])


def _read_z(path: Path, count: int) -> Floats:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"'{path}' cannot be read: {error}"
        raise InputError(msg) from error
    values = [value for value in map(_number, lines) if value is not None]
    if len(values) != count:
        msg = f"'{path}' lists {len(values)} z positions for {count} planes"
        raise InputError(msg)
    return np.array(values)


def _number(line: str) -> float | None:
    try:
        return float(line.split(",")[-1])
    except ValueError:
        return None


def _grey(pixels: NDArray[np.generic]) -> Image:
    image = pixels.astype(np.float32)
    return image if image.ndim == 2 else np.asarray(image.mean(axis=2))


def _tapered(image: Image) -> Image:
    """Without its mean, fading out to the borders."""
    window = np.outer(*(np.hanning(length) for length in image.shape))
    return np.asarray((image - image.mean()) * window, dtype=np.float32)


def _vertex(values: Image, peak: int) -> float:
    """Place of the top of the parabola through a peak, counted from 0 both ways."""
    size = len(values)
    before, top, after = (float(values[(peak + step) % size]) for step in (-1, 0, 1))
    bend = before - 2.0 * top + after
    offset = 0.5 * (before - after) / bend if bend else 0.0
    return (peak + offset + size / 2) % size - size / 2
