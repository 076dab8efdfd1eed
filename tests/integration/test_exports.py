"""A finished run as OME-TIFF and as plain OME-Zarr, read back by other libraries."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaozarrs
import zarr
from loop_kit import command, failed, succeeded
from writer_kit import indices, make_series, numbered, recording

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.errors import ExitCode
from rtfocus.frame import Position, SeriesStart
from rtfocus.images.metadata import written_by_rtfocus
from rtfocus.images.ome_zarr import read_ome_zarr
from rtfocus.runs import open_run

CHANNELS = [
    Channel("DAPI", OpticalSystem(0.8, 460.0, 0.325)),
    Channel("FITC", OpticalSystem(0.8, 520.0, 0.325)),
]
SITES = [
    Position("left", x_um=100.0, y_um=2.0),
    Position("right/2", x_um=400.0, y_um=2.0),
]
WELLS = [
    Position("C11", plate_row="C", plate_column="11", x_um=0.0, y_um=900.0),
    Position("B03 right", plate_row="B", plate_column="03", field=1),
    Position("B03 left", plate_row="B", plate_column="03", field=0),
]

KINDS = ("raw", "restored", "defocus", "deviation", "expected_error")


def record(folder: Path, positions: list[Position], *, lost: int = -1) -> SeriesStart:
    series = make_series(
        shape=(515, 601),
        sizes={"t": 2, "p": len(positions), "c": 2},
        positions=positions,
        channels=CHANNELS,
        bit_depth=12,
    )
    with recording(folder, series, expects_error=True) as run:
        frames = list(indices(series))
        for sequence, index in enumerate(frames):
            if sequence == lost:
                run.writer.mark_missing(sequence, 1, "corrupt")
                run.accounting.count("dropped", "gap")
            else:
                run.send(sequence, index)
        run.close(len(frames))
    return series


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SeriesStart]:
    """A run of two positions that lacks frame 6: t=1, p=1, c=0."""
    folder = tmp_path_factory.mktemp("runs") / "sites.rtfocus"
    return folder, record(folder, SITES, lost=6)


@pytest.fixture(scope="module")
def wells(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SeriesStart]:
    folder = tmp_path_factory.mktemp("runs") / "wells.rtfocus"
    return folder, record(folder, WELLS)


def test_ome_tiff_has_every_image_as_a_series_with_its_facts(sites, tmp_path):
    folder, series = sites
    output = tmp_path / "sites.ome.tif"
    said = command("export", folder, "-o", output)
    assert succeeded(said).startswith("exported 10 images with 40 planes to ")
    assert "image 'right/2 raw': 1 plane without a frame" in said.err
    with tifffile.TiffFile(output) as file:
        found = {one.name: one for one in file.series}
        assert list(found) == [
            f"{site.name} {kind}" for kind in KINDS for site in SITES
        ]
        for sequence, index in enumerate(indices(series)):
            place = index["t"], index["c"]
            expected = numbered(sequence, series) * (sequence != 6)
            raw = found[f"{SITES[index['p']].name} raw"].asarray()
            np.testing.assert_array_equal(raw[place], expected)
            maps = found[f"{SITES[index['p']].name} defocus"].asarray()
            assert np.isnan(maps[place].ravel()[0])
            assert (maps[place].ravel()[1:] == sequence).all() or sequence == 6
            for kind, above in (("deviation", 1.25), ("expected_error", 0.5)):
                maps = found[f"{SITES[index['p']].name} {kind}"].asarray()
                stated = np.nan if sequence == 6 else sequence + above
                assert np.isnan(maps).sum() == 12 * (index["p"] == 1)
                np.testing.assert_array_equal(maps[place][1:], stated)
        images = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
        notes = file.ome_metadata
    pixels = images[1]["Pixels"]
    assert pixels["PhysicalSizeX"] == 0.325
    assert [c["Name"] for c in pixels["Channel"]] == ["DAPI", "FITC"]
    assert [c["EmissionWavelength"] for c in pixels["Channel"]] == [460.0, 520.0]
    first, _, lost, _ = pixels["Plane"]
    assert (first["PositionX"], first["PositionZ"]) == (400.0, 12.5)
    assert first["ExposureTime"] == 5.0
    assert first["DeltaT"] > 0
    assert "ExposureTime" not in lost
    for number in (5, 7, 9):  # of the maps: the first tile is not the first pixel
        assert images[number]["Pixels"]["PhysicalSizeX"] == 8 * 0.325
        first, *_ = images[number]["Pixels"]["Plane"]
        assert first["PositionX"] == pytest.approx(400.0 + 7.5 * 0.325)
        assert first["PositionY"] == pytest.approx(2.0 + 7.5 * 0.325)
    assert "micrometer, standard deviation of the defocus" in notes
    assert "count, root mean square" in notes
    assert "t=1 c=0 z=0" in notes


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_ome_zarr_is_plain_and_has_a_pyramid(version, sites, tmp_path):
    folder, series = sites
    output = tmp_path / "sites.ome.zarr"
    options = ["--image", "raw", "--zarr-version", version]
    succeeded(command("export", folder, "-o", output, *options))
    yaozarrs.validate_zarr_store(str(output))
    for p, site in enumerate(SITES):
        group = zarr.open_group(output / str(p), mode="r")
        attributes = dict(group.attrs)
        scales = attributes.get("ome", attributes)["multiscales"][0]
        full, half = (group[one["path"]] for one in scales["datasets"])
        assert full.metadata.zarr_format == (3 if version == "0.5" else 2)
        assert getattr(full, "shards", None) is None
        assert half.shape == (2, 2, 1, 257, 300)
        pixels = numbered(p * 2, series)
        np.testing.assert_array_equal(full[0, 0, 0], pixels)
        mean = pixels[:2, :2].mean()
        assert half[0, 0, 0, 0, 0] == np.rint(mean)
        (_, place), (size, shifted) = (
            one["coordinateTransformations"] for one in scales["datasets"]
        )
        assert size["scale"][3:] == [0.65, 0.65]
        assert place["translation"] == [0, 0, 0, site.y_um, site.x_um]
        moved = np.subtract(shifted["translation"], place["translation"])
        assert moved.tolist() == pytest.approx([0, 0, 0, 0.1625, 0.1625])
    back = read_ome_zarr(output)
    assert [one.position for one in back] == ["left", "right/2"]
    assert [channel.name for channel in back[1].channels] == ["DAPI", "FITC"]
    assert back[1].stage is not None
    assert back[1].stage.x_um == 400.0


def place_of(image: Path) -> tuple[list[float], list[float]]:
    """Return scale and translation in y and x, as Zarr readers find them."""
    (multiscale,) = zarr.open_group(image, mode="r").attrs["ome"]["multiscales"]
    scale, *moved = multiscale["datasets"][0]["coordinateTransformations"]
    translation = moved[0]["translation"] if moved else [0.0] * 5
    return scale["scale"][3:], translation[3:]


@pytest.mark.parametrize("kind", ["defocus", "deviation", "expected_error"])
def test_a_map_lies_where_its_tiles_lie(kind, sites, wells, tmp_path):
    inner = "" if kind == "defocus" else kind
    for (folder, series), places in (
        (sites, ["0", "1"]),
        (wells, ["C/11/0", "B/03/1", "B/03/0"]),
    ):
        output = tmp_path / f"{folder.stem}.ome.zarr"
        succeeded(command("export", folder, "-o", output, "--image", kind))
        yaozarrs.validate_zarr_store(str(output))
        for position, place in zip(series.positions, places, strict=True):
            recorded = folder / "defocus.ome.zarr" / place / inner
            scale, origin = place_of(output / place)
            assert scale == [8 * 0.325] * 2
            # Of a stage that nobody knows it counts from the frame's first pixel.
            at = (position.y_um or 0.0, position.x_um or 0.0)
            assert origin == pytest.approx([um + 7.5 * 0.325 for um in at])
            assert (scale, origin) == place_of(recorded)
            np.testing.assert_array_equal(
                zarr.open_array(output / place / "0", mode="r")[:],
                zarr.open_array(recorded / "0", mode="r")[:],
            )


def test_a_folder_has_a_file_for_every_map(sites, wells, tmp_path):
    for folder, series in (sites, wells):
        output = tmp_path / folder.stem
        succeeded(command("export", folder, "-o", output))
        names = {path.name for path in output.rglob("*.tif")}
        assert names == {
            f"{position.name.replace('/', '_')} {kind}.tif"
            for kind in KINDS
            for position in series.positions
        }
        assert {path.is_dir() for path in output.iterdir()} == {folder == wells[0]}


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_a_plate_stays_a_plate(version, wells, tmp_path):
    folder, series = wells
    output = tmp_path / "wells.ome.zarr"
    said = failed(command("export", folder, "-o", output))
    assert "a plate as OME-Zarr holds one image of each field" in said
    options = ["--image", "restored", "--zarr-version", version]
    succeeded(command("export", folder, "-o", output, *options))
    yaozarrs.validate_zarr_store(str(output))
    for p, path in enumerate(("C/11/0", "B/03/1", "B/03/0")):
        array = zarr.open_array(output / path / "0", mode="r")
        expected = numbered(2 * p + 1, series)[::-1]
        np.testing.assert_array_equal(array[0, 1, 0], expected)


def test_only_an_own_and_untouched_export_is_replaced(sites, tmp_path):
    folder, _ = sites
    output = tmp_path / "again.ome.zarr"
    export = ["export", folder, "-o", output, "--image", "defocus"]
    old = ["--zarr-version", "0.4"]
    succeeded(command(*export, *old))
    assert "exists" in failed(command(*export))
    succeeded(command(*export, *old, "--overwrite"))
    assert written_by_rtfocus(output)
    succeeded(command(*export, "--overwrite"))
    assert written_by_rtfocus(output)
    (output / "notes.txt").write_text("mine")
    failed(command(*export, "--overwrite"))
    assert (output / "notes.txt").read_text() == "mine"
    assert "lies in the run folder" in failed(
        command("export", folder, "-o", folder / "x.ome.tif")
    )


def test_the_table_of_frames_is_read_by_any_reader_of_csv(sites, tmp_path):
    folder, series = sites
    output = tmp_path / "frames.csv"
    export = ("export", folder, "-o", output)
    assert "exported 8 frames to" in succeeded(command(*export))
    assert output.read_bytes().startswith(b"time_s,position,")
    rows = list(csv.DictReader(output.read_text("utf-8").splitlines()))
    known = open_run(folder).frames
    assert [int(row["sequence"]) for row in rows] == list(range(8))
    for row, frame in zip(rows, known, strict=True):
        assert row["position"] == series.positions[frame["p"]].name
        assert row["channel"] == CHANNELS[frame["c"]].name
        assert row["status"] == frame["status"]
        assert row["signed"] == ("" if frame["signed"] is None else "False")
        for name in ("z_um", "defocus_um", "exposure_ms"):
            number = float(row[name]) if row[name] else np.nan
            np.testing.assert_equal(number, frame[name])
    lost = rows[6]
    assert lost["status"] == "missing"
    assert {lost[name] for name in ("defocus_um", "level", "signed")} == {""}
    assert (lost["time_s"], rows[0]["time_s"]) == ("", "0.0")
    assert float(rows[-1]["time_s"]) > 0
    failed(command(*export), ExitCode.INPUT)
    succeeded(command(*export, "--overwrite"))
    output.write_text("mine,not yours\n", "utf-8")
    failed(command(*export, "--overwrite"), ExitCode.INPUT)
    assert "--image cannot be used" in failed(command(*export, "--image", "raw"))


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "cut.rtfocus"
    with recording(folder, make_series(), restored=False) as run:
        run.send(0, {"t": 0})
        run.writer.drain()
    output = tmp_path / "cut.ome.tif"
    said = failed(command("export", folder, "-o", output))
    assert "is not finished" in said
    unrestored = failed(command("restore", folder), ExitCode.INPUT)
    assert "is not finished" in unrestored
    table = tmp_path / "so_far.csv"
    assert "exported 1 frame to" in succeeded(command("export", folder, "-o", table))
    assert f"rtfocus check {folder} --repair" in said
    said = failed(command("export", folder, "-o", output, "--precision", "fp16"))
    assert "--precision cannot be used" in said
    said = failed(command("export", tmp_path, "-o", output), ExitCode.INPUT)
    assert "is no run folder" in said
    missing = command("export", tmp_path / "cat.rtfocus", "-o", output)
    assert "cat.rtfocus' does not exist; give a run folder" in missing.err
    assert missing.code == ExitCode.INPUT
    assert not output.exists()


def test_an_image_that_the_run_lacks_is_named(tmp_path):
    folder = tmp_path / "raw.rtfocus"
    with recording(folder, make_series(), restored=False) as run:
        run.close(run.send_all())
    said = failed(
        command("export", folder, "-o", tmp_path / "o.ome.tif", "--image", "restored")
    )
    assert "has no image 'restored'; it has raw, defocus, deviation" in said
    succeeded(command("export", folder, "-o", tmp_path / "all"))
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == ["defocus.tif", "deviation.tif", "raw.tif"]


def test_what_frames_lack_is_told_apart_from_frames_that_are_missing(tmp_path):
    folder, series = tmp_path / "some.rtfocus", make_series(sizes={"t": 5})
    with recording(folder, series, expects_error=True) as run:
        results = [run.result(t, {"t": t}) for t in range(4)]
        unstated = replace(results[1], expected_error=None)
        unrestored = replace(
            results[2], restored=None, expected_error=None, skipped="overload"
        )
        for t, result in enumerate((results[0], unstated, unrestored, None)):
            run.writer.append(run.fill(t, {"t": t}), result)
        run.writer.mark_missing(4, 1, "corrupt")
        run.accounting.set_acquired(5)
        run.accounting.count("dropped", "gap")
        run.close(5)
    said = command("export", folder, "-o", tmp_path / "some.ome.tif")
    succeeded(said)
    missing = "1 plane without a frame"
    told = [
        f"image 'site {kind}': {what}"
        for kind, *reasons in (
            ("raw", missing),
            ("restored", "2 planes not restored", missing),
            ("defocus", "1 plane not processed", missing),
            ("deviation", "1 plane not processed", missing),
            (
                "expected_error",
                "1 plane of which the engine states none",
                "1 plane not restored",
                "1 plane not processed",
                missing,
            ),
        )
        for what in reasons
    ]
    assert [line for line in said.err.splitlines() if "image '" in line] == told
    with tifffile.TiffFile(tmp_path / "some.ome.tif") as file:
        notes = file.ome_metadata
    key = '<M K="planes of which the engine states none">t=1 c=0 z=0</M>'
    assert key in notes


def test_recorded_planes_that_are_damaged_or_gone_are_never_told_as_exported(tmp_path):
    folder, series = tmp_path / "some.rtfocus", make_series(sizes={"t": 2})
    with recording(folder, series) as run:
        run.close(run.send_all(2))
    (shard,) = (folder / "raw.ome.zarr").rglob("c.1.*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    file, one = tmp_path / "some", tmp_path / "some.ome.tif"
    said = failed(command("export", folder, "-o", file), ExitCode.INCOMPLETE)
    assert "plane t=1 c=0 z=0 cannot be read" in said
    assert "; 3 of 4 files written; what is damaged says: rtfocus check " in said
    assert len(list(file.iterdir())) == 3
    said = failed(command("export", folder, "-o", one), ExitCode.INPUT)
    assert said.strip().endswith(f"; what is damaged says: rtfocus check {folder}")
    assert not one.exists()
    # Of a file that is not there zarr reads zeros.
    shard.unlink()
    told = command("export", folder, "-o", one)
    assert "image 'site raw': 1 plane whose file is gone" in told.err
    said = failed(told, ExitCode.INCOMPLETE)
    assert "1 plane recorded and not exported: files are gone; which:" in said
    with tifffile.TiffFile(one) as exported:
        assert '<M K="planes whose file is gone">t=1 c=0 z=0</M>' in (
            exported.ome_metadata
        )
        assert len(exported.series) == 4
    restored = ("--image", "restored", "--overwrite")
    succeeded(command("export", folder, "-o", one, *restored))


def test_a_version_of_zarr_means_nothing_to_other_files(sites, tmp_path):
    old = ("-o", tmp_path / "a.ome.tif", "--zarr-version", "0.4")
    said = failed(command("export", sites[0], *old), ExitCode.CONFIG)
    assert "--zarr-version cannot be used: " in said
    assert "a.ome.tif' is no OME-Zarr" in said
