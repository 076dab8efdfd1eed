"""Image files as other programs write them, for the tests of reading."""

import json
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from rtfocus.errors import InputError
from rtfocus.images.metadata import OutputImage
from rtfocus.images.outputs import ImageOutput, OutputGuard
from rtfocus.images.reading import companions
from rtfocus.images.series import ImageSeries

OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
SHAPE = (200, 240)
"""Of a `specimen`: no square, so that axes are told apart."""


def flat(value: float, dtype: str = "u2", shape: tuple[int, ...] = (8, 9)):
    return np.full(shape, value, dtype)


def as_output(series: ImageSeries) -> OutputImage:
    planes = (series.read(**index) for index in series.indices())
    return OutputImage(series, series.dtype, planes)


def ome_pixels(body: str, attributes: str = "", **sizes: int) -> str:
    """Pixels element of 9 x 8 pixels with other sizes 1 unless given."""
    lengths = {"Z": 1, "C": 1, "T": 1, **sizes}
    text = " ".join(f'Size{axis}="{length}"' for axis, length in lengths.items())
    return (
        '<Pixels ID="P" DimensionOrder="XYZCT" Type="uint16" SizeX="9" SizeY="8" '
        f"{text} {attributes}>{body}</Pixels>"
    )


def ome_xml(images: str, attributes: str = "", before: str = "") -> str:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{OME}" {attributes}>'
        f"{before}{images}</OME>"
    )


def write_pages(path: Path, planes: list[np.ndarray], xml: str | None = None) -> Path:
    """Pages behind one another, the first with OME-XML, as Micro-Manager does."""
    with tifffile.TiffWriter(path) as file:
        for number, plane in enumerate(planes):
            file.write(
                plane,
                photometric="minisblack",
                contiguous=False,
                metadata=None,
                description=xml.encode() if xml and number == 0 else None,
            )
    return path


