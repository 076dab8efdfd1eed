"""Labels: level, sub-level defocus and uncertainty from logits, by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.engines.card import OutputCard, parse_card, read_card
from rtfocus.engines.fitted import DeviationCard, stated_um
from rtfocus.errors import EngineError
from rtfocus.files import resource_folder
from rtfocus.frame import BACKGROUND, DefocusMap, FrameHeader, TileGrid
from rtfocus.processing.classify import LabelDecoder, estimate_frame

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


FIT = DeviationCard(spread=0.5, floor=0.2, distance=0.01)


def told(levels: list[float], spread: list[float], step_um: float) -> DefocusMap:
    """Return tiles of an engine whose levels are `step_um` apart."""
    count = len(levels)
    return DefocusMap(
        TileGrid(1, count, 96, 48.0, 47.5, signed=True),
        np.array([levels], np.float32) * np.float32(step_um),
        np.ones((1, count), np.float32),
        np.zeros((1, count), np.int16),
        np.array([spread], np.float32) * np.float32(step_um),
    )


def frame_level(*tiles):
    decoder = LabelDecoder(OutputCard(name="l", labels=LABELS))
    logits = np.log(np.maximum(np.array(tiles, np.float32).T, 1e-20))
    return decoder.level_of_frame(logits[:, None])


def test_a_frame_has_the_mean_distance_of_its_tiles_on_the_side_they_lean_to():
    near, far = [0.0, 0.0, 0.5, 0.5, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0, 0.8, 0.0]
    assert frame_level(near, far) == pytest.approx((0.5 + 2) / 2)
    mirrored = [[*tile[-2::-1], tile[-1]] for tile in (near, far)]
    assert frame_level(*mirrored) == pytest.approx(-(0.5 + 2) / 2)


def test_a_frame_of_open_direction_has_its_distance_still():
    assert frame_level([0.5, 0.0, 0.0, 0.0, 0.5, 0.0]) == pytest.approx(2)


def test_tiles_likelier_background_have_no_say_in_the_level_of_a_frame():
    empty = [0.4, 0.0, 0.0, 0.0, 0.0, 0.6]
    assert frame_level(empty, [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]) == pytest.approx(1)
    assert np.isnan(frame_level(empty, empty))


@pytest.mark.parametrize("step_um", [1.0, 2.5])
def test_what_is_stated_is_the_spread_beyond_a_place_between_levels(step_um):
    found = told([2.0, 2.5, -2.5, -10.0, np.nan], [1.0, 1.0, 0.5, 0.0, np.nan], step_um)
    variance = [
        0.5 * 1.0 + 0.2 + 0.01 * 4,
        0.5 * 0.75 + 0.2 + 0.01 * 6.25,
        0.2 + 0.01 * 6.25,  # as wide as two equal neighbours are: known to the point
        0.2 + 0.01 * 100,
        np.nan,
    ]
    stated = stated_um(found, FIT, step_um)
    np.testing.assert_allclose(stated[0], np.sqrt(variance) * step_um, rtol=1e-5)
    assert stated.dtype == np.float32


def test_without_a_fit_the_spread_is_stated_and_without_a_spread_nothing():
    found = told([2.0], [1.0], 2.0)
    assert stated_um(found, None, 2.0) is found.uncertainty_um
    assert stated_um(replace(found, uncertainty_um=None), FIT, 2.0) is None


def test_the_card_of_rtfocus_2_says_more_where_nobody_told_the_optics():
    fits = read_card(resource_folder("engines") / "rtfocus-2").deviation
    found = told([0.0, 5.0], [0.6, 1.5], 1.0)
    assert (
        stated_um(found, fits["blind"], 1.0) > stated_um(found, fits["told"], 1.0)
    ).all()


def test_a_deviation_below_nothing_is_refused():
    folder = resource_folder("engines") / "rtfocus-2"
    said = read_card(folder).model_dump()
    said["deviation"]["told"]["floor"] = -0.1
    with pytest.raises(EngineError, match=r"deviation.told.floor"):
        parse_card(said, "here")


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("input", "origin_px", 1e9, r"origin_px': .*1000000 \(got 1000000000.0\)"),
        ("input", "origin_px", 1e30, r"origin_px': no more than .* \(got 1e\+30\)"),
        ("input", "origin_px", float("nan"), r"origin_px': .* \(got nan\)"),
        ("input", "stride_px", 1e30, r"stride_px': .* \(got 1e\+30\)"),
        ("levels", "step_um", 1e9, r"step_um': .*100000 \(got 1000000000.0\)"),
        ("levels", "count", "many", r"count': .*integer.* \(got 'many'\)"),
    ],
)
def test_numbers_that_no_engine_has_are_refused_with_the_value(
    section, key, value, said
):
    card = read_card(resource_folder("engines") / "delpnet").model_dump()
    card[section][key] = value
    with pytest.raises(EngineError, match=said):
        parse_card(card, "here")


@given(
    levels=st.lists(
        st.sampled_from([BACKGROUND, -3, -1, 0, 2]), min_size=1, max_size=8
    ),
    share=st.floats(0.01, 1),
    data=st.data(),
)
def test_a_frame_is_what_its_tiles_are_in_whatever_order(levels, share, data):
    weights = {-3: 1.0, -1: 0.3, 0: 0.45, 2: 0.7, BACKGROUND: 0.9}
    order = data.draw(st.permutations(levels))
    grid = TileGrid(1, len(levels), 96, 48.0, 47.5, signed=True)
    level = np.array([order], np.int16)
    defocus_um = np.where(level == BACKGROUND, np.nan, 1.5 * level).astype(np.float32)
    confidence = np.vectorize(weights.get)(level) * share
    header = FrameHeader(1, "u", 5, (96, 240), "<u2", 0, 1.0, {"t": 5})
    found = estimate_frame(header, DefocusMap(grid, defocus_um, confidence, level))
    seen = [one for one in levels if one != BACKGROUND]
    assert found.foreground == pytest.approx(len(seen) / len(levels))
    if not seen:
        assert found.level is found.defocus_um is None
        return
    total = {one: seen.count(one) * weights[one] for one in seen}
    assert total[found.level] == pytest.approx(max(total.values()))
    mean = sum(one * total[one] for one in total) / sum(total.values())
    assert found.defocus_um == pytest.approx(1.5 * mean, abs=1e-5)
    assert found.confidence == pytest.approx(share * sum(total.values()) / len(seen))
