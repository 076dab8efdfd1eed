"""Safety: whatever images and stage say, no limit is ever passed."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymmcore_plus import CMMCorePlus

from rtfocus.autofocus.execution import run_search
from rtfocus.autofocus.focuser import Focuser
from rtfocus.autofocus.planes import FocusCalibration, PlaneComparison
from rtfocus.autofocus.policy import (
    GiveUp,
    Limits,
    Move,
    MoveRule,
    Probe,
    SearchRule,
    Stay,
    direction_of,
    is_calibrated,
    limits_at,
    move_rule,
    path_of,
    save_calibration,
    search_rule,
    with_measured_backlash,
)
from rtfocus.autofocus.search import FocusSearch
from rtfocus.channel import OpticalSystem
from rtfocus.config.model import AutofocusConfig
from rtfocus.errors import ConfigError
from rtfocus.frame import FocusReading

OPTICS = OpticalSystem(0.5, 520.0, 0.5, psf_model="born_wolf")
UNIT = OPTICS.defocus_unit_um
places = st.floats(-1e4, 1e4, allow_nan=False)
anything = st.floats(allow_nan=True, allow_infinity=True)


@pytest.fixture(scope="module")
def comparison() -> PlaneComparison:
    return PlaneComparison(OPTICS)


@st.composite
def rules(draw: st.DrawFn) -> MoveRule:
    low = draw(places)
    return MoveRule(
        Limits(low, low + draw(st.floats(0, 1e3))),
        deadband_um=draw(st.floats(0, 5)),
        most_um=draw(st.floats(0.01, 500)),
        approach=draw(st.sampled_from([-1, 0, 1])),
        overshoot_um=draw(st.floats(0, 50)),
    )


@given(rules(), st.floats(0, 1), anything)
@settings(max_examples=200, deadline=None)
def test_every_stop_of_every_move_is_allowed(
    rule: MoveRule, share: float, wanted: float
) -> None:
    low, high = rule.limits.low_um, rule.limits.high_um
    here = rule.limits.clip(low + share * (high - low))
    target = rule.target(here, wanted)
    if target is None:
        return
    assert abs(target - here) <= rule.most_um * (1 + 1e-9) + 1e-9
    assert all(rule.limits.holds(stop) for stop in rule.path(here, target))


@given(rules(), anything, anything)
@settings(max_examples=150, deadline=None)
def test_paths_end_at_the_target_from_the_chosen_side(
    rule: MoveRule, here: float, wanted: float
) -> None:
    if not rule.limits.holds(here) or not math.isfinite(wanted):
        assert rule.target(here, wanted) is None
        return
    path = rule.path(here, wanted)
    assert path[-1] == rule.limits.clip(wanted)
    if rule.approach and len(path) == 2:
        assert (path[1] - path[0]) * rule.approach > 0


@pytest.mark.parametrize(
    ("low", "high"), [(math.nan, 1.0), (0.0, math.inf), (2.0, 1.0)]
)
def test_limits_that_limit_nothing_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="limits"):
        Limits(low, high)


def test_limits_hold_their_own_ends_and_nothing_beyond() -> None:
    limits = Limits(0, 10)
    assert limits.holds(0)
    assert limits.holds(10)
    for beyond in (-1e-9, 10 + 1e-9, math.nan, math.inf, -math.inf):
        assert not limits.holds(beyond)
    assert Limits(5, 5).holds(5)  # a plan's z that is the last allowed one


def test_a_deadband_and_a_step_are_kept() -> None:
    rule = MoveRule(Limits(0, 100), deadband_um=0.5, most_um=10)
    assert rule.target(50, 50.4) is None
    assert rule.target(50, 80) == 60
    assert rule.target(95, 120) == 100


def test_the_wrong_side_is_overshot_within_the_limits() -> None:
    rule = MoveRule(Limits(0, 100), 0.1, 50, approach=1, overshoot_um=3)
    assert rule.path(50, 60) == (60,)
    assert rule.path(50, 50.5) == (50.5,)
    assert rule.path(50, 50) == (50,)
    assert rule.path(50, 40) == (37, 40)
    assert rule.path(50, 1) == (0, 1)
    assert MoveRule(Limits(0, 9), 0.1, 50, 1, 0.5).path(8, 4) == (3.5, 4)
    assert MoveRule(Limits(0, 9), 0.1, 50, -1, 0.5).path(4, 8) == (8.5, 8)
    assert MoveRule(Limits(0, 9), 0.1, 50, approach=1).path(8, 4) == (4,)


def test_a_search_begins_anew_from_the_chosen_side_within_the_limits() -> None:
    rule = MoveRule(Limits(0, 10), 0.1, 5, approach=1, overshoot_um=2)
    assert rule.settling(6) == (2, 6)
    assert rule.settling(1) == (0, 1)
    assert rule.settling(0) == rule.settling(11) == ()
    assert MoveRule(Limits(0, 10), 0.1, 5, overshoot_um=2).settling(4) == ()


def test_a_run_may_go_as_far_as_both_its_reach_and_its_limits_allow() -> None:
    for limits, start, low, high in (
        ({}, 100, 70, 130),
        ({"low_um": 90, "high_um": 1000}, 100, 90, 130),
        ({"low_um": 0, "high_um": 110}, 100, 70, 110),
        ({"low_um": 100}, 100, 100, 130),
        ({"high_um": 100}, 100, 70, 100),
    ):
        config = AutofocusConfig(reach_um=30, **limits)
        assert limits_at(config, start) == Limits(low, high)
    for start in (-0.1, 10.1):
        with pytest.raises(ConfigError, match=r"outside of autofocus\.low_um 0 to"):
            limits_at(AutofocusConfig(low_um=0, high_um=10), start)


def test_a_correction_leads_beyond_no_limit_and_a_plan_where_it_wants() -> None:
    config = AutofocusConfig(low_um=-5, high_um=20, reach_um=10)
    focuser = Focuser(CMMCorePlus(), config, {}, lambda *_: FocusReading(None, None))
    for planned, correction, sent in (
        *((0, 3, 3), (0, 100, 10), (0, -100, -5)),
        *((15, 8, 20), (15, -8, 7), (15, -100, 5)),
        # The plan itself is beyond: a correction may only bring it back.
        *((30, 5, 30), (30, -5, 25), (30, -100, 20)),
        *((-9, -3, -9), (-9, 3, -6), (-9, 100, 1)),
    ):
        assert focuser.corrected(planned, correction) == sent
    focuser.config = AutofocusConfig(reach_um=10)
    assert focuser.corrected(1000, 11) == 1010
    assert focuser.corrected(1000, -11) == 990


def test_a_search_goes_first_where_the_objective_touches_nothing() -> None:
    for side, direction, safe in (
        *(("auto", 1, -1), ("auto", -1, 1), ("auto", 0, -1)),
        *(("up", 1, 1), ("down", -1, -1)),
    ):
        for trusted in (False, True):
            config = AutofocusConfig(safe_side=side, most_images=7)
            rule = search_rule(config, direction, trusted=trusted)
            assert (rule.safe_side, rule.most_images) == (safe, 7)
            assert (rule.trust_sign, rule.verify) == (trusted, not trusted)
    for said, of_core, direction in (
        *(("auto", -1, -1), ("auto", 0, 0), ("toward", -1, 1)),
        *(("away", 1, -1), ("unknown", 1, 0)),
    ):
        assert direction_of(AutofocusConfig(direction=said), of_core) == direction


def test_play_is_passed_unless_somebody_says_that_there_is_none() -> None:
    limits, unit_um = Limits(0, 9), 2.0
    for said, approach, overshoot_um in (
        ({}, 1, 2.0),
        ({"approach": "down"}, -1, 2.0),
        ({"backlash_um": 0}, 0, 0.0),
        ({"approach": "down", "backlash_um": 0.5}, -1, 0.5),
    ):
        config = AutofocusConfig(deadband=0.2, most_um=7, **said)
        wanted = MoveRule(limits, 0.4, 7, approach, overshoot_um)
        assert move_rule(config, limits, unit_um) == wanted


def test_measured_play_is_believed_of_a_calibration_that_can_be_trusted(
    tmp_path: Path,
) -> None:
    path = tmp_path / "calibration.yaml"
    for said, backlash_um, problems, approach, overshoot_um in (
        ({}, -2.0, [], "up", 3.0),
        ({"approach": "down"}, 2.0, [], "down", 3.0),
        ({"backlash_um": 0.5}, 2.0, [], "either", 0.5),
        ({}, 2.0, ["it says otherwise"], "either", 0.0),
        ({}, 0.3, [], "either", 0.0),  # less than is measured for certain
    ):
        found = FocusCalibration(
            channel="DAPI",
            focus_um=0.0,
            sharpest_um=0.0,
            unexplained=0.0,
            direction=1,
            direction_of_core=1,
            backlash_um=backlash_um,
            level_offset_um=0.0,
            level_scale=1.0,
            level_range_um=10.0,
            unit_um=2.0,
            problems=problems,
        )
        save_calibration(path, found)
        config = with_measured_backlash(AutofocusConfig(calibration=path, **said))
        assert (config.approach, config.backlash_um) == (approach, overshoot_um)
        assert is_calibrated(config) == (not problems)
    assert not is_calibrated(AutofocusConfig())


class HostileStage:
    """Says and does what it likes; remembers what it was asked for."""

    def __init__(self, rng: random.Random, start: float) -> None:
        self._rng, self._said = rng, start
        self._mood = rng.choice(["true", "stuck", "reversed", "random", "lost", "far"])
        self._start = start
        self.commands: list[float] = []

    def position_um(self) -> float:
        return self._said

    def go_to(self, z_um: float) -> None:
        self.commands.append(z_um)
        said = {
            "true": z_um,
            "stuck": self._start,
            "reversed": 2 * self._start - z_um,
            "random": self._rng.uniform(-1e3, 1e3),
            "lost": self._rng.choice([math.nan, math.inf, z_um]),
            "far": z_um + self._rng.gauss(0, 50),
        }
        self._said = said[self._mood]


def hostile_reading(rng: random.Random) -> FocusReading:
    kind = rng.random()
    if kind < 0.2:
        words = ["blank", "few_tiles", "saturated", "flat", "two_peaks", "edge"]
        return FocusReading(None, None, True, rng.choice(words), "says the test")
    away = rng.choice([rng.gauss(0, 10), rng.uniform(-1e6, 1e6), 0.0])
    return FocusReading(away, rng.choice([1e-9, 0.1, 1.0, 100.0]), rng.random() < 0.5)


def test_ten_thousand_hostile_histories_pass_no_limit(
    comparison: PlaneComparison,
) -> None:
    for number in range(10_000):
        rng = random.Random(number)
        low = rng.uniform(-100, 100)
        limits = Limits(low, low + rng.uniform(0, 200))
        start = rng.uniform(limits.low_um - 5, limits.high_um + 5)
        stage = HostileStage(rng, start)
        search = FocusSearch(
            comparison,
            MoveRule(
                limits,
                deadband_um=rng.uniform(0, 2),
                most_um=rng.uniform(0.1, 300),
                approach=rng.choice([-1, 0, 1]),
                overshoot_um=rng.uniform(0, 20),
            ),
            SearchRule(
                most_images=rng.randint(1, 12),
                safe_side=rng.choice([-1, 1]),
                trust_sign=rng.random() < 0.5,
            ),
            direction=rng.choice([-1, 0, 1]),
        )
        verdict = run_search(search, stage, lambda _, rng=rng: hostile_reading(rng))
        assert all(limits.holds(z) for z in stage.commands), number
        assert verdict.images <= search.rule.most_images, number
        if not limits.holds(start):
            assert not stage.commands, number
            assert not verdict.focused, number


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_hostile_spectra_pass_no_limit_either(
    comparison: PlaneComparison, data: st.DataObject
) -> None:
    limits = Limits(-20, 20)
    stage = HostileStage(random.Random(data.draw(st.integers(0, 99))), 0.0)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))

    def look(_: float) -> FocusReading:
        spectrum = np.abs(rng.normal(size=48)) * 10.0 ** rng.uniform(-9, 9)
        return FocusReading(3.0, 1.0, False, spectrum=spectrum.tolist(), noise=0.1)

    search = FocusSearch(comparison, MoveRule(limits, 0.1, 100))
    run_search(search, stage, look)
    assert all(limits.holds(z) for z in stage.commands)


def test_a_timeout_ends_a_search_that_does_not_progress(
    comparison: PlaneComparison,
) -> None:
    now = iter(range(0, 10_000, 30))
    stage = HostileStage(random.Random(0), 0.0)
    search = FocusSearch(
        comparison,
        MoveRule(Limits(-50, 50), 0.1, 5),
        SearchRule(most_images=50, patience=50),
    )
    verdict = run_search(
        search,
        stage,
        lambda _: FocusReading(40.0, 1.0, False),
        timeout_s=60,
        clock=lambda: float(next(now)),
    )
    assert not verdict.focused
    assert verdict.images < 20


def test_decisions_become_paths() -> None:
    rule = MoveRule(Limits(0, 10), 0.1, 5)
    assert path_of(Stay(), 5, rule) == ()
    assert path_of(Move(2), 5, rule) == (7,)
    assert path_of(Probe(-9), 5, rule) == (0,)
    assert path_of(GiveUp("said", 1.0), 5, rule) == (6,)
    assert path_of(Move(2), math.nan, rule) == ()
