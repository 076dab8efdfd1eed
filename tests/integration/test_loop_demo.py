"""The demo: what a newcomer sees first."""

import re
import sys

import numpy as np
from loop_kit import (
    assert_whole,
    needs_shipped_engine,
    process_of,
    read_report,
    sets,
    succeeded,
)
from PIL import Image

FIGURES = re.compile(
    r"restored ([\d.]+) dB against raw ([\d.]+) dB .*"
    r"correlation (-?[\d.]+), mean error ([\d.]+) um",
    re.DOTALL,
)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_demo_delivers_stores_report_and_picture(tmp_path):
    needs_shipped_engine()
    plain = ("run.folder=out", "acquisition.mda.time_plan.loops=1")
    mine = ("autofocus.mode=off", "processing.classifier=null", *plain)
    succeeded(process_of("run", "demo", "-q", *sets(*mine), cwd=tmp_path))
    before = contents(tmp_path / "out" / "demo.rtfocus")
    options = sets("acquisition.mda.time_plan={interval: 0.1, loops: 8}")
    said = succeeded(process_of("demo", "--folder", "out", *options, cwd=tmp_path))
    assert contents(tmp_path / "out" / "demo.rtfocus") == before, "a run is replaced"
    folder = tmp_path / "out" / "demo-2.rtfocus"
    counted = re.search(r"= 8 written \+ (\d+) focus probes \+ 0 dropped \+ 0 in", said)
    assert counted is not None, said
    assert int(counted[1]) >= 3
    assert re.search(r"focus held within ([\d.]+) um", said)
    assert_whole(folder, frames=8)
    report = read_report(folder)
    assert report["reason"] == "completed"
    assert report["totals"]["stored"] == dict.fromkeys(
        ("raw", "restored", "defocus", "confidence", "deviation"), 8
    )
    assert report["stages"]["restore"]["count"] == 8
    way = "shared memory" if sys.platform in ("linux", "win32") else "TCP"
    assert report["came_by"] == {way: 8 + int(counted[1])}
    assert f"frames came by: {way} " in said
    assert "frames came by" in (folder / "report.html").read_text("utf-8")
    figures = FIGURES.search(said)
    assert figures is not None, said
    restored_db, raw_db, correlation, error_um = map(float, figures.groups())
    assert restored_db > raw_db + 1.0
    # The surface lies 0 to 10 um away: one that guesses has 0 and 3 um.
    assert correlation > 0.85
    assert error_um < 2.0
    assert str(folder / "picture.png").removeprefix(f"{tmp_path}/") in said
    with Image.open(folder / "picture.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    # Three panels of 512 px in each of two rows.
    assert pixels.shape[0] >= 1024
    assert pixels.shape[1] >= 1536
    for rows in np.array_split(pixels, 2, axis=0):
        for panel in np.array_split(rows, 3, axis=1):
            assert panel.std() > 10, "an empty panel"
