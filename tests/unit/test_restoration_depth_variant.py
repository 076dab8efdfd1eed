"""Whole-frame restoration: what is touched, what is not, and what is gained."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import RestorationConfig
from rtfocus.evaluation.scores import psnr
from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.optics.formation import BlurredPlanes, blur
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.depth_variant import DepthVariantRestorer
from rtfocus.processing.montage import Montage, Region
from rtfocus.processing.restore import WHOLE_FRAME, noise_variance, read_region
from rtfocus.specimens import draw_specimen

SYSTEM = OpticalSystem(0.5, 451.0, 0.65)
LEVELS = range(1, 11)
SHAPE = (256, 256)
GRID = TileGrid(5, 5, 84, 42.0, 41.5, signed=False)
PHOTONS = 2000.0


@pytest.fixture(scope="module")
def psfs():
    return {level: compute_psf(SYSTEM, 2.0 * level) for level in LEVELS}


@pytest.fixture(scope="module")
def sharp():
    return draw_specimen("nuclei", SHAPE, np.random.default_rng(11)) * PHOTONS


@pytest.fixture(scope="module")
def exposed(sharp, psfs):
    """Noisy frames by level; level 0 is sharp."""
    rng = np.random.default_rng(12)
    blurred = {0: sharp} | {level: blur(sharp, psf) for level, psf in psfs.items()}
    return {
        level: rng.poisson(np.maximum(image, 0) + 20).astype(np.float32) - 20
        for level, image in blurred.items()
    }


def restorer_of(psfs, gain_e_per_count=None, **settings):
    return DepthVariantRestorer(
        Montage(GRID, SHAPE),
        psfs,
        RestorationConfig(**settings),
        quantum=1.0,
        gain_e_per_count=gain_e_per_count,
    )


def restore(frame, labels, psfs, **options):
    restorer = restorer_of(psfs, **options)
    return restorer.restore(frame, labels, np.empty_like(frame))


@pytest.mark.parametrize("level", LEVELS)
def test_wiener_gains_at_every_level(level, sharp, exposed, psfs):
    labels = np.full((5, 5), level, np.int16)
    restored = restore(exposed[level], labels, psfs)
    before = psnr(sharp, exposed[level], data_range=PHOTONS)
    after = psnr(sharp, restored, data_range=PHOTONS)
    assert after > before + 1.0


@pytest.mark.parametrize("level", LEVELS)
def test_accelerated_form_is_as_good_as_fifteen_iterations(level, sharp, exposed, psfs):
    labels = np.full((5, 5), level, np.int16)
    figures = {
        method: psnr(
            sharp,
            restore(exposed[level], labels, psfs, method=method),
            data_range=PHOTONS,
        )
        for method in ("richardson_lucy", "richardson_lucy_accelerated")
    }
    lost = figures["richardson_lucy"] - figures["richardson_lucy_accelerated"]
    assert lost <= 0.1


@pytest.mark.parametrize("method", WHOLE_FRAME)
def test_focus_and_background_come_back_bit_for_bit(method, exposed, psfs):
    labels = np.zeros((5, 5), np.int16)
    labels[:, 3:] = BACKGROUND
    restored = restore(exposed[0], labels, psfs, method=method)
    np.testing.assert_array_equal(restored, exposed[0])


@pytest.mark.parametrize("method", WHOLE_FRAME)
def test_only_pixels_near_blurred_tiles_change(method, exposed, psfs):
    labels = np.zeros((5, 5), np.int16)
    labels[2, 2] = 6
    restored = restore(exposed[6], labels, psfs, method=method)
    changed = restored != exposed[6]
    touched = np.zeros(SHAPE, bool)
    touched[84:168, 84:168] = True
    assert not changed[~touched].any()
    assert changed[touched].mean() > 0.9


def test_tilted_frame_gains_at_every_level_and_loses_nothing_in_focus(sharp, psfs):
    # Focus lies in row 45, in the middle of the first row of tiles.
    depth = np.abs(np.linspace(-1.5, 7, SHAPE[0], dtype=np.float32))
    surface = np.broadcast_to(depth[:, None], SHAPE)
    seen = np.maximum(BlurredPlanes(sharp, SYSTEM, step_um=0.5).at(surface), 0)
    frame = np.random.default_rng(3).poisson(seen + 20).astype(np.float32) - 20
    centres = GRID.origin_px + GRID.stride_px * np.arange(5)
    at_tiles = np.rint(np.interp(centres, np.arange(SHAPE[0]), depth) / 2)
    labels = np.repeat(at_tiles.astype(np.int16)[:, None], 5, axis=1)
    restored = restore(frame, labels, psfs)
    for level in range(4):
        rows = np.rint(depth / 2) == level
        before = psnr(sharp[rows], frame[rows], data_range=PHOTONS)
        after = psnr(sharp[rows], restored[rows], data_range=PHOTONS)
        assert after > before + (-0.05 if level == 0 else 1.0)


@pytest.mark.parametrize("method", WHOLE_FRAME)
def test_colour_is_restored_plane_by_plane_with_one_psf(method, exposed, psfs):
    labels = np.full((5, 5), 4, np.int16)
    colour = np.stack([exposed[4], exposed[3], exposed[5]], axis=-1)
    together = restore(colour, labels, psfs, method=method)
    for plane in range(3):
        alone = restore(
            np.ascontiguousarray(colour[..., plane]), labels, psfs, method=method
        )
        np.testing.assert_allclose(together[..., plane], alone, rtol=1e-4, atol=0.05)


def test_noise_to_signal_makes_the_filter_gentler(exposed, psfs):
    labels = np.full((5, 5), 5, np.int16)
    sharpened = [
        np.abs(restore(exposed[5], labels, psfs, noise_to_signal=k) - exposed[5]).mean()
        for k in (0.001, 0.03, 1.0)
    ]
    assert sharpened[0] > sharpened[1] > sharpened[2] > 0


def test_wiener_keeps_the_brightness(psfs):
    flat = np.full(SHAPE, 700.0, np.float32)
    labels = np.full((5, 5), 8, np.int16)
    np.testing.assert_allclose(restore(flat, labels, psfs), 700.0, rtol=1e-4)


def test_restoring_twice_gives_the_same_bits(exposed, psfs):
    labels = np.arange(25).reshape(5, 5).astype(np.int16) % 11
    first = restore(exposed[4], labels, psfs)
    np.testing.assert_array_equal(first, restore(exposed[4], labels, psfs))


def test_one_restorer_serves_several_threads(exposed, psfs):
    restorer = restorer_of(psfs)
    rng = np.random.default_rng(1)
    jobs = [rng.integers(0, 11, (5, 5)).astype(np.int16) for _ in range(12)]
    alone = [restore(exposed[5], labels, psfs) for labels in jobs]
    results = [np.empty(SHAPE, np.float32) for _ in jobs]

    def work(first):
        for i in range(first, len(jobs), 3):
            restorer.restore(exposed[5], jobs[i], results[i])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, expected in zip(results, alone, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_uneven_psfs_are_undone_not_doubled(sharp):
    coma = OpticalSystem(0.5, 451.0, 0.65, aberrations=Aberrations(coma_x_waves=0.4))
    psf = compute_psf(coma, 6.0)
    rng = np.random.default_rng(4)
    frame = rng.poisson(np.maximum(blur(sharp, psf), 0) + 20).astype(np.float32) - 20
    labels = np.full((5, 5), 3, np.int16)
    before = psnr(sharp, frame, data_range=PHOTONS)
    mirrored = np.ascontiguousarray(psf[:, ::-1])
    for method in WHOLE_FRAME:
        right = restore(frame, labels, {3: psf}, method=method)
        wrong = restore(frame, labels, {3: mirrored}, method=method)
        assert psnr(sharp, right, data_range=PHOTONS) > before + 1.0
        assert psnr(sharp, wrong, data_range=PHOTONS) < before + 1.0


def test_context_leads_from_what_is_behind_to_what_is_before():
    plane = np.arange(100, dtype=np.float32)[:, None].repeat(40, axis=1)
    region = Region(slice(30, 60), slice(0, 40))
    padded = read_region(plane, region, (50, 60))
    np.testing.assert_array_equal(padded[:30, :40], plane[30:60])
    # Read around the end: from row 59 on, and up to row 30, without a jump.
    margin = padded[30:, 10]
    assert margin[0] == pytest.approx(60, abs=0.5)
    assert margin[-1] == pytest.approx(29, abs=0.5)
    assert np.abs(np.diff(margin)).max() < 5


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    more=st.integers(0, 90),
)
def test_context_exists_for_regions_of_any_size(height, width, more):
    plane = np.random.default_rng(0).random((height, width)).astype(np.float32)
    region = Region(slice(0, height), slice(0, width))
    padded = read_region(plane, region, (height + more, width + more))
    np.testing.assert_array_equal(padded[:height, :width], plane)
    assert plane.min() <= padded.min()
    assert padded.max() <= plane.max()


def test_context_of_part_of_a_frame_is_that_of_the_whole_between_its_columns():
    plane = np.random.default_rng(1).random((50, 40)).astype(np.float32)
    whole = read_region(plane, Region(slice(9, 31), slice(0, 40)), (36, 40))
    part = read_region(plane, Region(slice(9, 31), slice(12, 27)), (36, 25))
    np.testing.assert_array_equal(part[:, :15], whole[:, 12:27])
    turned = read_region(plane.T, Region(slice(12, 27), slice(9, 31)), (25, 36)).T
    np.testing.assert_allclose(part, turned, rtol=1e-5)
    assert part.flags.c_contiguous


def test_unknown_method_lists_the_known_ones(psfs):
    with pytest.raises(ValueError, match="not one of wiener, richardson_lucy"):
        restorer_of(psfs, method="magic")


@pytest.mark.parametrize("sigma", [3.0, 20.0])
def test_noise_is_measured_on_a_defocused_frame(sigma, sharp, psfs):
    rng = np.random.default_rng(8)
    frame = blur(sharp, psfs[4]) + rng.normal(0, sigma, SHAPE).astype(np.float32)
    assert noise_variance(frame) == pytest.approx(sigma**2, rel=0.15)
    assert noise_variance(np.zeros((9, 9), np.float32), quantum=1.0) == 1 / 12


def test_a_known_gain_is_believed_where_the_frame_hides_its_noise(exposed, psfs):
    labels = np.full((5, 5), 5, np.int16)
    smoothed = gaussian_filter(exposed[5], 1.0)

    def sharpened(**options):
        return np.abs(restore(smoothed, labels, psfs, **options) - smoothed).mean()

    assert sharpened(gain_e_per_count=1.0) < sharpened()


def test_filters_are_kept_within_a_bound(exposed, psfs, monkeypatch):
    monkeypatch.setattr("rtfocus.processing.cpu.depth_variant._CACHED_ELEMENTS", 60_000)
    restorer = restorer_of(psfs)
    rng = np.random.default_rng(1)
    for _ in range(20):
        labels = rng.integers(0, 11, (5, 5)).astype(np.int16)
        out = np.empty(SHAPE, np.float32)
        restorer.restore(exposed[5], labels, out)
        expected = restore(exposed[5], labels, psfs)
        np.testing.assert_array_equal(out, expected)
    sizes = [h * (w // 2 + 1) for _, (h, w) in restorer._filters]
    assert sum(sizes) <= max(60_000, len(psfs) * max(sizes))
    assert len(sizes) < 40
