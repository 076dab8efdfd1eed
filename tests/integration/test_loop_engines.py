"""Commands on engines: list, info, add, and the kernels that one extracts."""

import shutil

import numpy as np
import pytest
import tifffile
from engine_kit import (
    KERNEL_PX,
    write_brightness_joint,
    write_shift_restorer,
    write_smooth_restorer,
)
from loop_kit import command, failed, succeeded
from PIL import Image

from rtfocus.engines.registry import find_engine
from rtfocus.errors import ExitCode
from rtfocus.optics.normalisation import PercentileRange


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The user's own folder of engines, empty."""
    folder = tmp_path / "my_engines"
    monkeypatch.setenv("RTFOCUS_ENGINES", str(folder))
    return folder


@pytest.fixture
def smooth(tmp_path):
    return write_smooth_restorer(tmp_path / "smooth")


def test_info_shows_the_card_the_checks_and_where_it_runs(mine, smooth):
    said = succeeded(command("engines", "info", str(smooth), "--config", "demo"))
    words = " ".join(said.split())
    assert "grey tiles of 64 px with a halo of 8 px" in words
    assert "sha256 as on the card" in words
    # Nine products on 64 x 64 pixels, of which 48 x 48 are kept.
    assert f"{9 * 64**2 / 48**2:.0f} per pixel" in words
    assert "11 from focus on, 2 um, both sides of focus" in words
    assert "on openvino yes" in words
    assert "fits 'DAPI'" in words


def test_info_of_damaged_weights_says_so_and_exits_with_1(mine, smooth):
    with (smooth / "model.fp32.onnx").open("ab") as file:
        file.write(b"x")
    said = command("engines", "info", str(smooth))
    assert said.code == 1
    assert "the file is damaged" in " ".join(said.out.split())


def test_an_added_engine_is_found_by_its_name(mine, smooth):
    said = succeeded(command("engines", "add", str(smooth)))
    assert "added restorer 'smooth'" in said
    assert (mine / "smooth" / "model.fp32.onnx").is_file()
    assert "smooth" in succeeded(command("engines", "list"))
    assert "smooth" in succeeded(command("engines", "info", "smooth"))


def test_names_that_are_taken_and_damaged_weights_are_not_added(mine, smooth):
    succeeded(command("engines", "add", str(smooth)))
    again = command("engines", "add", str(smooth))
    assert again.code == ExitCode.ENGINE
    assert "there is an engine 'smooth'" in again.err
    other = shutil.copytree(smooth, smooth.with_name("other"))
    card = (other / "engine.yaml").read_text("utf-8")
    (other / "engine.yaml").write_text(card.replace("name: smooth", "name: other"))
    (other / "model.fp32.onnx").write_bytes(b"")
    damaged = command("engines", "add", str(other))
    assert damaged.code == ExitCode.ENGINE
    assert "have sha256" in damaged.err
    assert sorted(path.name for path in mine.iterdir()) == ["smooth"]


def test_engines_of_an_installed_package_are_found_by_name(
    mine, smooth, tmp_path, monkeypatch
):
    site = tmp_path / "site"
    package = site / "their_lab" / "engines"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package.parent / "__init__.py").write_text("")
    shutil.copytree(smooth, package / "theirs")
    info = site / "their_lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-lab\n")
    (info / "entry_points.txt").write_text(
        "[rtfocus.engines]\ntheirs = their_lab.engines\ngone = their_lab.gone\n"
    )
    monkeypatch.syspath_prepend(str(site))
    said = succeeded(command("engines", "list"))
    assert "theirs" in said
    assert find_engine("theirs").folder == package / "theirs"
    # Python passes over what is no place to look into; so does the search.
    monkeypatch.syspath_prepend("no" * 3000)
    assert find_engine("theirs").folder == package / "theirs"


