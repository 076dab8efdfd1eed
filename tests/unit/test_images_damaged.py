"""Damaged files: each is read or refused in one line; nothing else is raised.

About 200 mutations of each format with fixed seeds: cut off, bytes flipped, blocks
of zeros, blocks repeated. Nothing beside the file may change.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_file_kit import (
    flat,
    ngff_axes,
    ome_pixels,
    ome_xml,
    write_mm_stack,
    write_ndtiff,
    write_ngff,
    write_pages,
)
from PIL import Image

from rtfocus.errors import InputError
from rtfocus.images.reading import find_images

MUTATIONS = 200
NOISE = np.random.default_rng(0).integers(0, 4000, (4, 8, 9), "u2")


def plain_tiff(folder: Path) -> None:
    options = {"compression": "zlib", "photometric": "minisblack"}
    tifffile.imwrite(folder / "a.tif", NOISE, resolution=(9, 9), **options)


def imagej_tiff(folder: Path) -> None:
    metadata = {"axes": "ZYX", "unit": "um", "spacing": 2.0, "Ranges": (0.0, 9.0)}
    tifffile.imwrite(folder / "a.tif", NOISE, imagej=True, metadata=metadata)


def ome_tiff(folder: Path) -> None:
    data = "".join(
        f'<TiffData FirstT="{t}" IFD="{t}" PlaneCount="1"/>' for t in range(4)
    )
    channel = '<Channel ID="c" Name="GFP" Color="255" EmissionWavelength="509"/>'
    size = 'PhysicalSizeX="0.3" PhysicalSizeXUnit="nm" PhysicalSizeZ="1"'
    image = f'<Image ID="i" Name="m">{ome_pixels(channel + data, size, T=2)}</Image>'
    write_pages(folder / "a.ome.tif", list(NOISE[:2]), ome_xml(image))


def png(folder: Path) -> None:
    Image.fromarray(NOISE[0].astype("u1")).save(folder / "a.png")


def png_16(folder: Path) -> None:
    Image.fromarray(NOISE[0]).save(folder / "a.png")


def jpeg(folder: Path) -> None:
    Image.fromarray(NOISE[0].astype("u1")).save(folder / "a.jpg")


def zarr_2(folder: Path) -> None:
    omero = {"channels": [{"label": "GFP", "window": {"start": 0, "end": 9}}] * 4}
    scale = [1, 0.3, 0.3]
    pixels, axes = NOISE, ngff_axes("cyx")
    write_ngff(folder / "a.zarr", pixels, axes, scale, more={"omero": omero})


def zarr_3(folder: Path) -> None:
    write_ngff(folder / "a.zarr", NOISE, ngff_axes("tyx"), [1, 1, 1], version="0.5")


def ndtiff(folder: Path) -> None:
    axes = [{"position": p, "channel": c} for p in range(2) for c in ("a", "b")]
    write_ndtiff(folder / "set", axes, {"PixelSize_um": 0.3, "ChNames": ["a", "b"]})


def mm_stack(folder: Path) -> None:
    places = [(c, 0, t, p) for p in range(2) for t in range(2) for c in range(2)]
    sizes = {"Frames": 2, "Slices": 1, "Channels": 2, "Positions": 2}
    write_mm_stack(folder / "a_MMStack.tif", places, {**sizes, "ChNames": ["a", "b"]})


def frames(folder: Path) -> None:
    for t in range(2):
        name = f"img_channel000_position000_time{t:09d}_z000.tif"
        tifffile.imwrite(folder / name, flat(t))
    (folder / "metadata.txt").write_text('{"Summary": {"ChNames": ["a"]}}')


MAKERS = [
    plain_tiff,
    imagej_tiff,
    ome_tiff,
    png,
    png_16,
    jpeg,
    zarr_2,
    zarr_3,
    ndtiff,
    mm_stack,
    frames,
]


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the bytes of a file with one kind of damage."""
    changed = bytearray(data)
    if not changed:
        return b"x"
    kind = rng.integers(5)
    start = int(rng.integers(len(changed)))
    end = min(len(changed), start + int(rng.integers(1, 64)))
    if kind == 0:
        return bytes(changed[:start])
    if kind == 1:
        changed[start:end] = bytes(end - start)
    elif kind == 2:
        changed[start:end] = changed[: end - start]
    else:
        # Most of what decides lies at the beginning.
        reach = len(changed) if kind == 3 else min(len(changed), 300)
        for place in rng.integers(reach, size=int(rng.integers(1, 5))):
            changed[place] = int(rng.integers(256))
    return bytes(changed)


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in files_of(folder)}


@pytest.mark.filterwarnings("default")  # of decoders, on what they repair
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_damaged_files_are_read_or_refused_in_one_line(
    tmp_path, make: Callable[[Path], None]
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    make(whole)
    assert find_images(whole).series
    originals = list(files_of(whole))
    refused = 0
    for seed in range(MUTATIONS):
        rng = np.random.default_rng(seed)
        victim = originals[int(rng.integers(len(originals)))]
        kept = victim.read_bytes()
        victim.write_bytes(damage(kept, rng))
        before = state(whole)
        refused += is_refused(whole)
        assert state(whole) == before, f"seed {seed} changed files"
        victim.write_bytes(kept)
    assert 0 < refused < MUTATIONS
    shutil.rmtree(whole)  # nothing holds the files


def is_refused(folder: Path) -> bool:
    """Read all there is; whatever is raised but InputError fails the test."""
    try:
        found = find_images(folder)
        for series in found.series:
            for index, _ in zip(series.indices(), range(8), strict=False):
                plane = series.read(**index)
                assert plane.shape == series.shape
                assert plane.dtype == series.dtype
    except InputError as error:
        said = [str(error)]
    else:
        said = [one.reason for one in found.broken]
    assert not any("\n" in line for line in said)
    return bool(said)


def test_links_in_a_circle_are_told(tmp_path: Path) -> None:
    link = tmp_path / "a.tif"
    try:
        link.symlink_to(tmp_path / "a.tif")
    except OSError:
        pytest.skip("no rights to make links")
    with pytest.raises(InputError, match=r"a\.tif"):
        find_images(link)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif' is a pipe or a device"):
        find_images(tmp_path / "a.tif")


def pages_of_pillow(path: Path) -> None:
    first, *others = (Image.fromarray(plane) for plane in NOISE)
    first.save(path, save_all=True, append_images=others)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(pages_of_pillow, id="pillow"),
        *(
            pytest.param(
                lambda path, o=options: tifffile.imwrite(
                    path, NOISE, photometric="minisblack", **o
                )
            )
            for options in (
                {"metadata": None},
                {"imagej": True},
                {"ome": True, "metadata": {"axes": "ZYX"}},
                {"ome": True, "bigtiff": True, "compression": "zlib"},
            )
        ),
    ],
)
def test_a_stack_that_was_cut_off_is_never_a_shorter_one(write, tmp_path) -> None:
    # Half of a copy: tifffile reads the planes before a page that is not there.
    path = tmp_path / "a.tif"
    write(path)
    whole = path.read_bytes()
    (series,) = find_images(path).series
    assert len(series) == 4
    for end in range(16, len(whole)):
        path.write_bytes(whole[:end])
        with suppress(InputError):
            (series,) = find_images(path).series
            assert len(series) == 4
            assert series.read(**list(series.indices())[-1]).any()


def test_an_image_without_pixels_is_refused(tmp_path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", NOISE[0], metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages.first.tags["ImageLength"].overwrite(0)
    with pytest.raises(InputError, match=r"has an image of \(0, 9\): no pixels"):
        find_images(tmp_path / "a.tif")
