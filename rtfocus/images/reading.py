"""Reading: TIFF, OME-TIFF, PNG, JPEG, OME-Zarr and folders of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rtfocus.errors import InputError
from rtfocus.images.ome_zarr import read_ome_zarr
from rtfocus.images.pictures import read_picture
from rtfocus.images.series import ImageSeries
from rtfocus.images.tiff import read_tiff

_READERS: dict[str, Callable[[Path], list[ImageSeries]]] = {
    ".tif": read_tiff,
    ".tiff": read_tiff,
    ".png": read_picture,
    ".jpg": read_picture,
    ".jpeg": read_picture,
    ".bmp": read_picture,
}


@dataclass(frozen=True)
class BrokenImage:
    """A file or folder that looks like an image and cannot be read as one."""

    path: Path
    reason: str
    """One line, names the file."""


@dataclass(frozen=True)
class FoundImages:
    """What a path holds: the images that can be opened, and what else was met."""

    series: list[ImageSeries]
    broken: tuple[BrokenImage, ...] = ()
    """Files that cannot be read; the caller names them and fails in the end."""
    skipped: tuple[Path, ...] = ()
    """Results of rtfocus among the images of a folder; they are no inputs."""


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
    return FoundImages(open_images(path))


def open_images(path: Path) -> list[ImageSeries]:
    """List the images at a path, opened lazily, folders in name order.

    Parameters
    ----------
    path
        An image file, an OME-Zarr (0.4 or 0.5; a plate or a collection too), or a
        folder, which is searched with its subfolders.

    Raises
    ------
    InputError
        If there is nothing at the path or nothing in it can be read; names what
        was looked for.
    """
    if not path.exists():
        msg = f"'{path}' does not exist; give an image file, an OME-Zarr or a folder"
        raise InputError(msg)
    if path.is_dir():
        return _open_folder(path)
    return _open_file(path)


def _open_file(path: Path) -> list[ImageSeries]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        msg = (
            f"'{path}': no reader for '{path.suffix}'; readable are "
            f"{', '.join(_READERS)}, OME-Zarr and folders of them"
        )
        raise InputError(msg)
    return reader(path)


def _open_folder(folder: Path) -> list[ImageSeries]:
    if _is_zarr(folder):
        return read_ome_zarr(folder)
    found: list[ImageSeries] = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            inside = _is_zarr(entry) or any(entry.rglob("*.*"))
            found += _open_folder(entry) if inside else []
        elif entry.suffix.lower() in _READERS:
            found += _open_file(entry)
    if not found:
        msg = f"'{folder}' holds no image; looked for {', '.join(_READERS)}, OME-Zarr"
        raise InputError(msg)
    return found


def _is_zarr(folder: Path) -> bool:
    marks = ("zarr.json", ".zgroup", ".zattrs")
    return any((folder / mark).is_file() for mark in marks)
