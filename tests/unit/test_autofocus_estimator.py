"""Estimator and belief: what a frame says of focus, and what is made of it."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtfocus.autofocus.belief import (
    Belief,
    Mode,
    modes_of_reading,
    modes_of_weights,
)
from rtfocus.autofocus.estimator import (
    EstimatorSettings,
    look_at,
    read_focus,
    tile_content,
)
from rtfocus.frame import DefocusMap, FocusReading, TileGrid

RULE = EstimatorSettings(unit_um=2.0, range_um=20.0, base_sd=0.2, relative_sd=0.0)
SIDE = 8


def field(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(500, (SIDE * 48 + 48, SIDE * 48 + 48)).astype(np.uint16)


def tiles(
    defocus: np.ndarray, *, signed: bool = True, uncertainty: float = 0.5
) -> DefocusMap:
    shape = defocus.shape
    grid = TileGrid(*shape, tile_px=96, stride_px=48, origin_px=47.5, signed=signed)
    known = np.isfinite(defocus)
    return DefocusMap(
        grid,
        defocus.astype(np.float32),
        np.where(known, 0.9, 0.0).astype(np.float32),
        np.zeros(shape, np.int16),
        np.where(known, uncertainty, np.nan).astype(np.float32),
    )


def flat(value: float) -> np.ndarray:
    return np.full((SIDE, SIDE), value)


@given(
    st.floats(-15, 15),
    st.floats(-6, 6),
    st.floats(-6, 6),
    st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_the_tilt_is_found_and_taken_out(
    middle: float, tilt_x: float, tilt_y: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    places = (np.arange(SIDE) * 48 + 47.5 - 216) / 432
    truth = middle + tilt_x * places[None, :] + tilt_y * places[:, None]
    noisy = truth + rng.normal(0, 0.1, truth.shape)
    # A tenth of the tiles lies anywhere; a robust fit does not mind.
    noisy.ravel()[rng.permutation(truth.size)[:6]] += 4.0
    found = read_focus(tiles(noisy), field(), replace(RULE, range_um=60.0))
    assert found.refusal is None
    assert found.defocus_um == pytest.approx(middle, abs=0.25)
    assert found.tilt_um == pytest.approx((tilt_x, tilt_y), abs=0.8)


def blank() -> DefocusMap:
    return tiles(flat(np.nan))


def few() -> DefocusMap:
    found = flat(np.nan)
    found[3, 3] = found[0, 1] = 2.0
    return tiles(found)


def two_groups() -> DefocusMap:
    found = flat(1.0) + np.random.default_rng(0).normal(0, 0.2, (SIDE, SIDE))
    rows, columns = np.indices(found.shape)
    found[(rows + columns) % 2 == 0] += 9.0
    return tiles(found)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (blank(), "blank"),
        (few(), "few_tiles"),
        (two_groups(), "two_peaks"),
        (tiles(flat(3.0), uncertainty=8.0), "flat"),
        (tiles(flat(19.8)), "edge"),
        (tiles(flat(-19.8)), "edge"),
    ],
)
def test_what_rests_on_too_little_is_refused(found: DefocusMap, reason: str) -> None:
    reading = read_focus(found, field(), RULE)
    assert (reading.refusal, reading.defocus_um) == (reason, None)
    assert reading.detail


def test_saturation_is_refused() -> None:
    pixels = field()
    pixels[:60] = 4095
    rule = replace(RULE, saturation_counts=4095)
    assert read_focus(tiles(flat(1.0)), pixels, rule).refusal == "saturated"
    assert read_focus(tiles(flat(1.0)), field(), rule).refusal is None


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4"])
@pytest.mark.parametrize(
    ("counts", "share"),
    [(99.5, 0.5), (100.0, 0.5), (100.5, 0.0), (1e6, 0.0), (np.inf, 0.0)],
)
def test_the_saturated_share_is_the_same_for_whole_numbers(
    dtype: str, counts: float, share: float
) -> None:
    pixels = np.full((64, 64), 99, dtype)
    pixels[:32] = 100
    rule = replace(RULE, saturation_counts=counts)
    reading = look_at(pixels, rule)
    assert reading.saturated == share
    assert msgspec.json.encode(reading)


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4"])
def test_what_an_image_shows_by_itself_goes_over_the_wire(dtype: str) -> None:
    rule = replace(RULE, saturation_counts=200.0)
    seen = look_at(np.minimum(field(), 255).astype(dtype), rule)
    assert (
        msgspec.msgpack.decode(msgspec.msgpack.encode(seen), type=FocusReading) == seen
    )


def test_a_region_is_all_that_counts() -> None:
    found = flat(8.0)
    found[:4, :4] = 1.0
    rule = replace(RULE, region=(0, 0, 210, 210))
    reading = read_focus(tiles(found), field(), rule)
    assert reading.defocus_um == pytest.approx(1.0, abs=0.05)
    assert reading.tiles == 16


def test_one_tile_is_enough_where_the_region_has_no_more() -> None:
    rule = replace(RULE, region=(0, 0, 60, 60))
    reading = read_focus(tiles(flat(3.0)), field(), rule)
    assert (reading.refusal, reading.tiles) == (None, 1)
    assert reading.defocus_um == pytest.approx(3.0)


@pytest.mark.parametrize(("signed", "value"), [(True, 6.0), (True, -6.0), (False, 1.0)])
def test_a_reading_is_as_unsure_as_its_engine_and_its_tiles(
    *, signed: bool, value: float
) -> None:
    rule = replace(RULE, relative_sd=0.1, range_um=60.0)
    alike = read_focus(tiles(flat(value), signed=signed), field(), rule)
    of_engine = 0.2 * 2.0 + 0.1 * abs(value)
    assert alike.sd_um == pytest.approx(of_engine)
    rng = np.random.default_rng(2)
    apart = flat(value) + rng.normal(0, 0.4, (SIDE, SIDE))
    for base_sd, most in ((0.2, of_engine), (0.0, 0.1 * abs(value))):
        read = read_focus(
            tiles(apart, signed=signed), field(), replace(rule, base_sd=base_sd)
        )
        # Of 64 tiles that err each for itself the median errs an eighth as much.
        wanted = np.hypot(most * read.defocus_um / value, 0.4 / SIDE)
        assert read.sd_um == pytest.approx(wanted, rel=0.06)


def test_tiles_count_by_their_content() -> None:
    pixels = np.full((432, 432), 500.0)
    pixels[:, :250] += np.random.default_rng(0).normal(0, 300, (432, 250))
    found = flat(6.0) + np.random.default_rng(1).normal(0, 0.3, (SIDE, SIDE))
    found[:, :4] = 2.0
    reading = read_focus(tiles(found, signed=False), pixels, replace(RULE, unit_um=9.0))
    assert reading.defocus_um == pytest.approx(2.0, abs=0.5)


def test_a_distance_has_two_sides_and_the_prior_settles_them() -> None:
    reading = FocusReading(6.0, 1.0, signed=False)
    modes = modes_of_reading(reading, 10.0, direction=1, trust_sign=True)
    assert sorted(mode.mean_um for mode in modes) == [4.0, 16.0]
    belief = Belief.of([Mode(1.0, 15.0, 2.0)]).seen(modes)
    assert belief.best.mean_um == pytest.approx(15.8, abs=0.2)
    others = [mode for mode in belief.modes if abs(mode.mean_um - 15.8) > 3.0]
    assert sum(mode.weight for mode in others) < 0.1


def test_a_reading_that_may_be_in_focus_has_one_mode_and_none_without_a_number() -> (
    None
):
    (mode,) = modes_of_reading(
        FocusReading(0.9, 2.0, signed=False), 10.0, direction=1, trust_sign=True
    )
    assert (mode.weight, mode.mean_um) == (1.0, 10.0)
    assert mode.sd_um == pytest.approx(np.hypot(2.0, 0.9))
    beside = FocusReading(1.1, 2.0, signed=False)
    modes = modes_of_reading(beside, 10.0, direction=1, trust_sign=True)
    assert [(mode.weight, mode.sd_um) for mode in modes] == [(0.5, 2.0)] * 2
    for unknown in ((None, 1.0), (1.0, None)):
        reading = FocusReading(*unknown, signed=False)
        assert modes_of_reading(reading, 10.0, direction=1, trust_sign=True) == []


@pytest.mark.parametrize(("direction", "focus"), [(1, 13.0), (-1, 7.0)])
def test_a_trusted_sign_is_one_gaussian(direction: int, focus: float) -> None:
    reading = FocusReading(3.0, 0.5, signed=True)
    (mode,) = modes_of_reading(reading, 10.0, direction=direction, trust_sign=True)
    assert mode.mean_um == focus
    assert len(modes_of_reading(reading, 10.0, direction=0, trust_sign=True)) == 2


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1), st.floats(-500, 500), st.floats(0.01, 50)),
        min_size=1,
        max_size=12,
    ),
    st.floats(-500, 500),
    st.floats(0.01, 20),
)
@settings(max_examples=150, deadline=None)
def test_beliefs_stay_probabilities(
    given_modes: list[tuple[float, float, float]], seen: float, sd: float
) -> None:
    belief = Belief.of(Mode(*one) for one in given_modes)
    for after in (belief, belief.seen([Mode(1.0, seen, sd)])):
        assert sum(mode.weight for mode in after.modes) == pytest.approx(1.0)
        assert len(after.modes) <= 6
        assert all(np.isfinite(mode.mean_um) and mode.sd_um > 0 for mode in after.modes)
        weights = [mode.weight for mode in after.modes]
        assert weights == sorted(weights, reverse=True)


def test_agreeing_observations_narrow_and_an_outlier_does_not_win() -> None:
    belief = Belief.of([Mode(1.0, 0.0, 1.0)]).seen([Mode(1.0, 0.2, 1.0)])
    assert belief.best.sd_um < 0.8
    assert abs(belief.seen([Mode(1.0, 80.0, 0.5)]).best.mean_um) < 1.0


def test_peaks_of_candidates_become_modes() -> None:
    z = np.arange(-10, 10.05, 0.1)
    weights = np.exp(-0.5 * ((z - 3) / 0.4) ** 2)
    weights += 0.3 * np.exp(-0.5 * ((z + 5) / 0.4) ** 2)
    first, second = modes_of_weights(z, weights / weights.sum())
    assert first.mean_um == pytest.approx(3, abs=0.01)
    assert first.sd_um == pytest.approx(0.4, abs=0.05)
    assert second.mean_um == pytest.approx(-5, abs=0.01)
    assert first.weight / second.weight == pytest.approx(1 / 0.3, rel=0.05)


@pytest.mark.parametrize(
    ("tile_px", "stride_px", "origin_px"),
    [(96, 48.0, 36.0), (96, 48.0, 47.5), (85, 31.5, 20.2), (224, 224.0, 111.5)],
)
@pytest.mark.parametrize("kind", ["grey", "colour", "signal"])
def test_content_is_the_deviation_of_every_second_pixel(
    tile_px: int, stride_px: float, origin_px: float, kind: str
) -> None:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 60_000, (301, 402)).astype(np.uint16)
    if kind == "colour":
        pixels = (
            np.stack([pixels, pixels.T[:301, :1] + pixels, pixels], 2) >> 8
        ).astype(np.uint8)
    elif kind == "signal":
        pixels = pixels.astype(np.float32) / 65535
    # One row and one column more than the frame holds whole.
    rows, columns = (int((side - tile_px) // stride_px) + 2 for side in (301, 402))
    grid = TileGrid(rows, columns, tile_px, stride_px, origin_px, signed=True)
    grey = pixels.mean(axis=2) if kind == "colour" else pixels.astype(float)
    half = int(tile_px / 2)
    expected = np.zeros((rows, columns))
    for place in np.ndindex(rows, columns):
        y, x = (int(origin_px + stride_px * number) for number in place)
        tile = grey[max(y - half, 0) : y + half : 2, max(x - half, 0) : x + half : 2]
        expected[place] = tile.std() if tile.size else 0.0
    found = tile_content(pixels, grid, (rows, columns))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
