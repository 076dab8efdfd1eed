"""The fit of the error that is stated beside a restored frame."""

import numpy as np
import pytest

from bench.evidence import Restored
from bench.expected_error import blocks_of, fitted, left_out, squared, worth
from rtfocus.engines.fitted import Evidence, EvidenceCard
from rtfocus.optics.normalisation import PercentileRange

MEASURES = 25
SHARE = 0.25


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    """Return what applies a quarter of every correction."""
    layer = {"weights": [[0.0] * MEASURES], "bias": [np.log(SHARE / (1 - SHARE))]}
    card = {"middle": [0.0] * MEASURES, "spread": [1.0] * MEASURES, "layers": [layer]}
    return Evidence(EvidenceCard.model_validate(card), PercentileRange(), 2.2)


def framed(kind: str, rng: np.random.Generator, *, in_focus: bool = False) -> Restored:
    """Return a frame whose error follows from its first measure, exactly."""
    measured = rng.normal(0, 1, (MEASURES, 9, 8)).astype(np.float32)
    before = np.exp(measured[0] - 4) * (1024 / 7.5) * (not in_focus)
    nothing = np.zeros_like(before)
    tiles = np.zeros((3, 0))
    return Restored(kind, in_focus, before, nothing, nothing, measured, 7.5, tiles)


def test_what_is_left_is_what_the_share_applied_leaves(evidence: Evidence) -> None:
    rng = np.random.default_rng(1)
    before, common, correction = rng.uniform(0.5, 1, (3, 9, 8)).astype(np.float32)
    measured = np.zeros((MEASURES, 9, 8), np.float32)
    one = Restored("a", False, before, common, correction, measured, 2.0, measured)
    blocks = blocks_of([one, one], evidence)
    left = before - 2 * SHARE * common + SHARE**2 * correction
    wanted = (2.0 / 1024 * np.maximum(left, 0))[:-1, :-1]
    np.testing.assert_allclose(blocks.error[:56], wanted.ravel(), rtol=1e-5)
    assert blocks.frame.tolist() == [0] * 56 + [1] * 56
    assert blocks.measured.shape == (112, MEASURES + 2)
    np.testing.assert_allclose(blocks.measured[:, MEASURES], SHARE, rtol=1e-6)
    power = SHARE**2 * 2.0 / 1024 * correction[:-1, :-1].ravel()
    applied = np.log(power + 1e-7) / 4
    np.testing.assert_allclose(blocks.measured[:56, -1], applied, rtol=1e-5)


def test_the_fit_finds_the_error_of_kinds_in_it_and_left_out(
    evidence: Evidence,
) -> None:
    rng = np.random.default_rng(2)
    frames = [framed(f"kind {number % 8}", rng) for number in range(64)]
    frames += [framed("kind 0", rng, in_focus=True)]
    blocks = blocks_of(frames, evidence)
    kinds = np.array([one.kind for one in frames])
    everything = np.array([not one.in_focus for one in frames])
    inside = everything[blocks.frame]
    fit = fitted(blocks, kinds, everything, 150)
    for stated in (
        squared(fit, blocks.measured),
        left_out(blocks, kinds, 150),
    ):
        ratio = np.sqrt(stated[inside] / blocks.error[inside])
        assert np.median(np.abs(np.log(ratio))) < 0.2
    assert "'rank': 0.9" in worth(blocks, frames, stated)
    assert len(fit.card()["middle"]) == MEASURES + 2
