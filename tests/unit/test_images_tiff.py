"""TIFF files as other programs write them: every plane at its index, nothing bent."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import psutil
import pytest
import tifffile
from image_file_kit import (
    flat,
    means,
    ome_pixels,
    ome_xml,
    write_pages,
    write_position_set,
)
from PIL import Image

from rtfocus.errors import InputError
from rtfocus.images.reading import find_images, open_images
from rtfocus.images.tiff_file import MAX_OPEN_FILES

T, C, Z = 2, 3, 4
WHOLE = np.zeros((T, C, Z, 8, 9), "u2")
for _index in np.ndindex(T, C, Z):
    WHOLE[_index] = 1000 + 1000 * _index[0] + 100 * _index[1] + 10 * _index[2]
RIGHT = WHOLE.mean(axis=(-1, -2)).ravel().tolist()


def in_order(axes: str) -> np.ndarray:
    return np.ascontiguousarray(WHOLE.transpose(["TCZYX".index(a) for a in axes]))


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        ("TCZYX", {"ome": True}),
        ("ZTCYX", {"ome": True}),
        ("CZTYX", {"ome": True, "compression": "zlib"}),
        ("TZCYX", {"imagej": True}),
        ("TZCYX", {"imagej": True, "byteorder": ">"}),
        ("TCZYX", {"ome": True, "bigtiff": True, "compression": "lzw"}),
        ("TCZYX", {"ome": True, "tile": (16, 16), "compression": "zstd"}),
        ("ZCTYX", {"compression": "zlib", "predictor": True}),
        ("CYXTZ", {}),
    ],
)
def test_every_plane_is_at_its_index(tmp_path, axes, options) -> None:
    path = tmp_path / "a.tif"
    metadata = {"axes": axes}
    photometric = None if options.get("imagej") else "minisblack"
    tifffile.imwrite(
        path, in_order(axes), metadata=metadata, photometric=photometric, **options
    )
    (series,) = open_images(path)
    assert series.sizes == {"t": T, "c": C, "z": Z}
    assert means(series) == RIGHT


def test_a_pyramid_is_read_at_full_resolution(tmp_path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        file.write(
            WHOLE, subifds=1, metadata={"axes": "TCZYX"}, photometric="minisblack"
        )
        file.write(WHOLE[..., ::2, ::2], subfiletype=1, photometric="minisblack")
    (series,) = open_images(tmp_path / "a.ome.tif")
    assert series.shape == (8, 9)
    assert means(series) == RIGHT


@pytest.mark.parametrize(
    ("axes", "names"),
    [("PTCZYX", ["p0", "p1"]), ("TMCZYX", ["m0", "m1"]), ("TCZRYX", ["r0", "r1"])],
)
def test_axes_beyond_t_c_z_are_images_of_their_own(tmp_path, axes, names) -> None:
    other = next(axis for axis in axes if axis not in "TCZYX")
    both = np.stack([WHOLE, WHOLE + 5000], axis=axes.index(other))
    tifffile.imwrite(
        tmp_path / "a.tif", both, metadata={"axes": axes}, photometric="minisblack"
    )
    series = open_images(tmp_path / "a.tif")
    assert [one.name for one in series] == [f"a_{name}" for name in names]
    assert means(series[0]) == RIGHT
    assert means(series[1]) == [value + 5000 for value in RIGHT]


def test_unnamed_axes_are_told(tmp_path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", flat(1, shape=(5, 8, 9)), metadata=None)
    (series,) = open_images(tmp_path / "a.tif")
    assert series.sizes["t"] == 5
    assert any("axis of 5 planes" in note for note in series.notes)
    assert any("read as t" in note for note in series.notes)


def test_gaps_of_an_ome_tiff_are_told_and_other_planes_stay_in_place(tmp_path) -> None:
    places = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    data = "".join(
        f'<TiffData FirstT="{t}" FirstC="{c}" IFD="{n}" PlaneCount="1"/>'
        for n, (t, c) in enumerate(places)
    )
    image = f'<Image ID="i" Name="m">{ome_pixels(data, T=3, C=2)}</Image>'
    planes = [flat(1000 + 100 * t + 10 * c) for t, c in places]
    path = write_pages(tmp_path / "a.ome.tif", planes, ome_xml(image))
    (series,) = open_images(path)
    assert means(series) == [1000, 1010, 1100, 0, 1200, 1210]
    assert any("1 of 6 planes" in note for note in series.notes)


@pytest.mark.parametrize("samples", [2, 3, 4, 5])
@pytest.mark.parametrize("form", ["plain", "ome", "stack"])
def test_channels_as_samples_are_all_kept(tmp_path, samples, form) -> None:
    values = [100.0 * (n + 1) for n in range(samples)]
    pixels = np.dstack([flat(value) for value in values])
    if form == "stack":
        pixels = np.stack([pixels, pixels])
        values = [value for value in values for _ in range(2)]
    metadata = {"plain": None, "ome": {"axes": "YXS"}, "stack": {"axes": "ZYXS"}}[form]
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels,
        photometric="minisblack",
        planarconfig="contig",
        ome=form == "ome",
        metadata=metadata,
    )
    (series,) = open_images(tmp_path / "a.tif")
    assert series.sizes["c"] == samples
    assert means(series) == values


RGB = np.dstack([flat(value, "u1") for value in (50, 100, 150)])


@pytest.mark.parametrize(
    ("pixels", "options", "note"),
    [
        (RGB, {}, None),
        (RGB.transpose(2, 0, 1), {"planarconfig": "separate"}, None),
        (np.dstack([RGB, flat(9, "u1")]), {"extrasamples": ["unassalpha"]}, "alpha"),
    ],
)
def test_rgb_stays_rgb_and_alpha_is_told(tmp_path, pixels, options, note) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **options)
    (series,) = open_images(tmp_path / "a.tif")
    np.testing.assert_array_equal(series.read(), RGB)
    assert bool(note) == any("alpha" in text for text in series.notes)


def test_rgb_with_a_fourth_sample_that_is_no_alpha_keeps_it(tmp_path) -> None:
    pixels = np.dstack([RGB, flat(200, "u1")])
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"]
    )
    (series,) = open_images(tmp_path / "a.tif")
    assert means(series) == [50, 100, 150, 200]


def test_a_stack_of_four_that_was_taken_for_colours_loses_no_image(tmp_path) -> None:
    stack = np.stack([flat(value) for value in (50, 100, 150, 200)])
    tifffile.imwrite(
        tmp_path / "a.tif", stack, photometric="rgb", planarconfig="separate"
    )
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == 1
        assert file.pages.first.extrasamples  # an alpha channel, it says
    (series,) = open_images(tmp_path / "a.tif")
    assert means(series) == [50, 100, 150, 200]


def test_signed_values_are_kept(tmp_path) -> None:
    signed = np.arange(-36, 36, dtype="i2").reshape(8, 9)
    for dtype in ("i1", "i2", "i4", "i8", "f2", "f4", "f8"):
        tifffile.imwrite(tmp_path / "a.tif", signed.astype(dtype))
        (series,) = open_images(tmp_path / "a.tif")
        assert series.dtype == np.float32
        np.testing.assert_array_equal(series.read(), signed)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((8, 9), 1e40), r"1e\+40, beyond the range of float32"),
        (np.full((8, 9), 1e-44), "beyond the range of float32"),
        (np.full((8, 9), 2**24 + 1, "i4"), "16777217; beyond"),
        (np.full((8, 9), -(2**24) - 1, "i4"), "whole numbers from -16777217"),
        (np.full((8, 9), 2**32 - 1, "u4"), "4294967295"),
        (np.full((8, 9), 2**62 + 1, "u8"), "whole numbers"),
        (np.full((8, 9), 1 + 2j, "c8"), "complex"),
    ],
)
def test_what_float32_cannot_hold_is_refused(tmp_path, pixels, message) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    with pytest.raises(InputError, match=message):
        open_images(tmp_path / "a.tif")[0].read()


def test_exact_large_numbers_nan_and_infinity_are_kept(tmp_path) -> None:
    for pixels in (
        np.full((8, 9), 2**30, "u4"),
        np.array([[np.nan, np.inf, -np.inf, 1.5]]),
    ):
        tifffile.imwrite(tmp_path / "a.tif", pixels)
        np.testing.assert_array_equal(open_images(tmp_path / "a.tif")[0].read(), pixels)


def test_a_set_of_files_is_read_once(tmp_path) -> None:
    files = write_position_set(tmp_path / "acq")
    series = open_images(tmp_path / "acq")
    assert [one.name for one in series] == [f"acq_MMStack_Pos{p}" for p in range(3)]
    assert [means(one) for one in series] == [
        [1000.0 * p + 10 * n for n in range(4)] for p in (1, 2, 3)
    ]
    for one, path in zip(series, files, strict=True):
        assert one.path == path
        assert set(one.files) == set(files)
        assert one.channel_names == ("DAPI", "FITC")
        assert one.pixel_size_um == 0.325
    assert len(open_images(files[1])) == 3


def test_a_missing_file_of_a_set_is_named_and_whole_images_are_read(tmp_path) -> None:
    files = write_position_set(tmp_path / "acq")
    files[1].unlink()
    with pytest.raises(InputError, match=r"lacks 'acq_MMStack_Pos1\.ome\.tif'"):
        open_images(files[0])
    tifffile.imwrite(tmp_path / "acq/other.tif", flat(7))
    found = find_images(tmp_path / "acq")
    names = ["acq_MMStack_Pos0", "acq_MMStack_Pos2", "other"]
    assert [one.name for one in found.series] == names
    assert means(found.series[1]) == [3000, 3010, 3020, 3030]
    (broken,) = found.broken
    assert broken.path == files[0]
    assert "Pos1" in broken.reason
    assert [one.name for one in find_images(files[2]).series] == names[:2]


def test_a_renamed_ome_tiff_is_no_missing_file(tmp_path) -> None:
    write_position_set(tmp_path, positions=1)[0].rename(tmp_path / "mine.tif")
    (series,) = open_images(tmp_path)
    assert means(series) == [1000, 1010, 1020, 1030]


def test_pixels_with_the_metadata_in_a_companion_file(tmp_path) -> None:
    named = '<UUID FileName="pix.ome.tif">urn:uuid:1</UUID>'
    data = f'<TiffData IFD="0" PlaneCount="2">{named}</TiffData>'
    size = 'PhysicalSizeX="0.5" PhysicalSizeY="0.5"'
    image = f'<Image ID="i" Name="m">{ome_pixels(data, size, Z=2)}</Image>'
    (tmp_path / "set.companion.ome").write_text(ome_xml(image), "utf-8")
    refers = '<BinaryOnly MetadataFile="set.companion.ome" UUID="urn:uuid:2"/>'
    planes = [flat(1), flat(2)]
    path = write_pages(
        tmp_path / "pix.ome.tif", planes, ome_xml(refers, 'UUID="urn:uuid:1"')
    )
    (series,) = open_images(path)
    assert series.sizes == {"t": 1, "c": 1, "z": 2}
    assert means(series) == [1, 2]
    assert series.pixel_size_um == 0.5
    assert tmp_path / "set.companion.ome" in series.files
    (tmp_path / "set.companion.ome").unlink()
    with pytest.raises(InputError, match=r"set\.companion\.ome"):
        open_images(path)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_cut_off_file_is_refused_before_any_work(tmp_path, compression) -> None:
    noise = np.random.default_rng(1).integers(0, 4000, (3, 64, 64), "u2")
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        # The pages come first, so that only pixels are lost.
        file.write(noise[0], compression=compression, metadata=None)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cut off"):
        open_images(path)


@pytest.mark.parametrize("sides", [(64, 47), (47, 64)])
def test_a_file_cut_off_in_the_last_of_its_images_is_refused(tmp_path, sides) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for side in sides:
            file.write(np.ones((side, side), "u2"), metadata=None)
    assert len(open_images(path)) == 2
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut off"):
        open_images(path)


@pytest.mark.parametrize("folder", ["", "D:\\data\\", "data/"])
def test_a_missing_file_is_named_without_the_folder_it_once_lay_in(
    tmp_path, folder
) -> None:
    data = "".join(
        f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1">'
        f'<UUID FileName="{folder}{name}.ome.tif">urn:uuid:{c}</UUID></TiffData>'
        for c, name in enumerate("ab")
    )
    image = f'<Image ID="i" Name="m">{ome_pixels(data, C=2)}</Image>'
    xml = ome_xml(image, 'UUID="urn:uuid:0"')
    path = write_pages(tmp_path / "a.ome.tif", [flat(1)], xml)
    with pytest.raises(InputError, match=r"lacks 'b\.ome\.tif'"):
        open_images(path)


def test_many_files_are_read_in_turn_without_many_handles(tmp_path) -> None:
    count = MAX_OPEN_FILES + 6
    for number in range(count):
        tifffile.imwrite(
            tmp_path / f"{number}.tif",
            np.stack([flat(number), flat(number + 1000)]),
            photometric="minisblack",
        )
    series = open_images(tmp_path)
    for t in (0, 1):
        found = [int(one.read(t=t)[0, 0]) for one in series]
        assert found == [number + 1000 * t for number in range(count)]


def test_ome_xml_with_absurd_sizes_is_refused(tmp_path) -> None:
    for pixels in (
        ome_pixels("", T=2**31),
        ome_pixels(f'<TiffData IFD="0" PlaneCount="{2**40}"/>'),
    ):
        image = f'<Image ID="i" Name="m">{pixels}</Image>'
        write_pages(tmp_path / "a.ome.tif", [flat(1)], ome_xml(image))
        with pytest.raises(InputError, match="OME-XML: an image of"):
            open_images(tmp_path / "a.ome.tif")


def test_planes_are_read_right_from_several_threads(tmp_path) -> None:
    planes = np.arange(200, dtype="u2")[:, None, None] + np.zeros((8, 9), "u2")
    tifffile.imwrite(
        tmp_path / "a.tif", planes, photometric="minisblack", compression="zlib"
    )
    (series,) = open_images(tmp_path / "a.tif")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda t: int(series.read(t=t)[0, 0]), range(200)))
    assert found == list(range(200))


def test_reading_parses_a_file_once(tmp_path, monkeypatch) -> None:
    """Parsing it for every plane took a time that grew with the square."""
    tifffile.imwrite(
        tmp_path / "a.tif",
        WHOLE,
        ome=True,
        compression="zlib",
        metadata={"axes": "TCZYX"},
    )
    opened = []
    original = tifffile.TiffFile.__init__

    def counting(self, file, *args, **options):
        opened.append(file)
        original(self, file, *args, **options)

    monkeypatch.setattr(tifffile.TiffFile, "__init__", counting)
    (series,) = open_images(tmp_path / "a.tif")
    assert means(series) == RIGHT
    assert len(opened) == 1


def test_files_are_closed_with_their_images(tmp_path) -> None:
    metadata = {"axes": "TCZYX"}
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, WHOLE, photometric="minisblack", metadata=metadata)
    series = open_images(tmp_path)
    assert means(series[0]) == RIGHT

    def opened() -> list[str]:
        files = psutil.Process().open_files()
        return [one.path for one in files if one.path.startswith(str(tmp_path))]

    assert opened() == [str(path)]
    del series
    assert opened() == []


def test_what_needs_imagecodecs_names_the_extra(tmp_path, monkeypatch) -> None:
    """Without it tifffile unpacks deflate, and nothing of LZW; Pillow no deep RGB."""
    pixels = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16)
    tifffile.imwrite(tmp_path / "lzw.tif", pixels, compression="lzw")
    tifffile.imwrite(tmp_path / "zip.tif", pixels, compression="zlib", predictor=True)
    colours = np.stack([pixels] * 3, axis=-1)
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(colours))
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(open_images(tmp_path / "deep.png")[0].read(), colours)

    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    plain = tifffile.tifffile.CompressionCodec(encode=False)
    fallback = importlib.import_module("tifffile._imagecodecs")
    monkeypatch.setattr(tifffile.tifffile, "imagecodecs", fallback)
    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", plain)
    monkeypatch.setattr(
        tifffile.TIFF, "UNPREDICTORS", tifffile.tifffile.PredictorCodec(encode=False)
    )
    for name, why in (("lzw.tif", "compressed by LZW"), ("deep.png", "of 16 bits")):
        with pytest.raises(
            InputError, match=rf'{why}: pip install "rtfocus\[codecs\]"'
        ):
            open_images(tmp_path / name)
    for name in ("zip.tif", "grey.png"):
        np.testing.assert_array_equal(open_images(tmp_path / name)[0].read(), pixels)
