"""Camera noise: means, variances, clipping and seeds."""

import numpy as np
import pytest

from rtfocus.optics.formation import CameraModel, NoisePool

CAMERA = CameraModel(
    photons=400.0, gain_e_per_count=0.5, offset_counts=100.0, read_noise_e=3.0
)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_mean_and_variance_are_those_of_poisson_and_read_noise(exact, level):
    rng = np.random.default_rng(0)
    image = np.full((500, 500), level, dtype=np.float32)
    if exact:
        frame = CAMERA.expose(image, rng)
    else:
        frame = NoisePool(CAMERA, rng).expose(image)
    electrons = 400.0 * level
    # Rounding to whole counts adds 1/12 to the variance.
    variance = 4.0 * (electrons + 9.0) + 1.0 / 12.0
    error = np.sqrt(variance / frame.size)
    assert frame.mean() == pytest.approx(100.0 + 2.0 * electrons, abs=5 * error)
    assert frame.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / frame.size))


def test_exact_noise_is_skewed_where_the_pool_is_not():
    dim = CameraModel(photons=4.0, gain_e_per_count=0.01, offset_counts=5e3)
    image = np.ones((500, 500), dtype=np.float32)
    exact = dim.expose(image, np.random.default_rng(0)).astype(np.float64)
    pooled = NoisePool(dim, np.random.default_rng(0)).expose(image).astype(np.float64)

    def skewness(frame):
        return (((frame - frame.mean()) / frame.std()) ** 3).mean()

    # Poisson of mean 4 with read noise 1.5: 4 / (4 + 2.25)^1.5 = 0.256.
    assert skewness(exact) == pytest.approx(0.256, abs=0.03)
    assert abs(skewness(pooled)) < 0.03


def test_noise_is_independent_from_pixel_to_pixel_and_frame_to_frame():
    rng = np.random.default_rng(3)
    image = np.full((300, 300), 0.5, dtype=np.float32)
    pool = NoisePool(CAMERA, rng)
    first, second = (pool.expose(image).astype(np.float64) for _ in range(2))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(first[:, :-1].ravel(), first[:, 1:].ravel())[0, 1]) < 0.02


def test_the_same_seed_gives_the_same_frames_and_another_does_not():
    image = np.random.default_rng(0).random((64, 64), dtype=np.float32)

    def frames(seed):
        exact = CAMERA.expose(image, np.random.default_rng(seed))
        pooled = NoisePool(CAMERA, np.random.default_rng(seed)).expose(image)
        return exact, pooled

    for one, same, other in zip(frames(7), frames(7), frames(8), strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != other).mean() > 0.5


def test_a_pool_smaller_than_the_frame_wraps_around():
    image = np.ones((40, 40), dtype=np.float32)
    frame = NoisePool(CAMERA, np.random.default_rng(0), size=100).expose(image)
    flat = frame.ravel()
    np.testing.assert_array_equal(flat[:1500], flat[100:])
    assert np.unique(flat).size > 30


def test_counts_are_clipped_at_both_ends():
    camera = CameraModel(
        photons=1e5, gain_e_per_count=1.0, offset_counts=0.0, bit_depth=12
    )
    image = np.linspace(0.0, 1.0, 1000, dtype=np.float32)
    frame = camera.expose(image, np.random.default_rng(0))
    assert frame.dtype == np.uint16
    assert frame.max() == camera.full_scale_counts == 4095
    dark = camera.expose(np.full(1000, -1e-6), np.random.default_rng(0))
    assert dark.min() == 0
    assert dark.max() < 20


def test_without_noise_the_mean_is_rounded():
    camera = CameraModel(
        photons=100.0, gain_e_per_count=1.0, offset_counts=10.0, bit_depth=8
    )
    frame = camera.expose_without_noise([0.0, 0.004, 0.006, 1.0, 5.0])
    assert frame.dtype == np.uint8
    assert frame.tolist() == [10, 10, 11, 110, 255]


def test_bad_parameters_are_refused_with_the_rule():
    with pytest.raises(ValueError, match="both must be > 0"):
        CameraModel(gain_e_per_count=0.0)
    with pytest.raises(ValueError, match="must be >= 0"):
        CameraModel(read_noise_e=-1.0)
    with pytest.raises(ValueError, match="choose 1 to 16"):
        CameraModel(bit_depth=32)
    with pytest.raises(ValueError, match="holds no noise"):
        NoisePool(CAMERA, np.random.default_rng(0), size=0)
