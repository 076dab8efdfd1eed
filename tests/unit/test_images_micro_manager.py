"""Micro-Manager's folders: NDTiff data sets, and one TIFF per frame."""

import itertools
import json

import pytest
import tifffile
from image_file_kit import flat, means, write_mm_stack, write_ndtiff

from rtfocus.errors import InputError
from rtfocus.images.reading import open_images
from rtfocus.images.series import StagePosition

SUMMARY = {
    "PixelSize_um": 0.325,
    "z-step_um": 1.5,
    "Interval_ms": 500,
    "ChNames": ["FITC", "DAPI"],
    "ChColors": [-16711936, 255],
}


def product(**axes) -> list[dict]:
    return [
        dict(zip(axes, place, strict=True))
        for place in itertools.product(*axes.values())
    ]


def test_time_channel_and_z_by_name_in_the_order_of_the_summary(tmp_path) -> None:
    axes = product(time=range(2), channel=["DAPI", "FITC"], z=range(3))
    # The keys of an entry come in any order.
    axes[5] = dict(reversed(axes[5].items()))
    folder = write_ndtiff(tmp_path / "set", axes, SUMMARY)
    (series,) = open_images(folder)
    assert series.sizes == {"t": 2, "c": 2, "z": 3}
    assert series.channel_names == ("FITC", "DAPI")
    assert [channel.color for channel in series.channels] == ["00FF00", "0000FF"]
    # FITC was written second, and is first here.
    assert means(series)[:6] == [1003, 1004, 1005, 1000, 1001, 1002]
    assert (series.pixel_size_um, series.z_step_um) == (0.325, 1.5)
    assert series.time_step_s == 0.5
    assert folder in series.files
    # The file of a set is the set.
    (again,) = open_images(folder / "set_NDTiffStack.tif")
    assert means(again) == means(series)


@pytest.mark.parametrize(
    ("axes", "names", "sizes"),
    [
        ({"position": range(3)}, ["position0", "position1", "position2"], (1, 1, 1)),
        (
            {"position": range(2), "time": range(2), "channel": ["a", "b"]},
            ["position0", "position1"],
            (2, 2, 1),
        ),
        (
            {"position": ["A1-Site_0", "B2-Site_0"], "time": range(2), "z": range(2)},
            ["A1-Site_0", "B2-Site_0"],
            (2, 1, 2),
        ),
        (
            {"row": range(2), "column": range(2), "z": range(2)},
            ["row0_column0", "row0_column1", "row1_column0", "row1_column1"],
            (1, 1, 2),
        ),
    ],
)
def test_positions_rows_and_columns_are_images(tmp_path, axes, names, sizes) -> None:
    places = product(**axes)
    write_ndtiff(tmp_path / "set", places, SUMMARY)
    series = open_images(tmp_path / "set")
    assert [one.name for one in series] == [f"set_{name}" for name in names]
    assert [one.position for one in series] == names
    found = [value for one in series for value in means(one)]
    assert sorted(found) == [1000 + n for n in range(len(places))]
    each = len(places) // len(names)
    assert found[:each] == [1000 + n for n in range(each)]
    assert all(tuple(one.sizes.values()) == sizes for one in series)


def test_frames_never_written_are_gaps_and_told(tmp_path) -> None:
    axes = product(time=range(4), channel=["DAPI", "FITC"])
    del axes[3], axes[3:5]  # FITC of t 1, all of t 2
    write_ndtiff(tmp_path / "set", axes, {})
    (series,) = open_images(tmp_path / "set")
    assert series.sizes["t"] == 4
    assert means(series) == [1000, 1001, 1002, 0, 0, 0, 1003, 1004]
    assert any("3 of 8 planes" in note for note in series.notes)


def test_a_missing_file_or_broken_index_is_an_error(tmp_path) -> None:
    folder = write_ndtiff(tmp_path / "set", product(z=range(2)), {})
    whole = (folder / "set_NDTiffStack.tif").read_bytes()
    (folder / "set_NDTiffStack.tif").write_bytes(whole[:-200])
    (series,) = open_images(folder)
    with pytest.raises(InputError, match="ends before it"):
        series.read(z=1)
    (folder / "set_NDTiffStack.tif").unlink()
    with pytest.raises(InputError, match=r"lacks 'set_NDTiffStack\.tif'"):
        open_images(folder)
    (folder / "NDTiff.index").write_bytes(b"\1")
    with pytest.raises(InputError, match="empty or broken"):
        open_images(folder)


def test_one_file_per_frame_is_one_image_per_position(tmp_path) -> None:
    for p, t, c, z in itertools.product(range(2), range(2), range(2), range(2)):
        tifffile.imwrite(
            tmp_path / f"img_channel{c:03d}_position{p:03d}_time{t:09d}_z{z:03d}.tif",
            flat(1000 * (p + 1) + 100 * t + 10 * c + z),
        )
    # As Micro-Manager leaves it when the acquisition is killed.
    text = json.dumps({"Summary": SUMMARY, "FrameKey-0-0-0": {}})
    (tmp_path / "metadata.txt").write_text(text[:-3])
    series = open_images(tmp_path)
    assert [one.sizes for one in series] == [{"t": 2, "c": 2, "z": 2}] * 2
    first = [
        1000 + 100 * t + 10 * c + z for t, c, z in itertools.product(*[(0, 1)] * 3)
    ]
    assert means(series[0]) == first
    assert means(series[1]) == [1000 + value for value in first]
    assert series[0].channel_names == ("FITC", "DAPI")
    assert series[0].pixel_size_um == 0.325
    assert len(series[0].files) == 18


