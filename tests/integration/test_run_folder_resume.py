"""Which folder a run goes to, and how a cut-off one goes on or is finished."""

import errno
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr
from writer_kit import LIVE, Recording, make_series, numbered, recording

from rtfocus import files
from rtfocus.config.model import RunConfig
from rtfocus.config.sections import StoreConfig
from rtfocus.errors import WriterError
from rtfocus.frame import Position
from rtfocus.writers.check import check_run
from rtfocus.writers.folder import run_folder


def cut_off(folder: Path, frames: int, **store: object) -> None:
    """Leave a run folder unfinished after `frames` durable frames."""
    with recording(folder, make_series(), store=store) as run:
        for t in range(frames):
            run.send(t, {"t": t})
        run.writer.drain()


def test_a_run_goes_on_after_its_last_durable_frame(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    cut_off(folder, 4)
    with recording(folder, make_series()) as run:
        assert run.writer.next_sequence == 4
        for t in (4, 5):
            run.send(t, {"t": t})
        run.close(6)
    assert run.accounting.summary()["written"] == 6
    assert check_run(folder).problems == []
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    for t in range(6):
        np.testing.assert_array_equal(raw[t, 0, 0], numbered(t, run.series))


def test_what_was_refused_is_told_over_all_processes_of_a_run(tmp_path: Path) -> None:
    killed, folder = tmp_path / "killed.rtfocus", tmp_path / "run.rtfocus"
    with recording(killed, make_series()) as run:
        run.accounting.count("rejected", "malformed", 3)
        run.send(0, {"t": 0})
        run.writer.drain()
        shutil.copytree(killed, folder)  # as it is after kill -9
        run.accounting.count("rejected", "version")
    in_time = {"malformed": 3}
    assert json.loads((folder / "rejected.json").read_text()) == in_time
    said = json.loads((killed / "rejected.json").read_text())
    assert said == {"malformed": 3, "version": 1}
    with recording(folder, make_series()) as run:
        assert run.accounting.rejected == in_time
        run.accounting.count("rejected", "malformed")
        run.send(1, {"t": 1})
        run.close(2)

    def told(folder: Path) -> object:
        terms = json.loads((folder / "report.json").read_text())["accounting"]
        return terms["rejected_messages"]

    assert told(folder) == {"malformed": 4}
    for place in (folder, killed):
        journal = place / "frames.ndjson"
        journal.write_bytes(journal.read_bytes()[:-20])
        assert check_run(place, repair=True).problems == []
    assert [told(folder), told(killed)] == [{"malformed": 4}, said]


def test_a_resumed_shard_keeps_its_earlier_frames(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    cut_off(folder, 3, shard_frames=4)
    with recording(folder, make_series(), store={"shard_frames": 4}) as run:
        for t in (3, 4, 5):
            run.send(t, {"t": t})
        run.close(6)
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    for t in range(6):
        np.testing.assert_array_equal(raw[t, 0, 0], numbered(t, run.series))


def test_a_gap_across_a_restart_is_placed_by_the_frame_before_it(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run.rtfocus"
    cut_off(folder, 2)
    with recording(folder, make_series()) as run:
        run.writer.mark_missing(2, 2, "restart")
        run.accounting.count("dropped", "gap", 2)
        for t in (4, 5):
            run.send(t, {"t": t})
        folder = run.close(6)
    report = check_run(folder)
    assert report.problems == []
    assert [line["index"]["t"] for line in report.missing] == [2, 3]


@pytest.mark.parametrize("is_told", [False, True])
def test_frames_on_the_disk_that_a_resumed_run_never_gets_are_kept(
    tmp_path: Path, is_told: bool
) -> None:
    """As after a kill between a frame's shards and its line, in mid time point."""
    folder = tmp_path / "run.rtfocus"
    with recording(folder, LIVE) as run:
        run.send_all(3)
        run.writer.drain()
    journal = folder / "frames.ndjson"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:5]))
    with recording(folder, LIVE) as run:
        assert run.writer.next_sequence == 5
        if is_told:
            run.writer.mark_missing(5, 1, "restart")
            run.accounting.count("dropped", "gap")
        run.close(6 if is_told else 5)
    report = check_run(folder)
    assert report.frames == 5
    if is_told:  # and to be had again
        assert report.problems == [
            "the journal names no frame of 5 shards; use --repair"
        ]
        assert check_run(folder, repair=True).frames == 6
    else:
        assert report.problems == []
        said = json.loads((folder / "report.json").read_text())["set_aside"]
        kept = [path.name for path in (folder / said).rglob("c.*")]
        assert kept == ["c.2.1.0.0.0"] * 5


