"""Z-stacks: `classify` says where they are in focus, by every door the same."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from batch_kit import OPTICS
from loop_kit import command, succeeded

from rtfocus.channel import OpticalSystem
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens import draw_specimen

STEP_UM = 1.5
FOCI = 3.0, 4.5
"""Planes in focus of two channels."""
PLANES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of two channels, one whose axis has no name, and a film."""
    place = tmp_path_factory.mktemp("stacks")
    rng = np.random.default_rng(4)
    optics = OpticalSystem(0.75, 520.0, 0.325)
    sharp = draw_specimen("nuclei", (128, 128), rng)
    light = 200 + 3000 * sharp / sharp.max()
    planes = np.stack(
        [
            [
                rng.poisson(blur(light, compute_psf(optics, (z - focus) * STEP_UM)))
                for focus in FOCI
            ]
            for z in range(PLANES)
        ]
    ).astype("<u2")
    known = {"axes": "ZCYX", "PhysicalSizeZ": STEP_UM, "PhysicalSizeZUnit": "µm"}
    tifffile.imwrite(place / "named.ome.tif", planes, metadata=known)
    tifffile.imwrite(place / "plain.tif", planes[:, 0], metadata=None)
    tifffile.imwrite(place / "film.ome.tif", planes[:, 0], metadata={"axes": "TYX"})
    return place


def found_by(place: Path, *asked: str | Path) -> tuple[bytes, bytes]:
    """Run ``classify`` in one or several steps; return its JSON and its table."""
    both = ("--json", place.with_suffix(".json"), "--csv", place.with_suffix(".csv"))
    steps = [("--init",), ("--unit", "1/2"), ("--unit", "2/2"), ("--finish",)]
    for more in steps if asked[-1] == "array" else [()]:
        succeeded(
            command("classify", *asked[: 1 if more else None], *OPTICS, *both, *more)
        )
    return both[1].read_bytes(), both[3].read_bytes()


def test_every_door_says_where_stacks_are_in_focus(
    folder: Path, tmp_path: Path
) -> None:
    said = succeeded(command("classify", folder, *OPTICS))
    one = found_by(tmp_path / "one", folder)
    assert one == found_by(tmp_path / "array", folder, "array")
    assert one == found_by(tmp_path / "many", folder, "--scheduler", "local:2")
    stacks = json.loads(one[0])["stacks"]
    # Files in their order; a film is none.
    assert [(Path(s["path"]).name, s["axis"], s["assumed"]) for s in stacks] == [
        ("named.ome.tif", "z", False),
        ("named.ome.tif", "z", False),
        ("plain.tif", "t", True),
    ]
    for stack, focus in zip(stacks, (*FOCI, FOCI[0]), strict=True):
        assert stack["place"] == "within"
        assert stack["focus_plane"] == pytest.approx(focus, abs=1)
        low, high = stack["likely"]
        assert low <= focus <= high
    first = stacks[0]["focus_plane"]
    assert stacks[0]["focus_offset_um"] == pytest.approx(first * STEP_UM)
    assert stacks[2]["focus_offset_um"] is None
    assert f"named c0 t0): in focus at plane {first:.1f} of 0 to 7" in said.replace(
        "t0 c0", "c0 t0"
    )
    assert "(plain c0 z0): if its planes are a z-stack: in focus at plane" in said
    assert "film z0" not in said
    rows = list(csv.DictReader(one[1].decode("utf-8-sig").splitlines()))
    assert_from_focus(rows, stacks[0])


def assert_from_focus(rows: list[dict[str, str]], stack: dict[str, Any]) -> None:
    """Compare the rows of planes with the stack of the first channel."""
    by_z = [row for row in rows if row["image"] == "named.ome.tif" and row["c"] == "0"]
    assert len(by_z) == PLANES
    for row in by_z:
        planes = int(row["z"]) - stack["focus_plane"]
        assert float(row["from_focus_planes"]) == pytest.approx(planes)
        assert float(row["from_focus_um"]) == pytest.approx(planes * STEP_UM)
        # What a single plane says stays what it is.
        assert float(row["defocus_um"]) >= 0
    plain = [row for row in rows if row["image"] == "plain.tif"]
    assert all(row["from_focus_planes"] and not row["from_focus_um"] for row in plain)
    film = [row for row in rows if row["image"] == "film.ome.tif"]
    assert len(film) == PLANES
    assert not any(row["from_focus_planes"] for row in film)


def test_a_recorded_stack_is_in_focus_where_it_was(
    shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "dfnn_mitochondria" / "stack_zyx.tif"
    if not source.is_file():
        pytest.skip(f"no recorded stack at {source}")
    place = tmp_path / "found.json"
    said = succeeded(command("classify", source, "--json", place))
    (stack,) = json.loads(place.read_text("utf-8"))["stacks"]
    assert stack["focus_plane"] == pytest.approx(9, abs=1)
    assert stack["explained"] > 0.95
    assert "if its planes are a z-stack: in focus at plane" in said
