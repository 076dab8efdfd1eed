"""Reading: the images of a file, an OME-Zarr, a data set or a folder of them.

A folder is taken as it is: hidden files and the twins that macOS makes of files
(``._x.tif``) are no images, numbers sort as numbers, sets of several files are read
once, links that lead back are not followed, and results of rtfocus among the images
are no inputs.

PNG, JPEG and BMP are read here, through Pillow; colours of 16 bits through
imagecodecs, as Pillow cuts those to 8, and grey of 16 bits with an alpha channel too.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from rtfocus.errors import ConfigError, InputError, one_line
from rtfocus.images.metadata import RUN_ENDING, is_zarr, run_at, written_by_rtfocus
from rtfocus.images.micro_manager import (
    is_ndtiff,
    ndtiff_files,
    read_frames,
    read_ndtiff,
    take_frames,
)
from rtfocus.images.series import (
    ImageSeries,
    IncompleteSetError,
    native_dtype,
)
from rtfocus.images.tiff import import_imagecodecs, read_tiff

# Modes that are no grey levels and no RGB, what they become, and the note.
_CONVERT = {
    "1": ("L", ""),
    "P": ("RGB", ""),
    "LA": ("L", "its alpha channel is left out"),
    "La": ("L", "its alpha channel is left out"),
    "RGBA": ("RGB", "its alpha channel is left out"),
    "RGBa": ("RGB", "its alpha channel is left out"),
    "PA": ("RGB", "its alpha channel is left out"),
    "CMYK": ("RGB", "its printing colours are converted to RGB"),
    "YCbCr": ("RGB", ""),
}
_KEPT = ("L", "RGB", "I", "I;16", "I;16B", "I;16L", "F")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class _Form:
    """What the header of a picture says of its pixels."""

    shape: tuple[int, ...]
    dtype: str
    note: str = ""


def read_picture(path: Path) -> list[ImageSeries]:
    """Open one picture; palettes become RGB, alpha is left out and that is noted.

    Raises
    ------
    InputError
        If the file is not a picture, or its colours are of a kind that cannot be kept.
    """
    form = _form(path)
    return [
        ImageSeries(
            name=path.stem,
            path=path,
            files=(path,),
            sizes={"t": 1, "c": 1, "z": 1},
            shape=form.shape,
            dtype=native_dtype(np.dtype(form.dtype)),
            read_plane=lambda _t, _c, _z: _load(path),
            notes=(form.note,) if form.note else (),
        )
    ]


def _form(path: Path) -> _Form:
    try:
        deep = _deep_channels(path)
        if deep is not None:
            import_imagecodecs(path, "has colours or alpha of 16 bits")
        # The limit is against attacks on servers; slides are as large.
        Image.MAX_IMAGE_PIXELS = None
        with Image.open(path) as picture:
            height, width, mode = picture.height, picture.width, picture.mode
            others = getattr(picture, "n_frames", 1) - 1
            is_phone = picture.format == "MPO"
    except InputError:
        raise
    # A damaged file makes the parser raise whatever it stumbles over.
    except Exception as error:
        raise _unreadable(path, error) from error
    if others > 0 and not is_phone:
        msg = f"'{path}' holds {others + 1} pictures, one can be read; save it as TIFF"
        raise InputError(msg)
    if deep is not None:
        colours = (3,) if deep >= 3 else ()
        note = "its alpha channel is left out" if deep in (2, 4) else ""
        return _Form((height, width, *colours), "<u2", note)
    if mode not in _CONVERT and mode not in _KEPT:
        msg = f"'{path}' has colours of kind '{mode}'; save it as grey or RGB"
        raise InputError(msg)
    converted, note = _CONVERT.get(mode, (mode, ""))
    colours = (3,) if converted == "RGB" else ()
    dtypes = {"L": "|u1", "RGB": "|u1", "F": "<f4", "I": "<i4"}
    dtype = dtypes.get(converted, "<u2")
    if path.suffix.lower() == ".png" and converted == "I":
        dtype = "<u2"  # older Pillows give 16-bit grey as 32 bits
    if others > 0:
        # Phones put previews and brightness maps behind the photograph.
        note = f"{others} more pictures in the file are left out"
    return _Form((height, width, *colours), dtype, note)


def _deep_channels(path: Path) -> int | None:
    """Return how many samples a pixel of a 16-bit PNG has; None: Pillow reads it."""
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26 or not head.startswith(_SIGNATURE) or head[24] != 16:
        return None
    return {2: 3, 4: 2, 6: 4}.get(head[25])


def _load(path: Path) -> NDArray[np.generic]:
    deep = _deep_channels(path)
    if deep is not None:
        codecs = import_imagecodecs(path, "has colours or alpha of 16 bits")
        pixels = np.asarray(codecs.png_decode(path.read_bytes()))
        colours = 3 if deep >= 3 else 1
        pixels = pixels[..., :colours]
        return pixels if colours == 3 else pixels[..., 0]
    with Image.open(path) as picture:
        mode = _CONVERT.get(picture.mode, ("", ""))[0]
        return np.asarray(picture.convert(mode) if mode else picture)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"'{path}' cannot be read as a picture: {one_line(error)}")


def stretch_histogram(image: ArrayLike) -> NDArray[np.uint8]:
    """Map the smallest value to 0 and the largest to 255, linearly, for viewing.

    ``g = (f - f_min) / (f_max - f_min) * 255``: Cardot, Marxer and Snozzi, EPFL
    cornea report, equation 1. Intensities of different images can no longer be
    compared afterwards; a constant image becomes 0.

    Examples
    --------
    >>> stretch_histogram([[10, 20], [30, 20]]).tolist()
    [[0, 128], [255, 128]]
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    scale = 255 / (high - low) if high > low else 0.0
    return np.rint((values - low) * scale).astype(np.uint8)


