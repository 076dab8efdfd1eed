"""Images: what is written is read back, whatever the format and the axes."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from image_file_kit import as_output, write_images
from PIL import Image

from rtfocus.errors import InputError, OutputError
from rtfocus.images.reading import open_images, stretch_histogram
from rtfocus.images.series import ImageSeries, checked_image, loss_of, stem_of


def numbered(sizes: dict[str, int], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Array (t, c, z, *shape) whose planes carry their index in their pixels."""
    full = (sizes["t"], sizes["c"], sizes["z"], *shape)
    planes = np.arange(sizes["t"] * sizes["c"] * sizes["z"]).reshape(full[:3])
    rows = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    grown = planes.reshape(*full[:3], *[1] * len(shape)) * 8 + rows
    return np.broadcast_to(grown, full).astype(dtype)


def as_series(pixels: np.ndarray, name: str = "image") -> ImageSeries:
    t, c, z = pixels.shape[:3]
    return ImageSeries(
        name=name,
        path=Path(name),
        sizes={"t": t, "c": c, "z": z},
        shape=pixels.shape[3:],
        dtype=pixels.dtype,
        read_plane=lambda t, c, z: pixels[t, c, z],
        pixel_size_y_um=0.65,
        pixel_size_x_um=0.65,
        z_step_um=2.0,
    )


@pytest.mark.parametrize("ending", [".tif", ".ome.tiff", ".ome.zarr"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_plane_comes_back_at_its_index(
    tmp_path: Path, ending: str, dtype: str
) -> None:
    pixels = numbered({"t": 2, "c": 3, "z": 4}, (7, 9), dtype)
    write_images(tmp_path / f"out{ending}", [as_output(as_series(pixels))])
    (back,) = open_images(tmp_path / f"out{ending}")
    assert back.sizes == {"t": 2, "c": 3, "z": 4}
    assert back.pixel_size_um == pytest.approx(0.65)
    assert back.z_step_um == pytest.approx(2.0)
    for index in back.indices():
        t, c, z = index.values()
        np.testing.assert_array_equal(back.read(**index), pixels[t, c, z])


def test_rgb_stays_rgb_in_tiff_and_becomes_channels_in_zarr(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 1, 1, 6, 5, 3), np.uint8)
    write_images(tmp_path / "out.tif", [as_output(as_series(pixels))])
    (tiff,) = open_images(tmp_path / "out.tif")
    assert tiff.shape == (6, 5, 3)
    np.testing.assert_array_equal(tiff.read(t=1), pixels[1, 0, 0])
    write_images(tmp_path / "out.zarr", [as_output(as_series(pixels))])
    array = zarr.open_group(tmp_path / "out.zarr", mode="r")["0"]
    np.testing.assert_array_equal(array[1, 2, 0], pixels[1, 0, 0, ..., 2])


@pytest.mark.parametrize("ending", [".tif", ".zarr"])
def test_several_images_become_several_series(tmp_path: Path, ending: str) -> None:
    one = numbered({"t": 1, "c": 1, "z": 1}, (4, 4), "uint16")
    two = numbered({"t": 3, "c": 1, "z": 1}, (5, 8), "uint16")
    images = [as_output(as_series(one, "a")), as_output(as_series(two, "b"))]
    write_images(tmp_path / f"out{ending}", images)
    back = open_images(tmp_path / f"out{ending}")
    assert [series.shape for series in back] == [(4, 4), (5, 8)]
    np.testing.assert_array_equal(back[1].read(t=2), two[2, 0, 0])


def test_a_folder_is_read_in_name_order_and_written_as_one_file_each(
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    for name, value in (("b", 2), ("a", 1)):
        tifffile.imwrite(tmp_path / f"in/{name}.tif", np.full((4, 4), value, np.uint8))
    found = open_images(tmp_path / "in")
    assert [series.name for series in found] == ["a", "b"]
    paths = write_images(tmp_path / "out", [as_output(series) for series in found])
    assert [path.name for path in paths] == ["a.tif", "b.tif"]
    assert int(tifffile.imread(paths[1])[0, 0]) == 2


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((17, 8, 8), {"t": 17, "c": 1, "z": 1}),
        ((45, 2, 8, 9), {"t": 45, "c": 2, "z": 1}),
    ],
)
def test_unnamed_tiff_axes_are_time_and_a_short_inner_one_is_channel(
    tmp_path: Path, shape: tuple[int, ...], sizes: dict[str, int]
) -> None:
    pixels = np.random.default_rng(1).integers(0, 9, shape, np.uint16)
    tifffile.imwrite(tmp_path / "s.tif", pixels, photometric="minisblack", metadata={})
    (series,) = open_images(tmp_path / "s.tif")
    assert series.sizes == sizes
    last = pixels[-1] if pixels.ndim == 3 else pixels[-1, 1]
    np.testing.assert_array_equal(series.read(t=sizes["t"] - 1, c=sizes["c"] - 1), last)


def test_a_picture_file_of_several_is_not_read_in_part(tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.full((6, 8), n, np.uint8)) for n in (7, 8, 9)]
    first, *more = pictures
    first.save(tmp_path / "moving.png", save_all=True, append_images=more)
    with pytest.raises(InputError, match=r"holds 3 pictures, one can be read; save"):
        open_images(tmp_path / "moving.png")
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=more)
    (series,) = open_images(tmp_path / "phone.jpg")
    assert series.notes == ("2 more pictures in the file are left out",)


