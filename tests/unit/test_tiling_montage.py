"""Blending weights: a partition of unity for every frame and grid."""

from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.processing.montage import (
    Montage,
    Region,
    axis_weights,
    from_planes,
    paired_planes,
    to_planes,
)


def approx(image):
    return pytest.approx(image, abs=1e-5)


def grid(rows: int, columns: int, *, stride: float = 42.0) -> TileGrid:
    return TileGrid(rows, columns, 84, stride, 41.5, signed=False)


@given(
    length=st.integers(1, 399),
    count=st.integers(1, 12),
    stride=st.floats(1.0, 90.0),
    origin=st.floats(-20.0, 60.0),
    window=st.sampled_from(["triangular", "rectangular"]),
)
def test_weights_of_an_axis_are_a_partition_of_unity(
    length, count, stride, origin, window
):
    centres = origin + stride * np.arange(count)
    weights = axis_weights(length, centres, window)
    assert weights.shape == (count, length)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, atol=1e-6)


def test_triangle_has_base_84_and_peaks_at_the_tile_centre():
    weights = axis_weights(300, 41.5 + 42.0 * np.arange(6))
    inner = weights[2]
    touched = np.flatnonzero(inner)
    assert touched[-1] - touched[0] + 1 == 84
    assert touched[0] == 84
    assert inner[125] == inner[126] == inner.max()


def test_rectangle_is_one_inside_its_own_tile_and_zero_outside():
    montage = Montage(grid(5, 5), (252, 252), "rectangular")
    labels = np.zeros((5, 5), np.int16)
    labels[2, 2] = 3
    region = montage.region(labels, 3)
    assert region == Region(slice(84, 168), slice(84, 168))
    np.testing.assert_array_equal(montage.weights(labels, 3, region), 1.0)


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    window=st.sampled_from(["triangular", "rectangular"]),
)
def test_levels_and_untouched_rest_add_up_to_one_in_every_pixel(
    height, width, seed, window
):
    rng = np.random.default_rng(seed)
    rows, columns = (max(1, (side - 84) // 42 + 1) for side in (height, width))
    montage = Montage(grid(rows, columns), (height, width), window)
    labels = rng.integers(-2, 6, (rows, columns)).astype(np.int16)
    labels[rng.random(labels.shape) < 0.2] = BACKGROUND
    total = np.zeros((height, width), np.float32)
    whole = Region(slice(0, height), slice(0, width))
    for level in np.unique(montage.tiles(labels)):
        total += montage.weights(labels, int(level), whole)
    np.testing.assert_allclose(total, 1.0, atol=1e-5)


@given(seed=st.integers(0, 2**31))
def test_region_holds_every_weight_of_its_level(seed):
    rng = np.random.default_rng(seed)
    montage = Montage(grid(4, 5), (210, 252))
    labels = rng.integers(-4, 9, (4, 5)).astype(np.int16)
    whole = Region(slice(0, 210), slice(0, 252))
    for level in montage.present(labels):
        region = montage.region(labels, level)
        everywhere = montage.weights(labels, level, whole)
        inside = montage.weights(labels, level, region)
        np.testing.assert_allclose(
            everywhere[region.rows, region.columns], inside, atol=1e-6
        )
        everywhere[region.rows, region.columns] = 0
        assert everywhere.max() == 0


def test_present_names_no_background_and_no_focus():
    montage = Montage(grid(2, 3), (126, 168))
    labels = np.array([[BACKGROUND, 0, 4], [0, -2, 4]], np.int16)
    assert montage.present(labels) == [-2, 4]


@pytest.mark.parametrize("side", [1, 5, 83])
def test_frames_smaller_than_a_tile_belong_to_the_one_tile(side):
    montage = Montage(grid(1, 1), (side, side))
    labels = np.full((1, 1), 7, np.int16)
    region = montage.region(labels, 7)
    assert region.shape == (side, side)
    np.testing.assert_array_equal(montage.weights(labels, 7, region), 1.0)


@settings(max_examples=40)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    window=st.sampled_from(["triangular", "rectangular"]),
)
def test_a_level_weighs_what_its_tiles_weigh_each_within_its_own_region(
    height, width, seed, window
):
    # Every tile has its centre in the frame.
    rows, columns = (max(1, ceil((side - 41.5) / 42)) for side in (height, width))
    montage = Montage(grid(rows, columns), (height, width), window)
    labels = np.random.default_rng(seed).integers(0, 2, (rows, columns)) * 2
    total = np.zeros((height, width), np.float32)
    for row, column in zip(*np.nonzero(montage.tiles(labels)), strict=True):
        region = montage.tile_region(row, column)
        own = montage.tile_weights(row, column, region)
        assert own.any(axis=0).all()
        assert own.any(axis=1).all()
        whole = montage.tile_weights(row, column, montage.whole)
        assert own.sum() == pytest.approx(whole.sum(), rel=1e-4)
        total[region.rows, region.columns] += own
    np.testing.assert_allclose(montage.restored_share(labels), total, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_planes_of_a_batch_become_the_frame_again(shape, channels):
    signal = np.random.default_rng(0).random(shape, np.float32)
    planes = to_planes(signal, channels)
    assert planes.shape[1:] == (channels, 4, 6)
    assert from_planes(planes, shape) == approx(signal)
    pairs = paired_planes(signal, from_planes(2 * planes, shape))
    assert len(pairs) == (1 if len(shape) == 2 else 3)
    for before, after in pairs:
        assert before.shape == (4, 6)
        assert after == approx(2 * before)
    # A grey frame is the mean of what its channels became.
    uneven = planes + np.arange(channels, dtype=np.float32)[:, None, None]
    if len(shape) == 2:
        assert from_planes(uneven, shape) == approx(signal + (channels - 1) / 2)
