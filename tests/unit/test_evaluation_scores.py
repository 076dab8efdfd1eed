"""Scores and costs of an evaluation against values counted by hand."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from rtfocus.engines.registry import FoundEngine, find_engine
from rtfocus.evaluation.contenders import multiply_adds_per_pixel
from rtfocus.evaluation.evaluate import (
    EQUAL_DB,
    Figures,
    Scored,
    _within_full_scale,
    mean_figures,
)
from rtfocus.evaluation.scores import (
    ErrorScore,
    LevelScore,
    rank_correlation,
    specimen_tiles,
)
from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.optics.normalisation import ContrastToNoise


def add(score, true, found, confidence=None, **more):
    found = np.array(found)
    sure = np.full(found.shape, 1.0) if confidence is None else np.array(confidence)
    score.add(true, found, sure.astype(np.float32), background=BACKGROUND, **more)


def test_right_close_and_empty_tiles_are_counted() -> None:
    score = LevelScore((0, 1, 2, 3, 4))
    add(score, (2.0, 2.0), [2, 2, 1, 4, BACKGROUND])
    found = score.summary()
    assert (found["tiles"], found["accuracy"], found["within_one"]) == (5, 0.4, 0.6)
    assert found["called_background"] == 0.2
    assert found["confusion"][2] == [0, 1, 2, 0, 1, 1]
    assert found["sign_right"] is None


def test_a_range_of_levels_counts_as_right() -> None:
    score = LevelScore((0, 1, 2, 3, 4, 5, 6))
    add(score, (3.6, 5.2), [3, 4, 5, 6, 2])
    found = score.summary()
    assert found["accuracy"] == 0.4
    assert found["within_one"] == 0.8
    # What is right is not known exactly: no confidence can be held against it.
    assert found["calibration_error"] is None


def test_in_focus_means_level_zero_whatever_the_range() -> None:
    score = LevelScore((0, 1, 2))
    add(score, (0.0, 1.04), [0, 1, 2])
    assert score.confusion[0].tolist() == [1, 1, 1, 0]
    assert score.right == 2
    both = LevelScore((-2, -1, 0, 1, 2))
    add(both, (-3.0, 0.5), [0])
    assert both.confusion[2].tolist() == [0, 0, 1, 0, 0, 0]


def test_levels_beyond_the_last_one_are_the_last_one() -> None:
    score = LevelScore((-2, -1, 0, 1, 2))
    add(score, (-9.0, -9.0), [-2, 2], sided=True)
    assert score.right == 1
    assert score.summary()["sign_right"] == 0.5


def test_the_sign_is_not_asked_of_tiles_called_in_focus() -> None:
    score = LevelScore((-1, 0, 1))
    add(score, (1.0, 1.0), [0, 1, -1, BACKGROUND], sided=True)
    assert (score.sided, score.right_side) == (2, 1)
    add(score, (0.5, 0.5), [1, -1], sided=True)
    add(score, (-0.6, -0.6), [1, -1], sided=True)
    assert (score.sided, score.right_side) == (6, 3)


def test_the_cumulative_match_counts_ranks() -> None:
    score = LevelScore((0, 1, 2, 3, 4, 5))
    score.add_ranks(np.array([0, 0, 1, 3]))
    assert score.summary()["top_k"] == [0.5, 0.75, 0.75, 1.0, 1.0]
    score.add_ranks(np.array([6]))  # behind every level and the background
    assert score.summary()["top_k"] == [0.4, 0.6, 0.6, 0.8, 0.8]
    assert score.right_range((3.6, 5.2)) == (4, 5)


def test_calibration_error_is_the_gap_between_confidence_and_truth() -> None:
    score = LevelScore((0, 1))
    # Of ten tiles at 90 % eight are right, of ten at 50 % six: one does not make up
    # for the other.
    add(score, (1.0, 1.0), [1] * 8 + [0] * 2, [0.9] * 10)
    add(score, (1.0, 1.0), [1] * 6 + [0] * 4, [0.5] * 10)
    assert score.summary()["calibration_error"] == pytest.approx(0.1, abs=1e-3)


def test_uncertainty_is_held_against_the_errors() -> None:
    score = LevelScore((0, 1))
    score.add_errors(np.array([0.5, -3.0, 1.5, np.nan]), np.array([1.0, 2.0, 0.5, 9.0]))
    score.add_errors(np.array([9.0]))  # an engine that states none
    found = score.summary()
    assert found["within_one_sigma"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["within_two_sigma"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["mean_error_um"] == 3.5


def test_stated_errors_are_held_against_the_true_ones() -> None:
    rng = np.random.default_rng(8)
    score = ErrorScore()
    for size in (1.0, 4.0, 16.0):
        true = size * rng.uniform(0.5, 2, (4, 5))
        score.add(np.full((4, 5), 1.5 * np.sqrt(np.square(true).mean())), true)
        score.add(3 * np.exp(true / size), true)
    score.add(np.full((4, 5), 0.02), np.zeros((4, 5)), in_focus=True)
    said = score.summary()
    assert (said["frames"], said["places"]) == (6, 120)
    # Where all places are told alike nothing is ranked: the others are, exactly.
    assert said["rank_in_frame"] == 1.0
    assert 0 < said["rank"] < 1
    # Three are 1.5 times too large; of the others one is within twice the true one.
    assert said["within_factor_two"] == pytest.approx(4 / 6, abs=1e-3)
    assert said["factor"] == pytest.approx(1.5, abs=0.01)
    assert said["in_focus_percent"] == 2.0


def test_equal_values_share_a_rank() -> None:
    one = np.array([3.0, 1, 1, 2, 5, 5, 5, 9, 0, 7])
    other = np.array([2.0, 2, 0, 1, 8, 3, 5, 4, 0, 6])
    wanted = spearmanr(one, other).statistic
    assert rank_correlation(one, other) == pytest.approx(wanted, abs=1e-3)
    assert rank_correlation(one[:8], other[:8]) is None
    assert rank_correlation(np.ones(10), other) is None


def test_mean_figures_name_the_worst_frame() -> None:
    def frame(name, before, after):
        return Scored(
            name, "g", Figures(before, 0.9, 0.8, 4.0), Figures(after, 0.95, 0.9, 2.0)
        )

    found = mean_figures([frame("a", 30.0, 36.0), frame("b", 32.0, 31.0)])
    assert found["gain_db"] == 2.5
    assert (found["worst_gain_db"], found["worst_frame"]) == (-1.0, "b")
    assert found["after"] == {"psnr_db": 33.5, "ssim": 0.95, "pcc": 0.9, "mse": 2.0}
    assert EQUAL_DB == 100.0


def test_what_no_camera_could_deliver_is_cut_but_not_rounded() -> None:
    restored = np.array([-3.0, 12.25, 380.0], np.float32)
    cut = _within_full_scale(restored, np.dtype(np.uint8))
    assert cut.tolist() == [0.0, 12.25, 255.0]
    assert _within_full_scale(restored, np.dtype(np.float32)) is restored


def test_only_tiles_with_something_in_them_are_asked_for() -> None:
    frame = np.random.default_rng(0).normal(100.0, 2.0, (96, 144)).astype(np.float32)
    frame[60:70, 100:110] += 80.0
    grid = TileGrid(2, 3, tile_px=48, stride_px=48, origin_px=23.5, signed=False)
    found = specimen_tiles(frame, grid, quantum=0.0)
    assert found.tolist() == [[False] * 3, [False, False, True]]


@given(seed=st.integers(0, 999), cells=st.integers(1, 4), height=st.floats(0, 40))
def test_tiles_with_a_specimen_are_those_that_are_no_background(seed, cells, height):
    rng = np.random.default_rng(seed)
    frame = rng.normal(100, 2, (96, 120)).astype(np.float32)
    frame[30:40, 50:70] += np.float32(height)
    side = 12 * cells
    rule = ContrastToNoise(quantum=1.0)
    empty = rule.tiles(frame, tile_px=side, stride_px=side)
    grid = TileGrid(*empty.shape, side, side, (side - 1) / 2, signed=False)
    assert (specimen_tiles(frame, grid, 1.0) == ~empty).all()


def test_multiply_adds_of_every_kind_of_layer(tmp_path: Path) -> None:
    found = write_layers(tmp_path / "layers")
    # Per pixel of the 24 px tile: a 3 x 3 convolution of 1 to 4 channels, one of 2
    # groups, a transposed one from half the size; 16 of its 24 px are owned.
    convolution, grouped = 4 * 9, 4 * 2 * 9
    half, transposed = 4 * 4 / 4, 4 * 1 * 4 / 4
    whole = convolution + grouped + half * 4 + transposed
    assert multiply_adds_per_pixel(found) == pytest.approx(whole * 24**2 / 16**2)


def test_a_built_in_engine_has_no_multiply_adds(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    card = {"name": "plain", "kind": "restorer", "implementation": "builtin:wiener"}
    (folder / "engine.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    assert multiply_adds_per_pixel(find_engine(str(folder))) is None


def write_layers(folder: Path) -> FoundEngine:
    """A restorer whose network has one layer of every kind that is counted."""
    from onnx import TensorProto, helper, numpy_helper

    weights = {
        "w1": np.ones((4, 1, 3, 3), np.float32),
        "w2": np.ones((4, 2, 3, 3), np.float32),
        "w3": np.ones((4, 4, 2, 2), np.float32),
        "w4": np.ones((4, 1, 2, 2), np.float32),
    }
    same = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["tiles", "w1"], ["a"], **same),
        helper.make_node("Conv", ["a", "w2"], ["b"], group=2, **same),
        helper.make_node("Conv", ["b", "w3"], ["c"], strides=[2, 2]),
        helper.make_node("ConvTranspose", ["c", "w4"], ["restored"], strides=[2, 2]),
    ]
    sides = ["n", 1, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("tiles", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info("restored", TensorProto.FLOAT, sides)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    folder.mkdir(parents=True)
    path = folder / "model.fp32.onnx"
    path.write_bytes(model.SerializeToString())
    optics = {"numerical_aperture": 0.5, "wavelength_nm": 500, "pixel_size_um": 0.5}
    card = {
        "name": "layers",
        "kind": "restorer",
        "implementation": "onnx",
        "files": {"fp32": path.name},
        "sha256": {"fp32": hashlib.sha256(path.read_bytes()).hexdigest()},
        "input": {"name": "tiles", "tile_px": 24, "halo_px": 4, "multiple_px": 2},
        "output": {"name": "restored"},
        "levels": {"step_um": 2.0, "count": 11},
        "normalisation": {"name": "percentile_range"},
        "optics": {"sampling_min": 0.1, "sampling_max": 2.0, "reference": optics},
    }
    (folder / "engine.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    return find_engine(str(folder))
