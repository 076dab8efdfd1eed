"""Metrics: percentiles in constant memory and the loss identity."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.metrics import (
    Accounting,
    Histogram,
    Outcome,
    accounting_in_words,
    plan_in_words,
)


def test_percentiles_agree_with_numpy_to_two_percent() -> None:
    values = np.random.default_rng(3).lognormal(2.0, 1.0, 20_000)
    histogram = Histogram()
    for value in values:
        histogram.add(float(value))
    for percent in (1, 50, 95, 99):
        expected = np.percentile(values, percent)
        assert histogram.percentile(percent) == pytest.approx(expected, rel=0.02)
        if percent > 1:
            assert histogram.summary()[f"p{percent}_ms"] == histogram.percentile(
                percent
            )
    assert histogram.summary()["max_ms"] == values.max()
    assert histogram.summary()["mean_ms"] == pytest.approx(values.mean())


@given(st.lists(st.floats(0.0, 1e7), min_size=1, max_size=30))
def test_percentiles_ascend_and_stay_below_the_largest_value(values: list[float]):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    found = [histogram.percentile(percent) for percent in (1, 50, 95, 99, 100)]
    assert found == sorted(found)
    assert found[-1] <= histogram.max_ms == max(values)
    assert histogram.count == len(values)


@given(st.lists(st.sampled_from(["written", "focus", "dropped", "in_error"])))
def test_every_frame_that_is_counted_once_is_accounted_for(terms: list[str]):
    accounting = Accounting()
    accounting.set_acquired(len(terms) + 1)
    for term in terms:
        accounting.count(term, "gap" if term in ("dropped", "in_error") else None)
    assert accounting.unaccounted == 1


def test_an_empty_histogram_says_none_not_zero() -> None:
    assert Histogram().percentile(50) is None
    assert Histogram().summary()["mean_ms"] is None


def test_the_loss_identity_shows_what_nobody_counted() -> None:
    accounting = Accounting()
    accounting.set_acquired(10)
    accounting.count("written", number=5)
    accounting.count("focus")
    accounting.count("dropped", "gap", 2)
    accounting.count("in_error", "write")
    assert accounting.unaccounted == 1
    accounting.count("in_error", "process")
    assert accounting.unaccounted == 0
    assert accounting.summary()["in_error"] == {"write": 1, "process": 1}
    accounting.set_acquired(3)
    assert accounting.acquired == 10


places = st.dictionaries(st.sampled_from(["gap", "stall", "write"]), st.integers(1, 9))


def numbers(words: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", words)]


@given(st.tuples(*[st.integers(0, 3)] * 4), places, places, st.integers(0, 60))
def test_both_identities_add_up_in_words(
    terms: tuple[int, int, int, int],
    dropped: dict[str, int],
    in_error: dict[str, int],
    planned: int,
) -> None:
    written, focus, unaccounted, camera_lost = terms
    accounting = Accounting()
    accounting.count("written", number=written)
    accounting.count("focus", number=focus)
    for term, by_place in (("dropped", dropped), ("in_error", in_error)):
        for place, number in by_place.items():
            accounting.count(term, place, number)
    lost = sum(dropped.values()) + sum(in_error.values())
    sent = written + lost + unaccounted
    accounting.end(sent + focus, planned=planned, camera_lost=camera_lost)
    said = accounting.summary()
    assert said["unaccounted"] == unaccounted
    acquired, *parts = numbers(accounting_in_words(said))
    assert acquired == sum(parts) == sent + focus
    told, *parts = numbers(plan_in_words(said))
    assert (told, sum(parts)) == (planned, max(planned, sent + camera_lost))
    outcome = Outcome.of_report({"accounting": said, "reason": "why"})
    assert sum(outcome.lost.values()) == lost + camera_lost
    assert outcome.is_complete == (lost + camera_lost == 0 and sent >= planned)
    missing = filter(None, [*outcome.lost.values(), outcome.not_acquired])
    assert numbers(str(outcome)) == [written, planned, *missing]
