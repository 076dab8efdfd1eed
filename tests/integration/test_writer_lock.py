"""One process writes a run folder; whoever else comes is refused and told who it is."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import writer_kit
from typer.testing import CliRunner
from writer_kit import LIVE, Recording, indices, make_series, recording

from rtfocus.cli.commands import app
from rtfocus.config.model import RunConfig
from rtfocus.config.sections import StoreConfig
from rtfocus.errors import BusyError, ExitCode, OutputError, WriterError
from rtfocus.writers.check import check_run
from rtfocus.writers.folder import RunLock, run_folder
from rtfocus.writers.header import HEADER_NAME


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtfocus.writers.folder.PATIENCE_S", 0.1)


@contextmanager
def recorder(folder: Path, frames: int = 20) -> Iterator[subprocess.Popen[str]]:
    """Record `LIVE` in another process; yield it once `frames` are durable."""
    program = [sys.executable, writer_kit.__file__, str(folder), "1"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        try:
            for _ in range(frames):
                process.stdout.readline()
            yield process
        finally:
            process.kill()
            process.stdout.read()


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_is_being_written_is_left_alone_by_everybody(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    with recording(folder, make_series()) as run:
        for t in range(3):
            run.send(t, {"t": t})
        run.writer.drain()
        before = content(folder)
        for attempt in (
            lambda: Recording(folder, make_series()),
            lambda: check_run(folder, repair=True),
        ):
            with pytest.raises(
                BusyError,
                match=rf"being written by process {os.getpid()} on .*recording since",
            ):
                attempt()
        live = check_run(folder)
        assert live.problems == []
        assert "is being written by process" in str(live)
        assert "--repair" not in str(live)
        result = CliRunner().invoke(app, ["check", str(folder)])
        assert result.exit_code == ExitCode.BUSY
        assert content(folder) == before
        for t in range(3, 6):
            run.send(t, {"t": t})
        run.close(6)
    report = check_run(folder)
    assert report.problems == []
    assert report.holder is None


def test_a_frozen_recorder_keeps_its_folder_and_a_killed_one_gives_it_back(
    tmp_path: Path,
) -> None:
    if not hasattr(signal, "SIGSTOP"):
        pytest.skip("this system freezes no processes")
    folder = tmp_path / "run.rtfocus"
    with recorder(folder) as process:
        process.send_signal(signal.SIGSTOP)
        # Until every thread of it stands still.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        before = content(folder)
        for attempt in (
            lambda: Recording(folder, LIVE),
            lambda: check_run(folder, repair=True),
        ):
            with pytest.raises(BusyError, match=f"process {process.pid} on"):
                attempt()
        assert content(folder) == before
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        for _ in range(20):  # goes on as if nothing had been
            process.stdout.readline()
    with recording(folder, LIVE) as run:
        assert run.writer.next_sequence >= 40
        run.close(run.writer.next_sequence)
    assert check_run(folder).problems == []


def test_who_lost_the_folder_touches_nothing(tmp_path: Path) -> None:
    """As a network disk does that forgets locks while a recorder is frozen."""
    for written in (0, 3):
        folder = tmp_path / str(written) / "run.rtfocus"
        with recording(folder, make_series()) as run:
            for t in range(written):
                run.send(t, {"t": t})
            run.writer.drain()
            holder = folder / "writer.json"
            taken = holder.read_text().replace('"token": "', '"token": "other')
            holder.write_text(taken)
            before = content(folder)
            with pytest.raises(BusyError, match="was taken over by process"):
                run.close(written)
            assert content(folder) == before
        assert content(folder) == before


def test_a_holder_that_a_scanner_has_open_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a virus scanner or a network disk does it for a moment."""
    refusals = [errno.EACCES, errno.EBUSY]
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "writer.json" and refusals:
            raise OSError(refusals[0], os.strerror(refusals.pop()), str(path))
        return read(path)

    folder = tmp_path / "run.rtfocus"
    with recording(folder, make_series()) as run:
        for t in range(4):
            run.send(t, {"t": t})
        run.writer.drain()
        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        run.close(4)
    assert refusals == []
    assert check_run(folder).problems == []


