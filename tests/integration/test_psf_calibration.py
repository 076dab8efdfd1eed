"""Calibration on real pairs: BBBC006, sharp against defocused fields.

Fitted on rows a02 to a18, checked on rows a19 to a24, which it never saw.
"""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from rtfocus.calibration.pair_fit import PsfFit, calibrate_psf
from rtfocus.calibration.pairs import Reblurring
from rtfocus.channel import OpticalSystem

START = OpticalSystem(0.5, 451.0, 0.65)
FITTED_FIELDS = ("a02_s1_w1", "a06_s2_w1", "a09_s2_w1", "a13_s2_w1", "a17_s2_w1")
HELD_BACK_ROWS = ("a19", "a20", "a22", "a23", "a24")


def read_pair(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    return (
        tifffile.imread(folder / "bbbc006_pairs" / "sharp" / f"{name}.tif"),
        tifffile.imread(folder / "bbbc006_pairs" / "defocus10um" / f"{name}.tif"),
    )


@pytest.fixture(scope="module")
def fit(shared_data: Path) -> PsfFit:
    pairs = [read_pair(shared_data, name) for name in FITTED_FIELDS]
    return calibrate_psf(pairs, START, nominal_defocus_um=10.0, fit_intensity=False)


def test_the_fitted_psf_reblurs_real_fields(fit: PsfFit) -> None:
    assert fit.best.psnr_db >= 45.0
    assert fit.best.psnr_db - fit.unblurred_psnr_db > 10.0


def test_the_blur_is_spherically_aberrated_and_its_sign_is_visible(fit: PsfFit) -> None:
    assert fit.best.defocus_um == pytest.approx(7.0, abs=1.0)
    assert fit.best.spherical_waves == pytest.approx(-0.47, abs=0.08)
    assert fit.system.defocus_offset_um == pytest.approx(-3.0, abs=1.0)
    assert fit.sign_margin_db > 1.5


def test_fields_that_were_not_fitted_are_reblurred_as_well(
    fit: PsfFit, shared_data: Path
) -> None:
    folder = shared_data / "bbbc006_pairs" / "sharp"
    names = [
        path.stem
        for path in sorted(folder.glob("*.tif"))
        if path.stem.startswith(HELD_BACK_ROWS)
    ]
    assert len(names) == 8
    held_back = Reblurring(
        START,
        [read_pair(shared_data, name) for name in names],
        widest_um=16.0,
        largest_aperture=0.5,
        fit_intensity=False,
        data_range=255.0,
    )
    seen = held_back.attempt(0.5, fit.best.defocus_um, fit.best.spherical_waves)
    assert seen.psnr_db >= 44.5
    assert seen.psnr_db - held_back.unblurred_psnr_db() > 10.0


def test_the_far_end_of_the_stack_lies_on_the_same_side(shared_data: Path) -> None:
    # Its nominal -32 um is a count of planes; the blur says that z and W have
    # opposite signs there too, as at the nominal 10 um.
    folder = shared_data / "bbbc006_16bit"
    pair = (
        tifffile.imread(folder / "in_focus" / "a01_s1.tif"),
        tifffile.imread(folder / "z00_minus32um" / "a01_s1.tif"),
    )
    far = calibrate_psf([pair], START, nominal_defocus_um=-32.0, data_range=4095.0)
    assert far.best.defocus_um == pytest.approx(-37.0, abs=2.0)
    assert far.best.spherical_waves == pytest.approx(0.3, abs=0.1)
    assert far.sign_margin_db > 1.0
