"""Evaluations by many processes: what one finds, whatever fails."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tifffile
from batch_kit import picture, two_workers, write_pairs
from loop_kit import command, failed, succeeded
from scipy.ndimage import gaussian_filter

from rtfocus.errors import ExitCode

pytest.importorskip("distributed", reason="needs rtfocus[batch]")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six fields sharp and blurred, with optics beside them."""
    return write_pairs(tmp_path / "mine")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler with two workers."""
    with two_workers() as address:
        yield address


def evaluated(said: str, out: Path) -> dict[str, Any]:
    """Return what a report says apart from time, place and milliseconds."""
    found = json.loads((out / "evaluation.json").read_text("utf-8"))
    for varies in ("command", "taken", "machine"):
        assert found.pop(varies)
    for one in found["outcomes"]:
        for cost in ("ms_per_megapixel", "cpu_ms_per_megapixel"):
            assert one.pop(cost) > 0
    rows = [line.split("│")[:-3] for line in said.splitlines() if "│" in line]
    assert rows
    pictures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    return {**found, "rows": rows, "pictures": pictures}


def test_engines_are_evaluated_by_many_processes_as_by_one(
    pairs: Path,
    engine_folder: Path,
    tmp_path: Path,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Workers stand elsewhere: what is relative is not to them.
    monkeypatch.chdir(tmp_path)
    published = tmp_path / "published" / "bbbc006_factin"
    published.mkdir(parents=True)
    for number, name in enumerate(("A_sharp", "A_defocus08um", "A_defocus10um")):
        soft = gaussian_filter(picture(9).astype("f4"), 2.0 * number)
        tifffile.imwrite(published / f"{name}.tif", (soft / 8).astype("u1"))
    asked = ("evaluate", "sharpness", "wiener", "--classifier", "sharpness")
    asked += ("--data", pairs.name, "--data", "bbbc006_factin")
    asked += ("--data-folder", "published")
    asked += ("--engine-folder", os.path.relpath(engine_folder, tmp_path))
    many = ("--scheduler", address)
    alone = evaluated(succeeded(command(*asked, "-o", "one")), tmp_path / "one")
    said = succeeded(command(*asked, "-o", "out", *many))
    assert evaluated(said, tmp_path / "out") == alone
    assert sorted(alone["pictures"]) == [
        "confusion_sharpness_bbbc006_factin.png",
        "images_bbbc006_factin.png",
        "images_mine.png",
    ]
    assert len(alone["outcomes"][1]["frames"]) == 6
    assert alone["outcomes"][2]["levels"]["tiles"] > 0
    assert "exists" in failed(command(*asked, "-o", "out", *many))
    said = failed(command(*asked, "-o", "x", "--resources", "GPU=1"))
    assert "give --scheduler" in said


def test_an_evaluation_goes_without_what_fails(
    pairs: Path, engine_folder: Path, tmp_path: Path, address: str
) -> None:
    blurred = pairs / "blurred"
    (blurred / "f1.tif").write_bytes((blurred / "f1.tif").read_bytes()[:5000])
    tifffile.imwrite(blurred / "f2.tif", picture(2)[:100])
    asked = ("evaluate", "wiener", "--scheduler", address, "--data", pairs)
    asked += ("--classifier", "sharpness", "--engine-folder", engine_folder)
    told = command(*asked, "-o", tmp_path / "out")
    assert told.code == ExitCode.INCOMPLETE
    said = "2 of 6 fields failed: 'mine: blurred f2', 'mine: blurred f1'; the rest is"
    assert said in told.err
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    size, broken = sorted(found["failed"], key=lambda line: "is cut off" in line)
    assert size.startswith("wiener on mine: blurred f2: ")
    assert broken.startswith("wiener on mine: blurred f1: ")
    assert broken in (tmp_path / "out" / "evaluation.md").read_text("utf-8")
    assert len(found["outcomes"][0]["frames"]) == 4
    assert (tmp_path / "out" / "images_mine.png").exists()

    # Where nothing is left, nothing is written.
    for path in blurred.iterdir():
        tifffile.imwrite(path, picture(2)[:100])
    told = command(*asked, "-o", tmp_path / "none")
    assert told.code == ExitCode.INPUT
    assert "6 of 6 fields failed" in told.err
    assert not (tmp_path / "none").exists()