_READERS: dict[str, Callable[[Path], list[ImageSeries]]] = {
    ".tif": read_tiff,
    ".tiff": read_tiff,
    ".btf": read_tiff,
    ".png": read_picture,
    ".jpg": read_picture,
    ".jpeg": read_picture,
    ".bmp": read_picture,
}
_FOREIGN = frozenset(
    ".czi .dv .gif .ims .jp2 .lif .lsm .mrxs .nd2 .ndpi .oib .oif .oir .r3d .scn .stk "
    ".svs .vsi .webp .zvi".split()
)
"""Formats of images that are not read; leaving them out of a folder is noted."""

_RAW = "raw.ome.zarr"


@dataclass(frozen=True)
class BrokenImage:
    """A file or folder that looks like an image and cannot be read as one."""

    path: Path
    reason: str
    """One line, names the file."""
    image: ImageSeries | None = None
    """Which of its images, where it could be opened."""


@dataclass(frozen=True)
class FoundImages:
    """What a path holds: the images that can be opened, and what else was met."""

    series: list[ImageSeries]
    broken: tuple[BrokenImage, ...] = ()
    """Files that cannot be read; the caller names them and fails in the end."""
    skipped: tuple[Path, ...] = ()
    """Results of rtfocus among the images of a folder; they are no inputs."""


@dataclass(frozen=True)
class _Candidate:
    """Something in a folder that may hold images."""

    path: Path
    read: Callable[[], list[ImageSeries]]
    is_result: bool = False


def find_images(path: Path) -> FoundImages:
    """Open the images at a path lazily; a broken one does not stop the others.

    Parameters
    ----------
    path
        As for `open_images`.

    Raises
    ------
    InputError
        If there is nothing at the path, nothing in it that looks like an image, or
        nothing that can be read.
    """
    if not os.path.lexists(path):
        msg = f"'{path}' does not exist; give an image file, an OME-Zarr or a folder"
        if any(sign in path.name for sign in "*?["):
            msg += ": that of the images, * and ? are for a shell to fill in"
        raise InputError(msg)
    if not path.is_dir():
        images = _read_all([_Candidate(path, partial(_open_file, path))])
    else:
        images = _read_all(list(_search_folder(path, set())))
    if images.series:
        return images
    if images.broken:
        raise InputError(_in_words(images.broken))
    msg = f"'{path}' holds no image; looked for {', '.join(_READERS)}, OME-Zarr, NDTiff"
    raise InputError(msg)


