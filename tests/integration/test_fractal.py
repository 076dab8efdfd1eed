"""Fractal: its task restores a field of a plate, and the manifest is the task's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from batch_kit import OPTICS, WIENER, write_plate
from image_file_kit import ngff_axes, specimen, write_ngff
from loop_kit import command, succeeded

import rtfocus.batch
from rtfocus.batch.fractal_restore import fractal_restore


def test_a_fractal_task_restores_a_field_beside_its_input(
    tmp_path: Path,
) -> None:
    plate = write_plate(tmp_path / "plate.zarr")
    package = Path(rtfocus.batch.__file__).parents[1]
    manifest = json.loads((package / "__FRACTAL_MANIFEST__.json").read_text("utf-8"))
    (task,) = manifest["task_list"]
    # As Fractal does: the file by its path, arguments and answer as JSON.
    asked, answer = tmp_path / "args.json", tmp_path / "out.json"
    field = plate / "A/3/1"
    arguments = {"zarr_url": str(field), "engine": "wiener", "optics": OPTICS[1]}
    assert set(arguments) <= set(task["args_schema_parallel"]["properties"])
    asked.write_text(json.dumps(arguments))
    run = [sys.executable, str(package / task["executable_parallel"])]
    run += ["--args-json", str(asked), "--out-json", str(answer)]
    done = subprocess.run(run, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    (update,) = json.loads(answer.read_text())["image_list_updates"]
    assert update == {
        "zarr_url": f"{field}_restored",
        "origin": str(field),
        "types": task["output_types"],
    }
    succeeded(command("restore", field, "-o", tmp_path / "one.tif", *WIENER))
    restored = zarr.open_array(Path(update["zarr_url"]) / "0", mode="r")
    np.testing.assert_array_equal(
        np.squeeze(restored[:]), tifffile.imread(tmp_path / "one.tif")
    )
    well = zarr.open_group(plate / "A/3", mode="r").attrs["well"]
    assert [one["path"] for one in well["images"]] == ["0", "1", "1_restored"]
    again = subprocess.run(run, capture_output=True, encoding="utf-8", check=False)
    assert again.returncode == 1
    assert "exists; choose another suffix" in again.stderr


def test_a_fractal_task_says_where_pixels_do_not_fit_their_type(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bright = np.clip(specimen(1) * 80_000, 0, 64_000).astype(np.uint16)
    field = tmp_path / "field.zarr"
    write_ngff(field, bright, ngff_axes("yx"), [0.325, 0.325])
    fractal_restore(zarr_url=str(field), engine="wiener", optics=OPTICS[1])
    told = [one.getMessage() for one in caplog.records]
    assert any("restored pixels exceed 65535 and are stored as that" in t for t in told)


def test_the_manifest_is_that_of_the_task() -> None:
    schemas = pytest.importorskip("fractal_task_tools._args_schemas")
    package = Path(rtfocus.batch.__file__).parents[1]
    manifest = json.loads((package / "__FRACTAL_MANIFEST__.json").read_text("utf-8"))
    (task,) = manifest["task_list"]
    made = schemas.create_schema_for_single_task(
        task["executable_parallel"], package="rtfocus"
    )
    assert task["args_schema_parallel"] == made
    kinds = pytest.importorskip("fractal_task_tools.task_models")
    known = set(kinds.ParallelTask.model_fields)
    assert set(task) - {"executable_parallel", "args_schema_parallel"} <= (
        known | {"meta_parallel"}
    )
