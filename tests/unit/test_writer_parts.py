"""Journal, disk watch and specs of the writer, each alone."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.config.sections import StoreConfig
from rtfocus.errors import OutputError, WriterError
from rtfocus.metrics import DiskWatch, check_space
from rtfocus.writers.arrays import FrameArray, context_of
from rtfocus.writers.finish import percentiles
from rtfocus.writers.header import ImageSpec, write_json
from rtfocus.writers.journal import JournalFile, intact_bytes, read_journal


def journal_of(path: Path, lines: int) -> None:
    journal = JournalFile(path, [], fsync=False)
    for number in range(lines):
        journal.append([{"sequence": number, "value": math.nan}])
    journal.close()


@given(cut=st.integers(0, 200))
def test_a_journal_cut_anywhere_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "frames.ndjson"
    journal_of(path, 6)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n")
    assert intact_bytes(path) == whole[:cut].rfind(b"\n") + 1
    assert [line["sequence"] for line in read_journal(path)] == list(range(lines))
    journal = JournalFile(path, [], fsync=True)
    journal.append([{"sequence": 99}])
    journal.close()
    assert [line["sequence"] for line in read_journal(path)] == [*range(lines), 99]


# Of the second the last whole line's end is the first byte of a block.
@pytest.mark.parametrize("torn_bytes", [200_000, 2 * (1 << 16) - 1])
def test_a_torn_line_longer_than_a_block_is_found(
    torn_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "frames.ndjson"
    journal_of(path, 3)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"x" * torn_bytes)
    assert intact_bytes(path) == size


def test_nan_becomes_null(tmp_path: Path) -> None:
    journal_of(tmp_path / "frames.ndjson", 1)
    assert (tmp_path / "frames.ndjson").read_bytes() == (
        b'{"sequence":0,"value":null}\n'
    )


@pytest.mark.parametrize("fsync", [True, False])
def test_lines_are_on_the_disk_before_they_count_where_the_store_asks_for_it(
    fsync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", note)
    path = tmp_path / "frames.ndjson"
    journal = JournalFile(path, [], fsync=fsync)
    sizes = []
    for number in range(2):
        journal.append([{"sequence": number}])
        sizes.append(path.stat().st_size)
        assert synced == (sizes if fsync else [])
    journal.close()
    write_json(tmp_path / "zarr.json", {}, fsync=fsync)
    assert synced == ([*sizes, len(b"{}")] if fsync else [])


def test_arrays_of_all_runs_share_threads_that_stay() -> None:
    # Threads that went with a run's last array were touched afterwards, by one of some
    # hundred runs of a busy service: that ended it with "corrupted unsorted chunks".
    synced = context_of(fsync=True)
    assert context_of(fsync=True) is synced
    assert synced["file_io_sync"].to_json() is True
    assert context_of(fsync=False)["file_io_sync"].to_json() is False


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


@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), chunk=st.integers(1, 4096)
)
def test_a_shard_holds_the_plane_in_whole_chunks(
    height: int, width: int, chunk: int
) -> None:
    spec = ImageSpec("raw", "uint16", 1, (height, width), 1.0, 0.0, (0.0, 1.0))
    shard, inner = spec.shard_shape(chunk), spec.chunk_shape(chunk)
    for length, outer, side in zip((height, width), shard, inner, strict=True):
        assert outer % side == 0
        assert length <= outer < length + side


@pytest.mark.parametrize("name", ["absent", "no\0path"])
def test_an_array_that_cannot_be_opened_is_told_where_it_is_asked_for(
    tmp_path: Path, name: str
) -> None:
    # tensorstore finds a path without a file later than one that can be none.
    spec = ImageSpec("raw", "uint16", 1, (9, 9), 1.0, 0.0, (0.0, 1.0))
    array = FrameArray(tmp_path / name, spec, (1, 1, 1), StoreConfig(), create=False)
    with pytest.raises(WriterError, match=f"cannot open array '.*{name}'"):
        array.read(0, 0, 0)


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<f4"])
@given(
    values=st.lists(st.integers(0, 255), min_size=1, max_size=300),
    percents=st.tuples(st.floats(0, 100), st.floats(0, 100)),
)
def test_percentiles_are_those_of_numpy(
    dtype: str, values: list[int], percents: tuple[float, float]
) -> None:
    seen = np.array(values, dtype)
    wanted = np.percentile(seen.astype(float), percents)
    np.testing.assert_allclose(percentiles(seen, percents), wanted, atol=1e-9)
