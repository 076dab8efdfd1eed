"""The whole loop loses nothing that was reported durable when it is killed.

Real sockets and a real ``rtfocus process`` that is killed while it records.
"""

import random
import signal
from pathlib import Path

import pytest
import zarr

from bench import kill_check
from bench.kill import RECORDED
from bench.kill_series import KilledSeries, Mode
from rtfocus.writers.check import check_run

RAW_ONLY = {"restored": False}


def kill(folder: Path, mode: Mode, kills: int, seed: int, *, at_finish: bool) -> Path:
    """Record a series through kills; return its run folder, in which all is well."""
    series = KilledSeries(folder, mode, random.Random(seed))
    outcome = series.run(kills, at_finish=at_finish, with_command=not at_finish)
    assert outcome.faults == []
    assert outcome.kills.total() == kills + at_finish
    assert outcome.resent > 0
    (run,) = (folder / "runs").glob("*.rtfocus")
    return run


def test_a_killed_run_goes_on_and_is_finished_by_a_repair(tmp_path: Path) -> None:
    run = kill(tmp_path, Mode("recorded", RAW_ONLY, RECORDED), 2, 5, at_finish=True)
    # What found no fault would have found two frames in each other's place.
    frames = check_run(run).frames
    raw = zarr.open_array(run / "raw.ome.zarr" / "0", mode="r+")
    raw[frames - 2 :] = raw[frames - 2 :][::-1]
    faults = kill_check.faults_at_end(run, frames)
    assert faults == [f"frame {frames - n} is wrong" for n in (2, 1)]


def test_a_frozen_processor_that_wakes_damages_nothing(tmp_path: Path) -> None:
    if not hasattr(signal, "SIGSTOP"):
        pytest.skip("this system freezes no processes")
    mode = Mode("frozen", RAW_ONLY, RECORDED)
    outcome = KilledSeries(tmp_path, mode, random.Random(7)).run_frozen()
    assert outcome.faults == []
    assert outcome.frames > 2


def test_killed_while_it_restores_and_shares_shards(
    tmp_path: Path, engine_folder: Path
) -> None:
    processing = {
        "classifier": "sharpness",
        "engine_folders": [str(engine_folder)],
        "restoration": {"method": "wiener"},
    }
    mode = Mode("processed", {"shard_frames": 4}, processing)
    kill(tmp_path, mode, 2, 6, at_finish=False)
