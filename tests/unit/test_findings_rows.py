"""Findings: rows of planes, stacks and tiles say what was found, and where it lies."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtfocus.batch.findings import COLUMNS, StatedErrors, find_in, tile_rows
from rtfocus.config import Config
from rtfocus.frame import BACKGROUND, DefocusMap, Estimate, FrameResult, TileGrid
from rtfocus.image_set import ImageSet
from rtfocus.images.reading import BrokenImage
from rtfocus.images.series import ImageSeries, PlatePlace, StagePosition

LEVELS = st.sampled_from([BACKGROUND, -3, -1, 0, 0, 2])


def image(sizes: dict[str, int], **facts: object) -> ImageSeries:
    plain = ImageSeries(
        "s",
        Path("in/day/s.tif"),
        sizes,
        (64, 64),
        np.dtype("<u2"),
        lambda _t, _c, _z: np.zeros((64, 64), np.uint16),
    )
    return replace(plain, **facts)  # type: ignore[arg-type]


def found(distance_um: float | None, tiles: DefocusMap | None = None) -> FrameResult:
    estimate = Estimate("u", 0, 1, distance_um, False, 0.9, 1.0, None, 0.0, {}, 0, 0)
    return FrameResult(None if distance_um is None else estimate, tiles, None)


def tile_map(levels: np.ndarray, **grid: object) -> DefocusMap:
    """Return a map of levels 1 um apart, each stated to a tenth of 5 + its level."""
    like = TileGrid(*levels.shape, 16, 8.0, 7.5, signed=True)
    um = np.where(levels == BACKGROUND, np.nan, levels).astype(np.float32)
    like = replace(like, **grid)  # type: ignore[arg-type]
    return DefocusMap(like, um, np.full_like(um, 0.5), levels, None, (5 + um) / 10)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """A set of one plane: finding its engines takes longest."""
    return ImageSet(Config(), [image({"t": 1, "c": 1, "z": 1})], free_choice=True)


@settings(max_examples=25)
@given(
    st.lists(st.lists(LEVELS, min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(8, 33),
    st.floats(4, 40),
    st.floats(-6, 40),
)
def test_a_tile_lies_about_its_centre_within_the_frame(levels, tile_px, stride, first):
    tiles = tile_map(
        np.array(levels, np.int16), tile_px=tile_px, stride_px=stride, origin_px=first
    )
    rows = tile_rows(found(0.0, tiles))
    assert len(rows) == 3 * len(levels)
    for number, row in enumerate(rows):
        place = divmod(number, 3)
        for axis, tile in zip("yx", place, strict=True):
            corner = tiles.grid.centres_px(tile + 1)[-1] - (tile_px - 1) / 2
            assert abs(row[axis] - max(corner, 0)) <= 0.5
            assert row[axis] >= 0
        level = levels[place[0]][place[1]]
        told = row["level"], row["defocus_um"], row["uncertainty_um"]
        if level == BACKGROUND:
            assert (row["label"], *told) == ("bg", None, None, None)
        else:
            off = pytest.approx((5 + level) / 10)
            assert (row["label"], *told) == (str(level), level, level, off)


@settings(max_examples=40)
@given(st.lists(LEVELS, min_size=1, max_size=12))
def test_shares_are_of_the_tiles_with_a_specimen_on_either_side(images, levels) -> None:
    images.turn_to([image({"t": 1, "c": 1, "z": 1})])
    tiles = tile_map(np.array([levels], np.int16))
    index = {"t": 0, "c": 0, "z": 0}
    (row,) = find_in(images, 0, [(index, found(0, tiles))], with_tiles=False).planes
    there = [level for level in levels if level != BACKGROUND]
    if not there:
        assert (row["out_of_focus"], row["uncertainty_um"]) == (None, None)
        return
    off = sum(level != 0 for level in there) / len(there)
    assert row["out_of_focus"] == pytest.approx(off)
    stated = np.median([(5 + level) / 10 for level in there])
    assert row["uncertainty_um"] == pytest.approx(stated)


FOCI = {(0, 0): 3, (0, 1): 4, (1, 0): 5, (1, 1): 6}
"""Of the stacks of an image, by t and c."""


def test_every_stack_has_the_focus_of_its_own_planes(images) -> None:
    place = PlatePlace("p", tuple("ABC"), ("1", "2"), row=2, column=0, field=4)
    stage = StagePosition(1, 2, 30)
    one = image({"t": 2, "c": 2, "z": 10}, z_step_um=0.5, stage=stage, place=place)
    images.turn_to([one])
    planes = [
        (index, found(abs(index["z"] - FOCI[index["t"], index["c"]]) / 2))
        for index in one.indices()
    ]
    told: list[None] = []
    findings = find_in(images, 0, planes, lambda: told.append(None), with_tiles=False)
    assert len(told) == len(one)
    assert [row["index"] for row in findings.planes] == list(one.indices())
    for row in findings.planes:
        t, c, z = (row["index"][axis] for axis in "tcz")
        beyond = z - FOCI[t, c]
        assert row["from_focus_planes"] == pytest.approx(beyond, abs=0.5)
        assert row["from_focus_um"] == pytest.approx(row["from_focus_planes"] / 2)
        assert row["z_offset_um"] == z / 2
        # Only of the first plane is the place of the stage known.
        assert row["z_um"] == (30 if (t, c, z) == (0, 0, 0) else None)
        assert row["from_focus_z_um"] is None
    assert len(findings.stacks) == 4
    for stack in findings.stacks:
        focus = FOCI[stack["index"]["t"], stack["index"]["c"]]
        assert stack["focus_plane"] == pytest.approx(focus, abs=0.5)
        assert stack["focus_offset_um"] == pytest.approx(stack["focus_plane"] / 2)
        assert (stack["axis"], stack["planes"], stack["assumed"]) == ("z", 10, False)
        assert (stack["well"], stack["field"]) == ("C1", 4)


@pytest.mark.parametrize(("z_rises", "sign"), [(True, 1), (False, -1)])
def test_planes_lie_above_or_below_focus_where_a_file_says_which_way_z_runs(
    images, z_rises, sign
) -> None:
    stage = StagePosition(None, None, 30)
    facts = {"z_step_um": 0.5, "stage": stage, "z_rises": z_rises}
    images.turn_to([one := image({"t": 1, "c": 1, "z": 10}, **facts)])
    planes = [(index, found(abs(index["z"] - 4) / 2)) for index in one.indices()]
    findings = find_in(images, 0, planes, with_tiles=False)
    assert findings.stacks[0]["z_rises"] is z_rises
    for z, row in enumerate(findings.planes):
        assert row["z_um"] == 30 + sign * z / 2
        assert row["from_focus_z_um"] == sign * row["from_focus_um"]


@pytest.mark.parametrize(
    ("sizes", "unnamed", "axes"),
    [
        ({"t": 9, "c": 1, "z": 1}, "t", ["t"]),
        ({"t": 9, "c": 2, "z": 1}, "t", ["t", "t"]),
        ({"t": 9, "c": 1, "z": 1}, "", []),  # a film
        ({"t": 9, "c": 1, "z": 2}, "t", []),
        ({"t": 1, "c": 1, "z": 4}, "", []),
        ({"t": 1, "c": 1, "z": 5}, "z", ["z"]),
    ],
)
def test_planes_that_a_file_does_not_name_may_be_a_stack(images, sizes, unnamed, axes):
    one = image(sizes, unnamed_axes=unnamed, z_step_um=2.0)
    images.turn_to([one])
    planes = [
        (index, found(abs(index["t"] + index["z"] - 4) + index["c"]))
        for index in one.indices()
    ]
    findings = find_in(images, 0, planes, with_tiles=False)
    stacks = findings.stacks
    assert [stack["axis"] for stack in stacks] == axes
    assert [row["index"] for row in findings.planes] == list(one.indices())
    for stack in stacks:
        assert stack["place"] == ("within" if unnamed == "t" else "above")
        assert stack["assumed"]
        # What is not bounded is no 0, and a step of z is none of t.
        assert (stack["likely"][1] is None) == (unnamed == "z")
        assert stack["focus_offset_um"] is None
    assert all(row["from_focus_um"] is None for row in findings.planes)


def test_the_table_has_a_row_for_every_plane_and_broken_image(images) -> None:
    one = image({"t": 1, "c": 1, "z": 2}, position="B1")
    images.turn_to([one])
    planes = zip(one.indices(), (found(2.5), found(None)), strict=True)
    findings = find_in(images, 0, planes, with_tiles=False)
    # The first plane is the one from which the others count, whatever their step.
    assert [row["z_offset_um"] for row in findings.planes] == [0, None]
    broken = [BrokenImage(Path("in/x.tif"), "too short")]
    said = {"engine": "e", "broken": broken, "root": Path("in")}
    text = findings.text("csv", **said)  # type: ignore[arg-type]
    table = csv.DictReader(io.StringIO(text))
    assert tuple(table.fieldnames or ()) == COLUMNS
    first, second, last = table
    assert (first["image"], first["z"], first["position"]) == ("day/s.tif", "0", "B1")
    assert (first["defocus_um"], first["status"]) == ("2.5", "classified")
    assert (second["defocus_um"], second["status"]) == ("", "classified")
    assert (last["image"], last["why"]) == ("x.tif", "too short")
    assert last["status"] == "broken"
    as_json = json.loads(findings.text("json", **said))  # type: ignore[arg-type]
    assert as_json["images"] == findings.planes
    assert as_json["broken"] == ["too short"]
    # An image that was given itself is told by its name.
    alone = findings.text("csv", engine="e", broken=[], root=one.path)
    assert [row["image"] for row in csv.DictReader(io.StringIO(alone))] == ["s.tif"] * 2


def test_a_plane_of_which_no_error_is_stated_is_none_of_error_0() -> None:
    tiles = tile_map(np.zeros((2, 3), np.int16))
    stated, two = StatedErrors(), image({"t": 1, "c": 1, "z": 2})
    error = np.arange(6, dtype=np.float32).reshape(2, 3)
    stated.note(replace(found(0, tiles), expected_error=error))
    assert not stated.is_of(two)
    stated.note(found(0, tiles))
    assert stated.is_of(two)
    first, second = (np.frombuffer(plane, "<f4") for plane in stated.planes)
    np.testing.assert_array_equal(first, error.ravel())
    assert np.isnan(second).all()
