"""What is appended to a run is read back by another library, in every layout."""

import json
import shutil
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaozarrs
import zarr
from msgspec import structs
from msgspec.msgpack import Ext
from numpy.typing import NDArray
from writer_kit import GRID, indices, make_series, numbered, recording

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.errors import InputError, WriterError
from rtfocus.frame import FrameResult, Position, Role, SeriesStart
from rtfocus.images.ome_xml import read_ome_xml
from rtfocus.images.ome_zarr import read_ome_zarr
from rtfocus.images.series import StagePosition
from rtfocus.runs import open_run
from rtfocus.writers.arrays import RunImages
from rtfocus.writers.check import check_run
from rtfocus.writers.commit import Tally
from rtfocus.writers.finish import complete_restoration, contrast
from rtfocus.writers.header import JOURNAL_NAME, read_header
from rtfocus.writers.journal import journal_lines
from rtfocus.writers.places import Plan

IMAGES = ("raw", "restored", "defocus")
COLOURS = [
    Channel("DAPI", OpticalSystem(0.8, 460.0, 0.325)),
    Channel("FITC", OpticalSystem(0.8, 520.0, 0.325)),
]
WELLS = [
    Position("B03 left", plate_row="B", plate_column="03", field=0),
    Position("B03 right", plate_row="B", plate_column="03", field=1),
    Position("C11", plate_row="C", plate_column="11"),
]
SITES = [Position("left", x_um=1.0, y_um=2.0), Position("right")]

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "uint8": ({"dtype": "|u1", "bit_depth": 8}, {}),
    "float32 restored": ({}, {"restored_dtype": "float32"}),
    "odd chunks": ({"shape": (41, 57)}, {"chunk_px": 16}),
    "rgb": ({"dtype": "|u1", "shape": (40, 56, 3)}, {}),
    "rgb, two channels": (
        {"shape": (40, 56, 3), "channels": COLOURS, "sizes": {"t": 3, "c": 2}},
        {"shard_frames": 2},
    ),
    "t c z": ({"sizes": {"t": 2, "c": 2, "z": 3}, "channels": COLOURS}, {}),
    "z before c": ({"sizes": {"t": 2, "z": 3, "c": 2}, "channels": COLOURS}, {}),
    "positions": ({"sizes": {"t": 3, "p": 2}, "positions": SITES}, {}),
    "position first": ({"sizes": {"p": 2, "t": 5}, "positions": SITES}, {}),
    "plate": ({"sizes": {"t": 2, "p": 3}, "positions": WELLS}, {}),
    "unbounded": ({"sizes": {"t": None}}, {}),
    "shards of 4": ({"sizes": {"t": 10}}, {"shard_frames": 4}),
    "shards of 4, early": (
        {"sizes": {"t": 6, "c": 2, "z": 3}, "channels": COLOURS},
        {"shard_frames": 4, "outstanding": 3},
    ),
    "zstd": ({}, {"codec": "zstd", "codec_level": 3}),
    "blosc-zstd": ({}, {"codec": "blosc-zstd"}),
    "uncompressed": ({}, {"codec": "none"}),
    "fsync": ({"sizes": {"t": 2}}, {"fsync": True}),
}


def group_path(series: SeriesStart, p: int) -> str:
    """Where the layout of the specification puts the image of position p."""
    position = series.positions[p]
    if position.plate_row is not None:
        return f"{position.plate_row}/{position.plate_column}/{position.field}"
    return str(p) if len(series.positions) > 1 else ""


