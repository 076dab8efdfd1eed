"""Autofocus commands on the virtual microscope: once, held, calibrated."""

import json
import re
import signal
from pathlib import Path

import pytest
import yaml
from loop_kit import OPTICS, command, failed, succeeded
from microscope_kit import clock_of_images

from rtfocus.autofocus.devices import CoreStage
from rtfocus.autofocus.policy import load_calibration, with_measured_backlash
from rtfocus.cli.commands import read_config
from rtfocus.errors import ExitCode
from rtfocus.holding import HeldPlace

UNIT_UM = 0.451 / 0.36**2


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = {
        "microscope": {
            "source": "virtual",
            "height_px": 256,
            "width_px": 256,
            "specimen": {"kind": "nuclei", "seed": 3},
            "surface": {"z_um": 4.0},
        },
        "camera": {"offset_counts": 100},
        "channels": [{"name": "DAPI", "optics": OPTICS}],
        "processing": {"classifier": "delpnet", "threads": 1, "device": "cpu"},
    }
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(data), "utf-8")
    return path


def test_once_finds_focus_and_says_so_in_one_line(config: Path) -> None:
    journal = config.with_name("focus.ndjson")
    said = succeeded(command("autofocus", config, "--journal", journal))
    (line,) = said.strip().splitlines()
    found = re.search(r"focused, z 0\.00 -> ([\d.]+) um", line)
    assert found
    assert float(found[1]) == pytest.approx(4.0, abs=0.5 * UNIT_UM)
    lines = journal.read_text("utf-8").splitlines()
    kinds = [json.loads(text)["kind"] for text in lines]
    assert kinds[-1] == "verdict"
    assert kinds.count("look") >= 3


@pytest.mark.parametrize("option", ["--images", "--interval"])
def test_options_of_hold_are_refused_without_it(config: Path, option: str) -> None:
    said = command("autofocus", config, option, "3")
    assert said.code == ExitCode.CONFIG
    assert f"{option} cannot be used: focus is found once; give --hold" in said.err


def test_focus_out_of_reach_ends_with_its_reason_within_the_limits(
    config: Path,
) -> None:
    said = command(
        *("autofocus", config, "--set", "microscope.surface.z_um=18"),
        *("--set", "autofocus.low_um=-6", "--set", "autofocus.high_um=6"),
    )
    assert said.code == ExitCode.FAILED
    assert "not focused (" in said.out
    end = re.search(r"-> (-?[\d.]+) um", said.out)
    assert end
    assert -6 <= float(end[1]) <= 6


