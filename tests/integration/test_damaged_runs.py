"""Runs whose files are gone or damaged: nothing is read as zeros without a word."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from loop_kit import command, failed, succeeded
from microscope_kit import record as record_replay
from writer_kit import indices, make_series, numbered, recording

from rtfocus.errors import ExitCode, InputError, WriterError
from rtfocus.frame import FrameResult, Position, SeriesStart
from rtfocus.images import ome_zarr
from rtfocus.images.reading import open_images
from rtfocus.napari.reader import read_layers
from rtfocus.runs import open_run
from rtfocus.view.codec import Flag
from rtfocus.view.stored_run import StoredRun, Traces
from rtfocus.writers.check import check_run
from rtfocus.writers.finish import complete_restoration, places_without_frame

SITES = [Position("left", x_um=0.0, y_um=0.0), Position("right", x_um=90.0, y_um=0.0)]
WELLS = [
    Position("B03 b", plate_row="B", plate_column="03", field=1),
    Position("B03 a", plate_row="B", plate_column="03", field=0),
]
LOST = 3
"""Sequence of the frame that never came: t=1, p=1."""
OPTICS = ("--optics", "NA=0.8,wavelength=520,pixel=0.325")


def record(folder: Path, positions: list[Position], **store: int) -> SeriesStart:
    sizes = {"t": 3, "p": len(positions)}
    series = make_series(sizes=sizes, positions=positions)
    with recording(folder, series, store=store) as run:
        for sequence, index in enumerate(indices(series)):
            if sequence == LOST:
                run.writer.mark_missing(sequence, 1, "corrupt")
                run.accounting.count("dropped", "gap")
            else:
                run.send(sequence, index)
        run.close(3 * len(positions))
    return series


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sites.rtfocus"
    record(folder, SITES)
    return folder


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "sites.rtfocus"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda shard: shard.write_bytes(b""),
    "half": lambda shard: shard.write_bytes(shard.read_bytes()[:1000]),
    "noise": lambda shard: shard.write_bytes(bytes(range(256)) * 8),
    "zeros": lambda shard: shard.write_bytes(bytes(shard.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plane_is_read_by_nobody(damage, run) -> None:
    DAMAGES[damage](run / "raw.ome.zarr/0/0/c.1.0.0.0.0")
    left, right = open_images(run)
    assert left.read(t=0).any()
    with pytest.raises(InputError, match="plane t=1 c=0 z=0 cannot be read: "):
        left.read(t=1)
    assert right.read(t=0).any()
    # Of a frame that never came zeros are what the run has.
    assert not right.read(t=1).any()
    opened = open_run(run)
    with pytest.raises(InputError, match="image of position 'left' cannot be read at"):
        np.asarray(opened.raw)
    assert opened.raw[2, 0, 0].any()
    assert not opened.image("raw", "right")[1].any()
    pixels = {told["name"]: data for data, told, _ in read_layers(run)}
    with pytest.raises(InputError, match="cannot be read at"):
        pixels["left default"][1].compute(scheduler="synchronous")
    assert pixels["left default"][2].compute(scheduler="synchronous").any()
    shown = StoredRun.open(run, Traces())
    shown.read_on()
    assert shown.picture((0, 0, 0, 0)).flags is Flag.NOTHING
    assert shown.picture((1, 1, 0, 0)).flags is Flag.ABSENT
    assert shown.picture((1, 0, 0, 0)).flags is Flag.UNREADABLE
    (problem,) = check_run(run).problems
    assert problem.startswith("frame 2 in raw: ")
    said = {"gone": "absent", "empty": "empty"}.get(damage, "cannot be decoded: ")
    assert said in problem


def test_a_header_is_read_once_for_all_positions_and_anew_for_another_run(run) -> None:
    ome_zarr._recorded.cache_clear()
    for _ in range(3):
        opened = open_run(run)
        assert [opened.image("raw", p)[0].any() for p in (0, 1)] == [True, True]
    assert ome_zarr._recorded.cache_info().misses == 1
    shutil.rmtree(run)
    record(run, WELLS)  # its frames lie in other folders
    (run / "raw.ome.zarr/B/03/1/0/c.2.0.0.0.0").unlink()
    opened = open_run(run)
    assert opened.image("raw", 0)[1].any()
    with pytest.raises(InputError, match="is gone or empty"):
        opened.image("raw", 0)[2]


def test_a_journal_is_read_once_for_all_positions_and_anew_when_repaired(
    run, monkeypatch
) -> None:
    read = []
    take = ome_zarr._Recorded._take

    def counted(recorded, line):
        read.append(line["sequence"])
        take(recorded, line)

    monkeypatch.setattr(ome_zarr._Recorded, "_take", counted)
    journal = run / "frames.ndjson"
    ome_zarr._recorded.cache_clear()
    for _ in range(3):  # of the frame that never came
        assert not open_run(run).image("raw", "right")[1].any()
    assert read == [0, 1, 2, LOST, 4, 5]
    left = open_run(run).image("raw", "left")
    (run / "raw.ome.zarr/0/0/c.1.0.0.0.0").unlink()
    with pytest.raises(InputError, match="is gone or empty"):
        left[1]
    lines = journal.read_text("utf-8").splitlines(keepends=True)
    journal.unlink()
    journal.write_text("".join(lines[:1]), "utf-8")
    assert not left[1].any()


@pytest.mark.parametrize(
    "line",
    [
        '{"status": "written", "index": null, "stored": ["raw"]}',
        '{"status": "written", "index": {"p": 99}, "stored": ["raw"]}',
        '{"status": "written", "index": {"t": "x"}, "stored": ["raw"]}',
        '{"status": "written", "index": {}, "stored": null}',
        "[1]",
        "{",
    ],
)
def test_a_damaged_line_hides_no_plane_that_is_gone(line, run) -> None:
    journal = run / "frames.ndjson"
    journal.write_text(f"{line}\n{journal.read_text('utf-8')}", "utf-8")
    (run / "raw.ome.zarr/0/0/c.1.0.0.0.0").unlink()
    left, right = open_images(run / "raw.ome.zarr")
    with pytest.raises(InputError, match="is gone or empty"):
        left.read(t=1)
    assert not right.read(t=1).any()


def test_a_link_to_images_of_a_run_is_read_as_they_are(run, tmp_path) -> None:
    (run / "raw.ome.zarr/0/0/c.1.0.0.0.0").unlink()
    link = tmp_path / "some.ome.zarr"
    link.symlink_to(run / "raw.ome.zarr", target_is_directory=True)
    left, right = open_images(link)
    with pytest.raises(InputError, match="is gone or empty"):
        left.read(t=1)
    assert not right.read(t=1).any()


def test_a_map_that_is_gone_is_told_by_the_page(run) -> None:
    (run / "defocus.ome.zarr/0/deviation/0/c.1.0.0.0.0").unlink()
    shown = StoredRun.open(run, Traces())
    shown.read_on()
    assert shown.picture((1, 0, 0, 0)).flags is Flag.UNREADABLE
    assert shown.picture((2, 0, 0, 0)).flags is Flag.NOTHING


def test_a_place_that_a_frame_came_to_twice_is_not_without_one(tmp_path) -> None:
    folder = tmp_path / "twice.rtfocus"
    with recording(folder, make_series(sizes={"t": 3})) as opened:
        for sequence, t in enumerate((0, 0, 7)):
            opened.send(sequence, {"t": t})
        opened.writer.mark_missing(3, 1, "corrupt")
        opened.accounting.count("dropped", "gap")
        opened.send(4, {"t": 2})
        opened.close(5)
    assert opened.accounting.summary()["in_error"] == {"duplicate": 1, "index": 1}
    assert places_without_frame(folder, 3) == (1, ["t=1 p=0 c=0 z=0"])
    shown = StoredRun.open(folder, Traces())
    shown.read_on()
    flags = [shown.picture((t, 0, 0, 0)).flags for t in range(3)]
    assert flags == [Flag.NOTHING, Flag.ABSENT, Flag.NOTHING]


def test_a_replay_says_what_was_never_recorded(run) -> None:
    _, report = record_replay({"microscope": {"source": "replay", "path": run}})
    assert report.frames == 6
    (said,) = report.warnings
    assert said == (
        "1 frame replayed with nothing but 0 (a run has 0 where no frame was "
        "recorded), the first: raw.ome.zarr t=1 c=0 z=0"
    )


def test_restore_leaves_an_image_out_whose_plane_is_gone_and_says_which(
    run, tmp_path
) -> None:
    (run / "raw.ome.zarr/0/0/c.1.0.0.0.0").unlink()
    many, one = tmp_path / "out", tmp_path / "out.ome.zarr"
    told = command("restore", run, "-o", many, "--engine", "wiener", *OPTICS)
    failed(told, ExitCode.INCOMPLETE)
    why = "plane t=1 c=0 z=0 cannot be read: its file '0/0/c.1.0.0.0.0' is gone"
    assert why in told.err
    assert "1 plane without a frame, nothing but 0: t=1 p=1 c=0 z=0" in told.err
    assert told.out.startswith("restored 3 planes to 1 file in")
    (written,) = many.iterdir()
    assert tifffile.imread(written).shape[0] == 3
    told = command("restore", run, "-o", one, "--engine", "wiener", *OPTICS)
    failed(told, ExitCode.INPUT)
    assert not one.exists()


def test_restore_of_a_run_that_was_cut_off_says_what_it_lacks(tmp_path) -> None:
    folder, series = tmp_path / "cut.rtfocus", make_series(sizes={"t": 4, "z": 2})
    with recording(folder, series, restored=False) as opened:
        for sequence in range(3):
            opened.send(sequence, {"t": sequence // 2, "z": sequence % 2})
        opened.writer.drain()
    told = command("classify", folder, *OPTICS)
    succeeded(told)
    lacks = [f"t={t} p=0 c=0 z={z}" for t, z in ((1, 1), (2, 0), (2, 1), (3, 0))]
    said = "5 planes without a frame, nothing but 0: "
    assert said + ", ".join([*lacks, "t=3 p=0 c=0 z=1"]) in " ".join(told.err.split())


@pytest.mark.parametrize("damage", ["gone", "empty"])
def test_no_zeros_are_restored_where_a_raw_frame_was(damage, tmp_path) -> None:
    folder, series = tmp_path / "some.rtfocus", make_series(sizes={"t": 2})
    with recording(folder, series) as opened:
        for sequence, index in enumerate(indices(series)):
            result = opened.result(sequence, index)
            bare = FrameResult(result.estimate, result.defocus, None, skipped="late")
            opened.writer.append(opened.fill(sequence, index), bare)
        opened.close(2)
    DAMAGES[damage](folder / "raw.ome.zarr/0/c.1.0.0.0.0")
    given = []

    def restored(pixels: np.ndarray, channel: str) -> FrameResult:
        given.append(pixels)
        return FrameResult(None, None, pixels)

    with pytest.raises(WriterError, match=r"frame t=1 c=0 z=0 of .* cannot be read"):
        complete_restoration(folder, restored)
    assert len(given) == 1
    assert not (folder / "restored.ome.zarr/0/c.1.0.0.0.0").exists()


def test_frames_of_wells_and_of_shards_with_several_are_known(tmp_path) -> None:
    folder = tmp_path / "wells.rtfocus"
    series = record(folder, WELLS, shard_frames=2)
    opened = open_run(folder)
    for p, well in enumerate(WELLS):
        for t in range(3):
            expected = numbered(2 * t + p, series) * (2 * t + p != LOST)
            np.testing.assert_array_equal(opened.image("raw", p)[t, 0, 0], expected)
        assert opened.image("deviation", well.name)[0].any()
    (folder / "raw.ome.zarr/B/03/1/0/c.0.0.0.0.0").unlink()
    (folder / "defocus.ome.zarr/B/03/0/deviation/0/c.1.0.0.0.0").unlink()
    gone = [("raw", "B03 b", 1), ("deviation", "B03 a", 2)]
    for kind, name, t in gone:
        with pytest.raises(InputError, match="is gone or empty"):
            opened.image(kind, name)[t]
    assert opened.image("raw", "B03 b")[2].any()
    assert opened.image("raw", "B03 a")[0].any()
    assert opened.image("deviation", "B03 a")[1].any()


def test_a_run_that_goes_on_is_read_as_far_as_it_is(tmp_path) -> None:
    folder, series = tmp_path / "live.rtfocus", make_series(sizes={"t": 4})
    durable = threading.Semaphore(0)

    def note(_: int) -> None:
        durable.release()

    with recording(folder, series, on_durable=note) as opened:
        reader = open_run(folder)
        seen = []
        for sequence in range(3):
            opened.send(sequence, {"t": sequence})
            assert durable.acquire(timeout=20)
            seen.append([bool(plane.any()) for plane in reader.raw[:3, 0, 0]])
        assert seen == [[True, False, False], [True, True, False], [True] * 3]
        (folder / "raw.ome.zarr/0/c.2.0.0.0.0").unlink()
        with pytest.raises(InputError, match="is gone or empty"):
            reader.raw[2]
        opened.close(3)


@pytest.mark.parametrize("lost", ["raw.ome.zarr/1", "raw.ome.zarr/1/zarr.json"])
def test_a_position_that_is_gone_is_named(lost, run, tmp_path) -> None:
    place = run / lost
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    output = tmp_path / "out"
    told = command("restore", run, "-o", output, "--engine", "wiener", *OPTICS)
    failed(told, ExitCode.INCOMPLETE)
    assert "raw.ome.zarr' lacks image '1', which its metadata list" in told.err
    assert len(list(output.iterdir())) == 1


def test_columns_of_the_journal_that_are_gone_are_told_and_written_again(run) -> None:
    shutil.rmtree(run / "frames.zarr")
    assert check_run(run).problems == [f"'{run / 'frames.zarr'}' is gone; use --repair"]
    assert check_run(run, repair=True).problems == []
    assert (run / "frames.zarr/sequence/c.0").is_file()


def test_images_of_a_run_that_are_gone_are_told(run, tmp_path) -> None:
    shutil.rmtree(run / "defocus.ome.zarr")
    told = command("export", run, "-o", tmp_path / "out")
    said = failed(told, ExitCode.INCOMPLETE)
    assert "image 'defocus', image 'deviation' recorded and not exported" in said
    assert len(list((tmp_path / "out").iterdir())) == 4
    succeeded(command("export", run, "-o", tmp_path / "raw", "--image", "raw"))
    shutil.rmtree(run / "raw.ome.zarr")
    # Neither maps nor restored frames are taken for what a camera saw.
    told = command("restore", run, "-o", tmp_path / "sharp", *OPTICS)
    said = failed(told, ExitCode.INPUT)
    assert "has no raw images, 'raw.ome.zarr'; it has restored.ome.zarr" in said
    shutil.rmtree(run / "restored.ome.zarr")
    said = failed(command("export", run, "-o", tmp_path / "none"), ExitCode.INPUT)
    assert "has no image 'raw'; it has none that can be read" in said
