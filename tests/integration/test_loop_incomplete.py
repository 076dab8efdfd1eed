"""A series with fewer frames than planned never reports success, wherever they went."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from loop_kit import command, process_of, read_report, run_loop, sets, small, stored

from rtfocus.errors import ExitCode
from rtfocus.microscope.virtual_devices import VirtualCamera

FILM = {"mda": {"time_plan": {"interval": 0, "loops": 12}}, "live": None}


def failing_camera(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the virtual camera fail within its hardware sequence."""
    whole = VirtualCamera.start_sequence

    def broken(camera, n, get_buffer):
        for number, tags in enumerate(whole(camera, n, get_buffer)):
            if number == after:
                msg = "USB cable pulled"
                raise RuntimeError(msg)
            yield tags

    monkeypatch.setattr(VirtualCamera, "start_sequence", broken)


@pytest.mark.parametrize("acquisition", [FILM, {"live": {"frames": 12}}])
def test_a_camera_that_fails_half_way(acquisition, tmp_path, monkeypatch):
    failing_camera(monkeypatch, after=5)
    run = run_loop(small(tmp_path, None, acquisition=acquisition))
    terms = run.report["accounting"]
    assert (terms["planned"], terms["acquired"], terms["written"]) == (12, 5, 5)
    assert (terms["camera_lost"], terms["not_acquired"]) == (7, 0)
    assert "USB cable pulled" in run.report["reason"]
    for place, pixels in run.sent.items():
        np.testing.assert_array_equal(run.stored("raw", *place), pixels)
    said = command("check", run.folder)
    assert said.code == ExitCode.INCOMPLETE
    assert "5 of 12 planned frames; 7 lost by the camera: " in said.out
    assert "USB cable pulled" in said.out


def test_the_command_says_what_is_missing_and_why(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        tifffile.imwrite(images / f"{number}.tif", np.full((64, 64), number, "u2"))
    (images / "2.tif").write_bytes(b"no image at all")
    options = sets(
        f"run.folder={tmp_path}",
        "run.name=film",
        f"microscope={{source: replay, path: '{images}', pixel_size_um: 0.65}}",
        "processing.classifier=null",
        "processing.restoration.method=none",
    )
    said = process_of("run", "replay", *options, "--quiet", cwd=tmp_path)
    assert said.code == ExitCode.INCOMPLETE, said.err
    assert said.err == ""
    text = " ".join(said.out.split())
    assert "3 of 4 planned frames; 1 not acquired: " in text
    assert "2.tif" in text
    assert "4 planned = 3 acquired + 0 lost by the camera + 1 not acquired" in text
    folder = tmp_path / "film.rtfocus"
    assert read_report(folder)["planned_frames"] == 4
    assert [stored(folder, "raw", t).max() for t in range(3)] == [0, 1, 3]


def test_a_plan_of_two_geometries_leaves_no_folder(tmp_path):
    pytest.importorskip("mm_test_adapters", reason="the DemoCamera is not installed")
    channels = "[{config: DAPI, exposure: 1}, {config: LowRes, group: Camera}]"
    options = sets(f"run.folder={tmp_path}", f"acquisition.mda.channels={channels}")
    said = process_of("run", "democamera", *options, "--quiet", cwd=tmp_path)
    assert said.code == ExitCode.CONFIG
    (line,) = said.err.splitlines()
    assert "'LowRes' of group 'Camera' (first at image" in line
    assert list(Path(tmp_path).glob("*.rtfocus")) == []


def test_a_misspelt_plan_keeps_its_exit_code_and_its_line(tmp_path):
    options = sets(f"run.folder={tmp_path}", "acquisition.mda.channels=[{confg: DAPI}]")
    said = process_of("run", "demo", *options, "--quiet", cwd=tmp_path)
    assert said.code == ExitCode.CONFIG
    (line,) = said.err.splitlines()
    assert "'acquisition.mda.channels[0].confg'; did you mean 'config'?" in line
