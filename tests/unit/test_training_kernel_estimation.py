"""Kernel estimation: known kernels and shifts are found again."""

import numpy as np
import pytest
from scipy import ndimage, signal

from rtfocus.training.kernel_pairs import (
    SIZES_PX,
    KernelEstimate,
    estimate_kernel,
    keep_best,
    kernels_of_pair,
    register,
)


@pytest.fixture(scope="module")
def sharp() -> np.ndarray:
    noise = np.random.default_rng(0).random((160, 160))
    return ndimage.gaussian_filter(noise, 0.8)


def lopsided_disc(size: int) -> np.ndarray:
    """Not symmetric, so that a kernel mistaken for its mirror image is noticed."""
    half = size // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    disc = (y**2 + x**2 <= half**2) * (1.0 + 0.5 * y / half)
    return disc / disc.sum()


@pytest.mark.parametrize("size", [5, 13, 21])
def test_known_kernel_is_recovered_with_its_size(sharp, size):
    kernel = lopsided_disc(size)
    blurred = signal.fftconvolve(sharp, kernel, mode="same")[16:144, 16:144]
    found = estimate_kernel(sharp[16:144, 16:144], blurred, range(3, 26, 2))
    assert found.size_px == size
    assert np.abs(found.kernel - kernel).sum() < 0.08
    assert found.kernel.sum() == pytest.approx(1.0, abs=1e-5)


def test_noise_does_not_make_the_kernel_larger(sharp):
    """A larger one fits its own half better, not the other half."""
    blurred = signal.fftconvolve(sharp, lopsided_disc(5), mode="same")
    blurred += np.random.default_rng(1).normal(0, 0.3 * blurred.std(), sharp.shape)
    found = estimate_kernel(sharp, blurred, range(3, 26, 2))
    assert found.size_px <= 9


def test_sizes_are_the_reports():
    assert (SIZES_PX[0], SIZES_PX[-1]) == (3, 35)


def test_registration_finds_the_shift_of_a_blurred_image(sharp):
    blurred = ndimage.gaussian_filter(sharp, 3)
    moved = ndimage.shift(blurred, (-2.0, 5.0))
    back, shift = register(sharp, moved)
    assert shift == pytest.approx((2.0, -5.0), abs=0.2)
    inner = (slice(20, 140), slice(20, 140))
    assert np.corrcoef(back[inner].ravel(), blurred[inner].ravel())[0, 1] > 0.98


def test_small_kernels_go_and_five_of_each_class_stay():
    def estimate(size: int, error: float) -> KernelEstimate:
        return KernelEstimate(np.zeros((size, size), np.float32), error)

    estimates = [estimate(9, 0.0)]
    estimates += [estimate(11, error) for error in (5, 3, 1, 2, 4, 6)]
    estimates += [estimate(21, error) for error in (2, 1)]
    kept = keep_best(estimates, 5)
    assert [(e.size_px, e.error) for e in kept] == [
        *[(11, error) for error in (1, 2, 3, 4, 5)],
        (21, 1),
        (21, 2),
    ]


def test_pair_gives_kernels_per_patch(sharp):
    field = np.tile(sharp, (2, 2))[:256, :256]
    blurred = signal.fftconvolve(field, lopsided_disc(13), mode="same")
    kept = kernels_of_pair(field, blurred)
    assert kept
    assert all(11 <= e.size_px <= 35 for e in kept)


def test_patches_too_small_for_the_kernel_are_refused():
    with pytest.raises(ValueError, match="at least 70 px a side"):
        estimate_kernel(np.zeros((64, 64)), np.zeros((64, 64)))
