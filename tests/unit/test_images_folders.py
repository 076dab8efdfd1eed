"""Folders as they are found: order, hidden files, broken files, results, links."""

import errno
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_file_kit import as_output, flat, means, ngff_axes, write_images, write_ngff
from PIL import Image

from rtfocus.errors import InputError
from rtfocus.images.reading import find_images, open_images


def fill(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        tifffile.imwrite(folder / name, flat(1000 + number))
    return folder


def test_numbers_sort_as_numbers(tmp_path) -> None:
    names = [f"img_{n}.tif" for n in (10, 2, 1, 11, 3)]
    fill(tmp_path, names)
    fill(tmp_path / "day2", ["a.tif"])
    fill(tmp_path / "day10", ["a.tif"])
    order = [f"img_{n}" for n in (1, 2, 3, 10, 11)]
    series = open_images(tmp_path)
    assert [one.name for one in series[2:]] == order
    assert [one.path.parent.name for one in series[:2]] == ["day2", "day10"]


def test_hidden_files_and_what_systems_leave_are_no_images(tmp_path) -> None:
    fill(tmp_path, ["a.tif"])
    (tmp_path / "._a.tif").write_bytes(b"\0\5\26\7" + bytes(4000))
    (tmp_path / ".a.ome.zarr.part").mkdir()
    for name in (".DS_Store", "Thumbs.db", "metadata.txt", "desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    found = find_images(tmp_path)
    assert [one.name for one in found.series] == ["a"]
    assert found.broken == ()


def test_a_broken_file_does_not_stop_the_others(tmp_path) -> None:
    fill(tmp_path, ["0.tif", "1.tif", "2.tif"])
    (tmp_path / "1.tif").write_bytes((tmp_path / "1.tif").read_bytes()[:300])
    (tmp_path / "3.czi").write_bytes(b"ZISRAWFILE")
    (tmp_path / "4.png").write_bytes(b"no picture")
    found = find_images(tmp_path)
    assert [one.name for one in found.series] == ["0", "2"]
    assert [one.path.name for one in found.broken] == ["1.tif", "3.czi", "4.png"]
    for one in found.broken:
        assert str(one.path) in one.reason
        assert "\n" not in one.reason
    with pytest.raises(InputError, match=r"1\.tif.*\(and 2 more\)"):
        open_images(tmp_path)


def test_what_may_not_be_looked_into_does_not_stop_the_others(
    tmp_path, monkeypatch
) -> None:
    fill(tmp_path, ["0.tif"])
    fill(tmp_path / "shut", ["1.tif"])
    (tmp_path / "2.tif").touch()
    (tmp_path / "3.tif").symlink_to(tmp_path / "nowhere.tif")
    shut = tmp_path / "shut"

    def refusing(real, begins):
        def call(path=".", *args, **options):
            if str(path).startswith(begins):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **options)

        return call

    # Not by its mode: to an administrator nothing is shut.
    monkeypatch.setattr(os, "stat", refusing(os.stat, f"{shut}{os.sep}"))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir, str(shut)))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir, str(shut)))
    found = find_images(tmp_path)
    monkeypatch.undo()
    assert [one.name for one in found.series] == ["0"]
    assert [one.path.name for one in found.broken] == ["2.tif", "3.tif", "shut"]
    assert "is empty, 0 bytes" in found.broken[0].reason
    assert "is a link that leads nowhere" in found.broken[1].reason
    assert "Permission denied" in found.broken[2].reason


def test_results_among_the_images_are_no_inputs(tmp_path) -> None:
    fill(tmp_path, ["0.tif", "1.tif"])
    first = open_images(tmp_path)
    write_images(tmp_path / "restored", [as_output(one) for one in first])
    write_images(tmp_path / "r.ome.zarr", [as_output(first[0])])
    found = find_images(tmp_path)
    assert [one.path.name for one in found.series] == ["0.tif", "1.tif"]
    assert len(found.skipped) == 3
    # Alone they are what somebody wants to look at.
    assert len(open_images(tmp_path / "restored")) == 2
    assert len(open_images(tmp_path / "r.ome.zarr")) == 1


