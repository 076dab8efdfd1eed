"""Whole-frame classification: geometry for every size, labels, background."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.card import InputCard, read_card
from rtfocus.engines.registry import FoundEngine, fit_frame
from rtfocus.errors import EngineError
from rtfocus.frame import BACKGROUND, DefocusMap, FrameHeader, TileGrid
from rtfocus.processing.channel_plan import ClassifierPlan
from rtfocus.processing.classify import estimate_frame
from rtfocus.processing.cpu.classifier import FrameClassifier

REFERENCE = ProcessingConfig(backend="onnxruntime", precision="f32")


def open_classifier(folder, shape, *, card=None, quantum=1.0):
    found = FoundEngine(folder, card or read_card(folder))
    fit = fit_frame(found.card.input, shape)
    plan = ClassifierPlan(found, fit, step_um=1.5, quantum=quantum)
    return FrameClassifier(plan, REFERENCE)


@given(
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    origin=st.sampled_from([36.0, 47.5]),
    multiple=st.sampled_from([1, 16, 48]),
)
def test_padded_frame_holds_a_tile_within_half_a_stride_of_every_pixel(
    height, width, origin, multiple
):
    card = InputCard(
        name="tiles", tile_px=96, stride_px=48, origin_px=origin, multiple_px=multiple
    )
    fit = fit_frame(card, (height, width))
    for side, padded in zip((height, width), fit.padded, strict=True):
        assert padded >= side
        assert padded % multiple == 0
        first = origin - 47.5
        tiles = int((padded - first - 96) // 48) + 1
        assert tiles >= 1
        end = first + 96 + (tiles - 1) * 48
        assert side - end <= 24
        # No more than one stride and the multiple are paid for.
        assert padded < max(side, 96) + 48 + multiple


def test_frame_is_classified_tile_by_tile(engine_folder):
    classifier = open_classifier(engine_folder / "sharpness", (200, 300))
    grid = classifier.grid
    assert (grid.rows, grid.columns) == (3, 5)
    rng = np.random.default_rng(0)
    frame = np.full((200, 300), 100, np.float32)
    coarse = np.kron(rng.random((5, 15)), np.ones((40, 20))) * 500
    frame[:, :100] += coarse.astype(np.float32)[:, :100]
    prepared = classifier.prepare(frame)
    found = classifier.see(prepared).defocus
    assert prepared.tiles.shape[:2] == (1, 1)
    assert (found.level[:, :2] >= 0).all()
    assert (found.level[:, 3:] == BACKGROUND).all()
    assert np.isnan(found.defocus_um[:, 3:]).all()
    # Sub-level defocus stays within one level of the label.
    seen = found.level >= 0
    assert (np.abs(found.defocus_um[seen] / 1.5 - found.level[seen]) <= 1).all()
    classifier.close()


def test_result_does_not_depend_on_gain_and_offset(engine_folder):
    rng = np.random.default_rng(3)
    frame = rng.random((240, 240)).astype(np.float32) * 60
    frame = np.round(np.kron(frame[:60, :60], np.ones((4, 4)))).astype(np.float32)
    classifier = open_classifier(engine_folder / "sharpness", frame.shape)
    one = classifier.see(classifier.prepare(frame)).defocus
    other = classifier.see(classifier.prepare(frame * 16 + 800)).defocus
    np.testing.assert_array_equal(one.level, other.level)
    classifier.close()


def test_labels_that_do_not_match_the_network_are_refused(engine_folder):
    folder = engine_folder / "sharpness"
    card = read_card(folder)
    short = card.model_copy(
        update={"output": card.output.model_copy(update={"labels": [0, 1, "bg"]})}
    )
    with pytest.raises(EngineError, match="lists 3 labels"):
        open_classifier(folder, (96, 96), card=short)


def test_unknown_normalisation_names_the_known_ones(engine_folder):
    folder = engine_folder / "sharpness"
    card = read_card(folder)
    strange = card.model_copy(update={"normalisation": {"name": "magic"}})
    with pytest.raises(EngineError, match=r"'magic', known are local_standard"):
        open_classifier(folder, (96, 96), card=strange)


def test_estimate_weights_tiles_by_confidence(engine_folder):
    grid = TileGrid(1, 4, 96, 48, 47.5, signed=False)
    found = DefocusMap(
        grid,
        defocus_um=np.array([[4.0, 8.0, np.nan, 8.0]], np.float32),
        confidence=np.array([[0.9, 0.3, 1.0, 0.3]], np.float32),
        level=np.array([[2, 4, BACKGROUND, 4]], np.int16),
    )
    header = FrameHeader(1, "u", 5, (96, 240), "<u2", 0, 1.0, {"t": 5})
    estimate = estimate_frame(header, found)
    assert estimate.level == 2
    assert estimate.defocus_um == pytest.approx((0.9 * 4 + 0.6 * 8) / 1.5)
    assert estimate.confidence == pytest.approx(0.5)
    assert estimate.foreground == 0.75
