"""Blur against direct convolution, and per depth."""

import numpy as np
import pytest
from scipy.signal import convolve2d

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.optics.formation import BlurredPlanes, blur, blur_stack
from rtfocus.optics.psf import compute_psf

SYSTEM = OpticalSystem(0.5, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.45))


@pytest.fixture
def image():
    return np.random.default_rng(1).random((70, 53)).astype(np.float32)


def directly(image, psf):
    half = psf.shape[0] // 2
    padded = np.pad(image.astype(np.float64), half, mode="reflect")
    return convolve2d(padded, psf.astype(np.float64), mode="valid")


@pytest.mark.parametrize("defocus_um", [0.0, 4.0, 12.0])
def test_blur_is_convolution_with_reflected_borders(image, defocus_um):
    psf = compute_psf(SYSTEM, defocus_um)
    result = blur(image, psf)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, directly(image, psf), atol=1e-6)


def test_an_uneven_psf_is_not_mirrored(image):
    psf = np.random.default_rng(2).random((7, 7)).astype(np.float32)
    np.testing.assert_allclose(blur(image, psf), directly(image, psf), atol=1e-4)


def test_a_psf_wider_than_the_image_is_still_a_convolution(image):
    psf = compute_psf(SYSTEM, 40.0, size_px=151)
    result = blur(image, psf)
    assert result.shape == image.shape
    np.testing.assert_allclose(result, directly(image, psf), atol=1e-6)


def test_colours_are_blurred_one_by_one(image):
    colours = np.stack([image, image**2, 1 - image], axis=-1)
    psf = compute_psf(SYSTEM, 6.0)
    result = blur(colours, psf)
    for index in range(3):
        np.testing.assert_allclose(
            result[..., index], blur(colours[..., index], psf), atol=1e-6
        )


def test_integers_are_taken_as_they_are(image):
    counts = (image * 4095).astype(np.uint16)
    psf = compute_psf(SYSTEM, 6.0)
    np.testing.assert_allclose(
        blur(counts, psf), blur(counts.astype(np.float32), psf), rtol=1e-6
    )


def test_a_stack_shares_the_image_and_keeps_the_order(image):
    psfs = [compute_psf(SYSTEM, defocus_um) for defocus_um in (0.0, 3.0, 9.0)]
    stack = blur_stack(image, psfs)
    for blurred, psf in zip(stack, psfs, strict=True):
        np.testing.assert_allclose(blurred, blur(image, psf), atol=1e-6)


@pytest.mark.parametrize("defocus_um", [-7.0, 0.0, 5.0])
def test_a_constant_map_is_a_uniform_blur(image, defocus_um):
    surface = np.full(image.shape, defocus_um, dtype=np.float32)
    np.testing.assert_allclose(
        BlurredPlanes(image, SYSTEM).at(surface),
        blur(image, compute_psf(SYSTEM, defocus_um)),
        atol=1e-6,
    )


def test_the_weights_are_a_partition_of_unity_on_any_surface():
    flat = np.full((64, 80), 0.4, dtype=np.float32)
    y, x = np.mgrid[:64, :80]
    surface = 0.15 * (x - 40) + 0.004 * (y - 30) ** 2
    result = BlurredPlanes(flat, SYSTEM, step_um=1.5).at(surface)
    np.testing.assert_allclose(result, flat, atol=1e-5)


def test_every_pixel_of_a_tilted_surface_takes_its_own_depth(image):
    surface = np.linspace(-6, 8, image.shape[0])[:, None] * np.ones(image.shape[1])
    result = BlurredPlanes(image, SYSTEM, step_um=0.25).at(surface)
    for row in (3, 20, 50, 66):
        own = blur(image, compute_psf(SYSTEM, float(surface[row, 0])))
        np.testing.assert_allclose(result[row], own[row], atol=3e-3)
        other = blur(image, compute_psf(SYSTEM, float(surface[row, 0]) + 4.0))
        assert np.abs(result[row] - other[row]).max() > 0.02


def test_planes_in_colour_follow_the_surface(image):
    colours = np.stack([image, image**2, 1 - image], axis=-1)
    surface = np.linspace(-3, 3, image.size).reshape(image.shape)
    result = BlurredPlanes(colours, SYSTEM).at(surface)
    for index in range(3):
        np.testing.assert_allclose(
            result[..., index],
            BlurredPlanes(colours[..., index], SYSTEM).at(surface),
            atol=1e-6,
        )


def test_one_value_and_a_constant_map_agree_between_planes(image):
    planes = BlurredPlanes(image, SYSTEM, step_um=2.0)
    surface = np.full(image.shape, 3.1, dtype=np.float32)
    np.testing.assert_allclose(planes.at(3.1), planes.at(surface), atol=1e-6)


def test_keep_focus_leaves_the_focused_pixels_alone(image):
    np.testing.assert_array_equal(
        BlurredPlanes(image, SYSTEM, keep_focus=True).at(0.0), image
    )
    assert np.abs(BlurredPlanes(image, SYSTEM).at(0.0) - image).max() > 0.05


def test_a_small_capacity_changes_nothing_but_memory(image):
    surface = np.linspace(-6, 6, image.size).reshape(image.shape)
    few = BlurredPlanes(image, SYSTEM, capacity=2)
    np.testing.assert_array_equal(
        few.at(surface), BlurredPlanes(image, SYSTEM).at(surface)
    )
    assert len(few._planes) == 2


def test_bad_input_is_refused_with_the_remedy(image):
    psf = compute_psf(SYSTEM, 3.0)
    with pytest.raises(ValueError, match="two odd sides"):
        blur(image, psf[1:])
    with pytest.raises(ValueError, match="need axes"):
        blur(image[0], psf)
    planes = BlurredPlanes(image, SYSTEM)
    with pytest.raises(ValueError, match="resample the map"):
        planes.at(np.zeros((5, 5)))
    with pytest.raises(ValueError, match="mask them first"):
        planes.at(np.full(image.shape, np.nan))
    with pytest.raises(ValueError, match="step_um > 0"):
        BlurredPlanes(image, SYSTEM, step_um=0.0)
    with pytest.raises(ValueError, match="need >= 2"):
        BlurredPlanes(image, SYSTEM, capacity=1)