def test_a_run_folder_among_images_is_no_input_and_alone_its_raw_images(
    tmp_path,
) -> None:
    run = tmp_path / "runs/r.rtfocus"
    write_ngff(run / "raw.ome.zarr", flat(5), ngff_axes("yx"), version="0.5")
    write_ngff(run / "restored.ome.zarr", flat(6), ngff_axes("yx"), version="0.5")
    for path in (tmp_path, run):
        (series,) = open_images(path)
        assert means(series) == [5]
    fill(tmp_path, ["0.tif"])
    found = find_images(tmp_path)
    assert [one.name for one in found.series] == ["0"]
    assert found.skipped == (run,)


def test_links_that_lead_back_are_not_followed(tmp_path) -> None:
    fill(tmp_path / "tree/day1", ["a.tif"])
    try:
        os.symlink(tmp_path / "tree", tmp_path / "tree/loop", target_is_directory=True)
    except OSError:
        pytest.skip("this user may not make links")
    assert [one.name for one in open_images(tmp_path / "tree")] == ["a"]


def test_a_link_that_leads_nowhere_is_told_as_one(tmp_path) -> None:
    fill(tmp_path, ["a.tif"])
    try:
        os.symlink(tmp_path / "gone.tif", tmp_path / "b.tif")
        os.symlink(tmp_path / "circle", tmp_path / "circle")
    except OSError:
        pytest.skip("this user may not make links")
    for path in (tmp_path / "b.tif", tmp_path / "circle"):
        with pytest.raises(InputError, match="is a link that leads nowhere; give the"):
            open_images(path)
    (broken,) = find_images(tmp_path).broken
    assert broken.path.name == "b.tif"
    assert "leads nowhere" in broken.reason


def test_names_keep_their_dots_and_equal_names_stay_apart(tmp_path) -> None:
    fill(tmp_path, ["w.A1.ome.tif", "w.A2.tif"])
    for number, ending in enumerate(("png", "bmp")):
        Image.fromarray(flat(number, "u1")).save(tmp_path / f"cell.{ending}")
    series = open_images(tmp_path)
    assert [one.name for one in series] == ["cell", "cell", "w.A1", "w.A2"]
    assert len({one.path for one in series}) == 4


def test_images_in_folders_without_endings_are_found(tmp_path) -> None:
    fill(tmp_path / "a/b/c", ["x.tif"])
    (tmp_path / "empty").mkdir()
    assert len(open_images(tmp_path)) == 1
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(InputError, match="holds no image"):
        open_images(tmp_path)


def png_of_16_bits(path: Path, pixels: np.ndarray) -> None:
    """Pillow cannot write one with colours."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    height, width = pixels.shape[:2]
    samples = pixels.shape[2] if pixels.ndim == 3 else 1
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[samples]
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_png_of_16_bits_keeps_them(tmp_path, samples) -> None:
    pixels = np.dstack([flat(v) for v in (1000, 20000, 60000, 65535)[:samples]])
    png_of_16_bits(tmp_path / "a.png", pixels)
    (series,) = open_images(tmp_path / "a.png")
    right = pixels[..., :3] if samples > 2 else pixels[..., 0]
    assert series.dtype == np.uint16
    np.testing.assert_array_equal(series.read(), right)
    assert any("alpha" in note for note in series.notes) == (samples in (2, 4))


@pytest.mark.parametrize(
    ("mode", "value", "right", "note"),
    [
        ("1", 1, 255, None),
        ("L", 7, 7, None),
        ("LA", (7, 90), 7, "alpha"),
        ("RGB", (1, 2, 3), [1, 2, 3], None),
        ("RGBA", (1, 2, 3, 90), [1, 2, 3], "alpha"),
    ],
)
def test_pictures_of_8_bits(tmp_path, mode, value, right, note) -> None:
    Image.new(mode, (9, 8), value).save(tmp_path / "a.png")
    (series,) = open_images(tmp_path / "a.png")
    assert series.dtype == np.uint8
    assert np.all(series.read() == right)
    assert bool(series.notes) == bool(note)
