"""The Wiener filter whose noise-to-signal ratio comes from elsewhere."""

import numpy as np
import pytest

from rtfocus.channel import OpticalSystem
from rtfocus.config.sections import RestorationConfig
from rtfocus.evaluation.scores import psnr
from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.optics.formation import TAPER_PX, band_weights, blur, edge_taper
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.depth_variant import Surrounded, WienerDeconvolution
from rtfocus.processing.cpu.network_restorer import (
    LearnedWienerRestorer,
    filter_tiles,
)
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import transfer_function

OPTICS = OpticalSystem(0.5, 451.0, 0.65)
BANDS = 12
TILE_PX, HALO_PX = 96, 24


def scene(shape, seed=3):
    """Bright discs on a dark ground, in counts."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    light = np.full(shape, 200, np.float32)
    for _ in range(12):
        y, x = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        light[np.hypot(rows - y, columns - x) < rng.uniform(4, 12)] += 800
    return light


def make_restorer(shape, predict, levels=(4,)):
    montage = Montage(TileGrid(2, 2, 96, 80, 47.5, signed=False), shape)
    return LearnedWienerRestorer(
        montage,
        {level: compute_psf(OPTICS, 2.0 * level, size_px=33) for level in levels},
        np.array([(0.5, level) for level in levels], np.float32),
        predict,
        tile_px=TILE_PX,
        halo_px=HALO_PX,
        normalisation=PercentileRange(),
    )


def constant(log_snr):
    """A predictor that says the same of every tile and band."""
    return lambda tiles, condition: np.full((len(tiles), BANDS), log_snr, np.float32)


def test_equal_ratio_in_all_bands_is_the_plain_wiener_filter():
    ratio = 0.01
    tile = scene((TILE_PX, TILE_PX))
    psf = compute_psf(OPTICS, 6.0, size_px=33)
    transfer = transfer_function(psf, tile.shape)
    log_snr = np.full((1, BANDS), -np.log(ratio), np.float32)
    found = filter_tiles(tile[None], transfer, log_snr)[0]
    # The same tapered tile through the filter of the live loop, whose gain is
    # scaled by (1 + ratio) so that it is 1 at f = 0.
    mean = tile.mean()
    tapered = (tile - mean) * edge_taper(tile.shape, TAPER_PX)
    settings = RestorationConfig(noise_to_signal=ratio)
    loop = WienerDeconvolution(psf, tile.shape, settings)
    plain = loop.restore(Surrounded(tapered))
    expected = (plain - tapered.mean()) / (1 + ratio) + tapered.mean() + mean
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_gain_of_every_frequency_by_hand():
    shape = (48, 64)
    rng = np.random.default_rng(1)
    tile = rng.standard_normal(shape).astype(np.float32)
    psf = compute_psf(OPTICS, 5.0, size_px=21)
    log_snr = rng.uniform(-1, 5, (1, BANDS)).astype(np.float32)
    found = filter_tiles(tile[None], transfer_function(psf, shape), log_snr)[0]
    # Impulse response: the same tile with a point added outside the taper.
    point = tile.copy()
    point[24, 32] += 1
    answer = filter_tiles(point[None], transfer_function(psf, shape), log_snr)[0]
    response = np.fft.rfft2(np.roll(answer - found, (-24, -32), (0, 1)))
    kernel = np.zeros(shape)
    kernel[:21, :21] = psf
    transfer = np.fft.rfft2(np.roll(kernel, (-10, -10), (0, 1)))
    noise = np.exp(-(log_snr[0] @ band_weights(shape, BANDS).reshape(BANDS, -1)))
    expected = transfer.conj() / (abs(transfer) ** 2 + noise.reshape(transfer.shape))
    # The added point also moves the mean, which the taper sees: skip f = 0 and
    # the few frequencies of the taper's own spectrum.
    inner = (slice(6, 20), slice(6, 20))
    np.testing.assert_allclose(response[inner], expected[inner], atol=2e-3)


def test_flat_tiles_keep_their_brightness():
    transfer = transfer_function(compute_psf(OPTICS, 8.0, size_px=33), (96, 96))
    flat = np.full((2, 96, 96), 7.5, np.float32)
    log_snr = np.zeros((2, BANDS), np.float32)
    np.testing.assert_allclose(filter_tiles(flat, transfer, log_snr), 7.5, rtol=1e-6)


@pytest.mark.parametrize("shape", [(176, 176), (97, 203), (60, 90)])
def test_known_blur_is_removed_in_frames_of_any_size(shape):
    sharp = scene(shape)
    blurred = blur(sharp, compute_psf(OPTICS, 8.0, size_px=33)).astype(np.float32)
    labels = np.full((2, 2), 4, np.int16)
    restorer = make_restorer(shape, constant(7.0))
    restored = restorer.restore(blurred, labels, np.empty_like(blurred))
    gain_db = psnr(sharp, restored, data_range=1000) - psnr(
        sharp, blurred, data_range=1000
    )
    assert gain_db > 3.5


def test_background_and_focus_come_back_as_they_were():
    blurred = scene((176, 176))
    labels = np.array([[BACKGROUND, 0], [0, BACKGROUND]], np.int16)
    restored = make_restorer((176, 176), constant(7.0)).restore(
        blurred, labels, np.empty_like(blurred)
    )
    np.testing.assert_array_equal(restored, blurred)


def test_restoring_is_seamless_where_all_tiles_agree():
    """Same ratio everywhere: no step where one tile hands over to the next."""
    shape = (240, 240)
    sharp = scene(shape, seed=9)
    blurred = blur(sharp, compute_psf(OPTICS, 8.0, size_px=33)).astype(np.float32)
    labels = np.full((2, 2), 4, np.int16)
    tiled = make_restorer(shape, constant(5.0)).restore(
        blurred, labels, np.empty_like(blurred)
    )
    montage = Montage(TileGrid(2, 2, 96, 80, 47.5, signed=False), shape)
    whole = LearnedWienerRestorer(
        montage,
        {4: compute_psf(OPTICS, 8.0, size_px=33)},
        np.array([(0.5, 4)], np.float32),
        constant(5.0),
        tile_px=600,
        halo_px=40,
        normalisation=PercentileRange(),
    ).restore(blurred, labels, np.empty_like(blurred))
    assert psnr(whole, tiled, data_range=1000) > 45


def test_each_tile_is_predicted_once_with_its_level():
    seen = []

    def predict(tiles, condition):
        seen.append((tiles.shape, condition.copy()))
        return np.full((len(tiles), BANDS), 3.0, np.float32)

    shape = (240, 192)
    restorer = make_restorer(shape, predict, levels=(3, 5))
    labels = np.full((2, 2), 5, np.int16)
    restorer.restore(scene(shape), labels, np.empty(shape, np.float32))
    conditions = np.concatenate([condition for _, condition in seen])
    # Kept parts of 48 px every 24 px: 9 down, 7 across.
    assert len(conditions) == 9 * 7
    assert {tuple(row) for row in conditions} == {(0.5, 5.0)}
    assert all(tiles[1:] == (1, TILE_PX, TILE_PX) for tiles, _ in seen)


def test_colours_are_restored_one_by_one():
    shape = (176, 176)
    grey = scene(shape)
    colour = np.stack([grey, grey[::-1], 2 * grey], axis=2)
    labels = np.full((2, 2), 4, np.int16)
    restorer = make_restorer(shape, constant(4.0))
    together = restorer.restore(colour, labels, np.empty_like(colour))
    alone = restorer.restore(
        np.ascontiguousarray(colour[..., 1]), labels, np.empty_like(grey)
    )
    np.testing.assert_allclose(together[..., 1], alone, rtol=1e-5)
