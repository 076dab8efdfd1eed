"""Calibration finds parameters that are known, and says what it cannot tell."""

from dataclasses import replace

import numpy as np
import pytest

from rtfocus.calibration.pair_fit import calibrate_psf
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens import draw_specimen

START = OpticalSystem(0.5, 451.0, 0.65)


def make_pairs(truth, defocus_um, *, gain=1.0, offset=0.0, count=2):
    rng = np.random.default_rng(11)
    psf = compute_psf(truth, defocus_um, size_px=121)
    for _ in range(count):
        sharp = 200.0 * draw_specimen("nuclei", (280, 280), rng)
        noise = rng.normal(0.0, 0.5, sharp.shape)
        yield sharp, gain * blur(sharp, psf) + offset + noise


@pytest.mark.parametrize(
    ("nominal_um", "defocus_um", "spherical"),
    [(10.0, 7.0, -0.45), (10.0, 11.5, 0.3), (-8.0, -9.0, -0.5)],
)
def test_known_parameters_are_recovered(nominal_um, defocus_um, spherical):
    truth = replace(START, aberrations=Aberrations(spherical_waves=spherical))
    pairs = list(make_pairs(truth, defocus_um, gain=1.1, offset=-2.0))
    fit = calibrate_psf(pairs, START, nominal_defocus_um=nominal_um)
    assert fit.best.defocus_um == pytest.approx(defocus_um, abs=0.3)
    assert fit.best.spherical_waves == pytest.approx(spherical, abs=0.03)
    assert fit.best.gain == pytest.approx(1.1, abs=0.01)
    assert fit.best.offset == pytest.approx(-2.0, abs=0.2)
    # What is left is the noise: 20 log10(255 / 0.5).
    assert fit.best.psnr_db == pytest.approx(54.15, abs=0.1)
    assert fit.unblurred_psnr_db < 42.0
    assert fit.sign_margin_db > 0.5


def test_the_fitted_system_maps_the_nominal_defocus_to_the_fitted_psf():
    truth = replace(START, aberrations=Aberrations(spherical_waves=-0.45))
    pairs = list(make_pairs(truth, 7.0, count=1))
    fit = calibrate_psf(pairs, START, nominal_defocus_um=10.0)
    psf = compute_psf(fit.system, 10.0, size_px=61)
    assert np.abs(psf - compute_psf(truth, 7.0, size_px=61)).sum() < 0.05
    assert fit.system.defocus_offset_um == pytest.approx(-3.0, abs=0.3)


def test_apertures_that_fit_as_well_are_reported():
    truth = replace(START, aberrations=Aberrations(spherical_waves=-0.45))
    pairs = list(make_pairs(truth, 7.0, count=1))
    fit = calibrate_psf(
        pairs,
        START,
        nominal_defocus_um=10.0,
        apertures=(0.45, 0.5),
        fit_intensity=False,
        tolerance_db=0.5,
    )
    assert fit.spread("numerical_aperture") == (0.45, 0.5)
    low, high = fit.spread("defocus_um")
    assert low < 7.0 < high
    assert {optimum.gain for optimum in fit.near} == {1.0}
    assert "NA 0.45 to 0.5" in fit.statement()
    assert len(fit.local_optima) == 4


def test_input_that_cannot_be_fitted_is_refused_with_the_remedy():
    image = np.zeros((280, 280))
    with pytest.raises(ValueError, match="at least one pair away from focus"):
        calibrate_psf([(image, image)], START, nominal_defocus_um=0.0)
    with pytest.raises(ValueError, match="0 pairs"):
        calibrate_psf([], START, nominal_defocus_um=10.0)
    with pytest.raises(ValueError, match="the same field"):
        calibrate_psf([(image, image[1:])], START, nominal_defocus_um=10.0)
    with pytest.raises(ValueError, match="need sides of at least"):
        calibrate_psf([(image[:60], image[:60])], START, nominal_defocus_um=10.0)
    with pytest.raises(ValueError, match="no structure"):
        calibrate_psf([(image, image)], START, nominal_defocus_um=10.0)
