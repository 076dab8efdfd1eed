"""OME-Zarr as other programs write it: units, scales, versions, plates, collections."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from image_file_kit import flat, means, ngff_axes, ome_pixels, ome_xml, write_ngff

from rtfocus.errors import InputError
from rtfocus.images.reading import find_images, open_images


@pytest.mark.parametrize(
    ("unit", "step", "whole", "um"),
    [
        ("micrometer", 0.325, None, 0.325),
        ("nanometer", 325.0, None, 0.325),
        ("millimeter", 0.000325, None, 0.325),
        ("angstrom", 3250.0, None, 0.325),
        ("micrometer", 1.0, 0.325, 0.325),
        ("micrometer", 2.0, 0.1625, 0.325),
        (None, 1.0, None, None),
        ("pixel", 1.0, None, None),
        ("micrometer", None, None, None),
    ],
)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_pixel_size_is_scale_times_global_scale_in_the_unit(
    tmp_path, version, unit, step, whole, um
) -> None:
    write_ngff(
        tmp_path / "a.ome.zarr",
        flat(1000)[None],
        ngff_axes("cyx", unit),
        None if step is None else [1, step, step],
        whole=None if whole is None else [1, whole, whole],
        version=version,
    )
    (series,) = open_images(tmp_path / "a.ome.zarr")
    assert series.name == "a"
    assert series.pixel_size_um == (None if um is None else pytest.approx(um))
    assert means(series) == [1000]


def test_y_x_and_z_have_their_own_steps_and_channels_their_display(tmp_path) -> None:
    window = {"start": 10, "end": 900, "min": 0, "max": 4095}
    omero = {"channels": [{"label": "DAPI", "color": "0000FF", "window": window}]}
    write_ngff(
        tmp_path / "a.zarr",
        np.stack([flat(1), flat(2)])[None],
        ngff_axes("czyx"),
        [1, 2.0, 0.2, 0.4],
        more={"omero": omero},
    )
    (series,) = open_images(tmp_path / "a.zarr")
    assert (series.pixel_size_y_um, series.pixel_size_x_um) == (0.2, 0.4)
    assert series.z_step_um == 2
    (channel,) = series.channels
    assert (channel.name, channel.color) == ("DAPI", "0000FF")
    assert (channel.window.start, channel.window.end) == (10, 900)
    assert (channel.window.low, channel.window.high) == (0, 4095)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_display_of_another_number_of_channels_is_of_none(tmp_path, count) -> None:
    omero = {"channels": [{"label": f"C{n}"} for n in range(count)]}
    pixels = np.stack([flat(1), flat(2)])
    write_ngff(tmp_path / "a.zarr", pixels, ngff_axes("cyx"), more={"omero": omero})
    (series,) = open_images(tmp_path / "a.zarr")
    names = [channel.name for channel in series.channels]
    assert names == (["C0", "C1"] if count == 2 else [])


def test_axes_in_any_order_and_time_step(tmp_path) -> None:
    pixels = np.arange(96 * 2, dtype="u2").reshape(12, 8, 2)
    axes = [*ngff_axes("xy"), {"name": "t", "type": "time", "unit": "millisecond"}]
    write_ngff(tmp_path / "a.zarr", pixels, axes, [0.3, 0.4, 250])
    (series,) = open_images(tmp_path / "a.zarr")
    assert series.shape == (8, 12)
    assert (series.pixel_size_y_um, series.pixel_size_x_um) == (0.4, 0.3)
    assert series.time_step_s == 0.25
    np.testing.assert_array_equal(series.read(t=1), pixels[..., 1].T)


def test_an_axis_beyond_t_c_z_makes_images(tmp_path) -> None:
    axes = [{"name": "angle"}, *ngff_axes("yx")]
    write_ngff(tmp_path / "a.zarr", np.stack([flat(1), flat(2)]), axes, [1, 1, 1])
    series = open_images(tmp_path / "a.zarr")
    assert [(one.name, means(one)) for one in series] == [
        ("a_angle0", [1]),
        ("a_angle1", [2]),
    ]


def test_more_images_than_any_file_has_are_refused(tmp_path) -> None:
    axes = [{"name": "angle"}, {"name": "view"}, *ngff_axes("yx")]
    path = write_ngff(tmp_path / "a.zarr", flat(1)[None, None], axes, [1, 1, 1, 1])
    array = json.loads((path / "0" / ".zarray").read_text())
    # Of so many 64 bits hold none.
    array["shape"][:2] = [2**32, 2**32]
    (path / "0" / ".zarray").write_text(json.dumps(array))
    with pytest.raises(InputError, match="has more than 100000 images"):
        open_images(path)


def test_old_versions_are_read_without_a_pixel_size(tmp_path) -> None:
    write_ngff(tmp_path / "v03.zarr", flat(3), ["y", "x"], version="0.3")
    five = write_ngff(tmp_path / "v01.zarr", flat(1)[None, None, None], [])
    attributes = json.loads((five / ".zattrs").read_text())
    attributes["multiscales"][0].pop("axes")
    (five / ".zattrs").write_text(json.dumps(attributes))
    old, older = (open_images(tmp_path / f"v0{v}.zarr")[0] for v in (3, 1))
    assert (means(old), means(older)) == ([3], [1])
    assert (old.pixel_size_um, older.pixel_size_um) == (None, None)


def test_further_multiscales_are_told(tmp_path) -> None:
    path = write_ngff(tmp_path / "a.zarr", flat(1), ngff_axes("yx"))
    attributes = json.loads((path / ".zattrs").read_text())
    attributes["multiscales"] *= 2
    (path / ".zattrs").write_text(json.dumps(attributes))
    (series,) = open_images(path)
    assert "the first of 2 multiscales" in series.notes[0]


def test_what_is_no_image_is_named(tmp_path) -> None:
    zarr.save_array(tmp_path / "bare.zarr", flat(1))
    with pytest.raises(InputError, match="array without OME metadata"):
        open_images(tmp_path / "bare.zarr")
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    with pytest.raises(InputError, match="no 'multiscales'"):
        open_images(tmp_path / "empty.zarr")
    write_ngff(tmp_path / "bad.zarr", flat(1), ngff_axes("zyx"))
    with pytest.raises(
        InputError, match=r"bad\.zarr' has broken multiscales .* 3 axes .* has 2; exp"
    ):
        open_images(tmp_path / "bad.zarr")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scales: scales.clear(), "lists no image; export it again"),
        (lambda scales: scales[0].update(datasets=[]), "names no array"),
        (
            lambda scales: scales[0]["datasets"][0].update(path="9"),
            "names the array '9', which is not there",
        ),
        (lambda scales: scales[0].update(coordinateSystems=[]), "newer than 0.5"),
        (
            lambda scales: scales[0]["datasets"][0].update(path="../b.zarr/0"),
            r"invalid|not there",
        ),
    ],
)
def test_metadata_that_lead_nowhere_are_told_in_words(tmp_path, change, said) -> None:
    path = write_ngff(tmp_path / "a.zarr", flat(1), ngff_axes("yx"))
    attributes = json.loads((path / ".zattrs").read_text())
    change(attributes["multiscales"])
    (path / ".zattrs").write_text(json.dumps(attributes))
    with pytest.raises(InputError, match=f"a.zarr' has broken .*{said}") as raised:
        open_images(path)
    assert "Error(" not in str(raised.value)


def write_plate(path: Path) -> None:
    root = zarr.open_group(path, mode="w", zarr_format=2)
    wells = [
        {"path": "A/1", "rowIndex": 0, "columnIndex": 0},
        {"path": "B/10", "rowIndex": 1, "columnIndex": 1},
    ]
    root.attrs["plate"] = {
        "name": "drug",
        "rows": [{"name": "A"}, {"name": "B"}],
        "columns": [{"name": "1"}, {"name": "10"}, {"name": "11"}],
        "wells": wells,
    }
    for well, value in (("A/1", 1000), ("B/10", 2000)):
        group = root.require_group(well)
        images = [{"path": "0", "acquisition": 0}, {"path": "1", "acquisition": 3}]
        group.attrs["well"] = {"images": images}
        for field in (0, 1):
            image = path / well / str(field)
            write_ngff(image, flat(value + field), ngff_axes("yx"), [0.3, 0.3])


def test_fields_of_a_plate_keep_their_places(tmp_path) -> None:
    write_plate(tmp_path / "plate.zarr")
    series = open_images(tmp_path / "plate.zarr")
    assert [one.name for one in series] == [
        "plate_A_1_0",
        "plate_A_1_1",
        "plate_B_10_0",
        "plate_B_10_1",
    ]
    assert [means(one) for one in series] == [[1000], [1001], [2000], [2001]]
    last = series[-1].place
    assert (last.plate, last.rows, last.columns) == (
        "drug",
        ("A", "B"),
        ("1", "10", "11"),
    )
    assert (last.row, last.column, last.field, last.acquisition) == (1, 1, 1, 3)
    # One field alone knows that it is part of the plate: writing over that is refused.
    (field,) = open_images(tmp_path / "plate.zarr/B/10/1")
    assert tmp_path / "plate.zarr" in field.files


def test_a_missing_field_of_a_plate_is_named_and_the_others_are_read(tmp_path) -> None:
    write_plate(tmp_path / "plate.zarr")
    shutil.rmtree(tmp_path / "plate.zarr/B/10/1")
    with pytest.raises(InputError, match="lacks field 'B/10/1'"):
        open_images(tmp_path / "plate.zarr")
    found = find_images(tmp_path)
    assert [means(one) for one in found.series] == [[1000], [1001], [2000]]
    assert len(found.broken) == 1
    shutil.rmtree(tmp_path / "plate.zarr/A")
    with pytest.raises(InputError, match="lacks field 'A/1' and 1 more"):
        open_images(tmp_path / "plate.zarr")


def test_a_bioformats2raw_collection_takes_names_from_its_ome_xml(tmp_path) -> None:
    path = tmp_path / "set.zarr"
    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    for number in range(11):
        image = flat(number)[None, None, None]
        write_ngff(path / str(number), image, ngff_axes("tczyx"), [1.0] * 5)
    images = "".join(
        f'<Image ID="Image:{n}" Name="site {n}">'
        f"{ome_pixels(f'<Channel Name={chr(34)}GFP{chr(34)}/><MetadataOnly/>')}</Image>"
        for n in range(11)
    )
    (path / "OME").mkdir()
    (path / "OME/METADATA.ome.xml").write_text(ome_xml(images), "utf-8")
    series = open_images(path)
    assert [one.name for one in series] == [f"set_site {n}" for n in range(11)]
    assert [means(one)[0] for one in series] == list(range(11))
    assert series[10].channel_names == ("GFP",)


def test_an_image_of_length_0_is_refused(tmp_path) -> None:
    write_ngff(tmp_path / "a.zarr", np.zeros((0, 8, 9)), ngff_axes("zyx"), [1, 1, 1])
    with pytest.raises(InputError, match=r"axes \{'z': 0, .* none of length 0"):
        open_images(tmp_path / "a.zarr")


def test_an_image_that_a_collection_lists_is_missed(tmp_path) -> None:
    root = tmp_path / "many.zarr"
    for name in "01":
        pixels, axes = flat(1000)[None], ngff_axes("cyx")
        write_ngff(root / name, pixels, axes, [1, 1, 1], version="0.5")
    zarr.open_group(root, mode="a").attrs["ome"] = {"version": "0.5"}
    listed = {"version": "0.5", "series": ["0", "1", "2"]}
    zarr.open_group(root / "OME", mode="w").attrs["ome"] = listed
    found = find_images(root)
    assert [means(one) for one in found.series] == [[1000], [1000]]
    (broken,) = found.broken
    assert broken.reason == f"'{root}' lacks image '2', which its metadata list"


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_image_without_one_file_of_pixels_is_told(tmp_path, version) -> None:
    root, planes = tmp_path / "a.zarr", np.stack([flat(1), flat(2)])
    write_ngff(root, planes, ngff_axes("cyx"), [1, 1, 1], version=version)
    (series,) = open_images(root)
    assert series.notes == ()
    for file in series.pixels.rglob("*"):
        if file.is_file() and file.name not in (".zarray", "zarr.json"):
            file.unlink()
    # By the format it is black.
    (series,) = open_images(root)
    assert means(series) == [0, 0]
    assert series.notes == (f"'{root}': image 'a' has no file of pixels, all are 0",)


def test_a_scale_that_is_not_understood_is_told_and_not_guessed(tmp_path) -> None:
    path = write_ngff(
        tmp_path / "a.zarr", flat(1), ngff_axes("yx", "micrometer"), [-0.5, -0.5]
    )
    (series,) = open_images(path)
    assert series.pixel_size_um is None
    assert "scale [-0.5, -0.5] is not positive" in series.notes[0]
    attributes = json.loads((path / ".zattrs").read_text())
    affine = [{"type": "affine", "affine": [[1, 0, 0], [0, 1, 0]]}]
    attributes["multiscales"][0]["datasets"][0]["coordinateTransformations"] = affine
    (path / ".zattrs").write_text(json.dumps(attributes))
    (series,) = open_images(path)
    assert "'affine' is not read" in series.notes[0]