def test_a_frame_whose_journal_line_is_torn_is_journalled_again(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run.rtfocus"
    cut_off(folder, 4)
    journal = folder / "frames.ndjson"
    journal.write_bytes(journal.read_bytes()[:-20])
    before = check_run(folder)
    assert before.frames == 3
    assert any("torn" in problem for problem in before.problems)
    after = check_run(folder, repair=True)
    assert after.problems == [], str(after)
    assert after.frames == 4
    assert zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r").shape[0] == 4
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["sequence"] for line in lines] == [0, 1, 2, 3]
    assert [line.get("recovered", False) for line in lines] == [False] * 3 + [True]


def test_a_torn_line_is_cut_before_a_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    cut_off(folder, 4)
    journal = folder / "frames.ndjson"
    journal.write_bytes(journal.read_bytes()[:-20])
    with recording(folder, make_series()) as run:
        assert run.writer.next_sequence == 3
        for t in (3, 4, 5):
            run.send(t, {"t": t})
        run.close(6)
    assert check_run(folder).problems == []


def test_a_line_broken_inside_the_journal_is_damage_and_is_mended(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run.rtfocus"
    cut_off(folder, 4)
    journal = folder / "frames.ndjson"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1][:30] + b"\n" + b"".join(lines[2:]))
    damaged = journal.read_bytes()
    before = check_run(folder)
    assert any("line 2 of" in problem for problem in before.problems)
    assert before.frames == 3
    after = check_run(folder, repair=True)
    assert after.problems == [], str(after)
    assert after.frames == 4
    assert (folder / "set_aside" / "frames.ndjson.1").read_bytes() == damaged


