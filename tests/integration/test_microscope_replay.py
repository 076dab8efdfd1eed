"""Replay: recorded images come out as they went in, at their index and rate."""

import threading

import numpy as np
import pytest
import tifffile
from image_file_kit import write_images
from microscope_kit import OPTICS, RecordingSink, record

from rtfocus.errors import ConfigError, InputError
from rtfocus.images.metadata import OutputImage
from rtfocus.images.reading import open_images


def replay(path, **settings):
    channels = settings.pop("channels", [{"name": "default", "optics": OPTICS}])
    microscope = {"source": "replay", "path": path, **settings}
    return {"microscope": microscope, "channels": channels}


@pytest.fixture
def stack(tmp_path):
    """TIFF of axes t, c, z, y, x whose planes all differ."""
    planes = np.arange(2 * 2 * 3, dtype=np.uint16).reshape(2, 2, 3, 1, 1)
    planes = planes * 100 + np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)
    path = tmp_path / "stack.ome.tif"
    tifffile.imwrite(
        path,
        planes.transpose(0, 2, 1, 3, 4),
        metadata={
            "axes": "TZCYX",
            "PhysicalSizeX": 0.65,
            "PhysicalSizeY": 0.65,
            "PhysicalSizeZ": 2.0,
        },
    )
    return path, planes


@pytest.mark.parametrize("ending", ["tif", "zarr"])
def test_planes_come_out_as_they_went_in(stack, tmp_path, ending):
    path, planes = stack
    if ending == "zarr":
        series = open_images(path)[0]
        every = (series.read(**index) for index in series.indices())
        path = tmp_path / "stack.ome.zarr"
        write_images(path, [OutputImage(series, series.dtype, every)])
    # Files without channel names take those of the config, in order.
    channels = [{"name": name, "optics": OPTICS} for name in ("DAPI", "FITC")]
    sink, report = record(replay(path, channels=channels))
    found = sink.by_index()
    for t in range(2):
        for c in range(2):
            for z in range(3):
                np.testing.assert_array_equal(found[t, 0, c, z], planes[t, c, z])
    assert (report.frames, report.planned, report.reason) == (12, 12, "completed")
    series = sink.series
    assert series is not None
    assert series.sizes == {"t": 2, "p": 1, "c": 2, "z": 3}
    assert [c.name for c in series.channels] == ["DAPI", "FITC"]
    assert (series.pixel_size_um, series.z_step_um) == (0.65, 2.0)
    assert sink.headers[1].z_um == 2.0


def test_repeats_go_on_in_time(stack):
    sink, report = record(replay(stack[0], repeats=3))
    assert report.frames == 36
    assert sink.series is not None
    assert sink.series.sizes["t"] == 6
    assert len(sink.by_index()) == 36


def test_a_folder_of_single_images_is_a_film(tmp_path):
    for number in range(5):
        tifffile.imwrite(tmp_path / f"a{number}.tif", np.full((9, 7), number, "u1"))
    sink, _ = record(replay(tmp_path, pixel_size_um=0.65))
    assert sink.series is not None
    assert sink.series.sizes == {"t": 5, "p": 1, "c": 1, "z": 1}
    assert [p[0, 0] for p in sink.pixels] == [0, 1, 2, 3, 4]
    assert sink.series.channels[0].optics is not None


def test_several_stacks_are_positions(tmp_path):
    for name in ("left", "right"):
        tifffile.imwrite(
            tmp_path / f"{name}.tif",
            np.full((4, 9, 7), len(name), "u2"),
            imagej=True,
            metadata={"axes": "ZYX"},
        )
    sink, _ = record(replay(tmp_path, pixel_size_um=0.65))
    assert sink.series is not None
    assert [p.name for p in sink.series.positions] == ["left", "right"]
    assert (sink.series.sizes["p"], sink.series.sizes["z"]) == (2, 4)
    assert {k[1]: v[0, 0] for k, v in sink.by_index().items()} == {0: 4, 1: 5}


def test_the_rate_is_kept(tmp_path):
    for number in range(6):
        tifffile.imwrite(tmp_path / f"a{number}.tif", np.zeros((9, 7), "u1"))
    sink, report = record(replay(tmp_path, frames_per_s=20, pixel_size_um=0.65))
    assert report.seconds >= 5 / 20
    assert report.lateness is not None
    assert [h.planned_s for h in sink.headers] == pytest.approx(
        [n / 20 for n in range(6)]
    )
    assert all(h.actual_s >= h.planned_s for h in sink.headers)


def write(folder, *planes):
    """Write single planes as img_1.tif, img_2.tif ... img_12.tif."""
    folder.mkdir()
    for number, plane in enumerate(planes, start=1):
        tifffile.imwrite(folder / f"img_{number}.tif", plane)
    return folder


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (np.zeros((9, 8), "u1"), r"7 x 9 px \|u1.*img_1.tif.*8 x 9 px \|u1.*img_3.tif"),
        (np.zeros((9, 7), "u2"), r"7 x 9 px <u2.*img_3.tif"),
        (np.zeros((9, 7, 3), "u1"), r"7 x 9 px \|u1 RGB.*img_3.tif"),
    ],
)
def test_images_that_differ_are_refused_before_the_first(other, said, tmp_path):
    planes = [np.zeros((9, 7), "u1")] * 4
    planes[2] = other
    sink = RecordingSink()
    with pytest.raises(InputError, match=said):
        record(replay(write(tmp_path / "mix", *planes), pixel_size_um=0.65), sink)
    assert sink.series is None


