"""The offline twins through the command line: any input, the very live results."""

import codecs
import csv
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaozarrs
import zarr
from image_file_kit import SHAPE, specimen
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

import rtfocus
from rtfocus.errors import ExitCode

ESTIMATE = {"level", "defocus_um", "signed", "confidence"}
TILE = {"y", "x", "level", "label", "probability", "defocus_um", "uncertainty_um"}
OPTICS = rtfocus.Optics(0.5, wavelength_nm=520, pixel_size_um=0.65)


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
    assert set(found) == {"written_by", "engine", "images", "stacks"}
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
    said = succeeded(command("restore", run.folder))
    assert said == f"no frame of {run.folder} was left raw: nothing to restore\n"
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


def test_orientations_are_the_same_by_command_and_in_python(tmp_path):
    image = np.kron(np.random.default_rng(2).random((12, 14)), np.ones((8, 8))) * 3000
    path, out = tmp_path / "image.tif", tmp_path / "out.tif"
    tifffile.imwrite(path, gaussian_filter(image, 3).astype(np.uint16))
    config = tmp_path / "config.yaml"
    processing = {"classifier": "rtfocus-2", "restoration": {"method": "rtfocus-2"}}
    config.write_text(json.dumps({"processing": processing | {"precision": "f32"}}))
    options = ("-o", out, "--overwrite", "--config", config, "--orientations")
    succeeded(command("restore", path, *options, 2))
    mean = rtfocus.restore(tifffile.imread(path), config=config, orientations=2)
    np.testing.assert_array_equal(tifffile.imread(out), mean)
    succeeded(command("restore", path, *options, 1))
    assert (tifffile.imread(out) != mean).any()
    said = failed(command("restore", path, *options, 3))
    assert "orientations" in said
    assert "1, 2, 4 or 8" in said


def test_keys_of_a_run_can_be_set_while_it_is_restored(run, tmp_path):
    out = tmp_path / "sharp.ome.zarr"
    wide = ("--set", "store.restored_dtype=float32")
    succeeded(command("restore", run.folder, "-o", out, *wide))
    assert zarr.open_group(out, mode="r")["0"].dtype == np.float32


