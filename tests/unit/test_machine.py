"""What is told of the computer."""

from pathlib import Path

import psutil
import pytest

from rtfocus.errors import OutputError, WriterError
from rtfocus.machine import (
    DiskWatch,
    Memory,
    adds_int8_in_16_bits,
    check_space,
    memory,
    processor_name,
    usable_threads,
)


def test_the_processor_has_a_name_of_one_line() -> None:
    name = processor_name()
    assert name
    assert "\n" not in name


def test_no_more_threads_are_usable_than_there_are() -> None:
    assert 1 <= usable_threads() <= psutil.cpu_count()


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").is_file(), reason="this system describes no processor"
)
def test_int8_is_exact_where_the_processor_has_vnni() -> None:
    described = Path("/proc/cpuinfo").read_text("utf-8")
    flags = next((ln for ln in described.splitlines() if ln.startswith("flags")), "")
    assert adds_int8_in_16_bits() == (bool(flags) and "vnni" not in flags)


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