def read_frame(folder: Path, name: str, series: SeriesStart, index: dict[str, int]):
    """Read one frame with zarr-python."""
    path = folder / f"{name}.ome.zarr" / group_path(series, index.get("p", 0)) / "0"
    array = zarr.open_array(path, mode="r")
    planes = 3 if len(series.shape) == 3 and name in ("raw", "restored") else 1
    first = index.get("c", 0) * planes
    found: NDArray[Any] = np.asarray(
        array[index.get("t", 0), first : first + planes, index.get("z", 0)]
    )
    return np.moveaxis(found, 0, -1) if planes == 3 else found[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_frame_is_read_back_at_its_own_index(layout: str, tmp_path: Path) -> None:
    changes, store = LAYOUTS[layout]
    series = make_series(**changes)
    with recording(tmp_path / "run.rtfocus", series, store=store) as run:
        frames = run.send_all()
        run.writer.drain()
        assert run.durable == list(range(frames))
        folder = run.close(frames)
    for name in IMAGES:
        yaozarrs.validate_zarr_store(str(folder / f"{name}.ome.zarr"))
    for sequence, index in enumerate(indices(series)):
        expected = numbered(sequence, series)
        raw = read_frame(folder, "raw", series, index)
        np.testing.assert_array_equal(raw, expected)
        restored = read_frame(folder, "restored", series, index)
        np.testing.assert_array_equal(restored, expected[::-1])
        defocus = read_frame(folder, "defocus", series, index)
        assert np.isnan(defocus[0, 0])
        assert (defocus.ravel()[1:] == sequence).all()
    report = check_run(folder)
    assert not report.problems, str(report)
    assert report.frames == frames
    assert run.pool.free == run.pool.count
    assert run.accounting.unaccounted == 0


def test_expected_errors_lie_inside_the_defocus_and_have_a_mean_in_the_table(
    tmp_path: Path,
) -> None:
    series = make_series(sizes={"t": 3, "c": 2}, channels=COLOURS)
    with recording(tmp_path / "run.rtfocus", series, expects_error=True) as run:
        slot = run.fill(0, {"t": 0, "c": 0})
        known = run.result(0, {"t": 0, "c": 0})
        run.writer.append(slot, replace(known, expected_error=None))
        run.send(1, {"t": 0, "c": 1})
        run.send(2, {"t": 1, "c": 0})
        slot = run.fill(3, {"t": 1, "c": 1})
        known = run.result(3, {"t": 1, "c": 1})
        assert known.expected_error is not None
        known.expected_error[0] = np.nan  # tiles of which no pixel is a number
        run.writer.append(slot, known)
        folder = run.close(4)
    store = folder / "defocus.ome.zarr/expected_error"
    yaozarrs.validate_zarr_store(str(store))
    told = zarr.open_group(store, mode="r").attrs["rtfocus"]
    assert told["unit"] == "count"
    assert "root mean square" in told["meaning"]
    read = open_run(folder)
    for index, wanted in (((0, 0), np.nan), ((0, 1), 1.5), ((1, 0), 2.5)):
        error = read.expected_error[(*index, 0)]
        assert error.shape == (GRID.rows, GRID.columns)
        np.testing.assert_array_equal(error.ravel()[1:], wanted)
    share = np.sqrt(1 - 1 / (GRID.rows * GRID.columns))
    table = [np.nan, 1.5 * share, 2.5 * share, 3.5]
    np.testing.assert_allclose(read.frames["expected_error_counts"], table, rtol=1e-6)
    column = zarr.open_array(folder / "frames.zarr/expected_error_counts", mode="r")
    np.testing.assert_allclose(np.asarray(column[:]), table, rtol=1e-6)
    report = check_run(folder)
    assert not report.problems, str(report)


def test_frames_that_are_restored_later_get_their_expected_error_too(
    tmp_path: Path,
) -> None:
    series = make_series(sizes={"t": 2})
    with recording(tmp_path / "run.rtfocus", series, expects_error=True) as run:
        run.send(0, {"t": 0})
        known = run.result(1, {"t": 1})
        late = replace(known, restored=None, expected_error=None, skipped="raw_only")
        run.writer.append(run.fill(1, {"t": 1}), late)
        folder = run.close(2)
    assert complete_restoration(folder, lambda pixels, channel: known) == 1
    read = open_run(folder)
    np.testing.assert_array_equal(read.expected_error[1, 0, 0], known.expected_error)
    np.testing.assert_array_equal(read.restored[1, 0, 0], known.restored)
    assert np.isfinite(read.frames["expected_error_counts"]).all()
    report = check_run(folder)
    assert not report.problems, str(report)


def test_frames_without_a_sequence_are_restored_later_each_by_itself(
    tmp_path: Path,
) -> None:
    series = make_series(sizes={"t": 4})
    with recording(tmp_path / "run.rtfocus", series, expects_error=True) as run:
        known = {t: run.result(t, {"t": t}) for t in (0, 1)}
        for t, result in known.items():
            late = replace(result, restored=None, expected_error=None)
            run.writer.append(run.fill(t, {"t": t}), replace(late, skipped="raw_only"))
        folder = run.close(2)
    journal = folder / JOURNAL_NAME
    lines = [json.loads(line) for line in journal.read_text("utf-8").splitlines()]
    # As a repair leaves frames that are more than the run's report knows of.
    lines = [line | {"sequence": None} for line in lines]
    absent = {"sequence": None, "status": "missing", "index": {"t": 2}, "reason": ""}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, absent])
    journal.write_text(text, "utf-8")
    results = iter(known.values())
    assert complete_restoration(folder, lambda pixels, channel: next(results)) == 2
    done = [json.loads(line) for line in journal.read_text("utf-8").splitlines()]
    assert [line["status"] for line in done] == ["written", "written", "missing"]
    assert done[2]["stored"] == []
    errors = open_run(folder).frames["expected_error_counts"][:2]
    assert errors[0] < errors[1]


