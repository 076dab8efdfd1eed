"""Every kind of engine by its name, through the processor of the live loop."""

import shutil

import numpy as np
import pytest
from engine_kit import (
    write_brightness_joint,
    write_constant_wiener,
    write_shift_restorer,
    write_smooth_restorer,
)
from scipy.ndimage import uniform_filter

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config import parse_config
from rtfocus.errors import EngineError
from rtfocus.frame import BACKGROUND
from rtfocus.offline import ImageProcessor
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.processing.montage import Montage

SHAPE = (192, 336)
SAMPLING = 0.65 * 0.5 / 0.451


@pytest.fixture(scope="module")
def zoo(engine_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    shutil.copytree(engine_folder / "sharpness", folder / "sharpness")
    write_brightness_joint(folder / "brightness")
    write_shift_restorer(folder / "shift")
    write_shift_restorer(folder / "by_defocus", entries=("defocus_levels",))
    write_smooth_restorer(folder / "smooth")
    write_smooth_restorer(folder / "smooth_rgb", channels=3)
    write_constant_wiener(folder / "even_wiener", log_snr=4.0)
    return folder


@pytest.fixture(scope="module")
def frame():
    """Brighter to the right: from -10 to 10 for the engine ``brightness``."""
    rng = np.random.default_rng(6)
    ramp = np.linspace(100, 4000, SHAPE[1])[None, :] + np.zeros((SHAPE[0], 1))
    frame = ramp + rng.normal(0, 20, SHAPE)
    # Left half of the middle: nothing but flat, so background.
    return np.maximum(frame, 0).astype(np.float32)


def processor(zoo, *, waves=None, **processing):
    optics = None
    if waves is not None:
        optics = OpticalSystem(
            0.5, 451, 0.65, aberrations=Aberrations(spherical_waves=waves)
        )
    method = processing.pop("method", "none")
    values = {
        "classifier": "brightness",
        "engine_folders": [str(zoo)],
        "threads": 2,
        "precision": "f32",
        "restoration": {"method": method},
    }
    raw = {"processing": values | processing, "store": {"restored_dtype": "float32"}}
    return ImageProcessor(parse_config(raw), optics)


def scale_of(frame):
    return PercentileRange().fit(frame)


def share_of(result):
    return Montage(result.defocus.grid, SHAPE).restored_share(result.defocus.level)


def test_a_joint_engine_classifies_with_sign_and_uncertainty(zoo, frame):
    with processor(zoo, waves=-0.3) as images:
        found = images.classify(frame)
    level = found.defocus.level
    assert (np.diff(level[0].astype(int)) > 0).all()
    assert level.min() < -4
    assert level.max() > 4
    np.testing.assert_allclose(found.defocus.defocus_um, 2.0 * level, atol=1.1)
    assert (found.defocus.uncertainty_um >= 0).all()
    assert found.estimate.signed
    assert "restorer" not in found.engines


def test_positive_aberration_turns_the_sign(zoo, frame):
    with processor(zoo, waves=-0.3) as images:
        one = images.classify(frame).defocus
    with processor(zoo, waves=0.3) as images:
        other = images.classify(frame).defocus
    np.testing.assert_array_equal(one.level, -other.level)
    np.testing.assert_allclose(one.defocus_um, -other.defocus_um)
    np.testing.assert_allclose(one.uncertainty_um, other.uncertainty_um)


def test_one_pass_of_a_joint_engine_restores_what_is_out_of_focus(zoo, frame):
    with processor(zoo, waves=-0.3, method="brightness") as images:
        result = images.restore(frame)
        assert set(images.backends()) == {"brightness"}
    _, scale = scale_of(frame)
    # The engine adds sampling / 10 in its own units.
    expected = frame + share_of(result) * scale * SAMPLING / 10
    np.testing.assert_allclose(result.restored, expected, rtol=1e-4)
    assert result.engines["classifier"] == result.engines["restorer"]


def test_background_and_focus_come_back_to_the_bit(zoo, frame):
    flat = frame.copy()
    flat[:, :200] = 1000
    for method in ("brightness", "shift", "smooth", "even_wiener"):
        with processor(zoo, waves=-0.3, method=method) as images:
            result = images.restore(flat)
        level = result.defocus.level
        assert (level == BACKGROUND).any(), method
        untouched = share_of(result) == 0
        assert 0 < untouched.mean() < 1, method
        np.testing.assert_array_equal(
            result.restored[untouched], flat[untouched], err_msg=method
        )
        assert np.any(result.restored != flat), method


def test_a_restorer_of_tiles_is_as_good_as_one_of_the_whole_frame(zoo, frame):
    with processor(zoo, method="smooth") as images:
        result = images.restore(frame)
        assert set(images.backends()) == {"brightness", "smooth"}
    smooth = uniform_filter(frame.astype(np.float64), 3, mode="reflect")
    expected = frame + share_of(result) * (smooth - frame)
    np.testing.assert_allclose(result.restored, expected, rtol=1e-4, atol=0.05)


def test_a_restorer_is_told_the_defocus_of_each_tile(zoo, frame):
    with processor(zoo, waves=-0.3, method="by_defocus") as images:
        result = images.restore(frame)
    _, scale = scale_of(frame)
    added = (result.restored - frame) / scale * 10
    level = result.defocus.level
    columns = result.defocus.grid.origin_px + 48 * np.arange(level.shape[1])
    inside = np.ix_(range(60, 130), [int(x) for x in columns if 60 < x < SHAPE[1] - 60])
    seen = added[inside].mean(axis=0)
    wanted = level[1, [60 < x < SHAPE[1] - 60 for x in columns]]
    # A tile is told the mean over itself and its surroundings: within a label's step.
    np.testing.assert_allclose(seen, wanted, atol=2.0)
    assert seen.min() < -3
    assert seen.max() > 3


def test_a_joint_engine_can_restore_after_another_classifier(zoo, frame):
    rng = np.random.default_rng(3)
    textured = frame + np.kron(rng.random((48, 84)), np.ones((4, 4))) * 2000
    textured = textured.astype(np.float32)
    with processor(zoo, classifier="sharpness", method="brightness") as images:
        result = images.restore(textured)
        assert set(images.backends()) == {"sharpness", "brightness"}
    _, scale = scale_of(textured)
    expected = textured + share_of(result) * scale * SAMPLING / 10
    np.testing.assert_allclose(result.restored, expected, rtol=1e-4)
    assert share_of(result).max() == 1


def test_classical_restorations_use_the_psf_of_the_signed_level(zoo, frame):
    with processor(zoo, waves=-0.5, method="richardson_lucy") as images:
        below = images.restore(frame).restored
    with processor(zoo, waves=0.5, method="richardson_lucy") as images:
        # Levels and W both turned: the same PSFs.
        above = images.restore(frame).restored
    np.testing.assert_allclose(below, above, rtol=1e-3, atol=1)
    assert np.abs(below - frame).max() > 10


@pytest.mark.parametrize("method", ["brightness", "smooth", "smooth_rgb"])
def test_colours_are_restored(zoo, frame, method):
    colours = np.stack([frame, frame[:, ::-1], frame * 0.5], axis=-1)
    with processor(zoo, method=method) as images:
        result = images.restore(colours)
    share = share_of(result)
    if method == "brightness":
        added = [scale_of(colours[..., c])[1] * SAMPLING / 10 for c in range(3)]
        expected = colours + share[..., None] * np.array(added)
    else:
        smooth = np.stack(
            [uniform_filter(colours[..., c], 3, mode="reflect") for c in range(3)], -1
        )
        expected = colours + share[..., None] * (smooth - colours)
    np.testing.assert_allclose(result.restored, expected, rtol=1e-3, atol=0.3)


def test_large_frames_are_seen_through_windows_with_the_same_result(
    zoo, frame, monkeypatch
):
    large = np.tile(frame, (2, 2))
    with processor(zoo, method="brightness") as images:
        whole = images.restore(large)
    monkeypatch.setattr("rtfocus.processing.cpu.classifier.LARGEST_PX", 240)
    monkeypatch.setattr("rtfocus.processing.cpu.classifier.HALO_PX", 48)
    with processor(zoo, method="brightness") as images:
        pieces = images.restore(large)
    np.testing.assert_array_equal(whole.defocus.level, pieces.defocus.level)
    np.testing.assert_allclose(whole.restored, pieces.restored, rtol=1e-5)


def test_optics_nobody_gave_are_not_told(zoo, frame):
    blind = {"blind": True}
    with processor(zoo, method="shift") as images:
        unknown = images.restore(frame).restored
    with processor(zoo, method="shift", waves=0.0, **blind) as images:
        np.testing.assert_array_equal(images.restore(frame).restored, unknown)


def test_fp16_where_an_engine_has_none_runs_fp32_and_says_so(zoo, frame, caplog):
    with processor(zoo, method="smooth", precision="fp16") as images:
        assert images.restore(frame).restored is not None
    assert "engine 'smooth' has no fp16 weights: fp32 runs" in caplog.text


def test_a_restorer_cannot_classify(zoo, frame):
    with (
        processor(zoo, classifier="smooth") as images,
        pytest.raises(EngineError, match=r"'smooth' restores and finds.*: .*delpnet"),
    ):
        images.classify(frame)
