"""OME-Zarr as it is written: levels, places, plates and what a viewer shows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from rtfocus.images.metadata import OutputImage, written_by_rtfocus
from rtfocus.images.series import (
    ContrastWindow,
    ImageChannel,
    ImageSeries,
    PlatePlace,
    StagePosition,
)
from rtfocus.images.zarr_writing import ZarrForm, is_plate, places_in_zarr, write_zarr

SIDES = st.sampled_from([1, 511, 512, 513, 1024, 1025]) | st.integers(1, 9000)


def output(pixels: np.ndarray, made: dict[str, str] | None = None, **facts: object):
    """Return an image of axes t, c, z, y, x and perhaps rgb, to be written."""
    like = ImageSeries(
        name="a",
        path=Path("a.tif"),
        sizes=dict(zip("tcz", pixels.shape, strict=False)),
        shape=pixels.shape[3:],
        dtype=pixels.dtype,
        read_plane=lambda t, c, z: pixels[t, c, z],
    )
    like = replace(like, **facts)  # type: ignore[arg-type]
    planes = (like.read(**index) for index in like.indices())
    return OutputImage(like, pixels.dtype, planes, made or {})


def said(path: Path) -> dict:
    return json.loads((path / "zarr.json").read_text("utf-8"))["attributes"]


@settings(max_examples=50)
@given(SIDES, SIDES)
def test_a_pyramid_ends_with_the_first_level_that_fits_a_screen(y, x) -> None:
    assert ZarrForm().shapes((y, x)) == [(y, x)]
    form = ZarrForm(pyramid=True)
    first, *smaller = form.shapes((y, x))
    assert first == (y, x)
    for above, below in zip([first, *smaller], smaller, strict=False):
        assert max(above) > 512
        assert below == tuple(max(side // 2, 1) for side in above)
    assert max([first, *smaller][-1]) <= 512
    assert form.chunks((y, x)) == (1, 1, 1, min(y, 1024), min(x, 1024))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("shape", [(1031, 3), (5, 1100), (1, 1027)])
def test_a_place_has_the_same_value_at_every_level(tmp_path, version, shape) -> None:
    """A ramp is its own mean: what a pixel lies at is what it says."""
    y_um = -70.0 + 0.5 * np.arange(shape[0])[:, None]
    x_um = 900.0 + 0.25 * np.arange(shape[1])
    ramp = (y_um + 16 * x_um).astype("<f4")[None, None, None]
    stage = StagePosition(x_um=900.0, y_um=-70.0)
    sizes = {"pixel_size_y_um": 0.5, "pixel_size_x_um": 0.25}
    path = tmp_path / "a.zarr"
    form = ZarrForm(version=version, pyramid=True)
    write_zarr(path, [output(ramp, stage=stage, **sizes)], form)
    attributes = dict(zarr.open_group(path, mode="r").attrs)
    (scales,) = attributes.get("ome", attributes)["multiscales"]
    assert len(scales["datasets"]) == len(form.shapes(shape)) > 1
    for level in scales["datasets"]:
        pixels = zarr.open_array(path / level["path"], mode="r")[0, 0, 0]
        scale, place = level["coordinateTransformations"]
        y, x = (
            place["translation"][axis] + scale["scale"][axis] * np.arange(count)
            for axis, count in zip((3, 4), pixels.shape, strict=True)
        )
        np.testing.assert_allclose(pixels, y[:, None] + 16 * x, rtol=0, atol=0.01)
    assert written_by_rtfocus(path)


def test_smaller_levels_round_whole_numbers_to_the_nearest(tmp_path) -> None:
    counts = np.random.default_rng(3).integers(0, 60000, (2, 1030)).astype("<u2")
    write_zarr(
        tmp_path / "a.zarr", [output(counts[None, None, None])], ZarrForm(pyramid=True)
    )
    found = zarr.open_array(tmp_path / "a.zarr" / "1", mode="r")[0, 0, 0].astype(float)
    blocks = counts.astype(float).reshape(1, 2, 515, 2).mean(axis=(1, 3))
    assert np.abs(found - blocks).max() <= 0.5


def test_each_colour_of_each_channel_is_a_channel(tmp_path) -> None:
    pixels = np.arange(2 * 2 * 4 * 5 * 3, dtype="u1").reshape(1, 2, 2, 4, 5, 3)
    write_zarr(tmp_path / "a.zarr", [output(pixels)])
    found = zarr.open_array(tmp_path / "a.zarr" / "0", mode="r")[:]
    right = np.moveaxis(pixels, -1, 2).reshape(1, 6, 2, 4, 5)
    np.testing.assert_array_equal(found, right)
    told = said(tmp_path / "a.zarr")["ome"]["omero"]["channels"]
    assert [one["color"] for one in told] == ["FF0000", "00FF00", "0000FF"] * 2


def test_a_place_without_a_pixel_size_is_left_out(tmp_path) -> None:
    stage = StagePosition(x_um=900.0, y_um=-70.0)
    pixels = np.zeros((1, 1, 1, 4, 5), "u1")
    write_zarr(tmp_path / "a.zarr", [output(pixels, stage=stage, pixel_size_y_um=0.5)])
    (scales,) = said(tmp_path / "a.zarr")["ome"]["multiscales"]
    scale, place = scales["datasets"][0]["coordinateTransformations"]
    # Um and pixels are no lengths of one kind: what has no unit has no place.
    assert place["translation"] == [0, 0, 0, -70, 0]
    assert scale["scale"] == [1, 1, 1, 0.5, 1]
    units = [axis.get("unit") for axis in scales["axes"]]
    assert units == [None, None, None, "micrometer", None]


NUMBERS = st.floats(-1e5, 1e5)


@settings(max_examples=20)
@given(NUMBERS, NUMBERS, st.none() | NUMBERS, st.booleans())
def test_what_a_viewer_shows_lies_in_what_it_can_show(
    tmp_path_factory, start, width, low, keeps
) -> None:
    """Other counts, as of stretched images, have the whole range of their type."""
    window = ContrastWindow(start, start + abs(width), low)
    pixels = np.zeros((1, 1, 1, 2, 2), "<u2")
    image = output(pixels, channels=(ImageChannel(window=window),))
    path = tmp_path_factory.mktemp("w") / "a.zarr"
    write_zarr(path, [replace(image, keeps_counts=keeps)])
    (channel,) = said(path)["ome"]["omero"]["channels"]
    shown = channel["window"]
    if not keeps:
        assert shown == {"start": 0, "end": 65535, "min": 0, "max": 65535}
        return
    assert (shown["start"], shown["end"]) == (window.start, window.end)
    assert shown["min"] == (min(0, start) if low is None else low)
    assert shown["max"] >= window.end


def test_how_images_were_made_is_told_of_each_where_they_differ(tmp_path) -> None:
    pixels = np.zeros((1, 1, 1, 2, 2), "u1")
    for name, second, told in (
        ("same", "wiener", {"engine": "wiener"}),
        ("other", "none", {"a engine": "wiener", "b engine": "none"}),
    ):
        both = [
            output(pixels, {"engine": "wiener"}),
            output(pixels, {"engine": second}, name="b"),
        ]
        write_zarr(tmp_path / name, both)
        assert said(tmp_path / name)["rtfocus"]["result"] == told
        assert written_by_rtfocus(tmp_path / name)
        # A group or array of somebody else's makes it another result than was written.
        for theirs in ("theirs/zarr.json", "theirs/c/0/0"):
            (file := tmp_path / name / theirs).parent.mkdir(parents=True)
            file.write_text("{}", "utf-8")
            assert not written_by_rtfocus(tmp_path / name)
            shutil.rmtree(tmp_path / name / "theirs")


FIELDS = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3))


@settings(max_examples=40)
@given(st.lists(FIELDS, min_size=1, max_size=6), st.booleans(), st.booleans())
def test_a_plate_is_made_of_different_fields_of_one_plate(fields, stray, other) -> None:
    places: list[PlatePlace | None] = [
        PlatePlace("p", tuple("ABC"), ("1", "2", "3"), *field) for field in fields
    ]
    places += [None] if stray else []
    places += [PlatePlace("q", ("Z",), ("1",), 0, 0, 9)] if other else []
    alike = len(set(fields)) == len(fields)
    assert is_plate(places) == (alike and not stray and not other)
    pixels = np.zeros((1, 1, 1, 2, 2), "u1")
    groups = places_in_zarr([output(pixels, place=place) for place in places])
    # Whatever they are, no two images are written to one group.
    assert len(set(groups)) == len(places)
    if is_plate(places):
        assert groups == [f"{'ABC'[r]}/{c + 1}/{f}" for r, c, f in fields]
