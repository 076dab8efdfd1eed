"""Ceilings and rankings of images that no engine was made for."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.evidence import Restored, keep, kept, widened
from bench.unseen import (
    BareNetwork,
    level_of,
    mean_wavelength,
    ranking,
    told_a_gaussian,
    told_the_blur,
    told_the_gains,
)
from rtfocus.engines.fitted import DeviationCard
from rtfocus.evaluation.samples import BBBC006, IN_FOCUS, STEP_UM, Sample, shown
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
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


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_what_blurred_it_resembles_the_stated_defocus_and_not_its_opposite(
    seed: int,
) -> None:
    light = np.zeros((64, 64), np.float32)
    light[20:40, 20:40] = 1
    sample, even, gaussian, sharp = shown(
        "box", "box", light, np.random.default_rng(seed)
    )
    assert sample.defocus_um is not None
    assert sample.psf is not None
    there, opposite = (
        blur(light, compute_psf(BBBC006, sign * sample.defocus_um[0]))
        for sign in (1.0, -1.0)
    )
    seen = blur(light, sample.psf)
    assert np.square(seen - there).sum() < np.square(seen - opposite).sum()
    assert (sample.sided, sample.even) == (True, False)
    assert (even.sided, even.even) == (False, True)
    assert gaussian.defocus_um is None
    assert sharp.defocus_um == (0.0, 0.0)


def framed(
    kind: str, tiles: NDArray[np.float64], *, in_focus: bool = False
) -> Restored:
    rng = np.random.default_rng(1)
    before, common, correction = rng.random((3, 2, 4), np.float32)
    measured = rng.random((25, 2, 4), np.float32)
    return Restored(
        kind, in_focus, before, common, correction, measured, 7.5, tiles=tiles
    )


def test_rounds_of_evidence_come_back_from_their_file(tmp_path: Path) -> None:
    tiles = np.random.default_rng(1).random((3, 6))
    frames = [framed("nuclei", tiles), framed("empty", tiles[:, :0], in_focus=True)]
    keep(tmp_path / "rounds" / "round_1.npz", frames)
    assert [one.name for one in (tmp_path / "rounds").iterdir()] == ["round_1.npz"]
    for one, again in zip(frames, kept(tmp_path / "rounds/round_1.npz"), strict=True):
        for name in Restored.__slots__:
            np.testing.assert_array_equal(getattr(again, name), getattr(one, name))
        assert type(again.in_focus) is bool


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


def test_twice_the_widened_deviation_covers_what_it_should_of_every_kind_alike() -> (
    None
):
    rng = np.random.default_rng(3)
    fit = DeviationCard(spread=1.0, floor=0.25, distance=0.0)
    # Labels that are sure: what is stated is the floor, half a level.
    frames = [
        framed(kind, np.stack([np.ones(n), np.zeros(n), rng.normal(0, deviation, n)]))
        for kind, n, deviation in (("well known", 8000, 0.5), ("new", 400, 2.0))
    ]
    wide = widened(fit, frames)
    assert wide.spread / fit.spread == pytest.approx(wide.floor / fit.floor, rel=1e-3)
    covered = [np.mean(abs(one.tiles[2]) <= 2 * np.sqrt(wide.floor)) for one in frames]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.005)
    assert widened(wide, frames).floor == pytest.approx(wide.floor, rel=1e-3)


def test_a_gaussian_told_undoes_a_gaussian_as_well_as_the_true_blur(
    frames: list[Sample],
) -> None:
    (gaussian,) = (one for one in frames if one.name.endswith("Gaussian"))
    assert told_a_gaussian(gaussian) == pytest.approx(told_the_blur(gaussian), abs=0.5)


def test_a_network_told_the_level_restores_another_image_than_told_nothing(
    frames: list[Sample],
) -> None:
    network = BareNetwork("rtfocus-2")
    pupil, _, gaussian, _ = frames
    untold, best, told, wrong = network.gains(pupil)
    assert best >= untold
    assert told > wrong
    assert best > 0
    assert network.gains(gaussian)[2] > 0


def test_a_gaussian_has_the_level_of_a_disc_as_wide() -> None:
    place = np.arange(-20, 21)
    profile = np.exp(-(place**2) / (2 * 2.5**2))
    psf = (profile[:, None] * profile).astype(np.float32)
    sample = Sample("one", psf, psf, None, "", 1.0, psf=psf / psf.sum())
    # A disc with the deviation 2.5 px has a radius of 5 px.
    expected = 5 * BBBC006.pixel_size_um / BBBC006.numerical_aperture / STEP_UM
    assert level_of(sample) == pytest.approx(expected, rel=0.01)
