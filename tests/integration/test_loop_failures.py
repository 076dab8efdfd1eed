"""What goes wrong in the loop ends it with one clear line and a readable store."""

import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
from loop_kit import (
    DEADLINE_S,
    OPTICS,
    command,
    failed,
    lines_written,
    process_of,
    read_journal,
    read_report,
    run_loop,
    sets,
    small,
    started,
    stored,
    wait_for,
    write_config,
)

import rtfocus
from rtfocus import app
from rtfocus.config import parse_config
from rtfocus.errors import ConfigError, EngineError, OutputError, WorkerError
from rtfocus.launch import SideProcess, on_free_ports, takes_files
from rtfocus.monitor import Monitor
from rtfocus.writers.check import check_run

ENDLESS = {"live": {"frames": None, "exposure_ms": 1}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MB."""
    if sys.platform != "linux":
        pytest.skip("needs tmpfs to make a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "rtfocus", folder]
    mounted = subprocess.run(mount, capture_output=True, encoding="utf-8", check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_folder_that_takes_no_files_is_told_before_either_side_starts(tmp_path):
    in_the_way = tmp_path / "runs"
    in_the_way.write_bytes(b"a file, where a folder is needed")
    config = small(in_the_way / "today", None)
    over = threading.Event()
    ways = [
        lambda: SideProcess(config, "acquire"),
        lambda: app.run(config, stop=over, abandon=over),
        lambda: app.process(on_free_ports(config), stop=over),
        lambda: app.serve(on_free_ports(config), stop=over),
    ]
    for way in ways:
        with pytest.raises(OutputError, match=r"nothing can be written in '.*runs'"):
            way()


def test_no_run_is_recorded_within_another(tmp_path, monkeypatch):
    inside = tmp_path / "first.rtfocus" / "raw.ome.zarr"
    inside.mkdir(parents=True)
    (tmp_path / "first.rtfocus" / "series.json").write_text("{}", "utf-8")
    with pytest.raises(OutputError, match=r"lies in a run, '.*first\.rtfocus'"):
        app.run(small(inside, None), stop=threading.Event(), abandon=threading.Event())
    assert list(inside.iterdir()) == []
    # By default the folder is below where one stands.
    monkeypatch.chdir(inside)
    with pytest.raises(OutputError, match=rf"such as '{re.escape(str(tmp_path))}'"):
        takes_files(Path("runs"))


def test_a_full_disk_ends_the_run_with_one_line(small_disk, tmp_path):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(4_000_000))
    store = {"codec": "none", "min_free_mb": 0}
    config = small(small_disk, None, acquisition=ENDLESS, store=store)
    path = write_config(tmp_path / "endless.yaml", config)
    said = failed(process_of("run", path, "--quiet", cwd=tmp_path))
    assert re.search(r"disk full|No space left", said), said
    folder = small_disk / "small.rtfocus"
    written = [x for x in read_journal(folder) if x["status"] == "written"]
    assert len(written) > 10
    frames = {stored(folder, "raw", x["index"]["t"]).tobytes() for x in written}
    assert len(frames) == len(written)
    filler.unlink()
    report = check_run(folder, repair=True)
    assert report.problems == [], str(report)
    assert report.frames == len(written)


def test_a_nearly_full_disk_ends_the_run_with_a_finished_store(small_disk, tmp_path):
    store = {"codec": "none", "min_free_mb": 5}
    config = small(
        small_disk,
        None,
        acquisition=ENDLESS,
        store=store,
        microscope={"frames_per_s": 20},
    )
    path = write_config(tmp_path / "endless.yaml", config)
    said = failed(process_of("run", path, "--quiet", cwd=tmp_path))
    assert "store.min_free_mb" in said
    report = check_run(small_disk / "small.rtfocus")
    assert report.problems == [], str(report)
    assert report.frames > 5


def test_frames_that_no_worker_had_taken_when_one_failed_are_in_error(
    tmp_path, monkeypatch
):
    def fail(monitor, slot):
        wait_for(lambda: monitor.accounting.acquired == 8, "all frames")
        msg = f"no room for frame {slot.frame().sequence}"
        raise EngineError(msg)

    monkeypatch.setattr(Monitor, "arrived", fail)
    with pytest.raises(WorkerError, match="no room for frame 0"):
        run_loop(small(tmp_path, None))
    terms = read_report(tmp_path / "small.rtfocus")["accounting"]
    assert (terms["acquired"], terms["in_error"]) == (8, {"aborted": 8})
    assert terms["unaccounted"] == 0


def test_an_unknown_key_is_named_with_the_nearest(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("processing: {restoration: {methode: wiener}}\n", "utf-8")
    said = failed(command("run", path))
    assert "unknown key 'processing.restoration.methode'" in said
    assert "did you mean 'method'?" in said
    said = failed(command("run", "demo", "--set", "transport.slot=4"))
    assert "unknown key 'transport.slot'; did you mean 'slots'?" in said


def test_no_such_config_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").mkdir()
    for name in ("nowhere", "nowhere.yaml"):
        said = failed(command("run", name))
        assert "democamera" in said
        assert name in said


def test_a_folder_called_like_a_shipped_config_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    said = failed(command("run", "demo", "--set", "store.codec=gzip"))
    assert "'store.codec'" in said
    assert "blosc-lz4" in said


def test_a_missing_engine_names_what_was_looked_for(tmp_path):
    options = sets(f"run.folder={tmp_path}", "processing.classifier=nosuch")
    said = failed(command("run", "demo", "--quiet", *options))
    assert "engine 'nosuch' not found; looked for engine.yaml in" in said
    assert "rtfocus train" in said
    assert not list(tmp_path.glob("*.rtfocus"))


def test_an_engine_outside_its_optics_is_refused_with_the_remedy(
    tmp_path, engine_folder
):
    coarse = {**OPTICS, "pixel_size_um": 6.5}
    config = small(tmp_path, engine_folder).model_dump(mode="json")
    config["channels"][0]["optics"] = coarse
    with pytest.raises(EngineError, match="sharpness") as refusal:
        run_loop(parse_config(config))
    assert "processing.ignore_optics" in str(refusal.value)
    assert not list(tmp_path.glob("*.rtfocus"))


def test_a_region_too_small_to_tell_its_defocus_leaves_no_folder(
    tmp_path, engine_folder
):
    config = small(tmp_path, engine_folder, microscope={"height_px": 12})
    with pytest.raises(ConfigError, match=r"\(12, 256\) is too small"):
        run_loop(config)
    assert not list(tmp_path.glob("*.rtfocus"))


def test_a_clock_that_is_set_amid_a_run_leaves_its_times_as_they_were(
    tmp_path, engine_folder, monkeypatch
):
    told, calls = time.time_ns, itertools.count()
    # Somebody sets it back by an hour, as time servers and summer's end do.
    monkeypatch.setattr(
        time, "time_ns", lambda: told() - (3600 * 10**9 if next(calls) > 80 else 0)
    )
    acquisition = {"live": {"frames": 40, "exposure_ms": 1}}
    run = run_loop(small(tmp_path, engine_folder, acquisition=acquisition))
    assert next(calls) > 120
    captured = [line["captured_ns"] for line in run.journal]
    assert captured == sorted(captured)
    assert captured[-1] - captured[0] < 600e9
    assert all(0 <= x["durable_ns"] - x["received_ns"] < 600e9 for x in run.journal)
    assert 0 <= run.report["stages"]["capture_to_estimate"]["p50_ms"] < 600e3


def test_a_wrong_adapter_path_is_told_by_the_other_side(tmp_path):
    nowhere = tmp_path / "nowhere"
    options = sets(f"run.folder={tmp_path}", f"microscope.adapter_path={nowhere}")
    said = failed(command("run", "democamera", "--quiet", *options))
    assert "microscope side failed: microscope.adapter_path" in said
    assert str(nowhere) in said


def test_an_unknown_channel_is_told_with_those_there_are():
    plan = "acquisition.mda.channels=[{{config: {}}}]"
    said = failed(command("acquire", "demo", *sets(plan.format("GFP"))))
    assert "no channel 'GFP'" in said
    assert "group 'Channel': DAPI" in said
    grouped = plan.format("DAPI, group: Light")
    said = failed(command("acquire", "demo", *sets(grouped)))
    assert "no channel group 'Light'" in said
    inner = '{"stage_positions": [{"sequence": {"channels": ["GFP"]}}]}'
    said = failed(command("acquire", "demo", *sets(f"acquisition.mda={inner}")))
    assert "no channel 'GFP'" in said


def test_nothing_to_acquire_is_told(tmp_path):
    options = sets(f"run.folder={tmp_path}", "acquisition={}")
    said = failed(command("acquire", "democamera", "--quiet", *options))
    assert "neither 'mda'" in said


def test_a_replay_of_nothing_is_told(tmp_path):
    options = sets(f"microscope.path={tmp_path / 'none.tif'}")
    said = failed(command("acquire", "replay", "--quiet", *options))
    assert "none.tif'; set it to an image file" in said


def test_a_microscope_side_that_is_not_there_is_told(tmp_path, engine_folder):
    patience = {"connect_timeout_s": 0.3}
    config = on_free_ports(small(tmp_path, engine_folder, transport=patience))
    path = write_config(tmp_path / "config.yaml", config)
    said = failed(command("process", path, "--once", "--quiet"))
    assert config.transport.control in said
    assert "0.3 s" in said


def test_a_processor_that_is_not_there_is_told(tmp_path):
    image = tmp_path / "image.tif"
    tifffile.imwrite(image, np.zeros((20, 20), np.uint16))
    patience = {"connect_timeout_s": 0.3}
    source = {"source": "replay", "path": str(image), "pixel_size_um": 0.65}
    config = small(tmp_path, None, transport=patience, microscope=source)
    path = write_config(tmp_path / "config.yaml", on_free_ports(config))
    said = failed(command("acquire", path, "--quiet"))
    assert "start `rtfocus process`" in said


@contextmanager
def both_sides(path, folder):
    """Yield the processes of the processor and the microscope, five frames written."""
    with (
        started("process", path, "--once", "--quiet", cwd=path.parent) as processor,
        started("acquire", path, "--quiet", cwd=path.parent) as microscope,
    ):
        wait_for(
            lambda: (
                lines_written(folder) >= 5
                or None not in (processor.poll(), microscope.poll())
            ),
            "five frames",
        )
        yield processor, microscope


def test_a_killed_processor_aborts_the_acquisition_when_asked_to(
    tmp_path, engine_folder
):
    # A peer silent for 6 heartbeats is lost.
    policy = {
        "on_stall": "abort",
        "stall_timeout_s": 1.0,
        "heartbeat_s": 0.1,
        "slots": 6,
    }
    config = small(
        tmp_path,
        None,
        acquisition=ENDLESS,
        transport=policy,
        microscope={"frames_per_s": 30},
    )
    path = write_config(tmp_path / "config.yaml", on_free_ports(config))
    folder = tmp_path / "small.rtfocus"
    with both_sides(path, folder) as (processor, microscope):
        processor.kill()
        _, errors = microscope.communicate(timeout=DEADLINE_S)
    assert microscope.returncode == 1, errors
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert "the recorder is lost" in line
    assert "transport.on_stall is abort" in line
    assert re.search(r"\d+ frames are not durable", line), line
    report = check_run(folder, repair=True)
    assert report.problems == [], str(report)
    assert report.frames >= 5


def test_a_microscope_side_that_was_killed_is_not_a_stop_by_the_user(tmp_path):
    config = small(tmp_path, None, acquisition=ENDLESS)
    path = write_config(tmp_path / "config.yaml", config)
    folder = tmp_path / "small.rtfocus"
    with started("run", path, "--quiet", cwd=tmp_path) as both:
        wait_for(
            lambda: lines_written(folder) >= 5 or both.poll() is not None, "five frames"
        )
        (microscope,) = psutil.Process(both.pid).children()
        microscope.kill()
        _, errors = both.communicate(timeout=DEADLINE_S)
    assert both.returncode == 1, errors
    report = check_run(folder)
    assert report.problems == [], str(report)
    outcome = rtfocus.open_run(folder).outcome
    assert not outcome.was_stopped
    assert not outcome.is_complete
    assert outcome.reason.startswith("microscope side failed"), outcome.reason


def test_a_publisher_that_was_killed_is_told_with_where_its_frames_are(tmp_path):
    config = small(tmp_path, None, acquisition=ENDLESS, transport={"heartbeat_s": 0.1})
    path = write_config(tmp_path / "config.yaml", on_free_ports(config))
    folder = tmp_path / "small.rtfocus"
    with both_sides(path, folder) as (processor, microscope):
        microscope.kill()
        _, errors = processor.communicate(timeout=DEADLINE_S)
    assert processor.returncode == 1, errors
    terms = read_report(folder)["accounting"]
    account = f"; {terms['acquired']} acquired = {terms['written']} written + "
    assert account in errors
    assert f"in error, in '{folder}'" in errors
