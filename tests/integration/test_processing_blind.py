"""Blind restoration in the loop's code: corrections are weighed, told ones are not."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import yaml
from engine_kit import write_brightness_joint
from loop_kit import run_loop, small
from numpy.typing import NDArray

from rtfocus.config import parse_config
from rtfocus.evaluation.contenders import contender
from rtfocus.evaluation.samples import BBBC006, DataSet
from rtfocus.files import resource_folder
from rtfocus.offline import ImageProcessor
from rtfocus.optics.formation import blur
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.optics.psf import compute_psf
from rtfocus.runs import open_run
from rtfocus.specimens import draw_specimen

SHIPPED = resource_folder("engines") / "rtfocus-2"
NO_DATA = DataSet("none", "", BBBC006, 100.0, ())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the shipped engine without what weighs its corrections."""
    folder = tmp_path_factory.mktemp("bare") / "rtfocus-2"
    shutil.copytree(SHIPPED, folder)
    card = yaml.safe_load((folder / "engine.yaml").read_text("utf-8"))
    del card["evidence"], card["expected_error"]
    (folder / "engine.yaml").write_text(yaml.safe_dump(card), "utf-8")
    return folder


Restored = dict[tuple[str, bool], NDArray[np.float32]]


@pytest.fixture(scope="module")
def restored(bare: Path) -> Restored:
    """Restore one frame by both engines, blind and told; the frame is "frame".

    Expected errors, where one is stated, are "ENGINE error".
    """
    rng = np.random.default_rng(4)
    light = draw_specimen("tissue", (192, 192), rng)
    counts = 100 + 900 * blur(light, compute_psf(BBBC006, 7.0))
    frame = rng.poisson(counts).astype(np.uint16)
    images = {("frame", True): frame.astype(np.float32)}
    with ExitStack() as stack:
        for name, folder in (("shipped", SHIPPED), ("bare", bare)):
            for blind in (True, False):
                engine = contender(str(folder), classifier="none", blind=blind)
                config = engine.config(NO_DATA, threads=1, precision="f32")
                processor = stack.enter_context(ImageProcessor(config))
                result = processor.restore(frame)
                assert result.restored is not None
                images[name, blind] = np.array(result.restored)
                if result.expected_error is not None:
                    assert result.defocus is not None
                    assert result.expected_error.shape == result.defocus.level.shape
                    images[f"{name} error", blind] = result.expected_error
    images["light", True] = 100 + 900 * light
    return images


def test_blind_corrections_are_taken_back_in_part(
    restored: Restored,
) -> None:
    frame = restored["frame", True]
    whole = restored["bare", True] - frame
    weighed = restored["shipped", True] - frame
    assert np.abs(whole).max() > 20
    assert (np.abs(weighed) <= np.abs(whole) + 1e-3).all()
    assert (weighed * whole >= -1e-3).all()
    share = np.vdot(weighed, whole) / np.vdot(whole, whole)
    assert 0.05 < share < 0.999


def test_told_the_optics_all_of_a_correction_is_taken(
    restored: Restored,
) -> None:
    assert np.array_equal(restored["shipped", False], restored["bare", False])


def test_the_error_left_is_stated_blind_by_what_knows_it_alone(
    restored: Restored,
) -> None:
    stated = [key for key in restored if key[0].endswith("error")]
    assert stated == [("shipped error", True)]
    error = restored["shipped error", True]
    left = restored["shipped", True] - restored["light", True]
    true = np.sqrt(np.square(left).mean())
    assert true / 3 < np.sqrt(np.square(error).mean()) < 3 * true


def test_a_run_keeps_the_error_of_every_restored_frame(tmp_path: Path) -> None:
    write_brightness_joint(tmp_path / "engines/weighed", share=0.25, log_error=-4.0)
    processing = {
        "classifier": "weighed",
        "restoration": {"method": "weighed"},
        "engine_folders": [str(tmp_path / "engines")],
        "blind": True,
    }
    folder = run_loop(small(tmp_path, None, processing=processing)).folder
    read = open_run(folder)
    assert read.header.expects_error
    with ImageProcessor(parse_config(read.config)) as alone:
        found = [alone.restore(pixels).defocus for pixels in read.raw[:, 0, 0]]
    stated = np.array([defocus.stated_um for defocus in found])
    assert np.isfinite(stated).any()
    np.testing.assert_allclose(read.deviation[:, 0, 0], stated, rtol=1e-5)
    for frame in read.frames:
        raw = read.raw[frame["t"], 0, 0].astype(np.float32)
        _, scale = PercentileRange().fit(raw)
        wanted = scale * np.exp(-2.0)
        assert read.expected_error[frame["t"], 0, 0] == pytest.approx(wanted, rel=1e-3)
        assert frame["expected_error_counts"] == pytest.approx(wanted, rel=1e-3)
