"""Richardson-Lucy against scikit-image and against a loop written out."""

import numpy as np
import pytest
from scipy.signal import convolve2d
from skimage.restoration import richardson_lucy as reference

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import RestorationConfig
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.depth_variant import (
    BlindRichardsonLucyDeconvolution,
    RichardsonLucyDeconvolution,
    Surrounded,
)
from rtfocus.processing.restore import (
    back_projectors,
    gaussian_like,
    iterate,
    iteration_steps,
    richardson_lucy,
    transfer_function,
)
from rtfocus.specimens import draw_specimen

ROUND = OpticalSystem(0.5, 451.0, 0.65)
UNEVEN = OpticalSystem(
    0.5,
    451.0,
    0.65,
    aberrations=Aberrations(spherical_waves=-0.45, coma_x_waves=0.2),
)


@pytest.fixture
def image():
    rng = np.random.default_rng(7)
    return draw_specimen("tissue", (150, 131), rng).astype(np.float64) * 0.9 + 0.05


@pytest.mark.parametrize("system", [ROUND, UNEVEN])
@pytest.mark.parametrize("iterations", [1, 15, 30])
def test_flat_start_agrees_with_scikit_image(image, system, iterations):
    psf = compute_psf(system, 8.0).astype(np.float64)
    theirs = reference(image, psf, num_iter=iterations, clip=False)
    ours = richardson_lucy(image, psf, iterations, np.full_like(image, 0.5))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_flat_start_in_float32_agrees_with_scikit_image(image):
    psf = compute_psf(ROUND, 8.0)
    image32 = image.astype(np.float32)
    theirs = reference(image32, psf, num_iter=15, clip=False)
    ours = richardson_lucy(image32, psf, 15, np.full_like(image32, 0.5))
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_start_from_the_image_agrees_with_equation_3_written_out(image):
    small = image[:60, :55]
    psf = compute_psf(UNEVEN, 6.0).astype(np.float64)
    estimate = small.copy()
    for _ in range(15):
        blurred = convolve2d(estimate, psf, mode="same")
        estimate = estimate * convolve2d(small / blurred, psf[::-1, ::-1], mode="same")
    ours = richardson_lucy(small, psf, 15)
    np.testing.assert_allclose(ours, estimate, rtol=1e-7, atol=1e-9)


def test_start_from_the_image_differs_from_the_flat_start(image):
    psf = compute_psf(ROUND, 8.0)
    from_image = richardson_lucy(image, psf, 15)
    flat = richardson_lucy(image, psf, 15, np.full_like(image, 0.5))
    assert np.abs(from_image - flat).max() > 0.01


def test_batches_of_tiles_equal_tiles_one_by_one(image):
    psf = compute_psf(ROUND, 6.0)
    tiles = np.stack([image[:64, :64], image[40:104, 50:114]]).astype(np.float32)
    together = richardson_lucy(tiles, psf, 5)
    single = [richardson_lucy(tile, psf, 5) for tile in tiles]
    np.testing.assert_allclose(together, np.stack(single), rtol=1e-4, atol=1e-6)


def test_dark_and_zero_regions_stay_finite_and_non_negative():
    image = np.zeros((80, 80), np.float32)
    image[30:50, 30:50] = 1000.0
    restored = richardson_lucy(image, compute_psf(ROUND, 10.0), 15)
    assert np.isfinite(restored).all()
    assert restored.min() >= 0
    black = richardson_lucy(np.zeros((40, 40), np.float32), compute_psf(ROUND, 4.0), 15)
    np.testing.assert_array_equal(black, 0.0)


def test_the_image_handed_in_is_not_changed(image):
    before = image.copy()
    richardson_lucy(image, compute_psf(ROUND, 4.0), 3)
    np.testing.assert_array_equal(image, before)


def test_periodic_iteration_keeps_the_total_light(image):
    signal = image[:128, :128].astype(np.float32)
    transfer = transfer_function(compute_psf(ROUND, 8.0), (128, 128))
    restored = iterate(
        signal, transfer, [np.conj(transfer)] * 15, shape=(128, 128), start=signal
    )
    assert restored.sum() == pytest.approx(signal.sum(), rel=1e-4)


@pytest.mark.parametrize("iterations", [1, 3, 4, 8])
def test_one_unmatched_iteration_leaves_what_its_matched_ones_would(iterations):
    transfer = transfer_function(compute_psf(UNEVEN, 6.0), (96, 96))
    power = np.abs(transfer) ** 2
    settings = RestorationConfig(
        method="richardson_lucy_accelerated", iterations=iterations
    )
    steps = iteration_steps(compute_psf(UNEVEN, 6.0), settings)
    left = np.ones_like(power)
    for back in back_projectors(transfer, steps):
        assert back[0, 0] == pytest.approx(1.0, abs=1e-4)
        left = left * np.abs(1.0 - transfer * back)
    np.testing.assert_allclose(left, (1.0 - power) ** sum(steps), atol=2e-4)
    assert 14 <= sum(steps) <= 18
    assert steps == sorted(steps, reverse=True)


def test_transfer_function_of_an_even_psf_is_real_and_of_an_uneven_one_complex():
    even = transfer_function(compute_psf(ROUND, 6.0), (96, 90))
    uneven = transfer_function(compute_psf(UNEVEN, 6.0), (96, 90))
    assert np.isrealobj(even)
    assert np.iscomplexobj(uneven)
    assert even[0, 0] == pytest.approx(1.0, abs=1e-5)


def test_psf_wider_than_the_transform_wraps_and_keeps_its_light():
    transfer = transfer_function(compute_psf(ROUND, 20.0, size_px=61), (20, 24))
    assert transfer[0, 0] == pytest.approx(1.0, abs=1e-5)


def mirrored(image, psf):
    """Pad as the loop does; returns the function that cuts the middle out again."""
    half = psf.shape[0] // 2
    padded = np.pad(image, half, mode="symmetric").astype(np.float32)
    return padded, lambda whole: whole[half:-half, half:-half]


def test_the_blind_form_restores_without_knowing_the_kernel(image):
    psf = compute_psf(UNEVEN, 9.0)
    padded, cut = mirrored(image, psf)
    blurred = np.fft.irfft2(
        np.fft.rfft2(padded) * transfer_function(psf, padded.shape), s=padded.shape
    ).astype(np.float32)

    def lost(restored):
        return float(np.mean((cut(restored) - image) ** 2))

    settings = RestorationConfig(method="richardson_lucy_blind")
    blind = BlindRichardsonLucyDeconvolution(psf, padded.shape, settings)
    restored, kernel = blind.find(Surrounded(blurred))
    settings = RestorationConfig(method="richardson_lucy", iterations=8)
    known = RichardsonLucyDeconvolution(psf, padded.shape, settings)
    assert (
        lost(known.restore(Surrounded(blurred))) < lost(restored) < 0.7 * lost(blurred)
    )
    # It began as a Gaussian, as far from the truth as the width alone can be.
    start = gaussian_like(psf)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert kernel.min() >= 0
    assert np.abs(kernel - psf).sum() < np.abs(start - psf).sum()


def test_the_blind_form_keeps_light_and_black_frames(image):
    psf = compute_psf(ROUND, 6.0)
    padded, _ = mirrored(image, psf)
    settings = RestorationConfig(method="richardson_lucy_blind")
    blind = BlindRichardsonLucyDeconvolution(psf, padded.shape, settings)
    assert blind.restore(Surrounded(padded)).sum() == pytest.approx(
        padded.sum(), rel=0.01
    )
    assert not blind.restore(Surrounded(np.zeros_like(padded))).any()