def test_png_of_8_and_16_bit_and_alpha(tmp_path: Path) -> None:
    deep = (np.arange(48).reshape(6, 8) * 1000).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(np.full((6, 8, 4), 7, np.uint8)).save(tmp_path / "alpha.png")
    alpha, deep_back = open_images(tmp_path)
    assert alpha.shape == (6, 8, 3)
    assert deep_back.dtype == np.uint16
    np.testing.assert_array_equal(deep_back.read(), deep)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent.tif", "does not exist"),
        (lambda p: (p / "x.doc").write_text("x") and p / "x.doc", "no reader for"),
        (lambda p: (p / "a.nd2").write_text("x") and p / "a.nd2", "export it as OME"),
        (lambda p: (p / "x.tif").write_text("x") and p / "x.tif", "read as TIFF"),
        (lambda p: (p / "x.png").write_text("x") and p / "x.png", "as a picture"),
        (lambda p: p, "holds no image"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_images(make(tmp_path))


def test_a_truncated_tiff_names_the_plane(tmp_path: Path) -> None:
    path = tmp_path / "cut.tif"
    noise = np.random.default_rng(2).integers(0, 255, (64, 64), np.uint8)
    tifffile.imwrite(path, noise)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cut\.tif"):
        open_images(path)[0].read()


def test_an_unknown_ending_of_the_output_is_refused(tmp_path: Path) -> None:
    pixels = numbered({"t": 1, "c": 1, "z": 1}, (4, 4), "uint8")
    with pytest.raises(OutputError, match=r"use \.tif"):
        write_images(tmp_path / "out.xyz", [as_output(as_series(pixels))])


def test_stretching_is_linear_from_0_to_255():
    image = np.array([[-5.0, 0.0], [5.0, 45.0]])
    assert stretch_histogram(image).tolist() == [[0, 26], [51, 255]]
    assert stretch_histogram(np.full((3, 3), 7)).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize(
    ("values", "dtype", "said"),
    [
        ([-(2**24), 2**24], "int32", None),
        ([0, 2**24 + 1], "int32", "from 0 to 16777217; beyond"),
        ([-(2**24) - 1, 0], "int32", "from -16777217 to 0; beyond"),
        ([0, 2**25], "uint32", None),  # even numbers that large float32 holds
        ([0, 2**53 + 1], "int64", "from 0 to 9007199254740993; beyond"),
        ([0, 2**15 - 1], "int16", None),
        ([False, True], "bool", None),
        ([0.0, -1e300], "float64", "up to 1e\\+300, beyond the range"),
        ([0.0, 1e-300], "float64", "up to 1e-300, beyond the range"),
        ([0.0, 1e-9], "float64", None),
        ([0.0, float(np.finfo(np.float32).tiny)], "float64", None),
        ([0.0, 1e-40], "float64", "up to 1e-40, beyond the range"),
        ([0.0, 1e-40], "float32", None),  # what it was saved as holds it
        ([0.0, 0.0], "float64", None),
        ([np.nan, np.inf], "float64", None),
        ([1.0, 2.0], "complex64", "is complex"),
        ([1, 2], "O", "of type object, which is no number"),
    ],
)
def test_what_float32_cannot_hold_is_no_image(values, dtype, said) -> None:
    told = loss_of(np.array([values], dtype))
    assert told is None if said is None else re.search(said, told or "")


def test_names_hold_nothing_that_a_result_could_not() -> None:
    plain = as_series(numbered({"t": 1, "c": 1, "z": 1}, (4, 4), "uint8"))
    odd = replace(plain, name="a\0b", position="\x1bleft")
    assert (odd.name, odd.position) == ("a\ufffdb", "\ufffdleft")
    assert plain.position is None


@pytest.mark.parametrize(
    ("file", "stem"),
    [
        ("a.OME.tif", "a"),
        ("b.ome.zarr", "b"),
        (".ome.tif", ".ome"),
        ("home.tif", "home"),
    ],
)
def test_a_name_without_the_ending_of_its_format(file, stem) -> None:
    assert stem_of(Path(file)) == stem


def test_pixels_are_square_where_one_side_is_stated_or_both_agree() -> None:
    plain = as_series(numbered({"t": 1, "c": 1, "z": 1}, (4, 4), "uint8"))
    for y_um, x_um, size_um in (
        (0.3, None, 0.3),
        (None, 0.3, 0.3),
        (None, None, None),
        (0.3, 0.3, 0.3),
    ):
        one = replace(plain, pixel_size_y_um=y_um, pixel_size_x_um=x_um)
        assert one.pixel_size_um == size_um


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((4, 5), ">u2"), None),
        (np.zeros((4, 5, 3), np.uint8), None),
        (np.array([[np.nan, np.inf, 1.0]]), None),
        (np.array([[-1e15]], np.float32), None),
        (np.zeros((4, 5, 4), np.uint8), "this array is \\(4, 5, 4\\); give the planes"),
        (np.zeros((2, 3, 4, 3), np.uint8), "give the planes of a stack one by one"),
        (np.zeros(5, np.uint8), "this array is \\(5,\\)$"),
        (np.zeros((0, 5), np.uint8), "no pixels"),
        (np.array([[1.1e15]], np.float32), "up to 1.1e\\+15; .* can be computed with"),
    ],
)
def test_what_can_be_restored_is_told_from_what_cannot(given, said) -> None:
    for of_stack in (False, True):
        if said is None:
            image = checked_image(given, of_stack=of_stack)
            np.testing.assert_array_equal(image, given)
            assert image.dtype.isnative
            assert image.flags.c_contiguous
        else:
            with pytest.raises(InputError, match=said):
                checked_image(given, of_stack=of_stack)


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "shows nothing"), (1e-16, "up to 1e-16; 1e-15 to")]
)
def test_one_plane_of_a_stack_may_show_nothing_but_no_image(value, said) -> None:
    plane = np.full((4, 5), value, np.float32)
    np.testing.assert_array_equal(checked_image(plane, of_stack=True), plane)
    with pytest.raises(InputError, match=said):
        checked_image(plane, of_stack=False)
