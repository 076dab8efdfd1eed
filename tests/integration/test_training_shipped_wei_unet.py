"""The shipped engine of Wei's networks: its file, and real fields never trained on."""

import numpy as np
import onnxruntime
import pytest

from rtfocus.engines.card import read_card, verified_file
from rtfocus.evaluation.scores import match_intensity, psnr, ssim
from rtfocus.files import resource_folder
from rtfocus.images.reading import open_images
from rtfocus.optics.normalisation import PercentileRange

FOLDER = resource_folder("engines") / "wei_unet"
HALF = 16


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    path = verified_file(FOLDER, read_card(FOLDER))
    assert path.stat().st_size <= 4 * 2**20
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_names_on_the_card_are_those_of_the_file(session):
    card = read_card(FOLDER)
    assert [t.name for t in session.get_inputs()] == ["tiles", "condition"]
    assert [t.name for t in session.get_outputs()] == [
        card.output.name,
        card.kernel_output.name,
    ]
    tiles = np.zeros((2, 1, 96, 128), np.float32)
    given = {"tiles": tiles, "condition": np.zeros((2, 2), np.float32)}
    restored, kernel = session.run(None, given)
    assert restored.shape == tiles.shape
    assert kernel.shape == (2, *[card.kernel_output.size_px] * 2)


@pytest.mark.parametrize("field", ["a19_s1_w1", "a24_s1_w1"])
def test_real_fields_come_back_sharp_and_blur_again(session, shared_data, field):
    """Blind, full scale 255; the bench finds 7 to 10 dB and 0.99."""
    folder = shared_data / "bbbc006_pairs"
    sharp, blurred = (
        open_images(folder / side / f"{field}.tif")[0].read()[:512, :512] * 1.0
        for side in ("sharp", "defocus10um")
    )
    offset, scale = PercentileRange().fit(blurred)
    tiles = ((blurred - offset) / scale)[None, None].astype(np.float32)
    restored, kernel = session.run(
        None, {"tiles": tiles, "condition": np.zeros((1, 2), np.float32)}
    )
    before = psnr(sharp, blurred, data_range=255)
    after = psnr(sharp, restored[0, 0] * scale + offset, data_range=255)
    assert after - before > 5
    size = [n + 2 * HALF for n in sharp.shape]
    spectrum = np.fft.rfft2(kernel[0], size) * np.fft.rfft2(sharp, size)
    again = np.fft.irfft2(spectrum, size)[2 * HALF : -2 * HALF, 2 * HALF : -2 * HALF]
    recorded = blurred[HALF:-HALF, HALF:-HALF]
    assert ssim(recorded, match_intensity(recorded, again), data_range=255) >= 0.972