def test_a_specimen_that_drifts_meanwhile_is_found(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_of_images(monkeypatch)
    said = succeeded(
        command(
            *("autofocus", config),
            *("--set", "microscope.surface.drift_um_per_min=12"),
            # A flat drawing is sharper in focus than optics allow, within 0.5 um of z.
            *("--set", "microscope.surface.tilt_y_um=2"),
            *("--set", "microscope.frames_per_s=1"),
        )
    )
    found = re.search(r"focused, z 0\.00 -> ([\d.]+) um, (\d+) images", said)
    assert found
    seconds = int(found[2]) - 1
    drifted_um = 12.0 / 60 * seconds
    assert float(found[1]) == pytest.approx(4.0 + drifted_um, abs=0.5 * UNIT_UM)


def test_hold_follows_a_drift(config: Path) -> None:
    said = succeeded(
        command(
            *("autofocus", config, "--hold", "--images", "40", "--interval", "0.2"),
            *("--set", "microscope.surface.drift_um_per_min=44"),
            # The search before is not what is tested.
            *("--set", "microscope.surface.drift_from_s=3"),
        )
    )
    held = re.findall(r"held: ([+-][\d.]+) um", said)
    # 3.6 um in 5 s and more; half a depth of field, 1.7 um, is borne.
    assert sum(float(step) for step in held) > 1.8
    assert re.search(r"held: 40 images, z [-\d.]+ um at the end$", said.strip())


def test_hold_is_refused_where_the_hardware_holds(config: Path) -> None:
    asked = ("autofocus", config, "--hold", "--set", "autofocus.actuator=offset")
    assert "--hold cannot be used: the hardware" in failed(
        command(*asked), ExitCode.CONFIG
    )


def test_hold_searches_again_what_it_lost(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = clock_of_images(monkeypatch)
    follow, visits = HeldPlace.follow, [0]

    def follow_after_a_knock(place: HeldPlace, time_s: float) -> float:
        visits[0] += 1
        if visits[0] == 4:  # the plate sinks by 18 um at once
            waits.append(180.0)
        return follow(place, time_s)

    monkeypatch.setattr(HeldPlace, "follow", follow_after_a_knock)
    said = succeeded(
        command(
            *("autofocus", config, "--hold", "--images", "12", "--interval", "0"),
            *("--set", "microscope.surface.drift_um_per_min=6"),
            *("--set", "microscope.frames_per_s=50"),
            *("--set", "microscope.surface.drift_from_s=10"),
        )
    )
    found = re.findall(r"focused, z (-?[\d.]+) -> (-?[\d.]+) um", said)
    assert said.count("focus is lost and searched again (1 of 5)") == 1
    assert len(found) == 2, said
    sunk_um = 6.0 / 60 * (sum(waits) - 10)
    assert float(found[1][1]) == pytest.approx(4.0 + sunk_um, abs=0.6 * UNIT_UM)


@pytest.mark.parametrize(
    ("asked", "move"),
    # In a search; in the planes after it.
    [(("autofocus",), 2), (("calibrate", "-o", "focus.yaml"), 14)],
)
def test_ctrl_c_stops_the_stage(
    asked: tuple[str, ...], move: int, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    go_to, moves = CoreStage.go_to, [0]

    def go_to_with_ctrl_c(stage: CoreStage, z_um: float) -> None:
        moves[0] += 1
        if moves[0] == move:
            signal.raise_signal(signal.SIGINT)
        go_to(stage, z_um)

    monkeypatch.setattr(CoreStage, "go_to", go_to_with_ctrl_c)
    told = command(asked[0], config, *asked[1:])
    assert told.code == ExitCode.INTERRUPTED
    assert move <= moves[0] <= move + 3
    assert not config.with_name("focus.yaml").exists()


def test_a_calibration_and_a_journal_take_the_place_of_nothing_else(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(*_: object) -> None:
        pytest.fail("the stage moved")

    monkeypatch.setattr(CoreStage, "go_to", moved)
    folder, before = config.parent, config.read_bytes()
    thesis, notes = folder / "thesis.png", folder / "notes.txt"
    thesis.write_bytes(b"precious")
    notes.write_text("precious", "utf-8")
    make = ("calibrate", config, "--overwrite", "-o")
    refused = [
        ((*make, config), "is the input"),
        ((*make, folder / "thesis.yaml"), "exists and was not written by rtfocus"),
        ((*make, folder / "focus.png"), "two results would both be"),
        ((*make, folder / "no.yaml", "--reach", "1", "--step", "1"), "3 planes; take"),
        (("autofocus", config, "--journal", config), "is the input"),
        (("autofocus", config, "--journal", notes), "exists and is no journal"),
        (("autofocus", config, "--journal", folder), "holds the input"),
    ]
    for asked, said in refused:
        assert said in failed(command(*asked))
    assert config.read_bytes() == before
    assert (thesis.read_bytes(), notes.read_bytes()) == (b"precious",) * 2
    assert {path.name for path in folder.iterdir()} == {
        *("my.yaml", "notes.txt", "thesis.png")
    }


def test_a_calibrated_microscope_needs_fewer_images(config: Path) -> None:
    found = config.with_name("focus_20x.yaml")
    make = ("calibrate", config, "-o", found, "--reach", "3")
    succeeded(command(*make))
    calibration = load_calibration(found)
    assert calibration.trusted
    assert calibration.focus_um == pytest.approx(4.0, abs=0.3 * UNIT_UM)
    assert calibration.direction in (0, 1)
    assert calibration.direction_of_core == 1
    assert abs(calibration.backlash_um) < 0.2 * UNIT_UM
    assert found.with_suffix(".png").stat().st_size > 1000
    assert "--overwrite" in failed(command(*make))
    succeeded(command(*make, "--overwrite"))
    marked = found.read_text("utf-8")
    _, unmarked = marked.split("\n", 1)
    found.write_text(unmarked, "utf-8")
    said = failed(command(*make, "--overwrite"))
    assert f"move it away, and the picture '{found.with_suffix('.png')}'" in said
    found.write_text(marked, "utf-8")
    images = []
    for extra in ([], ["--set", f"autofocus.calibration={found}"]):
        said = succeeded(command("autofocus", config, *extra))
        number = re.search(r"(\d+) images", said)
        assert number
        images.append(int(number[1]))
    assert images[1] < images[0]


def test_optics_that_are_not_those_are_not_trusted(config: Path) -> None:
    found = config.with_name("wrong.yaml")
    said = command(
        *("calibrate", config, "-o", found, "--reach", "3"),
        *("--set", f"microscope.optics={json.dumps(OPTICS)}"),
        *("--set", "channels.0.optics.numerical_aperture=0.6"),
        *("--set", "processing.ignore_optics=true"),
    )
    assert said.code == ExitCode.FAILED, said
    assert "problem:" in said.out
    assert not load_calibration(found).trusted


def test_backlash_and_a_reversed_stage_are_measured_and_lived_with(
    config: Path,
) -> None:
    found, journal = config.with_name("play.yaml"), config.with_name("focus.ndjson")
    faults = ("--set", "microscope.z_stage.backlash_um=2")
    said = succeeded(command("calibrate", config, "-o", found, "--reach", "3", *faults))
    calibration = load_calibration(found)
    # Down, the stage stands 2 um higher than it says.
    length = f"backlash {-calibration.backlash_um:.2f} um"
    assert f"{length}: focus is at a lower z from above than from below;" in said
    assert calibration.backlash_um == pytest.approx(-2, abs=0.2 * UNIT_UM)
    assert calibration.focus_um == pytest.approx(4.0, abs=0.2 * UNIT_UM)
    told = read_config(config, [f"autofocus.calibration={found}"]).autofocus
    lived_with = with_measured_backlash(told)
    assert (told.approach, lived_with.approach) == ("either", "up")
    # Half as far again, so that it is past the play for certain.
    assert lived_with.backlash_um == pytest.approx(3, abs=0.3 * UNIT_UM)
    given = told.model_copy(update={"backlash_um": 0.7})
    assert with_measured_backlash(given) == given
    use = ("--set", f"autofocus.calibration={found}", "--journal", journal)
    said = succeeded(command("autofocus", config, *faults, *use))
    end = re.search(r"focused, z 0\.00 -> ([\d.]+) um", said)
    assert end
    assert float(end[1]) == pytest.approx(4.0, abs=0.3 * UNIT_UM)

    reversed_stage = ("--set", "microscope.z_stage.reversed=true")
    found = config.with_name("reversed.yaml")
    said = command("calibrate", config, "-o", found, "--reach", "3", *reversed_stage)
    assert said.code == ExitCode.FAILED
    assert "the stage runs against what Micro-Manager was told" in said.out
    calibration = load_calibration(found)
    assert (calibration.direction, calibration.direction_of_core) == (-1, 1)
    assert calibration.focus_um == pytest.approx(-4.0, abs=0.3 * UNIT_UM)
