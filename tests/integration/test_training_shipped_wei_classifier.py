"""The shipped Wei classifier: card and weights agree, and it knows its side."""

import numpy as np
import onnxruntime
import pytest
import yaml

from bench.signed_classes import engine_predictor, label_real
from rtfocus.files import resource_folder
from rtfocus.training.networks.wei_classifier import LABELS, PATCH_PX, WeiClassifier

FOLDER = resource_folder("engines") / "wei_classifier"


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
    assert card["levels"]["signed"]
    assert card["input"]["tile_px"] == PATCH_PX
    count = sum(p.numel() for p in WeiClassifier(channels=1).parameters())
    assert card["trained"]["parameters"] == count
    tiles = np.zeros((1, 1, 2 * PATCH_PX, 3 * PATCH_PX), np.float32)
    (logits,) = session.run(None, {"tiles": tiles})
    assert logits.shape == (1, len(LABELS), 2, 3)


def test_real_planes_behind_focus_are_told_from_sharp_ones(shared_data):
    """Fields that were never trained on."""
    found = label_real(engine_predictor(FOLDER), shared_data)
    far, sharp = found["nuclei, 10 um"], found["nuclei, sharp"]
    assert (far["1"] + far["2"]) / sum(far.values()) >= 0.7
    assert (sharp["-1"] + sharp["0"] + sharp["1"]) / sum(sharp.values()) >= 0.9
