"""Specimens: seeded, any size, structured; sharp images in their place."""

import numpy as np
import pytest
from scipy import ndimage

from rtfocus.channel import OpticalSystem
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens import (
    SPECIMEN_KINDS,
    draw_specimen,
    draw_stained,
    normalise_sharp,
)


@pytest.mark.parametrize("kind", SPECIMEN_KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (256, 192)])
def test_a_specimen_fills_its_shape_with_values_from_0_to_1(kind, shape):
    image = draw_specimen(kind, shape, np.random.default_rng(0))
    assert image.shape == shape
    assert image.dtype == np.float32
    assert image.min() >= 0.0
    assert image.max() <= 1.0


@pytest.mark.parametrize("kind", SPECIMEN_KINDS)
def test_the_seed_decides_the_specimen(kind):
    first, same, other = (
        draw_specimen(kind, (200, 220), np.random.default_rng(seed))
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.2


@pytest.mark.parametrize("kind", SPECIMEN_KINDS)
def test_a_specimen_is_bright_and_loses_detail_when_blurred(kind):
    image = draw_specimen(kind, (300, 300), np.random.default_rng(1))
    assert image.max() > 0.6
    assert (image >= 1.0).mean() < 0.01
    blurred = blur(image, compute_psf(OpticalSystem(0.5, 451.0, 0.65), 10.0))
    assert ndimage.laplace(blurred).std() < 0.5 * ndimage.laplace(image).std()


def test_nuclei_are_separate_objects_of_unequal_brightness_with_texture():
    image = draw_specimen("nuclei", (512, 512), np.random.default_rng(2))
    labels, count = ndimage.label(image > 0.05)
    indices = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(image > 0.05, labels, indices)
    brightness = ndimage.mean(image, labels, indices)[sizes > 100]
    assert brightness.size > 30
    assert brightness.std() / brightness.mean() > 0.2
    grain = ndimage.standard_deviation(image, labels, indices)[sizes > 100]
    assert np.median(grain / brightness) > 0.1


def test_scale_enlarges_the_objects():
    def count(scale):
        rng = np.random.default_rng(0)
        image = draw_specimen("nuclei", (512, 512), rng, scale=scale)
        return ndimage.label(image > 0.05)[1]

    assert count(0.6) > 2 * count(1.8)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match=r"choose from .*nuclei.*beads"):
        draw_specimen("yeast", (64, 64), np.random.default_rng(0))
    with pytest.raises(ValueError, match="both must be > 0"):
        draw_specimen("beads", (0, 64), np.random.default_rng(0))


def test_a_sharp_image_is_scaled_to_0_and_1():
    image = np.arange(10_000, dtype=np.uint16).reshape(100, 100) + 300
    result = normalise_sharp(image, black_percentile=0.0, white_percentile=100.0)
    assert (result.min(), result.max()) == (0.0, 1.0)
    assert result.shape == (100, 100)
    order = np.argsort(result.ravel(), kind="stable")
    np.testing.assert_array_equal(order, np.arange(10_000))
    assert normalise_sharp(np.full((4, 4), 7)).max() == 0.0


@pytest.mark.parametrize("shape", [(50, 40), (131, 97), (400, 333), (1, 7)])
def test_size_is_reached_by_mirrors_or_from_the_centre(shape):
    image = np.random.default_rng(0).random((60, 48, 3))
    result = normalise_sharp(image, shape)
    assert result.shape == (*shape, 3)
    whole = normalise_sharp(image)
    padded = np.pad(whole, ((500, 500), (500, 500), (0, 0)), mode="reflect")
    top, left = (1060 - shape[0]) // 2, (1048 - shape[1]) // 2
    np.testing.assert_array_equal(
        result, padded[top : top + shape[0], left : left + shape[1]]
    )


def test_images_that_cannot_be_specimens_are_refused():
    with pytest.raises(ValueError, match="need axes"):
        normalise_sharp(np.zeros(5))
    with pytest.raises(ValueError, match="not finite"):
        normalise_sharp(np.full((5, 5), np.inf))


def test_a_stained_section_absorbs_in_the_colours_of_its_dyes():
    image = draw_stained((200, 180), np.random.default_rng(3))
    assert image.shape == (200, 180, 3)
    assert image.dtype == np.float32
    assert image.min() > 0.0
    assert image.max() <= 1.0
    red, green, blue = np.moveaxis(image, -1, 0)
    # Both dyes take green most; haematoxylin leaves nuclei blue, not red.
    assert (green <= np.minimum(red, blue) + 1e-6).all()
    darkest = green < np.percentile(green, 5)
    assert (blue[darkest] > red[darkest]).mean() > 0.9
    np.testing.assert_array_equal(
        image, draw_stained((200, 180), np.random.default_rng(3))
    )
