"""A batch: its parts, and what becomes of units in whatever order things happen."""

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtfocus.batch.plan import BatchJob, BatchPlan, Failure, Ledger, Unit
from rtfocus.batch.scheduler import goes_on
from rtfocus.cli.batch import part_of
from rtfocus.errors import ConfigError, OutputError


def plan_of(count: int) -> BatchPlan:
    """Return a plan of so many images."""
    units = tuple(
        Unit(
            key=f"unit{number}",
            image=f"image{number}",
            content="",
            path=f"{number}.tif",
            number=0,
            facts="",
            made="",
            target=f"{number}.tif",
            planes=1,
        )
        for number in range(count)
    )
    job = BatchJob("restore", "in", "in", "out", {})
    return BatchPlan("key", "0", "folder", job, units)


@given(st.integers(0, 60), st.integers(1, 25))
def test_parts_hold_every_unit_once_and_differ_by_one_at_most(count, of):
    plan = plan_of(count)
    parts = [plan.part(*part_of(f"{number}/{of}")) for number in range(1, of + 1)]
    keys = [unit.key for part in parts for unit in part]
    assert sorted(keys) == sorted(unit.key for unit in plan.units)
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


def test_a_batch_takes_the_place_of_an_earlier_one_and_of_nothing_else(tmp_path):
    ledger, earlier = Ledger(tmp_path / "out"), plan_of(2)
    ledger.begin(earlier, None)
    ledger.done(earlier.units[0], [])
    (ledger.folder / ".rtfocus-left.part").write_text("by a killed process")
    ledger.begin(plan_of(3), None)
    assert ledger.plan() == plan_of(3)
    assert not ledger.is_done(earlier.units[0])
    assert not list(ledger.folder.glob(".rtfocus-left*"))

    theirs = ledger.folder / "notes.txt"
    theirs.write_text("of somebody")
    with pytest.raises(OutputError, match=r"holds 'notes\.txt'; choose another output"):
        ledger.begin(plan_of(1), None)
    assert theirs.read_text() == "of somebody"
    assert ledger.plan() == plan_of(3), "nothing is touched before it is refused"

    other = Ledger(tmp_path / "other")
    other.folder.write_text("a file")
    with pytest.raises(OutputError, match="is no folder; choose another output"):
        other.begin(plan_of(1), None)
    assert other.folder.read_text() == "a file"


HAPPENS = st.tuples(st.sampled_from(["start", "done", "failed"]), st.integers(0, 3))


# Every example waits for the disk.
@settings(max_examples=15, deadline=None)
@given(st.lists(HAPPENS, max_size=12))
def test_a_unit_is_left_until_it_is_done_and_failed_until_then(happened):
    plan = plan_of(4)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "out")
        ledger.begin(plan, None)
        done, failed = set(), set()
        for what, number in happened:
            unit = plan.units[number]
            if what == "start":
                ledger.start(unit)
            elif what == "done":
                ledger.done(unit, [f"note {number}"])
                done.add(unit.key)
                failed.discard(unit.key)
            else:
                ledger.failed(unit, Failure("input", "no such plane"))
                failed.add(unit.key)
        # Whoever opens the folder later reads the same.
        again = Ledger(Path(folder) / "out")
        assert again.plan() == plan
        left = {unit.key for unit in again.left(plan.units)}
        assert left == {unit.key for unit in plan.units} - done
        # Two may have done the same unit: done outweighs a failure that came later.
        found = {unit.key for unit, _ in again.failures(plan)}
        assert found == failed - done
        notes = {f"note {key.removeprefix('unit')}" for key in done}
        assert set(again.notes(plan)) == notes


@given(st.text(alphabet="0123456789/ -+x", max_size=8))
def test_what_is_no_part_is_refused_and_what_is_lies_within(text):
    found = re.fullmatch("([0-9]+)/([0-9]+)", text)
    wanted = (int(found[1]), int(found[2])) if found else (0, 0)
    if 1 <= wanted[0] <= wanted[1]:
        assert part_of(text) == wanted
    else:
        with pytest.raises(ConfigError, match=re.escape(f"'{text}' is no part")):
            part_of(text)


def test_what_is_left_is_counted_in_words():
    assert goes_on(1) == "1 image not done; the same command goes on from there"
    assert goes_on(2).startswith("2 images not done; ")


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "-1/3", "²/3", ""])
def test_parts_outside_are_refused(text):
    with pytest.raises(ConfigError, match="is no part"):
        part_of(text)
