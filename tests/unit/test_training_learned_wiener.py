"""Learned Wiener: the predictor, the filter in torch, and what it can learn."""

import numpy as np
import pytest
import torch

from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu import network_restorer as numpy_side
from rtfocus.processing.restore import transfer_function
from rtfocus.training.networks.learned_wiener import (
    BANDS,
    CONDITION,
    TILE_PX,
    LearnedWiener,
    level_psf,
    own_part,
    told_levels,
    wiener_filter,
)
from rtfocus.training.recipe import PairsRecipe

REFERENCE = {
    "numerical_aperture": 0.36,
    "wavelength_nm": 451,
    "pixel_size_um": 0.65,
    "aberrations": {"spherical_waves": -0.38},
}


@pytest.fixture(scope="module")
def pairs():
    return PairsRecipe.model_validate({"reference": REFERENCE})


def test_one_ratio_per_tile_and_band_whatever_the_size():
    network = LearnedWiener()
    for side in (TILE_PX, 96):
        log_snr = network(torch.rand(3, 1, side, side), torch.zeros(3, len(CONDITION)))
        assert log_snr.shape == (3, BANDS)


def test_parameters_by_hand():
    filters = 4 * 16 * 25
    mix = (4 * 16 + 3) * 96 + 96 + 96 * 96 + 96
    ratio = 96 * BANDS + BANDS
    count = sum(p.numel() for p in LearnedWiener(16).parameters())
    assert count == filters + mix + ratio


def test_a_fresh_predictor_trusts_low_frequencies_more():
    log_snr = LearnedWiener()(torch.rand(1, 1, 96, 96), torch.zeros(1, 3))[0]
    assert (log_snr[:-1] > log_snr[1:]).all()


def test_prediction_is_bounded_for_any_input():
    network = LearnedWiener()
    with torch.no_grad():
        network.ratio.weight.normal_(0, 100)
    log_snr = network(1e4 * torch.randn(4, 1, 96, 96), torch.zeros(4, 3))
    assert torch.isfinite(log_snr).all()
    assert log_snr.abs().max() == 12


def test_filter_agrees_with_the_one_of_the_live_loop(pairs):
    rng = np.random.default_rng(2)
    tiles = rng.random((2, TILE_PX, TILE_PX), np.float32)
    psf = level_psf(pairs, pairs.reference.sampling, -0.38, 5)
    log_snr = rng.uniform(-2, 6, (2, BANDS)).astype(np.float32)
    transfer = transfer_function(psf, (TILE_PX, TILE_PX))
    expected = numpy_side.filter_tiles(tiles, transfer, log_snr)
    found = wiener_filter(
        torch.from_numpy(tiles)[:, None],
        torch.from_numpy(np.stack([psf, psf])),
        torch.from_numpy(log_snr),
    )
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=2e-5)


def test_gradient_of_the_filter_by_finite_differences(pairs):
    torch.manual_seed(4)
    tiles = torch.rand(1, 1, 96, 96, dtype=torch.float64)
    psf = torch.from_numpy(level_psf(pairs, 0.52, -0.38, 3))[None].double()
    log_snr = torch.full((1, BANDS), 2.0, dtype=torch.float64, requires_grad=True)
    wiener_filter(tiles, psf, log_snr).square().mean().backward()
    step = torch.zeros_like(log_snr)
    step[0, 4] = 1e-4
    with torch.no_grad():
        up, down = (
            wiener_filter(tiles, psf, log_snr + s).square().mean()
            for s in (step, -step)
        )
    assert float(log_snr.grad[0, 4]) == pytest.approx(float(up - down) / 2e-4, rel=1e-3)


def test_levels_are_rounded_and_never_in_focus():
    rng = np.random.default_rng(0)
    levels = np.array([0.2, -0.2, 4.6, -10.5, 10.4])
    called = told_levels(levels, 0.0, rng)
    np.testing.assert_array_equal(called, [1, -1, 5, -10, 10])
    many = told_levels(np.full(4000, 4.0), 0.5, rng)
    assert np.std(many) == pytest.approx(np.hypot(0.5, np.sqrt(1 / 12)), abs=0.05)


def test_level_psf_of_the_reference_is_that_of_its_defocus(pairs):
    found = level_psf(pairs, pairs.reference.sampling, -0.38, 5)
    expected = compute_psf(pairs.reference, 11.0, size_px=65)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_learns_how_noisy_each_kind_of_tile_is(pairs):
    """Two kinds of tiles, noisy and clean, one PSF: one ratio cannot serve both."""
    torch.manual_seed(0)
    psf = torch.from_numpy(level_psf(pairs, 0.52, -0.38, 4))[None].expand(8, -1, -1)
    sharp = torch.nn.functional.avg_pool2d(
        (torch.rand(8, 1, 100, 100) > 0.7).float(), 5, stride=1
    )
    transfer = torch.fft.rfft2(sharp[:, 0])
    kernel = torch.zeros(8, 96, 96)
    kernel[:, :65, :65] = psf
    kernel = kernel.roll((-32, -32), (1, 2))
    blurred = torch.fft.irfft2(transfer * torch.fft.rfft2(kernel), s=(96, 96))
    noise = torch.tensor([0.001] * 4 + [0.1] * 4)[:, None, None]
    tiles = (blurred + noise * torch.randn(8, 96, 96))[:, None]
    condition = torch.zeros(8, 3)

    def error(log_snr):
        restored = wiener_filter(tiles, psf, log_snr)
        return (own_part(restored) - own_part(sharp)).square().mean(dim=(1, 2, 3))

    fixed = min(
        float(error(torch.full((8, BANDS), s)).log10().mean())
        for s in np.arange(0.0, 10.0, 0.5)
    )
    network = LearnedWiener(4)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        loss = error(network(tiles, condition)).log10().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert 10 * (fixed - float(loss.detach())) > 1.5
