"""Stacks and beads give back the optics they were made with."""

from dataclasses import replace

import numpy as np
import pytest

from rtfocus.calibration.bead_fit import BeadPlanes, find_beads
from rtfocus.calibration.pair_fit import measure_psf
from rtfocus.calibration.report import Calibration, config_text, match_planes
from rtfocus.calibration.stack_fit import StackPlanes
from rtfocus.calibration.through_focus import fit_through_focus
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.images.optics import read_optics
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens import draw_specimen

NOMINAL = OpticalSystem(0.5, 500.0, 0.4)
TRUTH = replace(
    NOMINAL,
    numerical_aperture=0.42,
    aberrations=Aberrations(spherical_waves=-0.3),
)
Z_UM = np.arange(-7.5, 7.6, 2.5)
FOCUS_UM = 0.7


def make_stack(truth, side=96, seed=3):
    """One specimen at every z, gain and background different in each plane."""
    rng = np.random.default_rng(seed)
    specimen = 200.0 * draw_specimen("nuclei", (side, side), rng)
    planes = [
        (1.0 - 0.02 * n) * blur(specimen, compute_psf(truth, z - FOCUS_UM)) + 5.0 + n
        for n, z in enumerate(Z_UM)
    ]
    return np.stack(planes) + rng.normal(0.0, 0.3, (len(Z_UM), side, side))


