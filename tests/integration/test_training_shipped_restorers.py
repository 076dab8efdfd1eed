"""Shipped restorers: through the live loop, on a real field never trained on."""

import numpy as np
import pytest

from rtfocus.config import parse_config
from rtfocus.engines.registry import list_engines
from rtfocus.evaluation.samples import BBBC006
from rtfocus.evaluation.scores import psnr
from rtfocus.images.reading import open_images
from rtfocus.offline import ImageProcessor

# Gain in dB that the field must have; about 2 dB less than it was measured with.
LEAST_DB = {
    "comi": 5.0,
    "learned_wiener": 7.0,
    "multiscale": 6.5,
    "rrdb": 3.0,
    "rtfocus-1": 7.5,
    "rtfocus-2": 8.0,
    "wei_unet": 6.0,
}


def test_every_shipped_restorer_has_a_bound():
    kinds = ("restorer", "joint")
    shipped = {one.name for one in list_engines() if one.card.kind in kinds}
    assert shipped == set(LEAST_DB)


@pytest.mark.parametrize("engine", LEAST_DB)
def test_a_real_field_comes_back_sharper(engine, shared_data):
    folder = shared_data / "bbbc006_pairs"
    sharp, blurred = (
        open_images(folder / side / "a23_s1_w1.tif")[0].read()[:480, :480]
        for side in ("sharp", "defocus10um")
    )
    config = parse_config(
        {
            "channels": [{"name": "default", "optics": BBBC006}],
            "processing": {
                "classifier": engine if engine.startswith("rtfocus") else "delpnet",
                "restoration": {"method": engine},
                "threads": 1,
            },
            "camera": {"offset_counts": 0},
        }
    )
    with ImageProcessor(config) as processor:
        restored = np.clip(processor.restore(blurred).restored, 0, 255)
    before = psnr(sharp, blurred, data_range=255)
    gain = psnr(sharp, restored, data_range=255) - before
    assert gain > LEAST_DB[engine]