def test_one_file_per_frame_of_version_1_4(tmp_path) -> None:
    (tmp_path / "Pos0").mkdir()
    for t, (c, name) in itertools.product(range(3), enumerate(("DAPI", "Cy5"))):
        if (t, c) != (1, 1):
            path = tmp_path / f"Pos0/img_{t:09d}_{name}_000.tif"
            tifffile.imwrite(path, flat(100 * t + c))
    (series,) = open_images(tmp_path)
    assert series.sizes == {"t": 3, "c": 2, "z": 1}
    assert set(series.channel_names) == {"DAPI", "Cy5"}
    dapi = series.channel_names.index("DAPI")
    assert [float(series.read(t=t, c=dapi).mean()) for t in range(3)] == [0, 100, 200]
    assert float(series.read(t=2, c=1 - dapi).mean()) == 201
    assert any("1 of 6 planes" in note for note in series.notes)


def test_a_frame_of_another_size_is_named(tmp_path) -> None:
    for t, shape in enumerate(((8, 9), (7, 9))):
        path = tmp_path / f"img_channel000_position000_time{t:09d}_z000.tif"
        tifffile.imwrite(path, flat(1, shape=shape))
    (series,) = open_images(tmp_path)
    with pytest.raises(InputError, match=r"t=1 c=0 z=0 has shape \(7, 9\)"):
        series.read(t=1)


def test_a_stack_of_positions_is_an_image_each(tmp_path) -> None:
    places = [
        (c, z, t, p)
        for p, t, z, c in itertools.product(range(2), range(2), range(2), range(2))
    ]
    del places[-1]  # aborted before the last
    labels = {"StagePositions": [{"Label": "A1"}, {"Label": "B2"}]}
    sizes = {"Frames": 2, "Slices": 2, "Channels": 2, "Positions": 2}
    path = tmp_path / "set_MMStack.tif"
    write_mm_stack(path, places, {**SUMMARY, **labels, **sizes, "TimeFirst": False})
    first, second = open_images(path)
    assert (first.name, second.name) == ("set_MMStack_A1", "set_MMStack_B2")
    assert first.sizes == second.sizes == {"t": 2, "c": 2, "z": 2}
    assert means(first) == [1000, 1002, 1001, 1003, 1004, 1006, 1005, 1007]
    assert means(second) == [1008, 1010, 1009, 1011, 1012, 1014, 1013, 0]
    assert first.channel_names == ("FITC", "DAPI")
    assert (first.pixel_size_um, first.z_step_um, first.position) == (0.325, 1.5, "A1")
    assert first.notes == ()
    assert any("1 of 8 planes" in note for note in second.notes)


def test_a_position_that_was_never_reached_is_no_image(tmp_path) -> None:
    path = write_mm_stack(
        tmp_path / "a_MMStack.tif",
        [(0, 0, 0, 0), (0, 0, 0, 2)],
        {"Frames": 1, "Slices": 1, "Channels": 1, "Positions": 4},
    )
    assert [means(one) for one in open_images(path)] == [[1000], [1001]]


def test_a_stack_with_an_absurd_index_is_refused(tmp_path) -> None:
    places = [(0, 0, 0, 0), (2**31, 0, 2**31, 0)]
    sizes = {"Frames": 1, "Slices": 1, "Channels": 1, "Positions": 1}
    write_mm_stack(tmp_path / "a_MMStack.tif", places, {**SUMMARY, **sizes})
    with pytest.raises(InputError, match="its index asks for"):
        open_images(tmp_path / "a_MMStack.tif")


def test_other_images_in_the_folder_of_a_data_set_are_read_too(tmp_path) -> None:
    write_ndtiff(tmp_path / "set", product(z=range(2)), {})
    tifffile.imwrite(tmp_path / "set/snap.tif", flat(7))
    assert [one.name for one in open_images(tmp_path / "set")] == ["set", "snap"]
    assert means(open_images(tmp_path / "set/snap.tif")[0]) == [7]


@pytest.mark.parametrize("step_um", [1.5, -1.5])
def test_every_position_has_its_own_place_and_way_of_z(tmp_path, step_um) -> None:
    axes = product(position=range(2), time=range(2), z=range(12))
    told = {
        n: {"XPositionUm": 100.0 * one["position"], "ZPositionUm": one["z"] * step_um}
        for n, one in enumerate(axes)
    }
    folder = write_ndtiff(tmp_path / "set", axes, SUMMARY, told)
    for number, series in enumerate(open_images(folder)):
        assert series.stage == StagePosition(100.0 * number, None, 0.0)
        assert series.z_rises is (step_um > 0)


def test_pages_of_micro_manager_say_which_way_z_runs(tmp_path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for number, one in enumerate(product(FrameIndex=range(2), SliceIndex=range(3))):
            about = {**one, "ChannelIndex": 0, "ZPositionUm": 9.0 - one["SliceIndex"]}
            tags = [(51123, "s", 0, json.dumps(about), True)]
            file.write(flat(number), extratags=tags, contiguous=False, metadata=None)
    (series,) = open_images(tmp_path / "a.tif")
    assert series.stage == StagePosition(None, None, 9.0)
    assert series.z_rises is False
