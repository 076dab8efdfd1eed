"""What is told of the computer."""

import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.errors import EngineError, OutputError, WriterError
from rtfocus.machine import (
    DiskWatch,
    Memory,
    RunClock,
    check_space,
    memory,
    processor_name,
    usable,
    usable_threads,
)


def test_the_processor_has_a_name_of_one_line() -> None:
    name = processor_name()
    assert name
    assert "\n" not in name


def test_no_more_threads_are_usable_than_there_are() -> None:
    assert 1 <= usable_threads() <= psutil.cpu_count()


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


class Disk:
    """Free space and clock of an imagined machine."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.now_s = 1000.0
        self.asked = 0

    def free_bytes(self, _folder: Path) -> int:
        self.asked += 1
        return self.free

    def clock_s(self) -> float:
        return self.now_s


def test_time_to_full_follows_the_rate_at_which_the_disk_fills() -> None:
    disk = Disk(free=1_000_000)
    watch = DiskWatch(Path(), 100_000, free=disk.free_bytes, clock_s=disk.clock_s)
    for second in range(10):
        assert (watch.time_to_full_s() is None) == (second < 5), "a burst is no rate"
        disk.now_s += 1
        disk.free -= 50_000
        watch.check()
    # 500,000 free, of which 400,000 may be used at 50,000 bytes/s.
    assert watch.time_to_full_s() == pytest.approx(8.0)
    disk.now_s += 1
    disk.free = 99_999
    with pytest.raises(WriterError, match="the run ends here"):
        watch.check()


def test_a_disk_that_fills_between_two_samples_ends_the_run_all_the_same() -> None:
    disk = Disk(free=199_999)
    watch = DiskWatch(Path(), 100_000, free=disk.free_bytes, clock_s=disk.clock_s)
    watch.check()
    disk.free = 99_999
    with pytest.raises(WriterError, match="the run ends here"):
        watch.check()


def test_near_its_end_the_disk_is_asked_once_a_frame() -> None:
    disk = Disk(free=150_000)
    watch = DiskWatch(Path(), 100_000, free=disk.free_bytes, clock_s=disk.clock_s)
    for number in range(1, 9):
        disk.now_s += 0.2  # due at every other frame
        watch.check()
        assert disk.asked == 1 + number


def test_the_disk_is_asked_four_times_a_second_at_most() -> None:
    disk = Disk(free=1_000_000)
    watch = DiskWatch(Path(), 0, free=disk.free_bytes, clock_s=disk.clock_s)
    for _ in range(1000):
        disk.now_s += 0.001
        watch.check()
    assert disk.asked <= 5
    assert watch.time_to_full_s() is None


def test_a_disk_too_small_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has \d+ MB free.*1000000000 MB planned"):
        check_space(tmp_path, 10**15, 0)
    with pytest.raises(OutputError, match=r"an unbounded run.*min_free_mb"):
        check_space(tmp_path, None, 10**15)
    check_space(tmp_path, 1, 0)


@pytest.mark.parametrize("hours", [1, -1])
def test_whoever_sets_the_clock_amid_a_run_changes_no_time_of_it(
    hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = RunClock(), time.time_ns
    begun_ns, read_ns = clock.now_ns(), time.perf_counter_ns()
    set_by_ns = hours * 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: told() + set_by_ns)
    assert 0 <= clock.now_ns() - begun_ns < 60e9
    assert abs(clock.at_ns(read_ns) - begun_ns) < 1e9
    assert clock.now_s() == pytest.approx(clock.now_ns() / 1e9, abs=1.0)
    # The next run is dated by the clock as it is then.
    assert abs(clock.restart() - begun_ns - set_by_ns) < 60e9
    assert abs(clock.now_ns() - begun_ns - set_by_ns) < 60e9


def test_the_machines_clock_is_followed_while_it_goes_evenly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, told, off_ns = RunClock(), time.time_ns, 0
    monkeypatch.setattr(time, "time_ns", lambda: told() + off_ns)
    for _ in range(10):
        # As a counter of time that runs 50 ms ahead from one image to the next.
        off_ns += 50_000_000
        clock.now_ns()
    assert abs(clock.now_ns() - time.time_ns()) < 50_000_000


def test_a_clock_that_stands_still_for_16_ms_is_counted_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Windows' does, up to Python 3.12."""
    tick_ns, begun_ns, since_ns = 15_625_000, 1_700_000_000_123_456_789, 0
    monkeypatch.setattr("rtfocus.machine._TICK_NS", tick_ns)
    monkeypatch.setattr("rtfocus.machine._counted_ns", lambda: since_ns)
    told = {"set_by_ns": 0}

    def time_ns() -> int:
        return (begun_ns + since_ns) // tick_ns * tick_ns + told["set_by_ns"]

    monkeypatch.setattr(time, "time_ns", time_ns)
    clock, late_ns = RunClock(), []
    for _ in range(200):
        since_ns += 1_000_000
        assert clock.now_ns() == clock.told_ns()
        late_ns.append(begun_ns + since_ns - clock.now_ns())
    # From its first tick on; never in the future, and never behind by a step more.
    assert 0 <= min(late_ns[16:]) <= max(late_ns[16:]) < 1_000_000
    assert all(now <= before for before, now in pairwise(late_ns))
    told["set_by_ns"] = 3600 * 10**9
    assert clock.told_ns() - clock.now_ns() > 3599 * 10**9


class Kind(NamedTuple):
    name: str
    why: str | None


@given(whys=st.lists(st.sampled_from([None, "not built"]), max_size=4), data=st.data())
def test_what_can_be_used_comes_best_first_and_nothing_else(
    whys: list[str | None], data: st.DataObject
) -> None:
    kinds = [Kind(f"kind{number}", why) for number, why in enumerate(whys)]
    wanted = data.draw(st.sampled_from(["auto", "none", "kind0", "kind2"]))
    meant = [kind for kind in kinds if wanted in ("auto", kind.name)]
    able = [kind for kind in meant if kind.why is None]
    asked: list[Kind] = []

    def why(kind: Kind) -> str | None:
        asked.append(kind)
        return kind.why

    found = usable("backend", wanted, kinds, why, "; look here")
    if not able:
        with pytest.raises(EngineError, match=f"for '{wanted}': .*; look here"):
            next(found)
        return
    assert next(found) is able[0]
    assert asked == meant[: meant.index(able[0]) + 1], "those behind are not asked"
    assert list(found) == able[1:]


def test_of_nested_control_groups_the_tightest_counts(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    groups = (("job/step", 9000, 100), ("job", 7000, 6500), ("", 8000, 9000))
    for folder, limit, used in groups:
        group = tmp_path / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(str(limit))
        (group / "memory.current").write_text(str(used))
        (group / "memory.stat").write_text(f"inactive_file {300 if folder else 0}")
    # The outermost is over its limit: nothing is free, not less.
    assert memory(tmp_path, tmp_path / "cgroup") == Memory(7000, 0)
    (tmp_path / "memory.max").write_text("max")
    assert memory(tmp_path, tmp_path / "cgroup") == Memory(7000, 800)