def test_a_run_without_expected_errors_says_that_it_has_none(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        frames = run.send_all()
        folder = run.close(frames)
    assert not (folder / "defocus.ome.zarr/expected_error").exists()
    assert np.isnan(open_run(folder).frames["expected_error_counts"]).all()
    with pytest.raises(InputError, match="no image 'expected_error'"):
        _ = open_run(folder).expected_error


def test_the_deviation_of_the_defocus_lies_inside_it(tmp_path: Path) -> None:
    series = make_series(sizes={"t": 2, "c": 2}, channels=COLOURS)
    with recording(tmp_path / "run.rtfocus", series) as run:
        frames = run.send_all()
        folder = run.close(frames)
    store = folder / "defocus.ome.zarr/deviation"
    yaozarrs.validate_zarr_store(str(store))
    group = zarr.open_group(store, mode="r")
    assert group.attrs["rtfocus"]["unit"] == "micrometer"
    read = open_run(folder)
    assert read.kinds == ("raw", "restored", "defocus", "deviation")
    for sequence, index in enumerate(indices(series)):
        stored = group["0"][index["t"], index["c"], 0]
        np.testing.assert_array_equal(stored, np.float32(sequence + 1.25))
        np.testing.assert_array_equal(read.deviation[index["t"], index["c"], 0], stored)


def test_a_run_from_before_deviations_were_kept_has_none_and_is_whole(
    tmp_path: Path,
) -> None:
    series = make_series(sizes={"t": 1})
    with recording(tmp_path / "run.rtfocus", series) as run:
        known = run.result(0, {"t": 0})
        assert known.defocus is not None
        bare = replace(known, defocus=replace(known.defocus, stated_um=None))
        run.writer.append(run.fill(0, {"t": 0}), bare)
        folder = run.close(1)
    shutil.rmtree(folder / "defocus.ome.zarr/deviation")
    header = json.loads((folder / "series.json").read_text("utf-8"))
    del header["states_deviation"]
    (folder / "series.json").write_text(json.dumps(header), "utf-8")
    assert open_run(folder).kinds == ("raw", "restored", "defocus")
    with pytest.raises(InputError, match="no image 'deviation'"):
        _ = open_run(folder).deviation
    report = check_run(folder)
    assert not report.problems, str(report)


def test_metadata_is_whole_before_frame_0(tmp_path: Path) -> None:
    series = make_series(sizes={"t": 4, "c": 2}, channels=COLOURS)
    with recording(tmp_path / "run.rtfocus", series) as run:
        for name in IMAGES:
            yaozarrs.validate_zarr_store(str(run.writer.folder / f"{name}.ome.zarr"))
        path = run.writer.folder / "defocus.ome.zarr"
        document = json.loads((path / "zarr.json").read_text())
        image = document["attributes"]["ome"]
        multiscale = image["multiscales"][0]
        assert [axis["name"] for axis in multiscale["axes"]] == list("tczyx")
        scale, shift = multiscale["datasets"][0]["coordinateTransformations"]
        assert scale["scale"] == [0.25, 1, 1.5, 8 * 0.325, 8 * 0.325]
        assert shift["translation"] == pytest.approx(
            [0, 0, 0, 7.5 * 0.325, 7.5 * 0.325]
        )
        labels = [c["label"] for c in image["omero"]["channels"]]
        assert labels == ["DAPI defocus", "FITC defocus"]
        array = zarr.open_array(path / "0", mode="r")
        assert array.metadata.dimension_names == tuple("tczyx")
        assert array.shape == (4, 2, 1, GRID.rows, GRID.columns)
        assert np.isnan(array[...]).all()


@pytest.mark.parametrize(("step_um", "unit"), [(1.5, "micrometer"), (None, "")])
def test_slices_that_are_not_equally_far_apart_have_no_unit(
    tmp_path: Path, step_um: float | None, unit: str
) -> None:
    series = make_series(sizes={"t": 2, "z": 2}, z_step_um=step_um)
    with recording(tmp_path / "run.rtfocus", series) as run:
        folder = run.close(run.send_all())
    assert check_run(folder).problems == []
    (scales,) = ome(folder, "raw")["ome"]["multiscales"]
    units = {axis["name"]: axis.get("unit", "") for axis in scales["axes"]}
    assert (units["z"], units["y"]) == (unit, "micrometer")
    (image,) = read_ome_zarr(folder / "raw.ome.zarr")
    assert image.z_step_um == step_um


@pytest.mark.parametrize(("interval_s", "unit"), [(2.5, "second"), (None, "")])
def test_time_points_that_are_not_equally_far_apart_have_no_unit(
    tmp_path: Path, interval_s: float | None, unit: str
) -> None:
    series = make_series(sizes={"t": 2, "z": 1}, interval_s=interval_s)
    with recording(tmp_path / "run.rtfocus", series) as run:
        folder = run.close(run.send_all())
    assert check_run(folder).problems == []
    (scales,) = ome(folder, "raw")["ome"]["multiscales"]
    units = {axis["name"]: axis.get("unit", "") for axis in scales["axes"]}
    assert (units["t"], units["z"]) == (unit, "micrometer")
    (image,) = read_ome_zarr(folder / "raw.ome.zarr")
    assert image.time_step_s == interval_s


def ome(folder: Path, name: str, inner: str = "") -> dict[str, Any]:
    path = folder / f"{name}.ome.zarr" / inner / "zarr.json"
    return json.loads(path.read_text())["attributes"]


def test_positions_say_where_they_lie_and_what_they_are_made_of(tmp_path: Path) -> None:
    """In the arrays' transforms and in the OME-XML, from before frame 0 on."""
    series = make_series(sizes={"t": None, "p": 2}, positions=SITES)
    with recording(tmp_path / "run.rtfocus", series) as run:
        folder = run.writer.folder
        before = read_ome_zarr(folder / "raw.ome.zarr")
        for sequence, index in enumerate(islice(indices(series), 5)):
            run.send(sequence, index)
        run.close(5)
    after = read_ome_zarr(folder / "raw.ome.zarr")
    for images, frames in ((before, 64), (after, 3)):
        assert [image.position for image in images] == ["left", "right"]
        assert [image.sizes["t"] for image in images] == [frames] * 2
        assert images[0].stage == StagePosition(x_um=1.0, y_um=2.0)
        assert images[1].stage is None
    xml = read_ome_xml((folder / "raw.ome.zarr/OME/METADATA.ome.xml").read_bytes())
    assert [image.sizes["t"] for image in xml.images] == [3, 3]
    assert xml.images[0].facts["pixel_size_x_um"] == 0.325

    places = {"raw": 0.0, "restored": 0.0, "defocus": 7.5 * 0.325}
    for name, origin in places.items():
        (scales,) = ome(folder, name, "0")["ome"]["multiscales"]
        _, moved = scales["datasets"][0]["coordinateTransformations"]
        assert moved["translation"] == pytest.approx([0, 0, 0, 2 + origin, 1 + origin])
        made_of = ome(folder, name, "1")["rtfocus"].get("made_of")
        if name == "raw":
            assert made_of is None
        else:
            there = (folder / f"{name}.ome.zarr" / "1" / made_of).resolve()
            assert there == (folder / "raw.ome.zarr" / "1").resolve()


def test_a_run_shows_what_is_in_it(tmp_path: Path) -> None:
    """Contrast is that of the data, by channel; somebody's own stays."""
    series = make_series(
        sizes={"t": 20, "c": 2}, channels=COLOURS, bit_depth=12, shape=(48, 48)
    )
    with recording(tmp_path / "run.rtfocus", series, slots=64) as run:
        for sequence, index in enumerate(indices(series)):
            slot = run.fill(sequence, index)
            result = run.result(sequence, index)
            level = 600 + 100 * index["c"]
            slot.pixels[...] = np.linspace(level, level + 80, 48 * 48).reshape(48, 48)
            result.defocus.defocus_um[...] = np.linspace(-3, 1, 12).reshape(3, 4)
            run.writer.append(slot, result)
        start = ome(run.writer.folder, "raw")["ome"]["omero"]["channels"]
        assert [c["window"]["end"] for c in start] == [4095, 4095]
        path = run.writer.folder / "restored.ome.zarr" / "zarr.json"
        own = json.loads(path.read_text())
        own["attributes"]["ome"]["omero"]["channels"][1]["window"]["end"] = 77.0
        path.write_text(json.dumps(own))
        folder = run.close(40)
    shown = [c["window"] for c in ome(folder, "raw")["ome"]["omero"]["channels"]]
    assert shown == [
        {"min": 0, "max": 4095, "start": low, "end": low + 79} for low in (600, 700)
    ]
    restored = ome(folder, "restored")["ome"]["omero"]["channels"]
    assert restored[0]["window"]["end"] > 4095
    assert restored[0]["window"]["max"] == restored[0]["window"]["end"]
    assert restored[1]["window"]["end"] == 77.0
    shown = ome(folder, "defocus")["ome"]["omero"]["channels"][0]["window"]
    assert 2.5 < shown["end"] <= 3
    assert shown["start"] == -shown["end"]
    assert check_run(folder).problems == []
    # Those values were kept while frames were written; a repair reads the frames.
    tally = Tally(Plan(series))
    for line in journal_lines(folder / JOURNAL_NAME, tally.plan):
        tally.add(line)
    images = RunImages(folder, read_header(folder), create=False)
    read = contrast(images, tally.sample)
    assert read["raw"] == [(600, 679), (700, 779)]
    assert read["defocus"][0] == (shown["start"], shown["end"])


def test_damaged_ome_xml_is_told_and_mended(tmp_path: Path) -> None:
    series = make_series(sizes={"t": 2, "p": 2}, positions=SITES)
    with recording(tmp_path / "run.rtfocus", series) as run:
        folder = run.close(run.send_all())
    path = folder / "restored.ome.zarr" / "OME" / "METADATA.ome.xml"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    (problem,) = check_run(folder).problems
    assert "METADATA.ome.xml' is damaged" in problem
    assert check_run(folder, repair=True).problems == []
    assert path.read_bytes() == whole


def test_rgb_planes_are_omero_channels_in_their_colours(tmp_path: Path) -> None:
    series = make_series(shape=(40, 56, 3), dtype="|u1")
    with recording(tmp_path / "run.rtfocus", series) as run:
        path = run.writer.folder / "raw.ome.zarr" / "zarr.json"
        omero = json.loads(path.read_text())["attributes"]["ome"]["omero"]
    colours = [channel["color"] for channel in omero["channels"]]
    assert colours == ["FF0000", "00FF00", "0000FF"]


def test_missing_frames_are_marked_at_their_own_index(tmp_path: Path) -> None:
    series = make_series(sizes={"t": 3, "c": 2, "z": 2}, channels=COLOURS)
    places = list(indices(series))
    lost = {2, 3, 9}
    with recording(tmp_path / "run.rtfocus", series) as run:
        for sequence, index in enumerate(places):
            if sequence == 2:
                run.writer.mark_missing(2, 2, "publisher restarted")
                run.accounting.count("dropped", "gap", 2)
            if sequence == 9:
                run.writer.mark_missing(9, 1, "corrupt")
                run.accounting.count("dropped", "gap")
            if sequence not in lost:
                run.send(sequence, index)
        run.writer.drain()
        assert run.durable == list(range(len(places)))
        folder = run.close(len(places))
    for sequence, index in enumerate(places):
        found = read_frame(folder, "raw", series, index)
        expected = numbered(sequence, series)
        np.testing.assert_array_equal(found, expected * (sequence not in lost))
    document = json.loads((folder / "raw.ome.zarr" / "zarr.json").read_text())
    missing = document["attributes"]["rtfocus"]["missing"]
    assert [m["sequence"] for m in missing] == sorted(lost)
    for m in missing:
        assert m["index"] == {"p": 0} | places[m["sequence"]]
    assert check_run(folder).problems == []
    assert run.accounting.summary()["dropped"] == {"gap": 3}
    assert run.accounting.unaccounted == 0


def test_a_gap_at_the_end_is_placed_and_keeps_the_run_whole(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        for t in range(4):
            run.send(t, {"t": t})
        run.writer.mark_missing(4, 2, "publisher lost")
        run.accounting.count("dropped", "gap", 2)
        run.writer.drain()
        assert run.durable == list(range(6))
        folder = run.close(6)
    assert [line["index"]["t"] for line in check_run(folder).missing] == [4, 5]
    assert zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r").shape[0] == 6


def test_focus_probes_are_journalled_and_not_stored(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series(sizes={"t": 2})) as run:
        run.send(0, {"t": 0})
        probe = run.fill(1, {"t": 0}, role=Role.FOCUS)
        run.writer.record_focus(probe, run.result(1, {"t": 0}))
        run.send(2, {"t": 1})
        run.writer.drain()
        assert run.durable == [0, 1, 2]
        folder = run.close(3)
    assert run.accounting.summary()["focus"] == 1
    assert run.accounting.unaccounted == 0
    found = read_frame(folder, "raw", run.series, {"t": 0})
    np.testing.assert_array_equal(found, numbered(0, run.series))


@pytest.mark.parametrize(
    ("says", "kept"),
    [
        ({"captured_ns": 2**63 - 1, "camera_image_number": 2**63 - 1}, None),
        (
            {"frame_meta": {"file": "a.tif", "plane": {"t": 1, "z": 2}}},
            {"t": 1, "z": 2},
        ),
        (
            {"frame_meta": {"file": "a.tif", "plane": {"t": 1, "x": "y" * 2**21}}},
            {"t": 1},
        ),
        ({"frame_meta": {"file": "a.tif", "plane": {"t": Ext(5, b"no JSON")}}}, {}),
        ({"frame_meta": {"file": "a.tif", "plane": {(1, 2): 3}}}, {}),
    ],
    ids=["largest numbers", "replayed", "too long", "no JSON", "key that is no text"],
)
def test_what_a_publisher_may_say_of_a_frame_leaves_a_journal_that_is_read_again(
    says: dict[str, Any], kept: dict[str, int] | None, tmp_path: Path
) -> None:
    with recording(tmp_path / "run.rtfocus", make_series(sizes={"t": 2})) as run:
        for sequence in range(2):
            slot = run.fill(sequence, {"t": sequence})
            slot.header = structs.replace(slot.frame(), **says)
            run.writer.append(slot, run.result(sequence, {"t": sequence}))
        folder = run.close(2)
    report = check_run(folder)
    assert report.problems == []
    assert report.frames == 2
    lines = list(journal_lines(folder / JOURNAL_NAME, Plan(run.series)))
    assert [line.get("plane") for line in lines] == [kept, kept]


def test_a_failed_restoration_keeps_the_raw_frame_and_says_so(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series(sizes={"t": 2})) as run:
        run.send(0, {"t": 0})
        run.writer.record_error(run.fill(1, {"t": 1}), "engine ran out of memory")
        folder = run.close(2)
    raw = read_frame(folder, "raw", run.series, {"t": 1})
    np.testing.assert_array_equal(raw, numbered(1, run.series))
    assert not read_frame(folder, "restored", run.series, {"t": 1}).any()
    line = json.loads((folder / "frames.ndjson").read_text().splitlines()[1])
    assert line["error"] == "engine ran out of memory"
    assert line["stored"] == ["raw"]
    assert (
        json.loads((folder / "report.json").read_text())["totals"]["processing_errors"]
        == 1
    )


def test_a_second_frame_of_a_place_never_overwrites_the_first(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        run.send(0, {"t": 0})
        run.send(1, {"t": 0})
        run.send(2, {"t": 1})
        folder = run.close(3)
    first = read_frame(folder, "raw", run.series, {"t": 0})
    np.testing.assert_array_equal(first, numbered(0, run.series))
    assert run.accounting.summary()["in_error"] == {"duplicate": 1}
    assert run.accounting.unaccounted == 0
    assert check_run(folder).problems == []


def test_a_frame_outside_the_plan_is_counted_not_stored(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        run.send(0, {"t": 0})
        run.send(1, {"t": 6})
        run.send(2, {"t": 1, "c": 1})
        folder = run.close(3)
    assert run.accounting.summary()["in_error"] == {"index": 2}
    assert run.accounting.unaccounted == 0
    # Its own line is no damage of the journal.
    assert check_run(folder).problems == []
    assert open_run(folder).frames["why"].tolist() == [
        None,
        "the plan has no place {'t': 6}",
        "the plan has no place {'t': 1, 'c': 1}",
    ]


def test_a_run_that_stops_early_is_trimmed_to_what_it_has(tmp_path: Path) -> None:
    series = make_series(sizes={"t": 50, "p": 2}, positions=SITES)
    with recording(tmp_path / "run.rtfocus", series) as run:
        for sequence, index in enumerate(indices(series)):
            if sequence < 7:
                run.send(sequence, index)
        folder = run.close(7, "canceled")
    for p in ("0", "1"):
        array = zarr.open_array(folder / "raw.ome.zarr" / p / "0", mode="r")
        assert array.shape[0] == 4
    report = json.loads((folder / "report.json").read_text())
    assert report["reason"] == "canceled"
    assert report["planned_frames"] == 100


def test_unbounded_time_grows_far_beyond_the_first_length(tmp_path: Path) -> None:
    series = make_series(sizes={"t": None}, shape=(8, 8))
    with recording(tmp_path / "run.rtfocus", series, grid=None) as run:
        for t in range(300):
            run.send(t, {"t": t})
        folder = run.close(300)
    array = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    assert array.shape[0] == 300
    for t in range(0, 300, 7):
        np.testing.assert_array_equal(array[t, 0, 0], numbered(t, series))


def test_raw_only_frames_are_listed_for_later(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        run.send(0, {"t": 0})
        result = FrameResult(None, None, None, skipped="raw_only: stalled")
        run.writer.append(run.fill(1, {"t": 1}), result)
        folder = run.close(2)
    totals = json.loads((folder / "report.json").read_text())["totals"]
    assert totals["not_restored"] == {"raw_only: stalled": 1}
    assert totals["stored"]["raw"] == 2
    assert totals["stored"]["restored"] == 1
    assert check_run(folder).problems == []


def test_the_journal_becomes_columns(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        folder = run.close(run.send_all())
    frames = zarr.open_group(folder / "frames.zarr", mode="r")
    assert frames["sequence"][:].tolist() == list(range(6))
    assert frames["t"][:].tolist() == list(range(6))
    assert frames["defocus_um"][:].tolist() == [float(i) for i in range(6)]
    assert frames["classify_ms"][:].tolist() == [2.5] * 6
    assert np.isnan(frames["restore_ms"][:]).all()
    assert frames["status"].attrs["words"] == ["written"]
    assert frames["engines"].attrs["words"] == ["delpnet@0123abcd"]
    received, durable = frames["received_ns"][:], frames["durable_ns"][:]
    assert (received <= durable).all()
    table = open_run(folder).frames
    for name in ("sequence", "t", "level", "defocus_um"):
        assert table[name].tolist() == list(range(6)), name
    for name in "pcz":  # of which a series of time points alone has one each
        assert table[name].tolist() == frames[name][:].tolist() == [0] * 6, name
    for name, value in (
        *(("z_um", 12.5), ("exposure_ms", 5.0), ("confidence", 0.5)),
        *(("foreground", 1.0), ("status", "written"), ("role", "record")),
        *(("why", None), ("file", None), ("signed", False)),
    ):
        assert table[name].tolist() == [value] * 6, name
    assert frames["signed"][:].tolist() == [0] * 6
    assert table["durable_ns"].tolist() == durable.tolist()
    text = (folder / "frames.ndjson").read_text()
    assert "NaN" not in text
    assert len(text.splitlines()) == 6


def test_slots_stay_untouched_until_their_frame_is_durable(tmp_path: Path) -> None:
    """With as many slots as frames under way, every reuse would show."""
    series = make_series(sizes={"t": 120}, shape=(128, 128))
    store = {"outstanding": 3}
    with recording(
        tmp_path / "run.rtfocus", series, store=store, grid=None, slots=4
    ) as run:
        folder = run.close(run.send_all())
    array = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    for t in range(120):
        np.testing.assert_array_equal(array[t, 0, 0], numbered(t, series))


def test_a_frame_of_another_shape_is_refused(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        slot = run.fill(0, {"t": 0})
        result = run.result(0, {"t": 0})
        result.restored = np.zeros((2, 2), np.uint16)
        with pytest.raises(WriterError, match=r"restored frame is uint16 \(2, 2\)"):
            run.writer.append(slot, result)


def test_positions_in_the_same_well_field_are_refused(tmp_path: Path) -> None:
    twins = [WELLS[0], WELLS[0]]
    series = make_series(sizes={"t": 1, "p": 2}, positions=twins)
    with pytest.raises(WriterError, match="own plate_row"):
        recording(tmp_path / "run.rtfocus", series).__enter__()


def test_a_well_name_that_is_no_folder_name_is_refused(tmp_path: Path) -> None:
    well = Position("w", plate_row="../B", plate_column="03")
    series = make_series(positions=[well])
    with pytest.raises(WriterError, match=r"does not fit OME-Zarr 0\.5.*'\.\./B'"):
        recording(tmp_path / "run.rtfocus", series).__enter__()
    assert not list(tmp_path.iterdir())


def test_sizes_that_disagree_with_their_lists_are_refused(tmp_path: Path) -> None:
    series = make_series(sizes={"t": 1, "c": 2})
    with pytest.raises(WriterError, match="plans 2 along c but lists 1"):
        recording(tmp_path / "run.rtfocus", series).__enter__()


def test_a_frame_never_waits_long_for_its_shard(tmp_path: Path) -> None:
    """The sender may need it to be durable before it can send the next."""
    first_durable = threading.Event()
    second_durable = threading.Event()
    told = {1: first_durable, 3: second_durable}

    def note(sequence: int) -> None:
        if sequence in told:
            told[sequence].set()

    with recording(
        tmp_path / "run.rtfocus",
        make_series(),
        store={"shard_frames": 6},
        on_durable=note,
    ) as run:
        run.send(0, {"t": 0})
        run.send(1, {"t": 1})
        assert first_durable.wait(timeout=20)
        run.writer.mark_missing(2, 1, "gap")
        run.accounting.count("dropped", "gap")
        run.send(3, {"t": 3})
        assert second_durable.wait(timeout=20)
        run.send(4, {"t": 4})
        run.send(5, {"t": 5})
        folder = run.close(6)
    array = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    for t in range(6):
        expected = numbered(t, run.series) * (t != 2)
        np.testing.assert_array_equal(array[t, 0, 0], expected)
    assert check_run(folder).problems == []


def test_a_gap_followed_only_by_probes_is_told_and_placed_later(
    tmp_path: Path,
) -> None:
    store = {"outstanding": 2}
    with recording(tmp_path / "run.rtfocus", make_series(), store=store) as run:
        run.send(0, {"t": 0})
        run.writer.mark_missing(1, 1, "gap")
        run.accounting.count("dropped", "gap")
        for sequence in range(2, 7):
            probe = run.fill(sequence, {"t": 0}, role=Role.FOCUS)
            run.writer.record_focus(probe, run.result(sequence, {"t": 0}))
        run.send(7, {"t": 2})
        folder = run.close(8)
    assert run.durable == list(range(8))
    assert run.accounting.unaccounted == 0
    report = check_run(folder)
    assert report.problems == []
    placed = [line["index"]["t"] for line in report.missing if line["index"]]
    assert placed == [1]
