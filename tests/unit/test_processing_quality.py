"""Quality figures against scikit-image and NumPy."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rtfocus.evaluation.scores import match_intensity, mse, pearson, psnr, ssim


@pytest.fixture
def pair():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 256, (70, 61)).astype(np.float64)
    return truth, truth + rng.normal(0, 12, truth.shape)


def test_psnr_and_mse_agree_with_scikit_image(pair):
    truth, image = pair
    theirs = peak_signal_noise_ratio(truth, image, data_range=255)
    assert psnr(truth, image, data_range=255) == pytest.approx(theirs)
    assert mse(truth, image) == pytest.approx(np.mean((truth - image) ** 2))
    assert psnr(truth, truth, data_range=255) == float("inf")


def test_ssim_agrees_with_scikit_image(pair):
    truth, image = pair
    theirs = structural_similarity(
        truth,
        image,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(truth, image, data_range=255) == pytest.approx(theirs, abs=1e-12)


def test_ssim_of_colour_is_the_mean_over_channels(pair):
    truth, image = pair
    colour = np.stack([truth, truth, image], axis=-1)
    grey = np.stack([truth] * 3, axis=-1)
    expected = (2 + ssim(truth, image, data_range=255)) / 3
    assert ssim(grey, colour, data_range=255) == pytest.approx(expected)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="smaller than the 11 px window"):
        ssim(np.ones((10, 50)), np.ones((10, 50)), data_range=1)


def test_pearson_agrees_with_numpy_and_is_nan_for_a_constant(pair):
    truth, image = pair
    expected = np.corrcoef(truth.ravel(), image.ravel())[0, 1]
    assert pearson(truth, image) == pytest.approx(expected)
    assert np.isnan(pearson(truth, np.ones_like(truth)))


def test_match_intensity_undoes_gain_and_offset(pair):
    truth, _ = pair
    np.testing.assert_allclose(match_intensity(truth, truth * 0.3 + 40), truth)
    np.testing.assert_allclose(
        match_intensity(truth, np.ones_like(truth)), truth.mean()
    )
