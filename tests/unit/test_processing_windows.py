"""Windows and frame tiles: everything is covered, once, and joined without a seam."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtfocus.engines.card import InputCard
from rtfocus.frame import BACKGROUND, DefocusMap, TileGrid
from rtfocus.processing.montage import (
    FrameTiles,
    Montage,
    fewest_windows,
    windows_of_size,
)


def summed(windows):
    total = np.zeros(windows.length_px)
    for index, weights in enumerate(windows.weights()):
        total[windows.span(index)] += weights
    return total


@settings(deadline=None)
@given(
    length=st.integers(1, 3000),
    own=st.integers(1, 300),
    halo=st.integers(0, 64),
)
def test_windows_of_a_size_cover_the_axis_with_weights_of_one(length, own, halo):
    windows = windows_of_size(length, own + 2 * halo, halo)
    assert windows.size_px == own + 2 * halo
    assert length + 2 * halo <= windows.length_px < length + 2 * halo + own
    np.testing.assert_allclose(summed(windows), 1, atol=1e-5)


@settings(deadline=None)
@given(length=st.integers(1, 9000), multiple=st.sampled_from([1, 16, 48]))
def test_fewest_windows_stay_below_the_largest_and_start_on_the_multiple(
    length, multiple
):
    windows = fewest_windows(length, 2304, 144, multiple)
    assert windows.length_px >= length
    assert windows.size_px <= 2304 + multiple
    if windows.count == 1:
        assert windows.length_px == length
    else:
        assert windows.own_px % multiple == windows.halo_px % multiple == 0
        np.testing.assert_allclose(summed(windows), 1, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (48, 48), (100, 161)])
def test_tiles_cut_and_joined_give_the_frame_back(shape):
    tiles = FrameTiles(InputCard(name="t", tile_px=64, halo_px=8), shape)
    planes = np.random.default_rng(1).random((2, *shape), np.float32)
    cut = tiles.cut(planes, tiles.places)
    assert cut.shape[1:] == (2, 64, 64)
    np.testing.assert_allclose(tiles.join(cut, tiles.places), planes, atol=1e-6)


def test_only_tiles_that_weigh_in_pixels_to_restore_are_needed():
    shape = (288, 288)
    grid = TileGrid(5, 5, 96, 48, 47.5, signed=True)
    labels = np.full((5, 5), BACKGROUND, np.int16)
    labels[1:, 1:] = 0
    labels[0, 0] = -3
    share = Montage(grid, shape).restored_share(labels)
    assert share[0, 0] == 1
    tiles = FrameTiles(InputCard(name="t", tile_px=64, halo_px=8), shape)
    needed = tiles.needed(share)
    # The label's weight ends at its neighbours' centres, pixel 95.
    assert set(needed) == {(row, column) for row in range(3) for column in range(3)}
    untouched = np.ones(shape, bool)
    untouched[:96, :96] = False
    assert (share[untouched] == 0).all()


def test_a_tile_is_told_the_defocus_of_the_labels_out_of_focus_around_it():
    grid = TileGrid(1, 5, 96, 48, 47.5, signed=True)
    found = DefocusMap(
        grid,
        defocus_um=np.array([[-4, 0, np.nan, 8, 6]], np.float32),
        confidence=np.array([[1, 1, 1, 0.5, 0.25]], np.float32),
        level=np.array([[-2, 0, BACKGROUND, 4, 3]], np.int16),
    )
    tiles = FrameTiles(InputCard(name="t", tile_px=96, halo_px=24), (96, 288))
    told = tiles.defocus_um(found, [(0, column) for column in range(6)])
    # Own pixels are 48 wide: labels within 24 + 48 px of their middle count.
    weighted = (8 * 0.5 + 6 * 0.25) / 0.75
    np.testing.assert_allclose(told, [-4, -4, 8, weighted, weighted, 6])
