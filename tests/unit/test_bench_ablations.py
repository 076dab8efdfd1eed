"""Ablations: the shares of the paper's tables against values counted by hand."""

import numpy as np
import pytest

from bench.ablations import accuracy, within_one
from rtfocus.training.level_tiles import BACKGROUND

TRUE = np.array([0, 0, 1, 2, 9, 10, BACKGROUND, BACKGROUND])
FOUND = np.array([0, 2, 2, 2, 9, BACKGROUND, BACKGROUND, 1])


def test_accuracy_counts_background_as_a_label() -> None:
    assert accuracy(TRUE, FOUND) == pytest.approx(4 / 8)


def test_a_specimen_called_background_is_no_near_miss() -> None:
    """Background follows level 10 in the labels, but is not the next level."""
    assert within_one(TRUE, FOUND) == pytest.approx(4 / 6)
