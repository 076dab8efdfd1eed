"""A disk that is full, fails or is too small ends a run with a clear message."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from writer_kit import Recording, make_series, numbered, recording

import rtfocus
from rtfocus.errors import InputError, OutputError, WriterError
from rtfocus.writers.check import check_run
from rtfocus.writers.header import read_header
from rtfocus.writers.journal import JournalFile

DISK_MB = 48
SHARD = "c.{}.0.0.0.0"
"""File of the frame at time point t, by the Zarr v3 specification."""
ENDLESS = make_series(sizes={"t": None}, shape=(128, 128))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 48 MB."""
    if sys.platform != "linux":
        pytest.skip("needs tmpfs to make a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "rtfocus", folder]
    mounted = subprocess.run(
        command, capture_output=True, encoding="utf-8", check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def send_until_error(run: Recording, first: int = 0) -> tuple[int, str]:
    """Append until the writer refuses; return the frames tried and its words."""
    for t in range(first, 100_000):
        slot = run.fill(t, {"t": t})
        try:
            run.writer.append(slot, run.result(t, {"t": t}))
        except WriterError as error:
            return t + 1, str(error)
    pytest.fail("the writer never refused a frame")


def assert_durable_frames_are_there(folder: Path, durable: list[int]) -> None:
    assert durable == list(range(len(durable)))
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    for t in durable:
        np.testing.assert_array_equal(raw[t, 0, 0], numbered(t, ENDLESS))


def assert_journalled_frames_are_there(folder: Path) -> None:
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    for text in (folder / "frames.ndjson").read_text().splitlines():
        line = json.loads(text)
        if line["status"] == "written":
            t = line["sequence"]
            assert line["index"]["t"] == t
            np.testing.assert_array_equal(raw[t, 0, 0], numbered(t, ENDLESS))


def test_a_full_disk_surfaces_and_keeps_what_was_durable(small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(DISK_MB * 700_000))
    store = {"codec": "none", "min_free_mb": 0}
    with recording(small_disk / "run.rtfocus", ENDLESS, store=store) as run:
        tried, said = send_until_error(run)
        assert re.search(r"disk full.*MB free.*free space", said)
        with pytest.raises(WriterError, match="disk full"):
            run.writer.drain()
        assert 10 < len(run.durable) < tried
        folder = run.writer.folder
    assert_durable_frames_are_there(folder, run.durable)
    # The frame that was refused never became the writer's: its slot is not freed.
    terms = run.accounting.summary()
    assert terms["written"] == len(run.durable)
    assert terms["in_error"] == {"write": tried - 1 - len(run.durable)}
    assert run.pool.free == run.pool.count - 1
    filler.unlink()
    report = check_run(folder, repair=True)
    assert report.problems == [], str(report)
    # Frames that were whole when the disk was full are kept, acknowledged or not.
    assert len(run.durable) <= report.frames < tried
    assert_durable_frames_are_there(folder, run.durable)
    assert_journalled_frames_are_there(folder)


def test_what_is_to_be_done_is_said_of_any_failed_write(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", ENDLESS) as run:
        run.send(0, {"t": 0})
        run.writer.drain()
        folder = run.writer.folder
        (folder / "raw.ome.zarr" / "0" / SHARD.format(1)).mkdir()
        run.send(1, {"t": 1})
        with pytest.raises(WriterError) as found:
            run.writer.drain()
    said = f"write to '{folder}' failed; what is durable stays; see to its disk, then"
    assert str(found.value).startswith(f"{said} run: rtfocus check {folder} --repair (")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that fails")
def test_a_header_on_a_failing_disk_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "series.json").symlink_to("/proc/self/mem")
    with pytest.raises(WriterError, match=r"series.json' cannot be read: .*its disk$"):
        read_header(tmp_path)


def test_a_disk_that_is_full_at_the_end_is_told_with_its_place(
    small_disk: Path,
) -> None:
    filler = small_disk / "filler"
    with recording(small_disk / "run.rtfocus", ENDLESS) as run:
        for t in range(5):
            run.send(t, {"t": t})
        run.writer.drain()
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        with pytest.raises(WriterError) as found:
            run.close(5)
    said = str(found.value)
    assert str(run.writer.folder) in said
    assert "None" not in said
    filler.unlink()
    report = check_run(run.writer.folder, repair=True)
    assert report.problems == [], str(report)
    assert report.frames == 5


def test_a_nearly_full_disk_ends_the_run_cleanly(small_disk: Path) -> None:
    store = {"codec": "none", "min_free_mb": DISK_MB * 0.9}
    with recording(small_disk / "run.rtfocus", ENDLESS, store=store) as run:
        tried, said = send_until_error(run)
        assert "less than store.min_free_mb" in said
        run.writer.settle()
        # As the app does: the refused frame arrived and was never written.
        run.accounting.count("in_error", "aborted")
        folder = run.close(tried, "disk nearly full")
    report = check_run(folder)
    assert report.problems == [], str(report)
    assert report.finished
    assert report.frames == tried - 1
    assert_durable_frames_are_there(folder, run.durable)


def test_a_run_that_cannot_fit_is_refused_before_frame_0(small_disk: Path) -> None:
    series = make_series(sizes={"t": 100_000})
    folder = small_disk / "run.rtfocus"
    with pytest.raises(OutputError, match=r"MB free, too little for \d+ MB planned"):
        Recording(folder, series)
    assert not list(small_disk.iterdir())


def test_a_failed_write_surfaces_and_every_frame_is_accounted_for(
    tmp_path: Path,
) -> None:
    store = {"outstanding": 4}
    with recording(tmp_path / "run.rtfocus", ENDLESS, store=store) as run:
        for t in range(5):
            run.send(t, {"t": t})
        run.writer.drain()
        # A folder where the writer needs a file: this shard cannot be made.
        in_the_way = run.writer.folder / "restored.ome.zarr/0" / SHARD.format(5)
        in_the_way.mkdir()
        tried, said = send_until_error(run, first=5)
        assert re.search(r"write to .* failed", said)
        in_the_way.rmdir()
        folder = run.close(tried, "writer failed")
    assert run.durable == list(range(5))
    terms = run.accounting.summary()
    assert terms["written"] == 5
    assert terms["in_error"] == {"write": tried - 1 - 5}
    assert terms["unaccounted"] == 1  # the refused frame is the caller's
    report = json.loads((folder / "report.json").read_text())
    assert "failed" in report["write_error"]
    assert_durable_frames_are_there(folder, run.durable)


def test_a_limit_of_the_size_of_files_is_not_called_a_full_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no such limits")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with recording(tmp_path / "run.rtfocus", ENDLESS, store={"codec": "none"}) as run:
        run.send(0, {"t": 0})
        run.writer.drain()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            tried, said = send_until_error(run, first=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        run.close(tried, "writer failed")
        folder = run.writer.folder
    assert re.search(r"as long as this system lets it be; .*ulimit -f", said), said
    assert "disk full" not in said
    assert_durable_frames_are_there(folder, run.durable)


def test_close_raises_a_failure_that_nobody_has_seen(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", ENDLESS) as run:
        in_the_way = run.writer.folder / "raw.ome.zarr/0" / SHARD.format(0)
        in_the_way.mkdir()
        run.send(0, {"t": 0})
        run.writer.settle()
        in_the_way.rmdir()
        with pytest.raises(WriterError, match=r"write to .* failed"):
            run.close(1)
    assert run.durable == []
    assert run.accounting.summary()["in_error"] == {"write": 1}


def test_the_first_failure_is_told_and_the_one_of_the_end_beside_it(
    tmp_path: Path,
) -> None:
    with recording(tmp_path / "run.rtfocus", ENDLESS) as run:
        first = run.writer.folder / "raw.ome.zarr/0" / SHARD.format(0)
        first.mkdir()
        run.send(0, {"t": 0})
        run.writer.settle()
        (run.writer.folder / "restored.ome.zarr/zarr.json").unlink()
        with pytest.raises(WriterError, match=r"write to .* failed") as told:
            run.close(1)
        (note,) = told.value.__notes__
        assert re.search("finishing the run folder failed too: .*restored.ome", note)


def test_a_journal_that_cannot_be_mended_tells_what_broke_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no file that is always full")
    with (
        closing(JournalFile(tmp_path / "frames.ndjson", [], fsync=False)) as journal,
        full.open("r+b", buffering=0) as file,
        monkeypatch.context() as patch,
    ):
        # It takes no byte, and cannot be cut either.
        patch.setattr(journal, "_file", file)
        with pytest.raises(WriterError, match="No space left on device") as told:
            journal.append([{"sequence": 0}])
    assert told.value.__notes__ == ["what was written of it stays: Invalid argument"]


def test_a_damaged_chunk_is_found(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        folder = run.close(run.send_all())
    shard = folder / "raw.ome.zarr/0" / SHARD.format(3)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (problem,) = check_run(folder).problems
    assert "frame 3 in raw" in problem


def test_a_lost_file_is_found(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        folder = run.close(run.send_all())
    (folder / "restored.ome.zarr/0" / SHARD.format(2)).unlink()
    (problem,) = check_run(folder).problems
    assert "frame 2 in restored" in problem
    assert "absent" in problem


def test_a_report_that_does_not_add_up_is_found(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        folder = run.close(run.send_all() + 2)
    (problem,) = check_run(folder).problems
    assert problem == "8 frames acquired but 6 accounted for"


def test_a_damaged_run_is_told_by_what_reads_it(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as recorded:
        folder = recorded.close(recorded.send_all())
    (folder / "report.json").write_text("{}")
    run = rtfocus.open_run(folder)
    with pytest.raises(WriterError, match=r"report\.json.*accounting.*--repair"):
        _ = run.outcome
    for shard in (folder / "raw.ome.zarr").rglob("c.*"):
        shard.write_bytes(b"x")
    with pytest.raises(InputError, match="rtfocus check"):
        _ = run.raw[0]
    with pytest.raises(IndexError):
        _ = run.raw[10**6]
    (folder / "restored.ome.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(InputError, match=r"restored\.ome\.zarr.*cannot be read"):
        _ = run.restored
    whole = {"axes": [{"name": "t"}], "datasets": [{"path": "0"}]}
    steps = {"coordinateTransformations": [{"scale": ["x"]}]}
    for ome in (
        5,
        {"multiscales": [{"datasets": whole["datasets"]}]},
        {"multiscales": [whole | {"datasets": [{"path": "0"} | steps]}]},
    ):
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}
        (folder / "defocus.ome.zarr" / "zarr.json").write_text(json.dumps(group))
        with pytest.raises(InputError, match=r"defocus\.ome\.zarr.*cannot be read"):
            _ = rtfocus.open_run(folder).defocus


def test_a_damaged_journal_is_told_with_what_mends_it(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as recorded:
        folder = recorded.close(recorded.send_all())
    run, path = rtfocus.open_run(folder), folder / "frames.ndjson"
    whole = path.read_bytes()
    for broken in (b'"x"', b"[1]", b"9" * 30):
        path.write_bytes(whole.replace(b'"sequence":1', b'"sequence":' + broken, 1))
        with pytest.raises(WriterError, match=r"of no frame.*check .* --repair"):
            _ = run.frames
    for broken in (b"{}\n", b"[]\n", b"\0\n"):
        path.write_bytes(broken + whole)
        with pytest.raises(WriterError, match=r"journal .*check .* --repair"):
            _ = run.frames
    path.unlink()
    with pytest.raises(WriterError, match=r"cannot be read: .*check .* --repair"):
        _ = run.frames
    path.mkdir()
    with pytest.raises(WriterError, match="move away what stands there"):
        _ = run.frames
