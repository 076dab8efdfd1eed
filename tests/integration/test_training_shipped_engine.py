"""The shipped DelpNet: card, weights and figures on real planes never trained on."""

import numpy as np
import onnxruntime
import pytest
import yaml

from rtfocus.resources import resource_folder
from rtfocus.training.evaluate import EngineUnderTest, evaluate_real
from rtfocus.training.networks.delpnet import GEOMETRY, LABELS, DelpNet

FOLDER = resource_folder("engines") / "delpnet"


@pytest.fixture(scope="module")
def card() -> dict:
    return yaml.safe_load((FOLDER / "engine.yaml").read_text(encoding="utf-8"))


def test_names_and_grid_on_the_card_are_those_of_the_network(card):
    session = onnxruntime.InferenceSession(
        FOLDER / card["files"]["fp32"], providers=["CPUExecutionProvider"]
    )
    assert [t.name for t in session.get_inputs()] == [card["input"]["name"]]
    assert [t.name for t in session.get_outputs()] == [card["output"]["name"]]
    assert tuple(card["output"]["labels"]) == LABELS
    assert card["input"]["tile_px"] == GEOMETRY.tile_px
    assert card["input"]["stride_px"] == GEOMETRY.stride_px
    assert card["trained"]["parameters"] == DelpNet().parameter_count
    tiles = np.zeros((1, 1, 528, 528), np.float32)
    (logits,) = session.run(None, {"tiles": tiles})
    assert logits.shape == (1, len(LABELS), 10, 10)


@pytest.mark.parametrize("gain", [1.0, 1 / 16, 8.0])
def test_labels_do_not_depend_on_gain_and_offset(shared_data, gain):
    """The same field as another camera would have counted it."""
    from rtfocus.images.reading import open_images

    path = shared_data / "bbbc006_16bit" / "in_focus" / "a03_s1.tif"
    frame = open_images(path)[0].read().astype(np.float32)
    engine = EngineUnderTest(FOLDER)
    found, empty = engine.classify(frame)
    changed, _ = engine.classify(frame * np.float32(gain) + 40)
    assert (found == changed)[~empty].mean() > 0.98


def test_real_planes_get_their_distance_from_focus(shared_data):
    """Fields that were used neither for training nor for calibration."""
    results = evaluate_real(EngineUnderTest(FOLDER), shared_data)
    for names in (
        ("nuclei, sharp", "nuclei 16 bit, sharp"),
        ("nuclei, 10 um",),
        ("nuclei 16 bit, -32 um",),
    ):
        tiles = sum(results[name]["tiles"] for name in names)
        right = sum(results[name]["tiles"] * results[name]["share"] for name in names)
        assert right / tiles >= 0.9, {name: results[name] for name in names}
