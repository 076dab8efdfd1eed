"""From nothing to a config that runs: configs copy, init on a real core, dry run."""

import sys
from io import StringIO
from pathlib import Path

import pytest
import yaml
from loop_kit import command, failed, needs_shipped_engine, sets, succeeded

from rtfocus.cli.commands import _FOR_USERS
from rtfocus.config import load_config
from rtfocus.errors import ExitCode

pytest.importorskip("mm_test_adapters", reason="needs Micro-Manager's DemoCamera")


def test_list_shows_those_for_users_first_and_breaks_no_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = succeeded(command("configs")).splitlines()
    starts = [line.split()[0] for line in said if line and not line.startswith(" ")]
    assert tuple(starts[: len(_FOR_USERS)]) == _FOR_USERS
    assert not any(line.startswith("train_") for line in said)
    folder = said[-1].removeprefix("All are in ")
    assert (Path(folder) / "demo.yaml").is_file()


def test_copy_is_the_config_and_replaces_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    assert succeeded(command("configs", "copy", "demo", mine)).strip() == str(mine)
    assert load_config(mine).model_dump() == load_config("demo").model_dump()
    mine.write_text("mine", "utf-8")
    assert "already" in failed(command("configs", "copy", "demo", mine))
    assert mine.read_text("utf-8") == "mine"
    assert "no shipped config" in failed(command("configs", "copy", "dmeo", mine))


def test_init_writes_what_the_core_says_and_it_passes(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    said = succeeded(command("init", mine, "--yes"))
    assert "Res20x 0.5 um" in said
    assert "Cy5, DAPI, FITC, Rhodamine (group Channel)" in said
    assert "nothing stands in the way" in said
    config = load_config(mine)
    assert [channel.name for channel in config.channels] == ["DAPI"]
    assert config.processing.classifier is None
    before = mine.read_text("utf-8")
    assert "already" in failed(command("init", mine, "--yes"))
    assert mine.read_text("utf-8") == before


@pytest.mark.parametrize(
    ("pixel_um", "engine"), [("0.5", "rtfocus-1"), ("0.1", None)], ids=str
)
def test_init_asks_for_what_no_core_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixel_um: str, engine: str | None
) -> None:
    needs_shipped_engine()
    # What cannot be is asked again: a channel, an NA, an index that is a wavelength.
    answers = ["day 1", "DAPI, GFP", "DAPI, FITC", "20", "5", "", pixel_um]
    answers += ["461", "0,75", "461", "", "", ""]
    monkeypatch.setattr(sys, "stdin", StringIO("\n".join(answers) + "\n"))
    mine = tmp_path / "no.yaml"
    said = succeeded(command("init", mine))
    assert "no channel 'GFP'; there are Cy5, DAPI" in said
    assert said.count("'461' is no number from") == 2
    config = load_config(mine)
    assert config.run.name == "day 1"
    assert [channel.name for channel in config.channels] == ["DAPI", "FITC"]
    assert config.channels[0].classifier == engine
    optics = config.channels[1].optics
    if engine is None:
        assert optics is None
        assert not config.store.restored
    else:
        assert optics is not None
        assert (optics.numerical_aperture, optics.wavelength_nm) == (0.75, 509)
        assert config.processing.restoration.method == "wiener"
    plan = yaml.safe_load(mine.read_text("utf-8"))["acquisition"]["mda"]
    assert plan["time_plan"] == {"interval": 1, "loops": 5}
    assert [c["exposure"] for c in plan["channels"]] == [20, 20]


class Deaf(StringIO):
    """A terminal where Ctrl-C is the answer."""

    def readline(self, size: int | None = -1, /) -> str:
        raise KeyboardInterrupt


def test_init_without_its_answers_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.yaml"
    monkeypatch.setattr(sys, "stdin", StringIO("day 1\n"))
    assert "or give --yes" in failed(command("init", mine), ExitCode.CONFIG)
    monkeypatch.setattr(sys, "stdin", Deaf())
    said = command("init", mine)
    assert (said.code, said.err) == (ExitCode.INTERRUPTED, "interrupted\n")
    assert not mine.exists()


