"""Journal, disk watch and specs of the writer, each alone."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.config.sections import StoreConfig
from rtfocus.errors import WriterError
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
