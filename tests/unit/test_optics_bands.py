"""Bands of radial frequency and the taper of a tile's edge."""

import numpy as np
import pytest

from rtfocus.optics.formation import band_centres, band_weights, edge_taper


@pytest.mark.parametrize("shape", [(192, 192), (96, 130), (7, 5)])
def test_bands_share_out_every_frequency(shape):
    weights = band_weights(shape, 12)
    assert weights.shape == (12, shape[0], shape[1] // 2 + 1)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-6)


def test_a_centre_belongs_to_its_band_alone():
    # Centres at 0, 1/8 * ..., 0.5 for five bands: 0.5 * (i / 4)^1.5.
    np.testing.assert_allclose(band_centres(5)[[0, 1, 4]], [0, 0.0625, 0.5])
    weights = band_weights((64, 64), 5)
    assert weights[0, 0, 0] == 1
    # 4 / 64 = 0.0625 cycles per pixel along x, 32 / 64 = 0.5 along y.
    np.testing.assert_allclose(weights[:, 0, 4], [0, 1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(weights[:, 32, 0], [0, 0, 0, 0, 1], atol=1e-6)


def test_bands_are_rings_and_the_corners_belong_to_the_last():
    weights = band_weights((64, 64), 5)
    np.testing.assert_array_equal(weights[:, 5, 0], weights[:, 0, 5])
    np.testing.assert_array_equal(weights[:, 32, 32], [0, 0, 0, 0, 1])


def test_values_per_band_are_interpolated_linearly():
    weights = band_weights((256, 256), 5)
    frequency = 10 / 256
    value = weights[:, 0, 10] @ np.arange(5.0)
    assert value == pytest.approx(np.interp(frequency, band_centres(5), np.arange(5)))


def test_one_band_is_refused():
    with pytest.raises(ValueError, match="need >= 2"):
        band_weights((64, 64), 1)


def test_taper_is_one_inside_and_half_a_cosine_outside():
    window = edge_taper((40, 60), 8)
    assert window.shape == (40, 60)
    np.testing.assert_array_equal(window[8:-8, 8:-8], 1)
    np.testing.assert_array_equal(window, window[::-1, ::-1])
    expected = 0.5 - 0.5 * np.cos(np.pi * 0.5 / 8)
    assert window[20, 0] == pytest.approx(expected, rel=1e-5)
    assert window[0, 0] == pytest.approx(expected**2, rel=1e-5)
