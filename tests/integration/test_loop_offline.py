"""The offline twins through the command line: any input, the very live results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaozarrs
import zarr
from loop_kit import (
    Run,
    command,
    failed,
    run_loop,
    small,
    stored,
    succeeded,
    write_config,
)
from PIL import Image
from scipy.ndimage import gaussian_filter
from yaozarrs import v05
from yaozarrs.write.v05 import write_image

ESTIMATE = {"level", "defocus_um", "signed", "confidence"}
TILE = {"y", "x", "level", "label", "probability", "defocus_um", "uncertainty_um"}
SHAPE = (200, 240)


def specimen(seed: int) -> Any:
    """Blurred blocks, 0 to 1."""
    blocks = np.random.default_rng(seed).random((SHAPE[0] // 4, SHAPE[1] // 4))
    return gaussian_filter(np.kron(blocks, np.ones((4, 4))), 1.0 + seed % 3)


@pytest.fixture
def config_file(tmp_path, engine_folder):
    """A config with the optics and the engine of these tests."""
    return write_config(tmp_path / "config.yaml", small(tmp_path, engine_folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory, engine_folder) -> Run:
    """A recorded run of two time points with two slices each."""
    folder = tmp_path_factory.mktemp("recorded")
    plan = {
        "axis_order": "tpcz",
        "channels": [{"config": "default", "exposure": 5}],
        "z_plan": {"range": 3.0, "step": 3.0},
        "time_plan": {"interval": 0, "loops": 2},
    }
    microscope = {"height_px": SHAPE[0], "width_px": SHAPE[1]}
    acquisition = {"live": None, "mda": plan}
    config = small(
        folder, engine_folder, acquisition=acquisition, microscope=microscope
    )
    return run_loop(config)


def write_inputs(folder: Path) -> dict[str, tuple[Path, list[list[int]]]]:
    """Write one input of every kind; return path and the shapes of its planes."""
    grey = [list(SHAPE)]
    planes = np.stack([specimen(n) * 4000 for n in range(6)]).astype(np.uint16)
    tifffile.imwrite(folder / "one.tif", planes[0])
    tifffile.imwrite(folder / "pages.tif", planes[:3], photometric="minisblack")
    hyper = planes.reshape(1, 2, 3, *SHAPE)
    tifffile.imwrite(folder / "hyper.ome.tif", hyper, metadata={"axes": "TCZYX"})
    colours = np.stack([specimen(n) * 250 for n in range(3)], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(folder / "colour.png")
    (folder / "folder").mkdir()
    for n in range(2):
        tifffile.imwrite(folder / "folder" / f"f{n}.tif", planes[n].astype(np.float32))
    axes = [
        v05.TimeAxis(name="t"),
        v05.SpaceAxis(name="y", unit="micrometer"),
        v05.SpaceAxis(name="x", unit="micrometer"),
    ]
    scale = v05.ScaleTransformation(scale=[1.0, 0.65, 0.65])
    dataset = v05.Dataset(path="0", coordinateTransformations=[scale])
    image = v05.Image(multiscales=[v05.Multiscale(axes=axes, datasets=[dataset])])
    write_image(folder / "film.ome.zarr", image, planes[:2], writer="zarr")
    return {
        "one": (folder / "one.tif", grey),
        "pages": (folder / "pages.tif", grey * 3),
        "hyper": (folder / "hyper.ome.tif", grey * 6),
        "colour": (folder / "colour.png", [[*SHAPE, 3]]),
        "folder": (folder / "folder", grey * 2),
        "film": (folder / "film.ome.zarr", grey * 2),
    }


def classified(path: Path, out: Path, *options: str | Path) -> dict[str, Any]:
    succeeded(command("classify", path, "--json", out, *options))
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


def assert_follows_the_schema(found: dict[str, Any], shapes: list[list[int]]) -> None:
    assert set(found) == {"written_by", "engine", "images"}
    assert found["engine"] == "sharpness"
    assert [image["shape"] for image in found["images"]] == shapes
    for image in found["images"]:
        assert {"path", "shape", "estimate", "tiles"} <= set(image)
        assert isinstance(image["path"], str)
        estimate = image["estimate"]
        assert set(estimate) == ESTIMATE
        assert estimate["level"] is None or 0 <= estimate["level"] <= 10
        assert estimate["signed"] is False
        assert 0 <= estimate["confidence"] <= 1
        assert image["tiles"]
        for tile in image["tiles"]:
            assert set(tile) == TILE
            assert 0 <= tile["y"] < SHAPE[0]
            assert 0 <= tile["x"] < SHAPE[1]
            assert 0 <= tile["probability"] <= 1
            if tile["label"] == "bg":
                assert (tile["level"], tile["defocus_um"]) == (None, None)
            else:
                assert tile["label"] == str(tile["level"])
                assert tile["defocus_um"] >= 0
        places = [(tile["y"], tile["x"]) for tile in image["tiles"]]
        assert places == sorted(set(places))


@pytest.mark.parametrize("kind", ["one", "pages", "hyper", "colour", "folder", "film"])
def test_classify_answers_in_one_schema(kind, tmp_path, config_file):
    path, shapes = write_inputs(tmp_path)[kind]
    found = classified(path, tmp_path / "out" / "f.json", "--config", config_file)
    assert_follows_the_schema(found, shapes)
    # All pictures are specimens: some tile of each has a level.
    for image in found["images"]:
        assert any(tile["level"] is not None for tile in image["tiles"])


def test_classify_of_a_run_is_what_the_run_found(run, tmp_path):
    found = classified(run.folder, tmp_path / "found.json")
    assert_follows_the_schema(found, [list(SHAPE)] * 4)
    by_place = {
        (image["index"]["t"], image["index"]["z"]): image for image in found["images"]
    }
    assert len(by_place) == len(run.journal) == 4
    for line in run.journal:
        place = line["index"]["t"], line["index"]["z"]
        estimate = by_place[place]["estimate"]
        assert estimate == {key: line["estimate"][key] for key in ESTIMATE}
        defocus_um = run.stored("defocus", place[0], 0, 0, place[1])
        listed = [tile["defocus_um"] for tile in by_place[place]["tiles"]]
        wanted = [None if np.isnan(v) else float(v) for v in defocus_um.ravel()]
        assert listed == wanted


def test_restore_of_a_run_is_what_the_run_stored(run, tmp_path):
    out = tmp_path / "again.ome.zarr"
    succeeded(command("restore", run.folder, "-o", out))
    yaozarrs.validate_zarr_store(str(out))
    again = zarr.open_array(out / "0", mode="r")
    assert again.dtype == np.uint16
    differing = 0
    for t, z in np.ndindex(2, 2):
        live = run.stored("restored", t, 0, 0, z)
        np.testing.assert_array_equal(again[t, 0, z], live)
        differing += not np.array_equal(live, run.stored("raw", t, 0, 0, z))
    assert differing == 4, "nothing was restored, so nothing was compared"


@pytest.mark.parametrize("kind", ["one", "pages", "hyper", "colour", "film"])
@pytest.mark.parametrize("ending", [".tif", ".ome.zarr"])
def test_restore_keeps_shape_and_type(kind, ending, tmp_path, config_file):
    path, shapes = write_inputs(tmp_path)[kind]
    out = tmp_path / f"restored{ending}"
    options = ["--config", config_file, "--engine", "wiener"]
    succeeded(command("restore", path, "-o", out, *options))
    dtype = np.uint8 if kind == "colour" else np.uint16
    if ending == ".tif":
        pixels = tifffile.imread(out)
        assert pixels.shape[-len(shapes[0]) :] == tuple(shapes[0])
    else:
        yaozarrs.validate_zarr_store(str(out))
        pixels = zarr.open_array(out / "0", mode="r")[...]
        assert pixels.shape[-2:] == SHAPE
    assert pixels.dtype == dtype
    assert pixels.size == sum(int(np.prod(shape)) for shape in shapes)
    assert pixels.std() > 0


def test_both_outputs_hold_the_same(tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["hyper"]
    outputs = [tmp_path / "a.ome.tif", tmp_path / "b.ome.zarr"]
    for out in outputs:
        succeeded(command("restore", path, "-o", out, "--config", config_file))
    in_tiff = tifffile.imread(outputs[0]).reshape(1, 2, 3, *SHAPE)
    in_zarr = zarr.open_array(outputs[1] / "0", mode="r")[...]
    np.testing.assert_array_equal(in_tiff, in_zarr)
    assert not np.array_equal(in_tiff, tifffile.imread(path).reshape(in_tiff.shape))


def test_stretched_planes_use_all_of_eight_bits(tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["pages"]
    out = tmp_path / "bright.tif"
    options = ("--config", config_file, "--engine", "wiener", "--stretch")
    succeeded(command("restore", path, "-o", out, *options))
    pages = tifffile.imread(out)
    assert pages.dtype == np.uint8
    for page in pages:
        assert (page.min(), page.max()) == (0, 255)


def test_a_folder_is_restored_into_a_folder(tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["folder"]
    out = tmp_path / "restored"
    succeeded(command("restore", path, "-o", out, "--config", config_file))
    assert sorted(p.name for p in out.iterdir()) == ["f0.tif", "f1.tif"]
    for name in ("f0.tif", "f1.tif"):
        pixels = tifffile.imread(out / name)
        assert (pixels.shape, pixels.dtype) == (SHAPE, np.float32)


def test_wrong_inputs_and_outputs_are_told(tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["one"]
    options = ("--config", config_file)
    said = failed(command("restore", tmp_path / "no.tif", "-o", tmp_path / "o.tif"))
    assert "no.tif' does not exist" in said
    said = failed(command("restore", path, "-o", tmp_path / "o.xyz", *options))
    assert "unknown ending '.xyz'" in said
    said = failed(command("restore", path, "--stretch", *options))
    assert "give --output" in said
    said = failed(
        command("restore", path, "-o", tmp_path / "o.tif", *options, "--engine", "nope")
    )
    assert "nope" in said
    text = tmp_path / "text.tif"
    text.write_text("no image")
    said = failed(command("classify", text, *options))
    assert "text.tif" in said
    assert not list(tmp_path.glob("o.*"))


def test_an_input_is_never_overwritten(run, tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["one"]
    before = path.read_bytes()
    said = failed(command("restore", path, "-o", path, "--config", config_file))
    assert str(path) in said
    assert path.read_bytes() == before
    raw = run.folder / "raw.ome.zarr"
    pixels = stored(run.folder, "raw", 0)
    failed(command("restore", raw, "-o", raw, "--config", config_file))
    np.testing.assert_array_equal(stored(run.folder, "raw", 0), pixels)
