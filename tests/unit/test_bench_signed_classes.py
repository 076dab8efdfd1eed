"""Class score: against values counted by hand."""

import numpy as np
import pytest

from bench.signed_classes import ClassScore, probabilities

LABELS = (-1, 0, 1)


@pytest.fixture
def score() -> ClassScore:
    """Five patches: two of -1 (one taken for 1), one of 0, two of 1 (one for 0)."""
    made = ClassScore(LABELS)
    made.add(
        np.array([0, 0, 1, 2, 2]),
        np.array(
            [
                [0.95, 0.05, 0.0],
                [0.1, 0.15, 0.75],
                [0.1, 0.85, 0.05],
                [0.0, 0.05, 0.95],
                [0.2, 0.55, 0.25],
            ]
        ),
    )
    return made


def test_confusion_counts_true_by_found(score):
    np.testing.assert_array_equal(score.confusion, [[1, 0, 1], [0, 1, 0], [0, 1, 1]])


def test_shares_are_those_counted_by_hand(score):
    assert score.accuracy == pytest.approx(3 / 5)
    assert score.precision == pytest.approx([1, 1 / 2, 1 / 2])
    assert score.recall == pytest.approx([1 / 2, 1, 1 / 2])
    # Off focus and called off focus: three patches, one on the wrong side.
    assert score.sign_right == pytest.approx(2 / 3)


def test_calibration_error_is_the_mean_gap_over_bins(score):
    """Bins of a tenth: 0.95 twice (right), 0.85 (right), 0.75 and 0.55 (wrong)."""
    gaps = (2 - 1.9) + (1 - 0.85) + 0.75 + 0.55
    assert score.calibration_error == pytest.approx(gaps / 5)


def test_the_summary_is_plain_numbers(score):
    summary = score.summary()
    assert summary["patches"] == 5
    assert summary["f1"] == pytest.approx([2 / 3, 2 / 3, 1 / 2], abs=1e-4)


def test_probabilities_are_the_papers_softmax():
    logits = np.array([[1.0, 2.0, 900.0], [0.0, 0.0, 0.0]])
    found = probabilities(logits)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[1], 1 / 3)
    assert found[0, 2] == pytest.approx(1)