def make_bead(truth, side=33, shift=(0.3, -0.2), seed=4):
    rng = np.random.default_rng(seed)
    place = BeadPlanes(
        np.ones((len(Z_UM), side, side)) * np.eye(side),
        Z_UM,
        pixel_size_um=truth.pixel_size_um,
    )
    place._centre = (side // 2 + shift[0], side // 2 + shift[1])
    planes = 5000.0 * place.predict(truth, FOCUS_UM, range(len(Z_UM))) + 100.0
    return rng.poisson(np.maximum(planes, 0.0)).astype(np.float32)


def test_a_stack_tells_aperture_aberration_and_focus() -> None:
    model = StackPlanes(make_stack(TRUTH), Z_UM, half_px=18)
    fit = fit_through_focus(model, NOMINAL)
    assert fit.best.numerical_aperture == pytest.approx(0.42, rel=0.05)
    assert fit.best.spherical_waves == pytest.approx(-0.3, abs=0.06)
    assert fit.best.focus_um == pytest.approx(FOCUS_UM, abs=0.4)
    assert fit.explained > 0.99
    assert fit.sign_margin_db > 1.0
    low, high = fit.spread("numerical_aperture")
    assert low <= fit.best.numerical_aperture <= high < 0.5
    assert "The other sign of W" in fit.statement()


def test_a_stage_that_runs_the_other_way_turns_the_sign() -> None:
    stack = make_stack(TRUTH)
    model = StackPlanes(stack, -Z_UM, half_px=18)
    fit = fit_through_focus(model, TRUTH, fit_aperture=False)
    assert fit.best.numerical_aperture == TRUTH.numerical_aperture
    assert fit.best.spherical_waves == pytest.approx(0.3, abs=0.06)
    assert fit.best.focus_um == pytest.approx(-FOCUS_UM, abs=0.4)


def test_a_bead_tells_the_optics_and_its_place_between_the_pixels() -> None:
    model = BeadPlanes(make_bead(TRUTH), Z_UM, pixel_size_um=0.4)
    for _ in range(2):
        model.centre_on(NOMINAL, model.sharpest_um)
    assert model._centre == pytest.approx((16.3, 15.8), abs=0.1)
    fit = fit_through_focus(model, NOMINAL)
    assert fit.best.numerical_aperture == pytest.approx(0.42, rel=0.04)
    assert fit.best.spherical_waves == pytest.approx(-0.3, abs=0.04)
    assert fit.best.focus_um == pytest.approx(FOCUS_UM, abs=0.3)


def test_astigmatism_is_found_where_it_is_asked_for() -> None:
    aberrations = Aberrations(spherical_waves=-0.3, astigmatism_waves=0.2)
    truth = replace(TRUTH, aberrations=aberrations)
    model = BeadPlanes(make_bead(truth, side=25), Z_UM, pixel_size_um=0.4)
    fit = fit_through_focus(model, TRUTH, fit_aperture=False, fit_astigmatism=True)
    found = fit.system.aberrations
    assert found.astigmatism_waves == pytest.approx(0.2, abs=0.05)
    assert found.astigmatism_oblique_waves == pytest.approx(0.0, abs=0.05)


def test_a_wide_bead_is_its_ball_blurred_by_the_psf() -> None:
    side, diameter_um = 41, 4.0
    stack = make_bead(TRUTH, side, (0.0, 0.0))
    model = BeadPlanes(stack, Z_UM, pixel_size_um=0.4, diameter_um=diameter_um)
    model._centre = (side // 2, side // 2)
    found = model.predict(TRUTH, FOCUS_UM, [3])[0]
    # The projection of a ball has the height of its chord.
    fine = (np.arange(side * 9) - (side * 9 - 1) / 2) * 0.4 / 9
    squared = (diameter_um / 2) ** 2 - fine[:, None] ** 2 - fine[None, :] ** 2
    chord = np.sqrt(np.maximum(squared, 0.0))
    ball = chord.reshape(side, 9, side, 9).sum(axis=(1, 3))
    psf = compute_psf(TRUTH, Z_UM[3] - FOCUS_UM, size_px=side)
    expected = blur(ball / ball.sum(), psf)
    inner = slice(6, -6)
    error = np.abs(found - expected)[inner, inner].max()
    assert error < 0.05 * expected.max()


def test_only_beads_that_stand_alone_are_found() -> None:
    stack = np.full((3, 100, 120), 10.0) + np.random.default_rng(0).random(
        (3, 100, 120)
    )
    for row, column, height in (
        (30, 40, 500),
        (30, 48, 400),
        (70, 90, 300),
        (4, 60, 900),
    ):
        stack[1, row - 1 : row + 2, column - 1 : column + 2] += height
    assert find_beads(stack, half_px=12) == [(30, 40), (70, 90)]
    assert find_beads(np.random.default_rng(1).random((5, 64, 64)), half_px=8) == []


def test_planes_are_matched_in_gain_and_offset() -> None:
    rng = np.random.default_rng(2)
    predicted = rng.random((2, 8, 8)).astype(np.float32)
    measured = predicted * np.array([3.0, 0.5], np.float32)[:, None, None] + 7.0
    assert np.allclose(match_planes(predicted, measured), measured, atol=1e-5)


def test_the_measured_psf_is_the_one_that_blurred() -> None:
    rng = np.random.default_rng(5)
    psf = compute_psf(TRUTH, 4.0, size_px=31)
    pairs = []
    for _ in range(2):
        sharp = rng.random((200, 200)) ** 4
        pairs.append((sharp, blur(sharp, psf)))
    found = measure_psf(pairs, half_px=15)
    assert found.shape == (31, 31)
    assert np.corrcoef(found.ravel(), psf.ravel())[0, 1] > 0.97


@pytest.mark.parametrize(
    ("stack", "match"),
    [
        (np.zeros((3, 90, 90)), "at least 4"),
        (np.zeros((5, 40, 40)), "too small"),
        (np.ones((5, 90, 90)), "no structure"),
    ],
)
def test_a_stack_that_cannot_be_fitted_is_refused(stack, match) -> None:
    with pytest.raises(ValueError, match=match):
        StackPlanes(stack, np.arange(len(stack)), half_px=20)


def test_a_bead_that_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 5 planes"):
        BeadPlanes(np.ones((4, 30, 30)), np.arange(4), pixel_size_um=0.1)
    with pytest.raises(ValueError, match="cut off"):
        BeadPlanes(np.ones((6, 7, 7)), np.arange(6), pixel_size_um=0.1)


@pytest.mark.parametrize(
    "fitted",
    [
        TRUTH,
        OpticalSystem(1.2, 520.0, 0.1, 1.33),
        OpticalSystem(1.3, 520.0, 0.1, 1.518, aberrations=Aberrations(0.1, 0.2)),
    ],
)
def test_optics_of_any_immersion_are_written_as_they_were_found(fitted, tmp_path):
    path = tmp_path / "optics.yaml"
    path.write_text(config_text(Calibration(fitted, "", (), {}, []), channel="a"))
    assert read_optics(str(path)) == fitted
