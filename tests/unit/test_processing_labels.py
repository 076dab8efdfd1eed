"""Labels: level, sub-level defocus and uncertainty from logits, by hand."""

import numpy as np
import pytest

from rtfocus.engines.card import OutputCard
from rtfocus.frame import BACKGROUND
from rtfocus.processing.classify import LabelDecoder

LABELS = [-2, -1, 0, 1, 2, "bg"]


def decode(probability):
    logits = np.log(np.maximum(np.array(probability, np.float32), 1e-20))
    return LabelDecoder(OutputCard(name="l", labels=LABELS)).decode(
        logits[:, None, None]
    )


def test_defocus_is_the_mean_over_the_level_and_its_neighbours():
    found = decode([0.1, 0.0, 0.0, 0.3, 0.6, 0.0])
    assert found.level[0, 0] == 2
    assert found.confidence[0, 0] == pytest.approx(0.6)
    # -2 is far from the chosen level and does not count here ...
    defocus = (0.3 * 1 + 0.6 * 2) / 0.9
    assert found.defocus[0, 0] == pytest.approx(defocus)
    # ... but makes it uncertain.
    variance = (
        0.1 * (-2 - defocus) ** 2 + 0.3 * (1 - defocus) ** 2 + 0.6 * (2 - defocus) ** 2
    )
    assert found.uncertainty[0, 0] == pytest.approx(np.sqrt(variance), rel=1e-5)


def test_background_is_no_level_and_adds_no_uncertainty():
    found = decode([0.0, 0.0, 0.0, 0.25, 0.15, 0.6])
    assert found.level[0, 0] == BACKGROUND
    found = decode([0.0, 0.0, 0.6, 0.0, 0.0, 0.4])
    assert found.level[0, 0] == 0
    assert found.uncertainty[0, 0] == pytest.approx(0, abs=1e-6)


def test_negative_levels_come_back_negative():
    found = decode([0.5, 0.5 - 1e-4, 0.0, 0.0, 0.0, 1e-4])
    assert found.level[0, 0] == -2
    assert found.defocus[0, 0] == pytest.approx(-1.5, abs=1e-3)


def test_levels_that_share_their_probability_outvote_focus():
    found = decode([0.0, 0.0, 0.4, 0.25, 0.3, 0.05])
    assert found.level[0, 0] == 2
    assert found.confidence[0, 0] == pytest.approx(0.3)


def test_focus_and_background_together_outvote_a_level():
    found = decode([0.0, 0.0, 0.3, 0.4, 0.0, 0.3 + 1e-3])
    assert found.level[0, 0] == BACKGROUND
