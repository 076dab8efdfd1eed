"""What an input says of its pixels, channels and wells is in the result; no more."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaozarrs
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from image_file_kit import write_images

from rtfocus.images.metadata import (
    SOFTWARE,
    OutputImage,
    PlaneFacts,
    result_names,
    written_by_rtfocus,
)
from rtfocus.images.reading import open_images
from rtfocus.images.series import (
    ContrastWindow,
    ImageChannel,
    ImageSeries,
    PlatePlace,
    StagePosition,
)

MADE = {"engine": "rtfocus-1@abc", "optics": "NA=0.75", "optics from": "the file"}
CHANNELS = (
    ImageChannel("DAPI", "0000FF", ContrastWindow(10, 900, 0, 4095), 451.0, 359.0),
    ImageChannel("Cy5", "FF0000", ContrastWindow(20, 800, 0, 4095), 670.0, 650.0),
)


def series(name: str = "a", **facts: object) -> ImageSeries:
    plain = ImageSeries(
        name,
        Path(f"{name}.tif"),
        {"t": 1, "c": 2, "z": 1},
        (4, 5),
        np.dtype("<u2"),
        lambda _t, c, _z: np.full((4, 5), c, np.uint16),
    )
    return replace(plain, **facts)  # type: ignore[arg-type]


def result(like: ImageSeries) -> OutputImage:
    planes = (like.read(**index) for index in like.indices())
    return OutputImage(like, like.dtype, planes, MADE)


@pytest.mark.parametrize("ending", [".ome.tif", ".ome.zarr"])
def test_what_is_known_comes_back(tmp_path, ending):
    out = tmp_path / f"o{ending}"
    known = series(
        pixel_size_y_um=0.5,
        pixel_size_x_um=0.25,
        z_step_um=2.0,
        time_step_s=3.0,
        channels=CHANNELS,
    )
    write_images(out, [result(known)])
    (back,) = open_images(out)
    assert (back.pixel_size_y_um, back.pixel_size_x_um) == pytest.approx((0.5, 0.25))
    assert back.z_step_um == pytest.approx(2.0)
    assert back.time_step_s == pytest.approx(3.0)
    assert back.channel_names == ("DAPI", "Cy5")
    assert [channel.color for channel in back.channels] == ["0000FF", "FF0000"]
    if ending == ".ome.zarr":
        yaozarrs.validate_zarr_store(str(out))
        assert [c.window for c in back.channels] == [c.window for c in CHANNELS]
    else:
        assert [channel.emission_nm for channel in back.channels] == [451, 670]


@pytest.mark.parametrize("ending", [".ome.tif", ".ome.zarr"])
def test_what_is_unknown_stays_unknown(tmp_path, ending):
    out = tmp_path / f"o{ending}"
    write_images(out, [result(series())])
    (back,) = open_images(out)
    assert (back.pixel_size_y_um, back.pixel_size_x_um) == (None, None)
    assert (back.z_step_um, back.time_step_s) == (None, None)
    assert back.channel_names == ()
    if ending == ".ome.zarr":
        ome = zarr.open_group(out, mode="r").attrs["ome"]
        assert "omero" not in ome
        assert all("unit" not in axis for axis in ome["multiscales"][0]["axes"])


@pytest.mark.parametrize("ending", [".ome.tif", ".ome.zarr"])
def test_text_that_no_format_holds_does_not_break_the_result(tmp_path, ending):
    """E.g. a file name in another encoding, or a channel named by a broken macro."""
    out = tmp_path / f"o{ending}"
    foreign = series(
        os.fsdecode(b"Gr\xfcn"),
        channels=(ImageChannel("D\x0bAPI"), ImageChannel("<&>\x00\ud800")),
        position="A\x1b[2J",
    )
    write_images(out, [result(foreign)])
    (back,) = open_images(out)
    assert back.channel_names == ("D\ufffdAPI", "<&>\ufffd\ufffd")
    assert back.read(c=1)[0, 0] == 1


def test_wells_keep_their_places(tmp_path):
    fields = [
        series(f"p{n}", place=PlatePlace("P1", ("A", "B", "C"), ("1", "2"), *place))
        for n, place in enumerate([(0, 0, 0), (0, 0, 1), (2, 1, 0)])
    ]
    write_images(tmp_path / "plate.ome.zarr", [result(one) for one in fields])
    yaozarrs.validate_zarr_store(str(tmp_path / "plate.ome.zarr"))
    plate = zarr.open_group(tmp_path / "plate.ome.zarr", mode="r").attrs["ome"]["plate"]
    assert [row["name"] for row in plate["rows"]] == ["A", "B", "C"]
    assert [well["path"] for well in plate["wells"]] == ["A/1", "C/2"]
    back = open_images(tmp_path / "plate.ome.zarr")
    assert [
        one.place and (one.place.row, one.place.column, one.place.field) for one in back
    ] == [(0, 0, 0), (0, 0, 1), (2, 1, 0)]
    assert written_by_rtfocus(tmp_path / "plate.ome.zarr")
    written = write_images(tmp_path / "tiffs", [result(one) for one in fields])
    assert [path.parent.name for path in written] == ["A1", "A1", "C2"]


def test_a_result_says_how_it_was_made(tmp_path):
    write_images(tmp_path / "o.ome.tif", [result(series())])
    with tifffile.TiffFile(tmp_path / "o.ome.tif") as file:
        assert file.pages.first.tags["Software"].value == SOFTWARE
        text = file.ome_metadata or ""
    for key, value in {"rtfocus": SOFTWARE, **MADE}.items():
        assert f'<M K="{key}">{value}</M>' in text
    write_images(tmp_path / "o.ome.zarr", [result(series())])
    mark = zarr.open_group(tmp_path / "o.ome.zarr", mode="r").attrs["rtfocus"]
    assert mark["written_by"] == SOFTWARE
    assert mark["result"] == MADE
    many = [result(series("a")), result(series("b"))]
    write_images(tmp_path / "many.ome.zarr", many)
    for name in ("o.ome.tif", "o.ome.zarr", "many.ome.zarr"):
        assert written_by_rtfocus(tmp_path / name)


def test_a_tiff_says_when_and_where_each_plane_was_taken(tmp_path):
    taken = [PlaneFacts(0.5, 20.0, -3.0), PlaneFacts(1.5, 30.0, None)]
    like = series(stage=StagePosition(1, 2, 7), channels=CHANNELS)
    image = replace(result(like), taken=taken)
    write_images(tmp_path / "o.ome.tif", [image])
    with tifffile.TiffFile(tmp_path / "o.ome.tif") as file:
        xml = tifffile.xml2dict(file.ome_metadata)["OME"]
    planes = xml["Image"]["Pixels"]["Plane"]
    # What is not known of a plane is where the stage stood at the first.
    for plane, since_s, exposure, z_um in zip(
        planes, (0.5, 1.5), (20, 30), (-3, 7), strict=True
    ):
        assert (plane["DeltaT"], plane["DeltaTUnit"]) == (since_s, "s")
        assert (plane["ExposureTime"], plane["ExposureTimeUnit"]) == (exposure, "ms")
        assert (plane["PositionX"], plane["PositionZ"]) == (1, z_um)


def test_equal_results_are_equal_files_and_others_differ_in_their_uuid(tmp_path):
    def written(name: str, **changes: object) -> bytes:
        image = replace(result(series(channels=CHANNELS)), **changes)  # type: ignore[arg-type]
        write_images(tmp_path / f"{name}.tif", [image])
        return (tmp_path / f"{name}.tif").read_bytes()

    first, other = written("a"), written("c", made={"engine": "x"})
    assert first == written("b")
    uuids = {data.partition(b'UUID="')[2][:45] for data in (first, other)}
    assert len(uuids) == 2
    # Of other counts the window of the input says nothing.
    assert b"contrast window c0" in first
    assert b"contrast window" not in written("d", keeps_counts=False)


PARTS = st.sampled_from(["a", "A", "a.tif", "a.png", "b.ome.tif", "b", "con", "a_2"])


@settings(max_examples=60)
@given(st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=6))
def test_no_result_takes_the_name_or_the_folder_of_another(paths):
    root = Path("in")
    found = [series("x", path=root.joinpath(*parts)) for parts in paths]
    names = result_names(found, root)
    keys = [str(name).casefold() for name in names]
    assert len(set(keys)) == len(paths)
    folders = {str(parent).casefold() for name in names for parent in name.parents}
    assert not folders & set(keys)


def test_what_lies_off_a_stage_position_moves_along_its_own_axis():
    stage = StagePosition(x_um=100, y_um=5, z_um=9)
    assert stage.moved(2, 30) == StagePosition(x_um=130, y_um=7, z_um=9)
    unknown = StagePosition(x_um=float("nan"))
    assert unknown.moved(2, 30) == StagePosition(x_um=30, y_um=2)


@pytest.mark.parametrize("z_rises", [True, False, None])
@pytest.mark.parametrize("name", ["o.ome.tif", "many.ome.zarr"])
def test_slices_lie_where_the_stage_stood_and_nowhere_if_nobody_knows(
    name, z_rises, tmp_path
):
    stage = StagePosition(1, 2, 7)
    facts = {"z_step_um": 0.5, "stage": stage, "z_rises": z_rises}
    like = series(sizes={"t": 2, "c": 2, "z": 4}, **facts)
    write_images(tmp_path / name, [result(like), result(replace(like, name="b"))])
    again, _ = open_images(tmp_path / name)
    assert again.stage == stage
    assert again.z_rises is z_rises
    step_um = {True: 0.5, False: -0.5, None: math.nan}[z_rises]
    known = [7 + z * step_um for z in range(4)] if z_rises is not None else [7]
    assert again.slices_um == known + [None] * (4 - len(known))
