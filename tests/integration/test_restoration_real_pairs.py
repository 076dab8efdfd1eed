"""Restoration of real defocused fields against their sharp partners."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import RestorationConfig
from rtfocus.evaluation.scores import psnr, ssim
from rtfocus.frame import TileGrid
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.depth_variant import DepthVariantRestorer
from rtfocus.processing.montage import Montage

# Fitted to training rows a02 to a18 of BBBC006 (see rtfocus.calibration.pair_fit),
# and the aberration-free PSF of the nominal optics.
FITTED = (
    OpticalSystem(0.5, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.45)),
    7.0,
)
NOMINAL = OpticalSystem(0.5, 451.0, 0.65, psf_model="born_wolf"), 10.0
VALIDATION = ("a19", "a20", "a21", "a22", "a23", "a24")
# 8-bit images: figures are relative to their full scale.
RANGE = 255.0


@pytest.fixture(scope="module")
def fields(shared_data: Path):
    folder = shared_data / "bbbc006_pairs"
    paths = sorted(
        path
        for path in (folder / "sharp").glob("*.tif")
        if path.name.startswith(VALIDATION)
    )
    return [
        (tifffile.imread(p), tifffile.imread(folder / "defocus10um" / p.name))
        for p in paths
    ]


def figures(fields, optics, method):
    """Mean PSNR and SSIM after restoring every tile with one PSF."""
    system, defocus_um = optics
    shape = fields[0][0].shape
    montage = Montage(TileGrid(1, 1, 96, 48, 47.5, signed=False), shape)
    settings = RestorationConfig(method=method)
    restorer = DepthVariantRestorer(
        montage, {5: compute_psf(system, defocus_um)}, settings, quantum=1.0
    )
    labels = np.full((1, 1), 5, np.int16)
    scores = []
    for sharp, blurred in fields:
        signal = blurred.astype(np.float32)
        restored = restorer.restore(signal, labels, np.empty_like(signal))
        scores.append(
            (
                psnr(sharp, restored, data_range=RANGE),
                ssim(sharp, restored, data_range=RANGE),
            )
        )
    return np.mean(scores, axis=0)


@pytest.mark.parametrize(
    ("method", "least_db", "least_ssim"),
    [
        ("richardson_lucy", 38.5, 0.96),
        ("richardson_lucy_accelerated", 38.5, 0.96),
        ("wiener", 38.5, 0.97),
    ],
)
def test_fitted_psf_restores_real_fields(fields, method, least_db, least_ssim):
    quality_db, similarity = figures(fields, FITTED, method)
    blurred_db = np.mean([psnr(s, b, data_range=RANGE) for s, b in fields])
    assert quality_db > blurred_db + 5
    assert quality_db >= least_db
    assert similarity >= least_ssim


def test_accelerated_form_loses_nothing_on_real_fields(fields):
    matched, _ = figures(fields, FITTED, "richardson_lucy")
    accelerated, _ = figures(fields, FITTED, "richardson_lucy_accelerated")
    assert accelerated >= matched - 0.1


def test_a_wrong_psf_costs_decibels(fields):
    fitted, _ = figures(fields, FITTED, "richardson_lucy")
    nominal, _ = figures(fields, NOMINAL, "richardson_lucy")
    assert fitted > nominal + 3
