"""The published patch-wise form, against patches cut and restored by hand."""

import numpy as np
import pytest
from scipy.signal import fftconvolve

from rtfocus.channel import OpticalSystem
from rtfocus.config.sections import RestorationConfig
from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.depth_variant import DepthVariantRestorer
from rtfocus.processing.cpu.network_restorer import TileRestorer
from rtfocus.processing.montage import Montage
from rtfocus.specimens import draw_specimen

SYSTEM = OpticalSystem(0.5, 451.0, 0.65)
SHAPE = (210, 210)
GRID = TileGrid(4, 4, 84, 42.0, 41.5, signed=False)
LABELS = np.array(
    [[BACKGROUND, 0, 3, 3], [0, 3, 5, 3], [3, 5, 5, 5], [2, 2, 5, 5]], np.int16
)


@pytest.fixture(scope="module")
def psfs():
    return {level: compute_psf(SYSTEM, 2.0 * level) for level in (2, 3, 5)}


@pytest.fixture(scope="module")
def frame(psfs):
    rng = np.random.default_rng(1)
    seen = blur(draw_specimen("nuclei", SHAPE, rng), psfs[3])
    return rng.poisson(np.maximum(seen, 0) * 900 + 60).astype(np.float32)


def restore(kind, frame, psfs, **options):
    restorer = kind(Montage(GRID, SHAPE), psfs, RestorationConfig(**options))
    return restorer.restore(frame, LABELS, np.empty_like(frame))


def by_hand(frame, psfs):
    """LB-DVD written out: patches of 84 padded to 110, triangular weights."""
    halo = 13
    padded = np.pad(frame.astype(np.float64), halo)
    triangle = 1 - np.abs(np.arange(84) - 41.5) / 42
    total = np.zeros(SHAPE)
    weight = np.zeros(SHAPE)
    for (row, column), level in np.ndenumerate(LABELS):
        y, x = 42 * row, 42 * column
        patch = padded[y : y + 110, x : x + 110]
        estimate = patch.copy()
        if level >= 1:
            psf = psfs[int(level)].astype(np.float64)
            for _ in range(15):
                blurred = fftconvolve(estimate, psf, mode="same")
                ratio = patch / np.maximum(blurred, 1e-3)
                estimate = estimate * fftconvolve(ratio, psf[::-1, ::-1], mode="same")
        window = np.outer(triangle, triangle)
        inner = estimate[halo:-halo, halo:-halo]
        total[y : y + 84, x : x + 84] += window * inner
        weight[y : y + 84, x : x + 84] += window
    return total, weight


def test_interior_equals_lb_dvd_written_out(frame, psfs):
    ours = restore(TileRestorer, frame, psfs)
    expected, weight = by_hand(frame, psfs)
    # Where the paper's triangles add up to 1: half a tile inside the border.
    inner = slice(42, 168)
    np.testing.assert_allclose(weight[inner, inner], 1.0)
    np.testing.assert_allclose(
        ours[inner, inner], expected[inner, inner], rtol=2e-3, atol=0.5
    )


def test_focus_and_background_come_back_bit_for_bit(frame, psfs):
    ours = restore(TileRestorer, frame, psfs)
    np.testing.assert_array_equal(ours[:41, :83], frame[:41, :83])
    assert np.any(ours[84:, 84:] != frame[84:, 84:])


def test_whole_frame_form_agrees_away_from_borders(frame, psfs):
    tiles = restore(TileRestorer, frame, psfs, halo_px=30)
    whole = restore(DepthVariantRestorer, frame, psfs, method="richardson_lucy")
    inner = slice(42, 168)
    difference = (tiles - whole)[inner, inner]
    assert np.sqrt(np.mean(difference**2)) < 0.02 * frame.max()


def test_colour_planes_are_restored_alike(frame, psfs):
    colour = np.stack([frame, frame * 2, frame], axis=-1)
    ours = restore(TileRestorer, colour, psfs)
    alone = restore(TileRestorer, frame, psfs)
    np.testing.assert_allclose(ours[..., 0], alone, rtol=1e-5)
    np.testing.assert_allclose(ours[..., 1], 2 * alone, rtol=1e-3, atol=0.5)
