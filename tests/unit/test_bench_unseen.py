"""Ceilings and rankings of images that no engine was made for."""

import numpy as np
import pytest

from bench.unseen import mean_wavelength, ranking, told_the_blur, told_the_gains
from rtfocus.evaluation.samples import IN_FOCUS, Sample, shown
from rtfocus.optics.formation import blur
from rtfocus.specimens import draw_specimen


@pytest.fixture(scope="module")
def frames() -> list[Sample]:
    rng = np.random.default_rng(2)
    light = draw_specimen("nuclei", (128, 128), rng)
    light = (light / light.max()).astype(np.float32)
    return list(shown("nuclei", "nuclei", light, rng))


def test_a_sample_carries_the_blur_it_was_made_with(frames: list[Sample]) -> None:
    for sample in frames:
        if IN_FOCUS in sample.name:
            assert sample.psf is None
            continue
        assert sample.psf is not None
        assert sample.sharp is not None
        assert sample.psf.sum() == pytest.approx(1.0, abs=1e-3)
        sharp, blurred = (
            np.asarray(one, float) for one in (sample.sharp, sample.pixels)
        )
        again = blur(sample.sharp, sample.psf)
        assert np.square(again - blurred).mean() < np.square(sharp - blurred).mean() / 2


def test_filters_that_are_told_gain(frames: list[Sample]) -> None:
    for sample in frames[:3]:
        assert told_the_blur(sample) > 0.5
        assert told_the_gains(sample) > 0.5


def test_what_was_never_blurred_has_no_ceiling(frames: list[Sample]) -> None:
    with pytest.raises(ValueError, match="not blurred"):
        told_the_blur(frames[3])


def test_a_distance_that_grows_both_ways_ranks_all_planes() -> None:
    z_um = [0.0, 1.0, 2.0, 3.5, 5.0]
    assert ranking([4, 2, 0, 3, 9], z_um, [2]) == pytest.approx((1.0, 0))
    rank, off = ranking([0, 2, float("nan"), 3, 4], z_um, [2])
    assert rank < 0.5
    assert off == 2


def test_blur_makes_the_wavelength_longer(frames: list[Sample]) -> None:
    assert mean_wavelength(frames[2].pixels) > mean_wavelength(frames[3].pixels)