def test_images_of_different_pixel_sizes_are_refused(tmp_path):
    for name, size_um in (("a", 0.65), ("b", 0.325)):
        sizes = {"PhysicalSizeX": size_um, "PhysicalSizeY": size_um}
        path = tmp_path / f"{name}.ome.tif"
        tifffile.imwrite(path, np.zeros((9, 7), "u1"), metadata=sizes)
    with pytest.raises(InputError, match=r"0\.65 um per pixel: a\.ome.*0\.325 um"):
        record(replay(tmp_path))
    sink, _ = record(replay(tmp_path, pixel_size_um=0.65))
    assert len(sink.pixels) == 2


def test_numbers_in_names_count_as_numbers(tmp_path):
    planes = [np.full((9, 7), number, "u1") for number in range(1, 13)]
    sink, report = record(replay(write(tmp_path / "a", *planes), pixel_size_um=0.65))
    assert [p[0, 0] for p in sink.pixels] == list(range(1, 13))
    assert [h.index["t"] for h in sink.headers] == list(range(12))
    assert report.outcome.is_complete


def test_channels_are_those_of_the_file_in_its_order(tmp_path):
    for name, order in (("a", ("Cy5", "DAPI")), ("b", ("DAPI", "Cy5"))):
        planes = [np.full((9, 7), 100 * len(channel), "u2") for channel in order]
        metadata = {
            "axes": "CYX",
            "Channel": {"Name": list(order)},
            "PhysicalSizeX": 0.65,
            "PhysicalSizeY": 0.65,
        }
        tifffile.imwrite(tmp_path / f"{name}.ome.tif", planes, metadata=metadata)
    channels = [{"name": "DAPI", "optics": OPTICS}, {"name": "Cy5"}]
    sink, _ = record(replay(tmp_path, channels=channels))
    series = sink.series
    assert series is not None
    assert [c.name for c in series.channels] == ["Cy5", "DAPI"]
    assert [c.optics is not None for c in series.channels] == [False, True]
    assert series.sizes == {"t": 1, "p": 2, "c": 2, "z": 1}
    # Cy5 is 300, DAPI is 400, in whatever order a file keeps them.
    values = {index: pixels[0, 0] for index, pixels in sink.by_index().items()}
    assert values == {
        (0, 0, 0, 0): 300,
        (0, 0, 1, 0): 400,
        (0, 1, 0, 0): 300,
        (0, 1, 1, 0): 400,
    }


def test_frames_of_micro_manager_keep_their_axes(tmp_path):
    for p, t, c, z in np.ndindex(2, 2, 2, 2):
        name = f"img_channel{c:03d}_position{p:03d}_time{t:09d}_z{z:03d}.tif"
        value = 1000 * (p + 1) + 100 * t + 10 * c + z
        tifffile.imwrite(tmp_path / name, np.full((9, 7), value, "u2"))
    sink, report = record(replay(tmp_path, pixel_size_um=0.65))
    assert sink.series is not None
    assert sink.series.sizes == {"t": 2, "p": 2, "c": 2, "z": 2}
    for (t, p, c, z), pixels in sink.by_index().items():
        assert pixels[0, 0] == 1000 * (p + 1) + 100 * t + 10 * c + z
    assert (report.frames, report.planned) == (16, 16)


def test_broken_files_are_named_and_the_others_are_played(tmp_path):
    folder = write(tmp_path / "a", *[np.full((9, 7), n, "u1") for n in range(4)])
    (folder / "img_2.tif").write_bytes(b"no image at all")
    cut = (folder / "img_3.tif").read_bytes()
    (folder / "img_3.tif").write_bytes(cut[:-20])
    sink, report = record(replay(folder, pixel_size_um=0.65))
    assert {p[0, 0] for p in sink.pixels} == {0, 3}
    assert (report.planned, report.frames, report.not_acquired) == (4, 2, 2)
    assert not report.outcome.is_complete
    for name in ("img_2.tif", "img_3.tif"):
        assert any(name in text for text in report.warnings), report.warnings
    assert "img_2.tif" in str(report.outcome)


def test_colour_images_are_replayed(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "rgb.tif", picture, photometric="rgb")
    sink, _ = record(replay(tmp_path / "rgb.tif", pixel_size_um=0.65))
    np.testing.assert_array_equal(sink.pixels[0], picture)


def test_stop_ends_a_slow_replay_at_once(tmp_path):
    for number in range(3):
        tifffile.imwrite(tmp_path / f"a{number}.tif", np.zeros((9, 7), "u1"))
    stop = threading.Event()
    _, report = record(
        replay(tmp_path, frames_per_s=0.01, pixel_size_um=0.65),
        stop=stop,
        on_frame=lambda _: stop.set(),
    )
    assert (report.frames, report.reason) == (1, "canceled")
    assert report.seconds < 50


def test_a_failing_sink_is_raised(stack):
    sink = RecordingSink(fail_at=3)
    with pytest.raises(ConnectionError):
        record(replay(stack[0]), sink)
    assert sink.reasons == ["the recorder is gone"]


def test_nothing_to_replay_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^microscope\.path: .*nowhere"):
        record(replay(tmp_path / "nowhere.tif"))


def test_images_without_a_pixel_size_need_one(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((9, 7), "u1"))
    with pytest.raises(ConfigError, match="pixel size is unknown"):
        record(replay(tmp_path / "a.tif", channels=[{"name": "default"}]))