def test_init_refuses_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    options = ("--mm-config", tmp_path / "no.cfg", "--yes")
    failed(command("init", mine, *options), ExitCode.CONFIG)
    assert not mine.exists()


def test_dry_run_tells_what_will_be_and_leaves_nothing(tmp_path: Path) -> None:
    needs_shipped_engine()
    options = sets(f"run.folder={tmp_path}", "store.overwrite=false")
    said = succeeded(command("run", "demo", "--dry-run", *options))
    assert "40 images of 512 x 512 pixels, 0.65 um each: 40 time points" in said
    assert "channel DAPI: defocus by rtfocus-2, restored by wiener" in said
    assert f"{tmp_path / 'demo.rtfocus'}: " in said
    assert not any(tmp_path.iterdir())


def test_dry_run_foresees_the_geometry_of_presets(tmp_path: Path) -> None:
    config = {
        "run": {"folder": str(tmp_path)},
        "microscope": {"source": "democamera", "pixel_size_um": 0.5},
        "acquisition": {
            "mda": {
                "grid_plan": {"rows": 2, "columns": 3},
                "channels": [{"config": "HighRes", "group": "Camera"}],
                "z_plan": {"range": 2, "step": 1},
            }
        },
        "processing": {"classifier": None, "restoration": {"method": "none"}},
    }
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    said = succeeded(command("run", path, "--dry-run"))
    # The preset has no binning; the configuration starts with one of 2.
    assert "18 images of 512 x 512 pixels, 0.5 um each: 6 positions, 3 slices" in said
    assert "recorded, not restored" in said


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("acquisition.mda.channels=[{config: GFP}]", ExitCode.CONFIG, "no channel"),
        ("acquisition.mda=null", ExitCode.CONFIG, "neither"),
        ("processing.classifier=nope", ExitCode.ENGINE, "engine 'nope'"),
        ("channels.0.optics.pixel_size_um=0.1", ExitCode.ENGINE, "0.1"),
        ("processing.device=gpu", ExitCode.ENGINE, "gpu"),
        ("store.min_free_mb=1e12", ExitCode.INPUT, "choose another run.folder"),
        ("run.folder=FILE/runs", ExitCode.INPUT, "run.folder"),
        ("camera.flat_field=FILE", ExitCode.CONFIG, "flat"),
        ("autofocus.calibration=none.yaml", ExitCode.CONFIG, "autofocus.calibration"),
        ("autofocus.search=nobody", ExitCode.CONFIG, "no installed package"),
        ("autofocus.region=[0, 96, 9, 9]", ExitCode.CONFIG, "of 512 x 96 pixels"),
        ("autofocus.region=[60, 60, 9, 9]", ExitCode.CONFIG, "at least 48 px wide"),
        ("autofocus.region=[0, 0, 9, 0]", ExitCode.CONFIG, "autofocus.region"),
        ("autofocus.channel_offsets_um={Dapi: 1}", ExitCode.CONFIG, "there are DAPI"),
    ],
)
def test_dry_run_finds_what_would_refuse_the_run(
    tmp_path: Path, change: str, code: ExitCode, words: str
) -> None:
    needs_shipped_engine()
    file = tmp_path / "a.txt"
    file.write_text("no image", "utf-8")
    small = "microscope.specimen.kind=beads", "microscope.height_px=96"
    options = sets(f"run.folder={tmp_path}", *small, change.replace("FILE", str(file)))
    said = command("run", "demo", "--dry-run", *options)
    assert said.code == code, said
    assert words in said.err
    assert "nothing stands in the way" not in said.out


def test_dry_run_of_a_recording_and_of_live_mode(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(3):
        Image.new("L", (40, 30)).save(tmp_path / f"{number}.png")
    options = sets(
        f"microscope={{source: replay, path: '{tmp_path}', pixel_size_um: 0.65}}",
        "processing.classifier=null",
        f"run.folder={tmp_path}",
    )
    said = succeeded(command("run", "replay", "--dry-run", *options))
    assert "3 images of 30 x 40 pixels" in said
    live = sets("acquisition={live: {}}", f"run.folder={tmp_path}")
    said = succeeded(command("run", "democamera", "--dry-run", *live))
    assert "until it is stopped images" in said
