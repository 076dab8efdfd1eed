"""Checkerboard measure: known patterns on known noise."""

import numpy as np
import pytest

from bench.checkerboard import checkerboard_ratio


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(512, 512))


def test_noise_has_no_lattice(noise):
    assert checkerboard_ratio(noise) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("amplitude", [0.1, 0.2])
def test_known_checkerboard_is_found_with_its_energy(noise, amplitude):
    """121 a^2 / v, the value that the docstring derives."""
    board = np.indices(noise.shape).sum(axis=0) % 2 * 2 - 1
    gain = checkerboard_ratio(noise + amplitude * board) - checkerboard_ratio(noise)
    assert gain == pytest.approx((64 * 2 / 3) ** 2 / 15 * amplitude**2, rel=0.1)


def test_pattern_of_two_doublings_is_seen_only_at_their_period(noise):
    columns = np.cos(2 * np.pi * np.arange(512) / 4)
    striped = noise + 0.2 * columns
    assert checkerboard_ratio(striped, period_px=4) > 2.5
    assert checkerboard_ratio(striped, period_px=2) == pytest.approx(1.0, abs=0.15)


def test_pattern_that_changes_its_sign_over_the_image_is_still_found(noise):
    board = np.indices(noise.shape).sum(axis=0) % 2 * 2 - 1
    sign = np.where(np.arange(512) < 256, 1, -1)
    assert checkerboard_ratio(noise + 0.2 * board * sign) > 4


def test_constant_image_has_no_pattern():
    assert checkerboard_ratio(np.ones((64, 64))) == 1.0


def test_too_small_image_is_refused():
    with pytest.raises(ValueError, match="at least 64 px"):
        checkerboard_ratio(np.ones((32, 64)))
