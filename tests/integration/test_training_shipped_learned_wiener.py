"""The shipped learned Wiener engine: its file, and real fields never trained on."""

import numpy as np
import onnxruntime
import pytest

from rtfocus.engines.card import read_card, verified_file
from rtfocus.evaluation.scores import psnr
from rtfocus.files import resource_folder
from rtfocus.frame import TileGrid
from rtfocus.images.reading import open_images
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.network_restorer import LearnedWienerRestorer
from rtfocus.processing.montage import Montage
from rtfocus.training.networks.learned_wiener import BANDS

FOLDER = resource_folder("engines") / "learned_wiener"
# The planes called 10 um, in steps of 2.2 um.
LEVEL = 5


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    path = verified_file(FOLDER, read_card(FOLDER))
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_names_on_the_card_are_those_of_the_file(session):
    card = read_card(FOLDER)
    assert [t.name for t in session.get_inputs()] == [
        card.input.name,
        card.condition.name,
    ]
    side = card.input.tile_px
    tiles = np.zeros((2, 1, side, side), np.float32)
    condition = np.zeros((2, len(card.condition.entries)), np.float32)
    (log_snr,) = session.run(
        [card.output.name], {"tiles": tiles, "condition": condition}
    )
    assert log_snr.shape == (2, BANDS)


@pytest.mark.parametrize("field", ["a19_s1_w1", "a24_s1_w1"])
def test_real_fields_come_back_sharp(session, shared_data, field):
    """Full scale 255, one PSF for the frame; two thirds of the gain on the card."""
    card = read_card(FOLDER)
    optics = card.optics.reference
    sharp, blurred = (
        open_images(shared_data / "bbbc006_pairs" / side / f"{field}.tif")[0]
        .read()[:512, :512]
        .astype(np.float32)
        for side in ("sharp", "defocus10um")
    )

    def predict(tiles, condition):
        given = {"tiles": tiles, "condition": condition}
        return session.run(["log_snr"], given)[0]

    halo = card.input.halo_px
    psf = compute_psf(optics, LEVEL * card.levels.step_um, size_px=2 * halo + 1)
    told = np.array(
        [[optics.sampling, optics.aberrations.spherical_waves, LEVEL]], np.float32
    )
    grid = TileGrid(1, 1, 96, 48, 47.5, signed=True)
    restorer = LearnedWienerRestorer(
        Montage(grid, blurred.shape),
        {LEVEL: psf},
        told,
        predict,
        tile_px=card.input.tile_px,
        halo_px=halo,
        normalisation=PercentileRange(),
    )
    labels = np.full((1, 1), LEVEL, np.int16)
    restored = restorer.restore(blurred, labels, np.empty_like(blurred))
    before = psnr(sharp, blurred, data_range=255)
    assert psnr(sharp, restored, data_range=255) - before > 5
