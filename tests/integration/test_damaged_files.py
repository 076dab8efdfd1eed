"""Files that rtfocus reads back, damaged or of another kind: one clear error each."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from loop_kit import command, failed, succeeded
from writer_kit import make_series, recording

from rtfocus.autofocus.planes import FocusCalibration
from rtfocus.autofocus.policy import load_calibration
from rtfocus.batch.plan import Ledger
from rtfocus.config import load_config
from rtfocus.errors import ConfigError, ExitCode, InputError, OutputError, WriterError
from rtfocus.images.optics import stated_optics
from rtfocus.report.page import write_page
from rtfocus.runs import open_run
from rtfocus.view.stored_run import numbers_of
from rtfocus.writers.check import check_run

DEEP = b'{"a":' * 5000
NO_TEXT = bytes(range(256))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "some.rtfocus"
    with recording(folder, make_series(sizes={"t": 2})) as run:
        run.close(run.send_all(2))
    return folder


def _with(**changes: object) -> Callable[[dict[str, Any]], bytes]:
    return lambda report: json.dumps(report | changes).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: json.dumps(report).encode()[:200],
        lambda _: b"",
        lambda _: b"[1]",
        lambda _: DEEP,
        lambda _: NO_TEXT,
        _with(warnings=3),
        _with(stages=[]),
        _with(stages={"classify": "fast"}),
        _with(throughput={"frames_per_s": "many"}),
        _with(backends=["cpu"]),
        _with(held=True),
        _with(devices=[]),
        _with(accounting=None),
        lambda report: json.dumps(
            report | {"accounting": report["accounting"] | {"rejected_messages": ["x"]}}
        ).encode(),
    ],
)
def test_a_damaged_report_is_told_by_all_and_repaired(damage, sound, tmp_path) -> None:
    run = Path(shutil.copytree(sound, tmp_path / "some.rtfocus"))
    path = run / "report.json"
    path.write_bytes(damage(json.loads(path.read_bytes())))
    said = failed(command("report", run), ExitCode.FAILED)
    assert f"'{path}' cannot be read: " in said
    assert said.endswith(f"; run: rtfocus check {run} --repair")
    page = (run / "report.html").read_text("utf-8")
    assert "report.json is damaged" in page
    with pytest.raises(WriterError, match=r"report\.json' cannot be read"):
        _ = open_run(run).outcome
    with pytest.raises(WriterError, match=r"report\.json' cannot be read"):
        numbers_of(open_run(run))
    assert check_run(run).problems == [f"'{path}' is damaged; use --repair"]
    assert check_run(run, repair=True).problems == []
    succeeded(command("report", run))


CALIBRATION = FocusCalibration("a", 1.0, 1.0, 0.1, 1, 1, 0.2, 0.1, 1.0, 5.0, 1.2, [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"backlash_um": "much"}, "Expected `float`"),
        ({"backlash_um": float("nan")}, "backlash_um a number"),
        ({"unit_um": 0.0}, "unit_um must be a number above 0"),
        ({"problems": 3}, "Expected `array`"),
        ({"direction": None}, "Expected `int`"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        (b"- 1\n", "must be a mapping"),
        (DEEP, "nested too deeply"),
        (NO_TEXT, "no text but a binary file"),
    ],
)
def test_a_calibration_that_is_none_is_refused(content, said, tmp_path) -> None:
    path = tmp_path / "focus.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(asdict(CALIBRATION) | content).encode()
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"rtfocus calibrate|binary|deeply"
    ) as refused:
        load_calibration(path)
    assert said in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_calibration_is_read_as_an_editor_saved_it(tmp_path) -> None:
    path = tmp_path / "focus.yaml"
    text = yaml.safe_dump(asdict(CALIBRATION)).replace("\n", "\r\n")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert load_calibration(path) == CALIBRATION


def test_optics_of_a_file_are_text_of_any_editor(tmp_path) -> None:
    path = tmp_path / "optics.yaml"
    path.write_text("optics: {numerical_aperture: 0.8}", "utf-16")
    assert stated_optics(str(path)) == {"numerical_aperture": 0.8}
    for content in (DEEP, NO_TEXT):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"optics '.*optics\.yaml' is "):
            stated_optics(str(path))


def test_the_state_of_a_batch_that_is_no_text_is_told(tmp_path) -> None:
    ledger = Ledger(tmp_path / "out")
    ledger.folder.mkdir()
    (ledger.folder / "key").write_bytes(NO_TEXT)
    assert not ledger.holds("0123")
    (ledger.folder / "plan.json").write_bytes(DEEP)
    with pytest.raises(OutputError, match="cannot be read as the state of a batch"):
        ledger.plan()


def test_a_report_with_numbers_that_no_run_has_makes_a_page(sound, tmp_path) -> None:
    run = Path(shutil.copytree(sound, tmp_path / "some.rtfocus"))
    report = json.loads((run / "report.json").read_bytes())
    times = dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "max_ms"), 2.0)
    stages = {
        "classify": times | {"max_ms": None},
        "restore": times | {"p50_ms": -1},
        "correct": {"p50_ms": 1.0},
        "normalise": times | {"max_ms": 1e308},
    }
    report |= {"stages": stages, "throughput": {"frames_per_s": 3}}
    (run / "report.json").write_text(json.dumps(report))
    succeeded(command("report", run))


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("grid", "stride_px"), -1.0, "tiles every -1.0 px"),
        (("provenance", "config"), [[1]], "its config is none"),
    ],
)
def test_a_header_no_run_has_is_damage(where, value, said, sound, tmp_path) -> None:
    run = Path(shutil.copytree(sound, tmp_path / "some.rtfocus"))
    header = json.loads((run / "series.json").read_bytes())
    header[where[0]][where[1]] = value
    (run / "series.json").write_text(json.dumps(header))
    assert said in failed(command("report", run))


@pytest.mark.parametrize("name", ["zarr.json", "0/zarr.json"])
@pytest.mark.parametrize("content", [b"[]", b"null", b'{"a":' * 50000, NO_TEXT])
def test_damaged_metadata_of_an_image_are_told(name, content, sound, tmp_path) -> None:
    run = Path(shutil.copytree(sound, tmp_path / "some.rtfocus"))
    (run / "raw.ome.zarr" / name).write_bytes(content)
    with pytest.raises(InputError, match=r"raw\.ome\.zarr' cannot be read"):
        open_run(run).image("raw")


def test_a_path_with_half_a_character_is_refused(tmp_path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('acquisition: {mda: "\\ud800"}')
    with pytest.raises(ConfigError, match="leads nowhere"):
        load_config(path)


def test_a_focus_log_that_is_a_folder_costs_no_page(sound, tmp_path) -> None:
    run = Path(shutil.copytree(sound, tmp_path / "some.rtfocus"))
    (run / "focus.ndjson").mkdir()
    assert write_page(run).is_file()
