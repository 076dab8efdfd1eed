"""A processor killed while recording loses nothing that it reported durable."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import writer_kit
import yaozarrs
import zarr
from writer_kit import LIVE, indices, numbered, recording

from rtfocus.writers.check import check_run


def record_and_kill(folder: Path, seed: int, shard_frames: int) -> int:
    """Kill a recording process at a random moment; return what was durable."""
    program = [sys.executable, writer_kit.__file__, str(folder), str(shard_frames)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        stop_at = random.Random(seed).randint(1, 60)
        said = [process.stdout.readline() for _ in range(stop_at)]
        process.kill()
        said += process.stdout.readlines()
    # The kill may have torn the last line it said.
    whole = [int(line) for line in said if line.endswith("\n")]
    assert whole == list(range(whole[0], whole[0] + len(whole)))
    return whole[-1] + 1


def assert_holds(folder: Path, durable: int) -> None:
    """Every durable frame is there, correct, for zarr-python."""
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    restored = zarr.open_array(folder / "restored.ome.zarr" / "0", mode="r")
    for sequence, index in zip(range(durable), indices(LIVE, durable), strict=False):
        expected = numbered(sequence, LIVE)
        place = (index["t"], index["c"], 0)
        np.testing.assert_array_equal(raw[place], expected)
        np.testing.assert_array_equal(restored[place], expected[::-1])


def assert_journal_holds(folder: Path, frames: int) -> None:
    """Every line names a place in the order of the plan, and the right pixels."""
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    journal = (folder / "frames.ndjson").read_text()
    lines = [json.loads(line) for line in journal.splitlines()]
    assert [line["sequence"] for line in lines] == list(range(len(lines)))
    assert sum(line["status"] == "written" for line in lines) == frames
    for line, index in zip(lines, indices(LIVE, len(lines)), strict=False):
        assert {axis: line["index"][axis] for axis in index} == index
        if line["status"] == "written":
            place = (index["t"], index["c"], 0)
            np.testing.assert_array_equal(raw[place], numbered(line["sequence"], LIVE))
    assert raw.shape[0] == -(-len(lines) // 2)


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_run_opens_and_holds_what_was_durable(
    seed: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run.rtfocus"
    shard_frames = 1 if seed % 2 == 0 else 4
    durable = record_and_kill(folder, seed, shard_frames)
    for name in ("raw", "restored", "defocus"):
        yaozarrs.validate_zarr_store(str(folder / f"{name}.ome.zarr"))
    assert_holds(folder, durable)
    before = check_run(folder)
    assert any("cut off" in problem for problem in before.problems)
    assert before.frames >= durable
    after = check_run(folder, repair=True)
    assert after.problems == [], str(after)
    # Frames that were whole when the kill came, but not yet journalled, are kept.
    assert after.frames >= before.frames
    assert_journal_holds(folder, after.frames)
    report = json.loads((folder / "report.json").read_text())
    assert report["reason"] == "interrupted"
    assert report["accounting"]["unaccounted"] == 0
    assert not list(folder.rglob("*.__lock"))


def test_a_restarted_processor_goes_on_where_the_killed_one_was(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run.rtfocus"
    durable = record_and_kill(folder, 11, shard_frames=1)
    durable_again = record_and_kill(folder, 12, shard_frames=1)
    assert durable_again >= durable
    with recording(folder, LIVE) as run:
        first = run.writer.next_sequence
        assert first >= durable_again
        for sequence, index in enumerate(indices(LIVE, first)):
            if first <= sequence < first + 10:
                run.send(sequence, index)
        run.writer.drain()
        assert run.durable == list(range(first, first + 10))
        run.close(first + 10)
    assert run.accounting.summary()["written"] == first + 10
    assert run.accounting.unaccounted == 0
    assert_holds(folder, first + 10)
    report = check_run(folder)
    assert report.problems == [], str(report)
    assert report.frames == first + 10