def companions(series: Iterable[ImageSeries]) -> list[Path]:
    """Return every file and folder that belongs to some images, Zarr parents too."""
    files: dict[Path, None] = {}
    for image in series:
        files |= dict.fromkeys((image.path, *image.files))
        around = [folder for folder in image.path.absolute().parents if is_zarr(folder)]
        files |= dict.fromkeys(around)
    return list(files)


def _read_ome_zarr(path: Path) -> list[ImageSeries]:
    # Where one is read: zarr takes longer to load than all that a side needs.
    from rtfocus.images.ome_zarr import read_ome_zarr

    return read_ome_zarr(path)


def _read_raw(run: Path) -> list[ImageSeries]:
    """Open the raw images of a run folder."""
    if not os.path.isdir(run / _RAW):
        there = ", ".join(sorted(path.name for path in run.glob("*.ome.zarr")))
        msg = f"run '{run}' has no raw images, '{_RAW}'; it has {there or 'none'}"
        raise InputError(msg)
    return _read_ome_zarr(run / _RAW)


def open_images(path: Path) -> list[ImageSeries]:
    """List the images at a path, opened lazily, folders in natural order of names.

    Parameters
    ----------
    path
        An image file, an OME-Zarr (a plate or a collection too), an NDTiff data set,
        or a folder, which is searched with its subfolders.

    Raises
    ------
    InputError
        If there is nothing at the path or anything in it cannot be read; names what
        was looked for.
    """
    images = find_images(path)
    if images.broken:
        raise InputError(_in_words(images.broken))
    return images.series


def read_even_field(path: Path, offset_counts: float) -> NDArray[np.float32]:
    """Read a picture of an even field, ``camera.flat_field``, as shares of its mean.

    Parameters
    ----------
    path
        Of an image of one plane.
    offset_counts
        Counts in the dark, which are in it too.

    Raises
    ------
    ConfigError
        If it cannot be read, or has no light above the offset to divide by.
    """
    try:
        field = np.asarray(open_images(path)[0].read(0), np.float32)
    except InputError as error:
        msg = f"camera.flat_field: {error}"
        raise ConfigError(msg) from error
    mean = float(field.mean())
    if not mean > offset_counts or not np.isfinite(mean):
        msg = (
            f"camera.flat_field '{path}' has a mean of {mean:g} counts, which must be "
            f"a number above camera.offset_counts ({offset_counts:g}); record an even "
            "field with light, as the camera gives it: nothing subtracted"
        )
        raise ConfigError(msg)
    return (field - np.float32(offset_counts)) / np.float32(mean - offset_counts)


def _in_words(broken: tuple[BrokenImage, ...]) -> str:
    more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    return broken[0].reason + more


def _open_file(path: Path) -> list[ImageSeries]:
    if os.path.islink(path) and not os.path.exists(path):
        msg = f"'{path}' is a link that leads nowhere; give the image itself"
        raise InputError(msg)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        msg = (
            f"'{path}': no reader for '{path.suffix}'; export it as OME-TIFF, or as "
            f"OME-Zarr, {', '.join(_READERS)}"
        )
        raise InputError(msg)
    if is_ndtiff(path.parent) and path.name in ndtiff_files(path.parent):
        return read_ndtiff(path.parent)
    if os.path.exists(path) and not os.path.isfile(path):
        msg = f"'{path}' is a pipe or a device, which is read once; save it as a file"
        raise InputError(msg)
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        msg = f"'{path}' is empty, 0 bytes; copy or save it again"
        raise InputError(msg)
    return reader(path)


