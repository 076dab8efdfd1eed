"""PSFs against what optics theory says about them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline
from scipy.special import j1

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.optics import psf as psf_module
from rtfocus.optics.psf import MAX_SIZE_PX, compute_psf, psf_radius_px, psf_stack

BBBC006 = OpticalSystem(0.5, 451.0, 0.65)
BORN_WOLF = replace(BBBC006, psf_model="born_wolf")
ALL_TERMS = Aberrations(0.3, 0.2, -0.1, 0.15, -0.2)


@settings(max_examples=40, deadline=None)
@given(
    aperture=st.floats(0.1, 0.9),
    pixel_um=st.floats(0.1, 1.0),
    defocus_um=st.floats(-20.0, 20.0),
    model=st.sampled_from(["pupil", "born_wolf"]),
    spherical=st.floats(-0.8, 0.8),
    half=st.integers(0, 30),
)
def test_a_psf_is_non_negative_and_sums_to_one(
    aperture, pixel_um, defocus_um, model, spherical, half
):
    system = OpticalSystem(
        aperture,
        550.0,
        pixel_um,
        psf_model=model,
        aberrations=Aberrations(spherical_waves=spherical),
    )
    psf = compute_psf(system, defocus_um, size_px=2 * half + 1)
    assert psf.dtype == np.float32
    assert psf.shape == (2 * half + 1, 2 * half + 1)
    assert psf.min() >= 0.0
    assert psf.sum(dtype=np.float64) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(psf, psf[::-1, ::-1], atol=1e-7)
    np.testing.assert_allclose(psf, psf.T, atol=1e-7)


@pytest.mark.parametrize("defocus_um", [0.0, 2.0, 10.0, 20.0, 40.0])
@pytest.mark.parametrize("system", [BBBC006, BORN_WOLF])
def test_the_default_window_is_the_smallest_with_99_percent_of_all_light(
    system, defocus_um
):
    half = compute_psf(system, defocus_um).shape[0] // 2
    # Fractions of the light of the whole plane, by Parseval over the pupil.
    fractions = psf_module._round_psf(system, defocus_um, half, 6)
    assert fractions.sum() >= 0.99
    assert fractions[1:-1, 1:-1].sum() < 0.99


def test_the_default_window_is_bounded():
    oil = OpticalSystem(1.4, 520.0, 0.065, refractive_index=1.518)
    assert compute_psf(oil, 20.0).shape == (MAX_SIZE_PX, MAX_SIZE_PX)


def test_the_in_focus_psf_is_the_airy_pattern():
    fine = OpticalSystem(0.3, 500.0, 0.05)
    psf = compute_psf(fine, 0.0, size_px=101)
    argument = 2 * np.pi * 0.3 / 0.5 * np.arange(1, 51) * 0.05
    airy = (2.0 * j1(argument) / argument) ** 2
    row = psf[50, 51:] / psf[50, 50]
    np.testing.assert_allclose(row, airy, atol=2e-3)


@pytest.mark.parametrize(
    ("system", "theory_um"),
    [
        # Exact: one wave between the axis and the edge of the aperture.
        (OpticalSystem(0.3, 520.0, 0.1), 0.52 / (1.0 - np.sqrt(1.0 - 0.3**2))),
        # Paraxial: 2 n lambda / NA^2.
        (
            OpticalSystem(0.3, 520.0, 0.1, psf_model="born_wolf"),
            2.0 * 0.52 / 0.3**2,
        ),
        (
            OpticalSystem(0.4, 520.0, 0.1, 1.33, psf_model="born_wolf"),
            2.0 * 1.33 * 0.52 / 0.4**2,
        ),
    ],
)
def test_the_first_axial_zero_lies_where_theory_says(system, theory_um):
    defoci = np.arange(theory_um - 1.5, theory_um + 1.5, 0.05)
    centre = psf_stack(system, defoci, 65)[:, 32, 32]
    found = defoci[np.argmin(centre)]
    assert found == pytest.approx(theory_um, abs=0.06)
    in_focus = compute_psf(system, 0.0, size_px=65)[32, 32]
    assert centre.min() < 2e-3 * in_focus


def test_born_wolf_is_even_in_z():
    for defocus_um in (2.0, 9.0, 33.0):
        np.testing.assert_array_equal(
            compute_psf(BORN_WOLF, defocus_um), compute_psf(BORN_WOLF, -defocus_um)
        )


@pytest.mark.parametrize("defocus_um", [0.0, 10.0, -40.0])
def test_the_pupil_model_is_born_wolf_at_low_aperture(defocus_um):
    low = OpticalSystem(0.1, 550.0, 0.65)
    pupil = compute_psf(low, defocus_um, size_px=41)
    born_wolf = compute_psf(replace(low, psf_model="born_wolf"), defocus_um, size_px=41)
    # Half a percent of the light may lie elsewhere; at NA 0.9 it is far more.
    assert np.abs(pupil - born_wolf).sum() < 5e-3
    high = replace(low, numerical_aperture=0.9)
    other = compute_psf(replace(high, psf_model="born_wolf"), 10.0, size_px=41)
    assert np.abs(compute_psf(high, 10.0, size_px=41) - other).sum() > 0.1


@pytest.mark.parametrize("defocus_um", [0.0, 7.0, -20.0, 40.0])
def test_the_fourier_transform_agrees_with_the_radial_integral(defocus_um):
    # Two independent ways to the same PSF.
    system = replace(BBBC006, aberrations=Aberrations(spherical_waves=-0.45))
    radial = psf_module._round_psf(system, defocus_um, 40, 6)
    transformed = psf_module._general_psf(system, defocus_um, 40, 6)
    assert np.abs(radial - transformed).sum() < 0.01


def test_spherical_aberration_makes_the_sign_of_defocus_visible():
    plain = BBBC006
    aberrated = replace(plain, aberrations=Aberrations(spherical_waves=-0.45))
    near, far = psf_stack(plain, (-6.0, 6.0), 41)
    np.testing.assert_allclose(near, far, atol=1e-7)
    near, far = psf_stack(aberrated, (-6.0, 6.0), 41)
    assert np.abs(near - far).sum() > 0.3
    # The fitted BBBC006 side: positive z with negative W keeps a sharp core.
    assert far[20, 20] > 2.0 * near[20, 20]


def test_all_signs_reversed_give_the_same_psf():
    minus = Aberrations(
        *(-value for value in (0.3, 0.2, -0.1, 0.0, 0.0)),
    )
    plus = Aberrations(0.3, 0.2, -0.1, 0.0, 0.0)
    np.testing.assert_allclose(
        compute_psf(replace(BBBC006, aberrations=plus), 5.0, size_px=41),
        compute_psf(replace(BBBC006, aberrations=minus), -5.0, size_px=41),
        atol=1e-6,
    )


def test_astigmatism_and_coma_point_where_their_names_say():
    def moments(aberrations, defocus_um):
        psf = compute_psf(
            replace(BBBC006, aberrations=aberrations), defocus_um, size_px=61
        ).astype(np.float64)
        y, x = np.mgrid[-30:31, -30:31]
        return (psf * x**2).sum(), (psf * y**2).sum(), (psf * x * y).sum(), psf

    # Positive waves are longer paths, defocus is shorter by r^2: they cancel in x.
    in_x, in_y, _, _ = moments(Aberrations(astigmatism_waves=0.5), 4.0)
    assert in_x < 0.8 * in_y
    in_x, in_y, _, _ = moments(Aberrations(astigmatism_waves=0.5), -4.0)
    assert in_y < 0.8 * in_x
    _, _, mixed, _ = moments(Aberrations(astigmatism_oblique_waves=0.5), 4.0)
    assert abs(mixed) > 0.2
    psf = moments(Aberrations(coma_x_waves=0.4), 0.0)[3]
    np.testing.assert_allclose(psf, psf[::-1], atol=1e-6)
    assert np.abs(psf - psf[:, ::-1]).sum() > 0.2
    psf = moments(Aberrations(coma_y_waves=0.4), 0.0)[3]
    np.testing.assert_allclose(psf, psf[:, ::-1], atol=1e-6)
    assert np.abs(psf - psf[::-1]).sum() > 0.2


def test_apodisation_lowers_the_peak_and_the_rings():
    # Fine pixels: a coarse one gains more from the weaker rings than it loses.
    fine = replace(BBBC006, pixel_size_um=0.1)
    plain = compute_psf(fine, 0.0, size_px=101)
    soft = compute_psf(replace(fine, apodisation=1.5), 0.0, size_px=101)
    assert soft[50, 50] < plain[50, 50]
    assert psf_radius_px(soft) < psf_radius_px(plain)


def test_the_defocus_offset_is_added():
    shifted = replace(BORN_WOLF, defocus_offset_um=-3.0)
    np.testing.assert_array_equal(
        compute_psf(shifted, 10.0, size_px=41),
        compute_psf(BORN_WOLF, 7.0, size_px=41),
    )


def test_a_pixel_integrates_the_light_it_covers():
    # Nine small pixels hold what one large pixel holds.
    coarse = OpticalSystem(0.5, 451.0, 0.66)
    fine = replace(coarse, pixel_size_um=0.22)
    large = psf_module._round_psf(coarse, 5.0, 10, 6)
    small = psf_module._round_psf(fine, 5.0, 31, 6)
    binned = small.reshape(21, 3, 21, 3).sum(axis=(1, 3))
    # To 0.05 % of the light: sub-pixels are summed by the midpoint rule.
    np.testing.assert_allclose(large, binned, atol=5e-4)
    sampled = small[1::3, 1::3] * 9.0
    assert np.abs(large - sampled).max() > 5e-3


def test_energy_lost_by_a_padding_of_13_px_at_he_level_10_is_about_9_percent():
    psf = compute_psf(BORN_WOLF, 20.0, size_px=201)
    lost = 1.0 - psf[87:114, 87:114].sum()
    assert 0.08 < lost < 0.11


def test_the_energy_radius_counts_from_the_centre():
    psf = np.zeros((11, 11), dtype=np.float32)
    psf[5, 5], psf[5, 8] = 0.9, 0.1
    assert psf_radius_px(psf, 0.5) == 0
    assert psf_radius_px(psf, 0.95) == 3
    radii = [psf_radius_px(psf) for psf in psf_stack(BBBC006, (0, 8, 16, 24), 101)]
    assert radii == sorted(radii)
    assert radii[0] < radii[-1]


def test_results_are_the_callers_own():
    compute_psf(BBBC006, 3.0, size_px=21)[:] = 0.0
    assert compute_psf(BBBC006, 3.0, size_px=21).sum() == pytest.approx(1.0, abs=1e-5)


def test_bad_sizes_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="choose an odd side"):
        compute_psf(BBBC006, 1.0, size_px=20)


def test_aberrations_with_all_terms_still_make_a_psf():
    psf = compute_psf(replace(BBBC006, aberrations=ALL_TERMS), 12.0)
    assert psf.min() >= 0.0
    assert psf.sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("knots", [256, 512])
def test_between_the_knots_lies_the_spline_that_scipy_has(knots):
    rng = np.random.default_rng(knots)
    parts = np.cumsum(rng.normal(size=(knots, 2)), axis=0)
    spline = CubicSpline(np.arange(knots), parts, bc_type=("clamped", "not-a-knot"))
    per_knot = psf_module._FINE_PER_UNIT // psf_module._KNOTS_PER_UNIT
    count = (knots - 1) * per_knot + 1
    wanted = spline(np.arange(count) / per_knot)
    np.testing.assert_allclose(psf_module._refine(parts, count), wanted, atol=1e-12)


@pytest.mark.parametrize("system", [BBBC006, replace(BBBC006, aberrations=ALL_TERMS)])
def test_what_is_kept_of_psfs_far_from_focus_is_bounded(system, monkeypatch):
    kept = psf_module.Kept(1 << 20)
    monkeypatch.setattr(psf_module, "KEPT", kept)
    most = 0
    for defocus_um in range(0, 40, 8):
        compute_psf(system, defocus_um)
        held = [
            sum(part.nbytes for part in (made if isinstance(made, tuple) else (made,)))
            for made in kept._results.values()
        ]
        assert kept.held_bytes == sum(held)
        most = max(most, kept.held_bytes)
        assert kept.held_bytes <= 1 << 20 or len(held) == 1
    assert most > 1 << 19


def test_a_psf_is_made_once_while_there_is_room_and_the_newest_always_stays():
    made = []

    def make(side):
        made.append(side)
        return np.zeros((side, side), np.float32)

    kept = psf_module.Kept(500)
    kept.get(make, 5)
    kept.get(make, 6)
    kept.get(make, 5)  # 6 was used longer ago
    kept.get(make, 8)
    assert kept.get(make, 5).shape == (5, 5)
    assert made == [5, 6, 8]
    kept.get(make, 99)
    kept.get(make, 99)
    assert made == [5, 6, 8, 99]
    assert kept.held_bytes == 4 * 99**2
    kept.get(make, 6)
    assert made == [5, 6, 8, 99, 6]
    assert kept.held_bytes == 4 * 36
