"""The shipped DelpNet: card, weights and figures on real planes never trained on."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml

from rtfocus.config import parse_config
from rtfocus.evaluation.contenders import contender
from rtfocus.evaluation.data_sets import find_data_set
from rtfocus.evaluation.evaluate import evaluate
from rtfocus.evaluation.scores import LevelScore
from rtfocus.files import resource_folder
from rtfocus.frame import BACKGROUND
from rtfocus.images.reading import open_images
from rtfocus.offline import ImageProcessor
from rtfocus.training.level_tiles import GEOMETRY, LABELS
from rtfocus.training.networks.delpnet import DelpNet

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
    count = sum(parameter.numel() for parameter in DelpNet().parameters())
    assert card["trained"]["parameters"] == count
    tiles = np.zeros((1, 1, 528, 528), np.float32)
    (logits,) = session.run(None, {"tiles": tiles})
    assert logits.shape == (1, len(LABELS), 10, 10)


@pytest.mark.parametrize("gain", [1.0, 1 / 16, 8.0])
def test_labels_do_not_depend_on_gain_and_offset(shared_data, gain):
    """The same field as another camera would have counted it."""
    path = shared_data / "bbbc006_16bit" / "in_focus" / "a03_s1.tif"
    frame = open_images(path)[0].read().astype(np.float32)
    config = parse_config({"processing": {"classifier": "delpnet", "threads": 1}})
    with ImageProcessor(config) as processor:
        level, changed = (
            processor.classify(image).defocus.level
            for image in (frame, frame * np.float32(gain) + 40)
        )
    seen = (level != BACKGROUND) | (changed != BACKGROUND)
    assert (level == changed)[seen].mean() > 0.98


def test_real_planes_get_their_distance_from_focus(shared_data):
    """Fields that were used neither for training nor for calibration."""
    scores = [
        score
        for name in ("bbbc006_pairs", "bbbc006_16bit")
        for score in levels_by_group(name, shared_data).items()
    ]
    for wanted in ("sharp", "10 um", "-32 um"):
        found = [score for group, score in scores if group == wanted]
        right, tiles = (sum(getattr(s, n) for s in found) for n in ("right", "tiles"))
        assert right / tiles >= 0.9, [score.summary() for score in found]


def levels_by_group(data_set: str, folder: Path) -> dict[str, LevelScore]:
    """Evaluate the engine on one data set through the live loop's code."""
    data = find_data_set(data_set, folder, None)
    delpnet = contender("delpnet", classifier="delpnet", blind=False)
    return evaluate(delpnet, data, delpnet.config(data, threads=1)).levels_by_group