def test_a_run_without_its_journal_is_journalled_again(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    cut_off(folder, 2)
    (folder / "frames.ndjson").unlink()
    assert any("is lost" in problem for problem in check_run(folder).problems)
    after = check_run(folder, repair=True)
    assert after.problems == [], str(after)
    assert after.frames == 2


def test_repair_leaves_a_finished_run_alone(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        folder = run.close(run.send_all())
    before = (folder / "report.json").read_bytes()
    assert check_run(folder, repair=True).repaired == []
    assert (folder / "report.json").read_bytes() == before


def test_a_run_without_a_frame_is_valid(tmp_path: Path) -> None:
    with recording(tmp_path / "run.rtfocus", make_series()) as run:
        folder = run.close(0, "canceled")
    assert check_run(folder).problems == []


def test_a_finished_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    with recording(folder, make_series()) as run:
        run.close(run.send_all())
    with pytest.raises(WriterError, match="choose another run"):
        Recording(folder, make_series())
    other = make_series(series_uid="uid-2", sizes={"t": 2})
    with recording(folder, other, store={"overwrite": True}) as run:
        run.close(run.send_all())
    report = json.loads((folder / "report.json").read_text())
    assert report["series_uid"] == "uid-2"
    assert check_run(folder).frames == 2


@pytest.mark.parametrize(
    "added",
    ["notes.txt", "analysis/cells.csv", "raw.ome.zarr/labels/nuclei/zarr.json"],
)
def test_a_finished_run_that_somebody_added_to_is_not_replaced(
    tmp_path: Path, added: str
) -> None:
    run, store = RunConfig(name="day", folder=tmp_path), StoreConfig(overwrite=True)
    other = make_series(series_uid="uid-2")
    folder = tmp_path / "day.rtfocus"
    with recording(folder, make_series()) as opened:
        opened.close(opened.send_all())
    (folder / "report.html").touch()
    assert run_folder(run, store, other) == folder
    theirs = folder / added
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("a week's work")
    assert run_folder(run, store, other) == tmp_path / "day-2.rtfocus"
    with pytest.raises(WriterError, match=r"is not of the run; move it away"):
        Recording(folder, other, store={"overwrite": True})
    assert theirs.read_text() == "a week's work"
    assert check_run(folder).frames == 6


def test_a_plate_that_nobody_added_to_is_replaced(tmp_path: Path) -> None:
    run, store = RunConfig(name="day", folder=tmp_path), StoreConfig(overwrite=True)
    wells = [
        Position(name=f"A{column}", plate_row="A", plate_column=str(column))
        for column in (1, 2)
    ]
    tiles = [Position(name=name) for name in ("left", "right")]
    for number, positions in enumerate((wells, tiles)):
        series = make_series(
            series_uid=f"uid-{number}", positions=positions, sizes={"t": 1, "p": 2}
        )
        folder = run_folder(run, store, series)
        assert folder == tmp_path / "day.rtfocus"
        with recording(folder, series, store={"overwrite": True}) as opened:
            for p in range(2):
                opened.send(p, {"p": p})
            opened.close(2)
    assert run_folder(run, store, make_series()) == folder


def test_a_finished_run_that_a_viewer_holds_open_is_replaced_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run.rtfocus"
    with recording(folder, make_series()) as run:
        run.close(run.send_all())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def held(path: Path, _target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    hasty = files.Patience(deadline_s=0.2, pause_s=0.05)
    monkeypatch.setattr(
        "rtfocus.writers.folder.remove", partial(files.remove, patience=hasty)
    )
    other = make_series(series_uid="uid-2")
    with monkeypatch.context() as windows:
        windows.setattr(Path, "rename", held)  # as Windows with a file open inside
        with pytest.raises(WriterError, match=r"run\.rtfocus' cannot be removed: Perm"):
            Recording(folder, other, store={"overwrite": True})
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    after.pop(folder / "writer.lock", None)
    before.pop(folder / "writer.lock", None)
    assert after == before
    assert check_run(folder).problems == []


def test_a_folder_too_deep_for_windows_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run.rtfocus"
    with recording(folder, make_series(), store={"shard_frames": 1}) as run:
        run.send_all()
        run.writer.drain()
        longest = max(len(str(path)) for path in folder.rglob("*"))
    deep = folder.with_name("run-2.rtfocus")
    most = "rtfocus.writers.folder._most_characters"
    monkeypatch.setattr(most, lambda: longest + 2)  # that of run-2, with no room more
    with pytest.raises(WriterError, match=r"and Windows opens \d+: shorten run\.f"):
        Recording(deep, make_series())
    assert not deep.exists()
    monkeypatch.setattr(most, lambda: longest + 60)
    with recording(deep, make_series()) as run:
        run.close(run.send_all())


def test_a_share_that_is_no_drive_is_refused_before_the_run(tmp_path: Path) -> None:
    # As on Windows a server and its share: TensorStore takes neither.
    share = Path(f"/{tmp_path}")
    with pytest.raises(WriterError, match=r"'//.*takes no images: connect it as a dri"):
        Recording(share / "run.rtfocus", make_series())
    assert list(tmp_path.iterdir()) == []


def test_another_series_in_a_cut_off_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    cut_off(folder, 2)
    with pytest.raises(WriterError, match=r"cut-off series uid-1.*--repair"):
        Recording(folder, make_series(series_uid="uid-2"))


def test_a_folder_of_something_else_is_never_touched(tmp_path: Path) -> None:
    folder = tmp_path / "run.rtfocus"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(WriterError, match="no run folder"):
            Recording(folder, make_series(), store={"overwrite": overwrite})
    assert (folder / "thesis.txt").read_text() == "precious"
    with pytest.raises(WriterError, match="no run folder"):
        check_run(folder)


def test_a_new_series_gets_a_free_name_and_a_cut_off_one_its_own(
    tmp_path: Path,
) -> None:
    run, store = RunConfig(name="day", folder=tmp_path), StoreConfig()
    first = run_folder(run, store, make_series())
    assert first == tmp_path / "day.rtfocus"
    cut_off(first, 2)
    assert run_folder(run, store, make_series()) == first
    other = make_series(series_uid="uid-2")
    second = run_folder(run, store, other)
    assert second == tmp_path / "day-2.rtfocus"
    with recording(second, other) as opened:
        opened.close(0)
    assert run_folder(run, store, other) == tmp_path / "day-3.rtfocus"
    # A cut-off run is never replaced, a finished one is where that is allowed.
    overwrite = StoreConfig(overwrite=True)
    assert run_folder(run, overwrite, other) == tmp_path / "day-3.rtfocus"
    check_run(first, repair=True)
    assert run_folder(run, overwrite, other) == first