def test_stretched_planes_use_all_of_eight_bits(tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["pages"]
    out = tmp_path / "bright.tif"
    options = ("--config", config_file, "--engine", "wiener", "--stretch")
    succeeded(command("restore", path, "-o", out, *options))
    pages = tifffile.imread(out)
    assert pages.dtype == np.uint8
    for page in pages:
        assert (page.min(), page.max()) == (0, 255)


def test_picture_shows_what_was_done_and_replaces_only_its_own(tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["pages"]
    picture, config = tmp_path / "shown.png", ("--config", config_file)
    said = command(
        *("restore", path, "-o", tmp_path / "out.tif", "--picture", picture, *config)
    )
    succeeded(said)
    assert f"picture: {picture}" in said.err
    with Image.open(picture) as shown:
        # Raw and restored, whole and in detail.
        assert shown.width > 4 * 2 * 256
        width = shown.width
    first = picture.read_bytes()
    said = failed(command("classify", path, *config, "--picture", picture))
    assert "exists; choose another output or --overwrite" in said
    assert picture.read_bytes() == first
    again = ("classify", path, *config, "--overwrite", "--picture")
    succeeded(command(*again, picture))
    with Image.open(picture) as found:
        assert found.width < width, "a map instead of two restored panels"
        mine = found.copy()
    mine.save(picture)
    drawn = picture.read_bytes()
    failed(command(*again, picture), ExitCode.INPUT)
    assert picture.read_bytes() == drawn
    for wrong in (path, tmp_path / "shown.jpg"):
        failed(command(*again, wrong), ExitCode.INPUT)


def test_a_folder_is_restored_into_a_folder(tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["folder"]
    out = tmp_path / "restored"
    succeeded(command("restore", path, "-o", out, "--config", config_file))
    assert sorted(p.name for p in out.iterdir()) == ["f0.tif", "f1.tif"]
    for name in ("f0.tif", "f1.tif"):
        pixels = tifffile.imread(out / name)
        assert (pixels.shape, pixels.dtype) == (SHAPE, np.float32)


def test_wrong_inputs_and_outputs_are_told(run, tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["one"]
    options = ("--config", config_file)
    said = failed(command("restore", tmp_path / "no.tif", "-o", tmp_path / "o.tif"))
    assert "no.tif' does not exist" in said
    said = failed(command("restore", path, "-o", tmp_path / "o.xyz", *options))
    assert "unknown ending '.xyz'" in said
    for option in (("--stretch",), ("--expected-error", tmp_path / "e.tif")):
        said = failed(command("restore", run.folder, *option, *options))
        assert said.startswith(f"error: {option[0]} is for other files")
        assert "give --output" in said
        said = failed(command("restore", path, *option, *options))
        assert "is no run folder; say where to write with --output" in said
    said = failed(
        command("restore", path, "-o", tmp_path / "o.tif", *options, "--engine", "nope")
    )
    assert "nope" in said
    text = tmp_path / "text.tif"
    text.write_text("no image")
    said = failed(command("classify", text, *options))
    assert "text.tif" in said
    tifffile.imwrite(tmp_path / "tiny.tif", np.full((7, 99), 9, np.uint8))
    told = command("classify", tmp_path / "tiny.tif", *options).err
    assert "tiny.tif': the image of shape (7, 99) is too small to tell" in told
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


def write_um(path: Path, size_um: float) -> Path:
    """Write an image that states its pixel size and nothing else."""
    sizes = {"axes": "YX", "PhysicalSizeX": size_um, "PhysicalSizeY": size_um}
    pixels = (specimen(1) * 4000).astype(np.uint16)
    tifffile.imwrite(path, pixels, ome=True, metadata=sizes)
    return path


def test_pixels_that_contradict_the_optics_are_refused(tmp_path, config_file):
    path, out = write_um(tmp_path / "b.ome.tif", 0.1), tmp_path / "o.tif"
    for options in ((), ("--config", config_file)):
        for line in (("restore", path, "-o", out), ("classify", path)):
            said = failed(command(*line, *options), ExitCode.CONFIG)
            assert "pixels of 0.1 um" in said
            assert "--optics NA=" in said
    assert not out.exists()


def test_optics_are_completed_told_and_written(tmp_path, config_file):
    path, out = write_um(tmp_path / "b.ome.tif", 0.65), tmp_path / "o.ome.zarr"
    stated = ("--optics", "NA=0.36,wavelength=451")
    done = command("restore", path, "-o", out, "--config", config_file, *stated)
    succeeded(done)
    assert "NA=0.36,wavelength=451,pixel=0.65, from --optics, pixel size" in done.err
    made = zarr.open_group(out, mode="r").attrs["rtfocus"]["result"]
    assert made["engine"] == "wiener"
    assert made["classifier"].startswith("sharpness@")
    assert made["optics"] == "NA=0.36,wavelength=451,pixel=0.65"
    assert made["optics from"] == "--optics, pixel size from the file"


def test_what_computes_psfs_is_refused_without_optics(tmp_path):
    path, _ = write_inputs(tmp_path)["colour"]
    line = ("restore", path, "-o", tmp_path / "o.tif", "--engine", "wiener")
    said = failed(command(*line), ExitCode.CONFIG)
    assert "no NA" in said
    assert "--engine rtfocus-2" in said


def test_a_broken_file_is_named_after_the_others_are_done(tmp_path, config_file):
    folder, _ = write_inputs(tmp_path)["folder"]
    whole = (folder / "f0.tif").read_bytes()
    (folder / "f00.tif").write_bytes(whole[: len(whole) // 2])
    out, found = tmp_path / "out", tmp_path / "found.json"
    options = ("--config", config_file)
    said = failed(command("restore", folder, "-o", out, *options), ExitCode.INCOMPLETE)
    assert "f00.tif" in said
    assert sorted(p.name for p in out.iterdir()) == ["f0.tif", "f1.tif"]
    line = ("classify", folder, "--json", found, *options)
    failed(command(*line), ExitCode.INCOMPLETE)
    told = json.loads(found.read_text("utf-8"))
    assert len(told["images"]) == 2
    assert len(told["broken"]) == 1


def test_of_an_image_that_cannot_be_read_to_its_end_no_plane_is_told(
    tmp_path, config_file
):
    folder, _ = write_inputs(tmp_path)["folder"]
    planes = np.full((3, *SHAPE), np.nan, np.float32)
    tifffile.imwrite(folder / "f00.tif", planes, photometric="minisblack")
    out = tmp_path / "found.json"
    line = ("classify", folder, "--json", out, "--config", config_file)
    said = failed(command(*line), ExitCode.INCOMPLETE)
    assert "f00.tif'; 2 planes classified" in said
    told = json.loads(out.read_text("utf-8"))
    assert [Path(image["path"]).name for image in told["images"]] == [
        "f0.tif",
        "f1.tif",
    ]


def test_a_table_tells_channel_and_z_where_the_file_knows_them(tmp_path):
    path, out = tmp_path / "stack.ome.tif", tmp_path / "found.csv"
    pixels = np.stack([specimen(n) * 4000 for n in range(4)]).astype(np.uint16)
    known = {
        "axes": "ZCYX",
        "PhysicalSizeZ": 0.3,
        "Channel": {"Name": ["GFP", "µ-tubulin"]},
        "Plane": {"PositionZ": [7.5, 7.5, 7.8, 7.8], "PositionZUnit": ["µm"] * 4},
    }
    tifffile.imwrite(path, pixels.reshape(2, 2, *SHAPE), ome=True, metadata=known)
    optics = ("--optics", "NA=0.75,wavelength=520,pixel=0.325")
    succeeded(command("classify", path, "--csv", out, *optics))
    # Else Excel takes the letter for two others.
    assert out.read_bytes().startswith(codecs.BOM_UTF8 + b"image,name,")
    text = out.read_bytes().decode("utf-8-sig")
    rows = {
        (row["c"], row["z"]): (row["channel"], row["z_um"], row["z_offset_um"])
        for row in csv.DictReader(text.splitlines())
    }
    assert rows == {
        ("0", "0"): ("GFP", "7.5", "0.0"),
        ("0", "1"): ("GFP", "7.8", "0.3"),
        ("1", "0"): ("µ-tubulin", "", "0.0"),
        ("1", "1"): ("µ-tubulin", "", "0.3"),
    }


def test_an_image_without_a_number_is_broken_a_plane_without_one_is_not(
    tmp_path, config_file
):
    options = ("--config", config_file)
    empty = tmp_path / "empty.tif"
    tifffile.imwrite(empty, np.full((256, 256), np.nan, np.float32))
    line = ("classify", empty, "--json", tmp_path / "d.json", *options)
    said = failed(command(*line), ExitCode.INPUT)
    assert "1 image cannot be read: " in said
    assert "0 planes classified" in said
    many = failed(command(*line, "--scheduler", "local:1"), ExitCode.INPUT)
    assert "1 image not classified" in many
    assert not (tmp_path / "d.json").exists()
    found = tmp_path / "empty_restored.tif"
    said = failed(command("restore", empty, "-o", found, *options), ExitCode.INPUT)
    assert "every pixel is NaN or infinite" in said
    assert not found.exists()
    planes = np.full((2, 256, 256), np.nan, np.float32)
    planes[0] = np.random.default_rng(1).poisson(300, (256, 256))
    shifted = tmp_path / "shifted.tif"
    tifffile.imwrite(shifted, planes, imagej=True, metadata={"axes": "ZYX"})
    succeeded(command("restore", shifted, "-o", tmp_path / "whole.tif", *options))
    assert np.isnan(tifffile.imread(tmp_path / "whole.tif")[1]).all()


def test_results_below_the_input_are_no_inputs(tmp_path, config_file):
    folder, _ = write_inputs(tmp_path)["folder"]
    line = ("restore", folder, "-o", folder / "restored", "--config", config_file)
    assert "restored 2 planes to 2 files" in succeeded(command(*line))
    before = {p: p.read_bytes() for p in folder.rglob("*.tif")}
    assert "exists" in failed(command(*line), ExitCode.INPUT)
    assert {p: p.read_bytes() for p in folder.rglob("*.tif")} == before
    assert "to 2 files" in succeeded(command(*line, "--overwrite"))
    assert len(list(folder.rglob("*.tif"))) == 4


def test_json_is_refused_before_the_work_and_the_old_one_kept(tmp_path, config_file):
    path, _ = write_inputs(tmp_path)["one"]
    old = tmp_path / "old.json"
    old.write_text("old result", "utf-8")
    before = path.read_bytes()
    for place in (tmp_path, old / "o.json", path, old):
        line = ("classify", path, "--json", place, "--config", config_file)
        failed(command(*line), ExitCode.INPUT)
        failed(command(*line, "--overwrite"), ExitCode.INPUT)
    assert (old.read_text("utf-8"), path.read_bytes()) == ("old result", before)


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_pixels_below_zero_stay_below_zero(tmp_path, config_file, dtype):
    pixels = (specimen(2) * 4000 - 2000).astype(dtype)
    tifffile.imwrite(tmp_path / "signed.tif", pixels)
    line = ("restore", tmp_path / "signed.tif", "-o", tmp_path / "o.tif")
    succeeded(command(*line, "--config", config_file, "--engine", "wiener"))
    restored = tifffile.imread(tmp_path / "o.tif")
    assert restored.dtype == np.float32
    assert restored.mean() == pytest.approx(pixels.mean(), abs=20)
    assert (restored < 0).mean() == pytest.approx((pixels < 0).mean(), abs=0.05)


@pytest.mark.parametrize("how", ["restore", "classify"])
def test_an_image_that_grows_while_it_is_read_is_named(
    how, tmp_path, config_file, monkeypatch
):
    image = tmp_path / "grows.tif"
    plane = (specimen(1) * 4000).astype(np.uint16)
    tifffile.imwrite(image, plane)

    @contextmanager
    def microscope_goes_on(*_):
        yield lambda: tifffile.imwrite(image, plane, append=True)

    monkeypatch.setattr("rtfocus.cli.offline.counting", microscope_goes_on)
    into = {"restore": "-o", "classify": "--json"}[how]
    output = tmp_path / ("out.tif" if how == "restore" else "out.json")
    ended = command(how, image, into, output, "--config", config_file)
    said = failed(ended, ExitCode.INCOMPLETE)
    assert "1 image changed while being read: " in said
    assert output.is_file()


@pytest.mark.parametrize("how", ["restore", "classify"])
@pytest.mark.parametrize("many", [(), ("--scheduler", "local:1")])
def test_every_image_that_lies_below_the_cameras_offset_is_named(
    how, many, tmp_path, config_file
):
    # A config for 12 bits, used on images of 8: most of their pixels become 0.
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for n, counts in enumerate([40, 60, 250]):
        image = (np.clip(specimen(n), 0.2, 1) * counts).astype(np.uint8)
        tifffile.imwrite(inputs / f"f{n}.tif", np.maximum(image, counts // 2))
    into = {"restore": "-o", "classify": "--json"}[how]
    output = tmp_path / ("out.zarr" if how == "restore" else "out.json")
    told = ("--config", config_file, "--set", "camera.offset_counts=100", *many)
    ended = command(how, inputs, into, output, *told)
    succeeded(ended)
    for n, is_named in enumerate([True, True, False]):
        line = f"f{n}.tif': most pixels lie below camera.offset_counts (100; "
        assert (line in ended.err) is is_named


def test_a_run_tells_once_of_each_channel_that_lies_below_the_cameras_offset(
    tmp_path, engine_folder, caplog
):
    run = run_loop(small(tmp_path, engine_folder, camera={"offset_counts": 50_000}))
    told = [one.getMessage() for one in caplog.records if "offset" in one.getMessage()]
    assert len(told) == 1
    assert "channel 'default': most pixels lie below camera.offset_counts" in told[0]
    page = (run.folder / "report.html").read_text("utf-8")
    assert "8 frames lie mostly below camera.offset_counts" in page


def test_python_tells_of_planes_below_the_cameras_offset(caplog):
    config = rtfocus.Config(camera={"offset_counts": 100})
    stack = np.stack([(specimen(n) * 200).astype(np.uint8) for n in range(3)])
    stack = np.clip(stack, 10, [[[60]], [[60]], [[250]]]).astype(np.uint8)
    stack[2] |= 128
    rtfocus.restore(stack, optics=OPTICS, config=config)
    rtfocus.classify(stack[0], optics=OPTICS, config=config)
    told = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert [text.partition(":")[0] for text in told] == ["2 planes", "1 plane"]


@pytest.mark.parametrize("how", ["restore", "classify"])
def test_an_image_too_faint_to_compute_with_is_refused(how, tmp_path, config_file):
    faint = (specimen(1) * 1e-25).astype(np.float32)
    tifffile.imwrite(tmp_path / "faint.tif", faint)
    into = {"restore": "-o", "classify": "--json"}[how]
    output = tmp_path / ("out.tif" if how == "restore" else "out.json")
    told = (tmp_path / "faint.tif", into, output, "--config", config_file)
    ended = command(how, *told)
    failed(ended, ExitCode.INPUT)
    assert "faint.tif': the image has values up to " in ended.err
    with pytest.raises(rtfocus.InputError, match=r"1e-15 to 1e\+15 can be computed"):
        rtfocus.restore(faint, optics=OPTICS)