def test_a_folder_that_cannot_be_looked_into_is_left_with_the_reason(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run.rtfocus"
    with recording(folder, make_series()) as run:
        run.send(0, {"t": 0})
        run.writer.drain()
        (folder / "writer.json").unlink()
        (folder / "writer.json").mkdir()
        with pytest.raises(WriterError, match="cannot be read any more"):
            run.close(1)
        (folder / "writer.json").rmdir()
    assert check_run(folder, repair=True).problems == []


def test_nobody_writes_behind_the_lines_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    with recording(folder, make_series()) as run:
        run.send(0, {"t": 0})
        run.writer.drain()
        journal = folder / "frames.ndjson"
        with journal.open("ab") as file:
            file.write(b'{"sequence":1,"status":"focus"}\n')
        before = journal.read_bytes()
        run.send(1, {"t": 1})
        with pytest.raises(BusyError, match="changed by another process"):
            run.writer.drain()
        assert run.durable == [0]
    assert journal.read_bytes() == before


def test_a_removed_folder_ends_the_run_instead_of_taking_frames(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows removes no open file")
    folder = tmp_path / "run.rtfocus"
    with recording(folder, make_series()) as run:
        run.send(0, {"t": 0})
        run.writer.drain()
        shutil.rmtree(folder)
        run.send(1, {"t": 1})
        with pytest.raises(BusyError, match="removed by another process"):
            run.writer.drain()
        assert run.durable == [0]


@pytest.mark.parametrize("shard_frames", [1, 4])
def test_a_moved_folder_ends_the_run_before_a_frame_is_acknowledged_without_it(
    tmp_path: Path, shard_frames: int
) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows moves no open file")
    folder, now = tmp_path / "day" / "run.rtfocus", tmp_path / "kept" / "run.rtfocus"
    with recording(folder, LIVE, store={"shard_frames": shard_frames}) as run:
        for sequence, index in enumerate(indices(LIVE, time_points=4)):
            run.send(sequence, index)
        run.writer.drain()
        folder.parent.rename(now.parent)
        run.send(8, {"t": 4})
        with pytest.raises(BusyError, match="was moved while it was recorded") as told:
            run.writer.drain()
        assert f"what is in '{folder}' now was never" in str(told.value)
        if sys.platform == "linux":
            assert f"rtfocus check {now} --repair" in str(told.value)
        assert run.durable == list(range(8))
    report = check_run(now, repair=True)
    assert report.problems == [], str(report)
    assert report.frames == 8


@pytest.mark.parametrize("shard_frames", [1, 4])
def test_an_image_moved_out_of_its_run_ends_it_before_a_frame_is_acknowledged(
    tmp_path: Path, shard_frames: int
) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows moves no open file")
    folder, aside = tmp_path / "run.rtfocus", tmp_path / "aside.ome.zarr"
    raw = folder / "raw.ome.zarr"
    with recording(folder, LIVE, store={"shard_frames": shard_frames}) as run:
        for sequence, index in enumerate(indices(LIVE, time_points=4)):
            run.send(sequence, index)
        run.writer.drain()
        raw.rename(aside)
        run.send(8, {"t": 4})
        with pytest.raises(BusyError, match=r"raw.ome.zarr' was removed or moved"):
            run.writer.drain()
        assert run.durable == list(range(8))
    shutil.rmtree(raw)
    aside.rename(raw)
    report = check_run(folder, repair=True)
    assert report.problems == [], str(report)
    assert report.frames == 8


def test_a_run_whose_header_was_removed_has_it_again_at_its_end(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series(sizes={"t": 2})) as run:
        run.send(0, {"t": 0})
        (run.writer.folder / HEADER_NAME).unlink()
        run.send(1, {"t": 1})
        folder = run.close(2)
    report = check_run(folder)
    assert (report.problems, report.frames) == ([], 2)


def test_another_series_gets_another_folder_even_before_the_first_has_begun(
    tmp_path: Path,
) -> None:
    run, store = RunConfig(name="day", folder=tmp_path), StoreConfig()
    first = run_folder(run, store, make_series())
    first.mkdir()
    with RunLock(first, "recording"):
        other = run_folder(run, store, make_series(series_uid="uid-2"))
        assert other == tmp_path / "day-2.rtfocus"
    assert run_folder(run, store, make_series()) == first


def test_a_refused_start_leaves_no_folder(tmp_path: Path) -> None:
    series = make_series(sizes={"t": 6, "c": 2})
    with pytest.raises(WriterError, match="lists 1"):
        Recording(tmp_path / "new" / "run.rtfocus", series)
    with pytest.raises(OutputError, match="too little for"):
        Recording(tmp_path / "run.rtfocus", make_series(), store={"min_free_mb": 1e12})
    assert not list(tmp_path.iterdir())
