"""Metrics: percentiles in constant memory and the loss identity."""

from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.metrics import Accounting, Histogram, Memory, memory


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


V2 = ("0::/box", "", "memory.max", "memory.current", "")
V1 = ("4:memory:/host/box", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize("version", [V2, (*V1, "total_")], ids=["2", "1"])
@pytest.mark.parametrize("own", ["box", ""], ids=["own", "root"])
def test_memory_is_what_a_container_may_use(
    version: tuple[str, str, str, str, str], own: str, tmp_path: Path
) -> None:
    line, root, limit, used, prefix = version
    mine = tmp_path / "cgroup"
    mine.write_text(f"9:name=systemd:/\n{line}\n")
    group = tmp_path / "groups" / root / (line.rpartition(":/")[2] if own else "")
    group.mkdir(parents=True)
    (group / limit).write_text("5000\n")
    (group / used).write_text("4000\n")
    (group / "memory.stat").write_text(
        f"anon 900\n{prefix}inactive_file 2000\n{prefix}active_file 100\n"
    )
    assert memory(tmp_path / "groups", mine) == Memory(5000, 3100)
    (group / limit).write_text("max\n")
    assert memory(tmp_path / "groups", mine).total == psutil.virtual_memory().total


def test_memory_without_control_groups_is_that_of_the_machine(tmp_path: Path) -> None:
    found = memory(tmp_path, tmp_path / "none")
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.free < found.total
