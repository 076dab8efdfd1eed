"""Ctrl-C: what was acquired is finished, nothing is lost, nobody is left."""

import signal
import sys
from pathlib import Path

import psutil
import pytest
from loop_kit import (
    DEADLINE_S,
    assert_whole,
    command,
    interrupt_group,
    lines_written,
    read_report,
    small,
    started,
    wait_for,
    write_config,
)

from rtfocus.errors import ExitCode
from rtfocus.launch import on_free_ports

ENDLESS = {"live": {"frames": None, "exposure_ms": 1}}
RATE = {"frames_per_s": 30}

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="signals of POSIX process groups"
)


def assert_stopped_cleanly(folder: Path) -> None:
    assert_whole(folder)
    report = read_report(folder)
    assert report["reason"] in ("canceled", "stopped")
    assert report["planned_frames"] is None
    assert report["accounting"]["written"] >= 5


@pytest.mark.parametrize("whom", ["group", "parent", "terminal"])
def test_an_interrupted_endless_run_is_finished(whom, tmp_path, engine_folder):
    config = small(tmp_path, engine_folder, acquisition=ENDLESS, microscope=RATE)
    path = write_config(tmp_path / "endless.yaml", config)
    folder = tmp_path / "small.rtfocus"
    with started("run", path, "--quiet", cwd=tmp_path) as process:
        wait_for(
            lambda: lines_written(folder) >= 5 or process.poll() is not None,
            "five frames",
        )
        assert process.poll() is None, process.communicate()
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 1
        if whom == "group":
            interrupt_group(process)
        else:
            # A terminal that is closed tells so.
            number = signal.SIGTERM if whom == "parent" else signal.SIGHUP
            process.send_signal(number)
        said, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (0, "")
    assert "0 dropped + 0 in error" in said
    assert not any(child.is_running() for child in children)
    assert_stopped_cleanly(folder)


def test_a_plan_stopped_by_the_user_says_how_much_there_is(tmp_path):
    plan = {"mda": {"time_plan": {"interval": 0, "loops": 900}}, "live": None}
    config = small(tmp_path, None, acquisition=plan, microscope=RATE)
    path = write_config(tmp_path / "long.yaml", config)
    folder = tmp_path / "small.rtfocus"
    with started("run", path, "--quiet", cwd=tmp_path) as process:
        wait_for(
            lambda: lines_written(folder) >= 5 or process.poll() is not None,
            "five frames",
        )
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (ExitCode.INCOMPLETE, "")
    terms = read_report(folder)["accounting"]
    written = terms["written"]
    assert terms["planned"] == 900 == written + terms["not_acquired"]
    expected = f"stopped by the user: {written} of 900 planned frames"
    assert expected in " ".join(said.split())
    checked = command("check", folder)
    assert checked.code == ExitCode.INCOMPLETE
    assert expected in checked.out


def test_two_commands_end_in_turn(tmp_path, engine_folder):
    """`acquire` ends on Ctrl-C; `process --once` then ends by itself."""
    config = small(tmp_path, engine_folder, acquisition=ENDLESS, microscope=RATE)
    path = write_config(tmp_path / "endless.yaml", on_free_ports(config))
    folder = tmp_path / "small.rtfocus"
    with (
        started("process", path, "--once", cwd=tmp_path) as processor,
        started("acquire", path, cwd=tmp_path) as microscope,
    ):
        wait_for(
            lambda: (
                lines_written(folder) >= 5
                or None not in (processor.poll(), microscope.poll())
            ),
            "five frames",
        )
        microscope.send_signal(signal.SIGINT)
        said, errors = microscope.communicate(timeout=DEADLINE_S)
        assert microscope.returncode == 0, errors
        assert "stopped by the user: " in said
        said, errors = processor.communicate(timeout=DEADLINE_S)
        assert processor.returncode == 0, errors
    assert "0 dropped + 0 in error" in said
    assert_stopped_cleanly(folder)