def _read_all(candidates: list[_Candidate]) -> FoundImages:
    """Read the images; results only where there is nothing else."""
    results = [candidate.path for candidate in candidates if candidate.is_result]
    if len(results) < len(candidates):
        candidates = [image for image in candidates if not image.is_result]
    else:
        results = []
    series: list[ImageSeries] = []
    broken: list[BrokenImage] = []
    taken: set[str] = set()
    for candidate in candidates:
        # By os.path: links in a circle have no place, and are refused when read.
        if os.path.realpath(candidate.path) in taken:
            continue
        try:
            images = candidate.read()
        except InputError as error:
            broken.append(BrokenImage(candidate.path, str(error)))
            images = error.readable if isinstance(error, IncompleteSetError) else []
        series += map(_with_note, images)
        sets = (image.files for image in images if len(image.files) > 1)
        taken |= {os.path.realpath(file) for files in sets for file in files}
    return FoundImages(series, tuple(broken), tuple(results))


def _with_note(image: ImageSeries) -> ImageSeries:
    """Note that a Zarr image has no file of pixels: black, by the format."""
    files = (name for *_, names in os.walk(image.pixels or "") for name in names)
    is_filled = any(not name.startswith((".", "zarr.json")) for name in files)
    if image.pixels is None or is_filled:
        return image
    note = f"'{image.path}': image '{image.name}' has no file of pixels, all are 0"
    return replace(image, notes=(*image.notes, note))


def _search(folder: Path, visited: set[Path]) -> Iterator[_Candidate]:
    """Yield what may hold images below a folder, in natural order."""
    if folder.resolve() in visited:
        return
    visited.add(folder.resolve())
    try:
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
        entries.sort(key=_natural)
    except OSError as error:
        yield _Candidate(
            folder, partial(_refuse, f"'{folder}' cannot be read: {error}")
        )
        return
    if is_ndtiff(folder):
        yield _Candidate(folder, partial(read_ndtiff, folder))
        own = ndtiff_files(folder)
        entries = [entry for entry in entries if entry.name not in own]
    # By os.path: what may not be looked at is no reason to stop.
    frames = take_frames([entry for entry in entries if os.path.isfile(entry)])
    others = set(entries) - set(frames)
    for entry in entries:
        if frames and entry == frames[0]:
            yield _Candidate(entry, partial(read_frames, folder, frames))
        elif entry in others and os.path.isdir(entry):
            yield from _search_folder(entry, visited)
        elif entry in others and (os.path.isfile(entry) or not os.path.exists(entry)):
            # A link to nowhere is an image that is missing.
            yield from _search_file(entry)


def _search_folder(folder: Path, visited: set[Path]) -> Iterator[_Candidate]:
    if run_at(folder) or (folder.suffix == RUN_ENDING and os.path.isdir(folder / _RAW)):
        yield _Candidate(folder, partial(_read_raw, folder), is_result=True)
    elif is_zarr(folder):
        if folder.resolve() not in visited:
            visited.add(folder.resolve())
            yield _Candidate(
                folder, partial(_read_ome_zarr, folder), written_by_rtfocus(folder)
            )
    else:
        yield from _search(folder, visited)


def _search_file(path: Path) -> Iterator[_Candidate]:
    suffix = path.suffix.lower()
    if suffix in _READERS:
        yield _Candidate(path, partial(_open_file, path), written_by_rtfocus(path))
    elif suffix in _FOREIGN:
        msg = f"'{path}': no reader for '{suffix}'; export it as OME-TIFF or OME-Zarr"
        yield _Candidate(path, partial(_refuse, msg))


def _refuse(message: str) -> list[ImageSeries]:
    raise InputError(message)


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Return a key that sorts 2 before 10; text and numbers alternate in it."""
    parts = re.split(r"(\d+)", path.name)
    key = [int(p) if n % 2 else p.lower() for n, p in enumerate(parts)]
    return key, path.name
