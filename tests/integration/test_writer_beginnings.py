"""A processor killed while it makes the run folder leaves one to go on with."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from writer_kit import make_series, numbered, recording

from rtfocus.config.model import RunConfig
from rtfocus.config.sections import StoreConfig
from rtfocus.writers.check import check_run
from rtfocus.writers.folder import run_folder

NOT_YET_MADE = [
    "series.json",
    "raw.ome.zarr",
    "raw.ome.zarr/0",
    "defocus.ome.zarr/0/zarr.json",
]


def half_made(folder: Path, absent: str) -> None:
    """Leave the folder of a run that was killed before `absent` was made."""
    with recording(folder, make_series()):
        pass
    if absent == "series.json":
        for store in folder.glob("*.ome.zarr"):
            shutil.rmtree(store)
    gone = folder / absent
    gone.unlink() if gone.is_file() else shutil.rmtree(gone)


@pytest.mark.parametrize("absent", NOT_YET_MADE)
def test_a_restarted_processor_completes_a_half_made_folder(
    absent: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run.rtfocus"
    half_made(folder, absent)
    run = RunConfig(name="run", folder=tmp_path)
    assert run_folder(run, StoreConfig(), make_series()) == folder
    with recording(folder, make_series()) as resumed:
        assert resumed.writer.next_sequence == 0
        for t in range(6):
            resumed.send(t, {"t": t})
        resumed.close(6)
    report = check_run(folder)
    assert report.problems == [], str(report)
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    for t in range(6):
        np.testing.assert_array_equal(raw[t, 0, 0], numbered(t, resumed.series))


@pytest.mark.parametrize("absent", NOT_YET_MADE[1:])
def test_a_repair_completes_a_half_made_folder(absent: str, tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    half_made(folder, absent)
    assert check_run(folder).problems != []
    report = check_run(folder, repair=True)
    assert report.problems == [], str(report)
    assert report.frames == 0


def test_pixels_that_no_journal_line_names_are_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    with recording(folder, make_series()) as run:
        for t in range(3):
            run.send(t, {"t": t})
        run.writer.drain()
    # Killed between the pixels and the first line: it is torn.
    journal = folder / "frames.ndjson"
    journal.write_bytes(journal.read_bytes()[:40])
    with recording(folder, make_series()) as resumed:
        assert resumed.writer.next_sequence == 0
        resumed.send(0, {"t": 0})
        resumed.close(1)
    report = check_run(folder)
    assert report.problems == [], str(report)
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    assert raw.shape[0] == 1
    np.testing.assert_array_equal(raw[0, 0, 0], numbered(0, resumed.series))