def write_position_set(folder: Path, positions: int = 3) -> list[Path]:
    """A set of OME-TIFFs, one per position, each with the metadata of all."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"acq_MMStack_Pos{p}.ome.tif" for p in range(positions)]

    def image(p: int) -> str:
        data = "".join(
            f'<TiffData FirstC="{c}" FirstT="{t}" IFD="{2 * t + c}" PlaneCount="1">'
            f'<UUID FileName="{names[p]}">urn:uuid:{p}</UUID></TiffData>'
            for t in range(2)
            for c in range(2)
        )
        channels = '<Channel ID="a" Name="DAPI"/><Channel ID="b" Name="FITC"/>'
        size = 'PhysicalSizeX="0.325" PhysicalSizeY="0.325"'
        pixels = ome_pixels(channels + data, size, C=2, T=2)
        return f'<Image ID="Image:{p}" Name="Pos{p}">{pixels}</Image>'

    images = "".join(image(p) for p in range(positions))
    for p, name in enumerate(names):
        planes = [flat(1000 * (p + 1) + 10 * n) for n in range(4)]
        write_pages(folder / name, planes, ome_xml(images, f'UUID="urn:uuid:{p}"'))
    return [folder / name for name in names]


def write_ndtiff(
    folder: Path,
    axes: list[dict[str, int | str]],
    summary: dict[str, object],
    told: dict[int, dict[str, float]] | None = None,
) -> Path:
    """An NDTiff data set, frame n flat with 1000 + n and `told` of n; version 3.

    https://github.com/micro-manager/NDTiffStorage
    """
    folder.mkdir(parents=True)
    head = json.dumps(summary).encode()
    start = struct.pack("<2sHI", b"II", 42, 8)
    start += struct.pack("<IIIII", 483729, 3, 3, 2355492, len(head)) + head
    pixels, index = bytearray(start), bytearray()
    for number, one in enumerate(axes):
        offset = len(pixels)
        pixels += flat(1000 + number, "<u2").tobytes()
        about = json.dumps({"PixelSizeUm": 0.325, **(told or {}).get(number, {})})
        about = about.encode()
        at = len(pixels)
        pixels += about
        key, name = json.dumps(one).encode(), b"set_NDTiffStack.tif"
        index += struct.pack("<I", len(key)) + key
        index += struct.pack("<I", len(name)) + name
        index += struct.pack("<IiiiiIii", offset, 9, 8, 1, 0, at, len(about), 0)
    (folder / "set_NDTiffStack.tif").write_bytes(pixels)
    (folder / "NDTiff.index").write_bytes(index)
    return folder


def write_mm_stack(
    path: Path, places: list[tuple[int, int, int, int]], summary: dict[str, object]
) -> Path:
    """A Micro-Manager stack, frame n at (c, z, t, p) and flat with 1000 + n.

    https://micro-manager.org/Micro-Manager_File_Formats
    """
    text = json.dumps({"MicroManagerVersion": "2.0", **summary}).encode()
    data = bytearray(40 + len(text))
    offsets = []
    for number, _ in enumerate(places):
        start = len(data)
        offsets.append(start)
        about = json.dumps({"PixelSizeUm": 0.325, "FrameIndex": number}).encode()
        short = {256: 9, 257: 8, 258: 16, 259: 1, 262: 1, 274: 1, 277: 1, 284: 1}
        long = {254: 0, 273: start + 162, 278: 8, 279: 144}
        tags = {tag: (3, 1, value) for tag, value in short.items()}
        tags |= {tag: (4, 1, value) for tag, value in long.items()}
        tags[51123] = (2, len(about), start + 162 + 144)
        data += struct.pack("<H", len(tags))
        for tag, entry in sorted(tags.items()):
            data += struct.pack("<HHII", tag, *entry)
        end = start + 162 + 144 + len(about)
        data += struct.pack("<I", end if number + 1 < len(places) else 0)
        data += flat(1000 + number, "<u2").tobytes() + about
    index_at = len(data)
    data += struct.pack("<II", 3453623, len(places))
    for place, offset in zip(places, offsets, strict=True):
        data += struct.pack("<5I", *place, offset)
    head = struct.pack("<2sHI", b"II", 42, offsets[0])
    head += struct.pack("<6I", 54773648, index_at, 483765892, 0, 99384722, 0)
    head += struct.pack("<II", 2355492, len(text)) + text
    data[: len(head)] = head
    path.write_bytes(data)
    return path


def ngff_axes(names: str, unit: str | None = "micrometer") -> list[dict[str, str]]:
    kinds = {"t": "time", "c": "channel"}
    return [
        {"name": name, "type": kinds.get(name, "space")}
        | ({"unit": unit} if unit and name in "zyx" else {})
        for name in names
    ]


def write_ngff(
    path: Path,
    pixels: np.ndarray,
    axes: list,
    scale: list[float] | None = None,
    *,
    version: str = "0.4",
    whole: list[float] | None = None,
    more: dict[str, object] | None = None,
) -> Path:
    """An OME-Zarr image of one level; `whole` is the scale of all levels."""
    three = version == "0.5"
    group = zarr.open_group(path, mode="w", zarr_format=3 if three else 2)
    group.create_array("0", data=pixels, chunks=pixels.shape)
    level: dict[str, object] = {"path": "0"}
    if scale:
        level["coordinateTransformations"] = [{"type": "scale", "scale": scale}]
    image = {"version": version, "axes": axes, "datasets": [level]}
    if whole:
        image["coordinateTransformations"] = [{"type": "scale", "scale": whole}]
    attributes = {"multiscales": [image], **(more or {})}
    group.attrs.update({"ome": attributes} if three else attributes)
    return path


def means(series) -> list[float]:
    """Mean of every plane in the order of `indices`."""
    return [float(series.read(**index).mean()) for index in series.indices()]


def write_images(output: Path, images: Sequence[OutputImage]) -> list[Path]:
    """Write images to an output that does not exist yet; return the paths written."""
    series = [image.like for image in images]
    guard = OutputGuard(companions(series))
    place = ImageOutput(output, series, guard, common_folder(series))
    broken = place.write(images)
    if broken:
        raise InputError(broken[0].reason)
    return place.written()


def common_folder(series: Sequence[ImageSeries]) -> Path:
    """Return the folder that holds all files of some images."""
    parents = [one.path.absolute().parent for one in series]
    first = parents[0]
    return next(
        folder
        for folder in (first, *first.parents)
        if all(parent.is_relative_to(folder) for parent in parents)
    )


@contextmanager
def files_up_to(size_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a disk that is full; skips on Windows."""
    resource = pytest.importorskip("resource", reason="limits are of POSIX systems")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def specimen(seed: int) -> NDArray[np.float64]:
    """Blurred blocks, 0 to 1."""
    blocks = np.random.default_rng(seed).random((SHAPE[0] // 4, SHAPE[1] // 4))
    return gaussian_filter(np.kron(blocks, np.ones((4, 4))), 1.0 + seed % 3)
