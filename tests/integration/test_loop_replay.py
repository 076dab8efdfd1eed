"""Replays through the whole loop: odd pixels, odd shapes, colours."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from loop_kit import Run, assert_whole, command, run_loop, small, succeeded
from PIL import Image
from scipy.ndimage import gaussian_filter

from rtfocus.errors import InputError
from rtfocus.runs import open_run


def specimen(seed: int, shape: tuple[int, int] = (192, 256)) -> np.ndarray[Any, Any]:
    """Blurred blocks, 0 to 1."""
    blocks = np.random.default_rng(seed).random((shape[0] // 4, shape[1] // 4))
    return gaussian_filter(np.kron(blocks, np.ones((4, 4))), 1.5)


def replay(folder: Path, images: Path, engines: Path, **sections: Any) -> Run:
    source = {"source": "replay", "path": str(images), "pixel_size_um": 0.65}
    return run_loop(small(folder, engines, microscope=source, **sections))


def test_nan_and_saturated_float_frames_pass_marked(tmp_path, engine_folder):
    stack = np.stack([specimen(n) for n in range(4)]).astype(np.float32) * 1000
    stack[1, 30:40, 50:60] = np.nan
    stack[2, 5, 7] = np.inf
    stack[3] = np.nan
    images = tmp_path / "images"
    images.mkdir()
    for number, plane in enumerate(stack):
        tifffile.imwrite(images / f"{number}.tif", plane)
    run = replay(tmp_path, images, engine_folder)
    assert_whole(run.folder, frames=4)
    for t in range(4):
        np.testing.assert_array_equal(run.stored("raw", t), stack[t])
        assert run.stored("restored", t).dtype == np.float32
    flags = [set(line["flags"]) for line in run.journal]
    assert "nan" not in flags[0]
    assert "nan" in flags[1]
    assert flags[2]
    assert "nan" in flags[3]
    # What is no number stays so; the light around it is restored.
    restored = run.stored("restored", 1)
    assert np.isfinite(restored[100:, 100:]).all()
    assert run.report["flagged"] == 3


def test_saturated_frames_are_marked(tmp_path, engine_folder):
    stack = (np.stack([specimen(n) for n in range(2)]) * 3000).astype(np.uint16)
    stack[1, 10:20, 10:20] = 4095
    tifffile.imwrite(tmp_path / "film.tif", stack, metadata={"axes": "TYX"})
    camera = {"saturation_counts": 4095}
    run = replay(tmp_path, tmp_path / "film.tif", engine_folder, camera=camera)
    assert_whole(run.folder, frames=2)
    assert [line["flags"] for line in run.journal] == [[], ["saturated"]]


@pytest.mark.parametrize("other", ["shape", "dtype"])
def test_images_of_different_forms_are_refused_before_the_first(
    other, tmp_path, engine_folder
):
    images = tmp_path / "images"
    images.mkdir()
    frames = [(specimen(n) * 3000).astype(np.uint16) for n in range(5)]
    frames[3] = frames[3][:, :200] if other == "shape" else frames[3].astype(np.uint8)
    for number, plane in enumerate(frames):
        tifffile.imwrite(images / f"{number}.tif", plane)
    with pytest.raises(InputError, match=r"differ.*0\.tif, 1\.tif.*3\.tif"):
        replay(tmp_path, images, engine_folder)
    assert not list(tmp_path.glob("*.rtfocus"))


def test_colour_of_8_bits_runs_through(tmp_path, engine_folder):
    images = tmp_path / "images"
    (images / "day 2").mkdir(parents=True)
    frames = [
        np.stack([specimen(3 * n + c) * 250 for c in range(3)], axis=-1).astype(
            np.uint8
        )
        for n in range(2)
    ]
    files = ["0.png", "day 2/1.png"]
    for file, pixels in zip(files, frames, strict=True):
        Image.fromarray(pixels).save(images / file)
    run = replay(tmp_path, images, engine_folder)
    assert_whole(run.folder, frames=2)
    assert [line["file"] for line in run.journal] == files
    assert open_run(run.folder).frames["file"].tolist() == files
    for t in range(2):
        for c in range(3):
            np.testing.assert_array_equal(run.stored("raw", t, 0, c), frames[t][..., c])
            assert run.stored("restored", t, 0, c).dtype == np.uint8
    assert run.report["restored"] == 2


def test_grey_of_8_bits_in_an_ome_tiff_keeps_its_axes(tmp_path, engine_folder):
    stack = np.stack([specimen(n) for n in range(12)]).reshape(2, 2, 3, 192, 256)
    stack = (stack * 250).astype(np.uint8)
    path = tmp_path / "axes.ome.tif"
    tifffile.imwrite(path, stack, metadata={"axes": "TCZYX"})
    run = replay(tmp_path, path, engine_folder)
    assert_whole(run.folder, frames=12)
    for t, c, z in np.ndindex(2, 2, 3):
        np.testing.assert_array_equal(run.stored("raw", t, 0, c, z), stack[t, c, z])


def test_raw_only_keeps_recording_when_restoration_is_slow(tmp_path, engine_folder):
    stack = (np.stack([specimen(n, (512, 512)) for n in range(6)]) * 3000).astype("u2")
    images = tmp_path / "film.tif"
    tifffile.imwrite(images, stack, metadata={"axes": "TYX"})
    slow = {"restoration": {"method": "richardson_lucy", "iterations": 60}}
    policy = {"on_stall": "raw_only", "stall_timeout_s": 0.2, "slots": 2}
    run = replay(tmp_path, images, engine_folder, processing=slow, transport=policy)
    assert_whole(run.folder, frames=6)
    for t in range(6):
        np.testing.assert_array_equal(run.stored("raw", t), stack[t])
    left_out = [line for line in run.journal if line["skipped"]]
    assert left_out
    (said,) = {line["skipped"] for line in left_out}
    assert re.match(r"raw_only: .* for 0\.2 s", said)
    assert all("restored" not in line["stored"] for line in left_out)
    assert run.report["restored"] == 6 - len(left_out)
    (reason,) = run.report["totals"]["not_restored"]
    assert run.report["totals"]["not_restored"][reason] == len(left_out)
    told = succeeded(command("restore", run.folder))
    assert f"restored {len(left_out)} frames" in told
    assert_whole(run.folder, frames=6)
    assert run.report["totals"]["not_restored"] == {}
    for t in range(6):
        assert run.stored("restored", t).any()