@pytest.mark.parametrize("kind", ["above", "absolute", "backslash", "linked", "name"])
def test_what_leads_out_of_its_folder_is_not_added(kind, mine, smooth, tmp_path):
    outside = shutil.copy(smooth / "model.fp32.onnx", tmp_path / "outside.onnx")
    card = smooth / "engine.yaml"
    text = card.read_text("utf-8")
    if kind == "linked":
        (smooth / "notes").symlink_to(tmp_path)
    elif kind == "name":
        card.write_text(text.replace("name: smooth", "name: ../../smooth"))
    else:
        there = {"above": "../outside.onnx", "backslash": "..\\outside.onnx"}
        name = there.get(kind, str(outside))
        card.write_text(text.replace("model.fp32.onnx", name))
    said = command("engines", "add", str(smooth))
    assert said.code == ExitCode.ENGINE
    assert len(said.err.splitlines()) == 1
    assert not mine.exists() or not list(mine.iterdir())


def test_a_joint_engine_named_alone_restores_in_its_own_pass(mine, tmp_path):
    write_brightness_joint(mine / "brightness")
    rng = np.random.default_rng(4)
    ramp = np.linspace(100, 4000, 240) + rng.normal(0, 20, (144, 240))
    frame = np.maximum(ramp, 0).astype(np.float32)
    tifffile.imwrite(tmp_path / "frame.tif", frame)
    restored = tmp_path / "restored.tif"
    arguments = ("restore", str(tmp_path / "frame.tif"), "-o", str(restored))
    succeeded(command(*arguments, "--engine", "brightness"))
    # It adds a tenth of the sampling in its own units where it sees defocus.
    _, scale = PercentileRange().fit(frame)
    added = scale * 0.65 * 0.5 / 0.451 / 10
    change = tifffile.imread(restored) - frame
    np.testing.assert_allclose(change[:, [0, -1]], added, rtol=1e-2)


def test_kernels_are_written_tile_by_tile_and_drawn(
    mine, tmp_path, engine_folder, smooth
):
    write_shift_restorer(mine / "shift")
    shutil.copytree(engine_folder / "sharpness", mine / "sharpness")
    rng = np.random.default_rng(4)
    frame = (rng.random((100, 150)) * 4000).astype(np.uint16)
    tifffile.imwrite(tmp_path / "frame.tif", frame)
    ours = ("--engine", "shift", "--classifier", "sharpness")
    output = tmp_path / "kernels.npz"
    said = command("kernels", str(tmp_path / "frame.tif"), "-o", str(output), *ours)
    assert "3 x 4 kernels of 5 px" in succeeded(said)
    with np.load(output) as found:
        kernels = found["kernels"]
        assert found["own_px"] == 48
        assert found["defocus_um"].shape == (3, 4)
    # This engine's kernel is the corner of its tile, eight pixels before its own.
    offset, scale = PercentileRange().fit(frame.astype(np.float32))
    corner = (frame[40 : 40 + KERNEL_PX, 88 : 88 + KERNEL_PX] - offset) / scale
    np.testing.assert_allclose(kernels[1, 2], corner, rtol=1e-2, atol=1e-2)
    # The image names no channel: it is the only one of the config.
    named = ("-o", str(tmp_path / "named.npz"), "--config", "demo")
    succeeded(command("kernels", str(tmp_path / "frame.tif"), *ours, *named))
    with Image.open(tmp_path / "kernels.png") as picture:
        assert picture.size == (300, 200)
    pages = tmp_path / "kernels.tif"
    again = ("kernels", str(tmp_path / "frame.tif"), "-o", str(pages), *ours)
    # The picture of the first call has this name already.
    assert "kernels.png' exists" in failed(command(*again))
    succeeded(command(*again, "--overwrite"))
    assert tifffile.imread(pages).shape == (12, KERNEL_PX, KERNEL_PX)
    none = ("--engine", str(smooth), "-o", str(tmp_path / "none.npz"))
    refused = command("kernels", str(tmp_path / "frame.tif"), *none)
    assert "extracts no kernels; those that do: shift" in refused.err
