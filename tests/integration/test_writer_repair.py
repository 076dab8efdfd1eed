"""Whatever a power cut, a copy or a hostile hand made of a run: no frame is deleted.

Property tests: the run's own files, really damaged, then checked and repaired.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from writer_kit import indices, make_series, numbered, recording

import rtfocus
from rtfocus.channel import Channel
from rtfocus.errors import RtfocusError, WriterError
from rtfocus.report.facts import read_facts
from rtfocus.writers.check import check_run

FRAMES = 12
SERIES = make_series(sizes={"t": 6, "c": 2}, channels=[Channel("a"), Channel("b")])
PLACES = list(indices(SERIES))
FEW = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def record(folder: Path, *, finished: bool, shard_frames: int = 1) -> None:
    store = {"shard_frames": shard_frames, "codec": "none"}
    with recording(folder, SERIES, store=store, grid=None) as run:
        run.send_all()
        run.writer.drain()
        if finished:
            run.close(FRAMES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, int], Path]:
    """Runs to copy: finished or cut off, with one or three frames per shard."""
    made = {}
    for finished in (True, False):
        for shard_frames in (1, 3):
            folder = tmp_path_factory.mktemp("runs") / "run.rtfocus"
            record(folder, finished=finished, shard_frames=shard_frames)
            made[finished, shard_frames] = folder
    return made


def shard_of(folder: Path, name: str, sequence: int, shard_frames: int) -> Path:
    place = PLACES[sequence]
    number = place["t"] // shard_frames
    return folder / f"{name}.ome.zarr/0/c.{number}.{place['c']}.0.0.0"


def shards_in(folder: Path) -> list[tuple[str, ...]]:
    """All shards by store and name, also those that were set aside."""
    return sorted(
        path.parts[-3:] for path in folder.rglob("c.*") if path.parts[-2] == "0"
    )


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "frames.ndjson").read_text()
    return [json.loads(line) for line in text.splitlines()]


def damage_journal(journal: Path, kind: str, start: int, size: int) -> None:
    data = bytearray(journal.read_bytes())
    start = start % (len(data) + 1)
    if kind == "truncated":
        journal.write_bytes(data[:start])
    elif kind == "zeros":
        data[start : start + size] = bytes(len(data[start : start + size]))
        journal.write_bytes(data)
    elif kind == "zero tail":
        journal.write_bytes(bytes(data[:start]) + bytes(size))
    elif kind == "garbage":
        data[start : start + size] = b'"\xff{}\n' * (size // 5)
        journal.write_bytes(data)
    elif kind == "doubled":
        journal.write_bytes(bytes(data) + bytes(data[start:]))
    else:
        journal.unlink()


@FEW
@given(
    finished=st.booleans(),
    shard_frames=st.sampled_from((1, 3)),
    kind=st.sampled_from(
        ("truncated", "zeros", "zero tail", "garbage", "doubled", "gone")
    ),
    start=st.integers(0, 6000),
    size=st.integers(1, 5000),
    lost=st.sets(st.integers(0, FRAMES - 1), max_size=3),
    flipped=st.sets(st.integers(0, FRAMES - 1), max_size=3),
)
def test_every_frame_whose_shard_is_sound_survives_a_damaged_journal(
    runs: dict[tuple[bool, int], Path],
    tmp_path: Path,
    finished: bool,
    shard_frames: int,
    kind: str,
    start: int,
    size: int,
    lost: set[int],
    flipped: set[int],
) -> None:
    folder = tmp_path / "run.rtfocus"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(runs[finished, shard_frames], folder)
    damage_journal(folder / "frames.ndjson", kind, start, size)
    hit = set()
    for sequence in lost | flipped:
        shard = shard_of(folder, "raw", sequence, shard_frames)
        if sequence in lost:
            shard.unlink(missing_ok=True)
        elif shard.exists():
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 16
            shard.write_bytes(data)
        hit |= {
            other
            for other in range(FRAMES)
            if shard_of(folder, "raw", other, shard_frames) == shard
        }
    sound = set(range(FRAMES)) - hit
    before = shards_in(folder)
    check_run(folder)
    after = check_run(folder, repair=True)
    # Nothing is deleted: every shard is where it was, or set aside.
    assert shards_in(folder) == before
    assert sound <= frames_journalled(folder, sound)
    # What is wrong afterwards is what the pixels' damage leaves, and nothing else.
    assert [text for text in after.problems if "in raw" not in text] == []
    again = check_run(folder)
    assert again.problems == after.problems
    assert (again.frames, again.missing) == (after.frames, after.missing)
    assert check_run(folder, repair=True).repaired == []
    assert ("set aside" in str(again)) == (folder / "set_aside").exists()


def frames_journalled(folder: Path, sound: set[int]) -> set[int]:
    """Return the frames that have a line; those in `sound` must read back right."""
    lines = lines_of(folder)
    numbers = [line["sequence"] for line in lines if line["sequence"] is not None]
    assert numbers == list(range(len(numbers)))
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    restored = zarr.open_array(folder / "restored.ome.zarr" / "0", mode="r")
    kept: set[int] = set()
    for line in lines:
        if line["status"] != "written":
            continue
        index = {axis: line["index"][axis] for axis in ("t", "c")}
        frame = PLACES.index(index)
        assert frame not in kept
        kept.add(frame)
        if frame in sound:
            place = (index["t"], index["c"], 0)
            expected = numbered(frame, SERIES)
            np.testing.assert_array_equal(raw[place], expected)
            np.testing.assert_array_equal(restored[place], expected[::-1])
    return kept


@FEW
@given(
    name=st.sampled_from(("series.json", "frames.ndjson", "report.json")),
    edits=st.lists(
        st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=12)),
        min_size=1,
        max_size=4,
    ),
)
def test_no_file_makes_check_or_repair_fail_without_a_word(
    runs: dict[tuple[bool, int], Path],
    tmp_path: Path,
    name: str,
    edits: list[tuple[int, bytes]],
) -> None:
    folder = tmp_path / "run.rtfocus"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(runs[True, 1], folder)
    data = bytearray((folder / name).read_bytes())
    for start, text in edits:
        start %= len(data)
        data[start : start + len(text)] = text
    (folder / name).write_bytes(data)
    shards = shards_in(folder)
    for repair in (False, True, False):
        # Anything but an RtfocusError fails the test.
        with suppress(RtfocusError):
            check_run(folder, repair=repair)
    assert shards_in(folder) == shards


HOSTILE_LINES = {
    "nothing": b"{}",
    "list": b"[]",
    "no index": b'{"sequence":0,"status":"written"}',
    "negative": b'{"sequence":0,"status":"written","index":{"t":-1},"stored":["raw"]}',
    "far away": b'{"sequence":0,"status":"written","index":{"t":1099511627776}}',
    "far number": b'{"sequence":9223372036854775807,"status":"focus","index":null}',
    "huge number": b'{"sequence":92233720368547758079,"status":"focus"}',
    "no position": b'{"sequence":0,"status":"written","index":{"t":0,"p":9}}',
    "huge position": b'{"sequence":0,"status":"written","captured_ns":1,'
    b'"index":{"t":0,"p":9223372036854775808}}',
    "stage is a path": b'{"sequence":0,"status":"focus","stage_ms":{"../../x":1}}',
    "level": b'{"sequence":0,"status":"focus","estimate":{"level":99999}}',
    "deep": b"[" * 5000,
    "zeros": bytes(3000),
}


@pytest.mark.parametrize("kind", HOSTILE_LINES)
def test_a_hostile_journal_is_told_and_mended(
    kind: str, runs: dict[tuple[bool, int], Path], tmp_path: Path
) -> None:
    for finished in (True, False):
        folder = tmp_path / str(finished) / "run.rtfocus"
        shutil.copytree(runs[finished, 1], folder)
        for name in ("frames.ndjson", "focus.ndjson"):
            (folder / name).write_bytes(HOSTILE_LINES[kind] + b"\n")
        # Anything but an RtfocusError fails the test.
        with suppress(RtfocusError):
            assert len(rtfocus.open_run(folder).frames) <= 1
        assert read_facts(folder).focus_log == []
        before = check_run(folder)
        assert any("is damaged" in problem for problem in before.problems), str(before)
        after = check_run(folder, repair=True)
        assert after.problems == [], str(after)
        assert after.frames == FRAMES
    assert not (tmp_path.parent / "x_ms").exists()


HOSTILE_HEADERS: dict[str, dict[str, Any]] = {
    "shape is text": {"shape": "x"},
    "shape is huge": {"shape": [10**7, 10**7]},
    "negative size": {"sizes": {"t": -3, "c": 2}},
    "huge sizes": {"sizes": {"t": 1 << 60, "c": 2}},
    "unknown axis": {"sizes": {"t": 6, "c": 2, "q": 4}},
    "no positions": {"positions": []},
    "objects": {"dtype": "O"},
    "path as well": {
        "positions": [{"name": "a", "plate_row": "../../victim", "plate_column": "1"}]
    },
}


@pytest.mark.parametrize("kind", [*HOSTILE_HEADERS, "series is null"])
def test_a_hostile_header_is_refused_and_nothing_changes(
    kind: str, runs: dict[tuple[bool, int], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run.rtfocus"
    shutil.copytree(runs[False, 1], folder)
    victim = tmp_path / "victim" / "1" / "0" / "0"
    victim.mkdir(parents=True)
    (victim / "precious.txt").write_text("x")
    content = json.loads((folder / "series.json").read_text())
    if kind in HOSTILE_HEADERS:
        content["series"].update(HOSTILE_HEADERS[kind])
    else:
        content["series"] = None
    (folder / "series.json").write_text(json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WriterError) as found:
        check_run(folder, repair=True)
    assert "\n" not in str(found.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("link", ["raw.ome.zarr", "frames.zarr", ".report.json.part"])
def test_repair_never_writes_through_a_link(
    link: str, runs: dict[tuple[bool, int], Path], tmp_path: Path
) -> None:
    other, folder = tmp_path / "other.rtfocus", tmp_path / "run.rtfocus"
    shutil.copytree(runs[True, 1], other)
    shutil.copytree(runs[False, 1], folder)
    target = other / (link if (other / link).exists() else "report.json")
    if (folder / link).is_dir():
        shutil.rmtree(folder / link)
    try:
        (folder / link).symlink_to(target)
    except OSError as error:  # Windows without developer mode
        pytest.skip(f"cannot make a link: {error}")
    journal = folder / "frames.ndjson"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(True)[:5]))
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    for attempt in (
        lambda: check_run(folder, repair=True),
        lambda: recording(folder, SERIES).__enter__(),
    ):
        with pytest.raises(WriterError, match="is a link"):
            attempt()
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == before
    # Through a link to the whole folder everything works.
    (folder / link).unlink()
    (tmp_path / "link.rtfocus").symlink_to(other)
    assert check_run(tmp_path / "link.rtfocus", repair=True).problems == []


def test_frames_that_the_journal_calls_missing_are_found_on_the_disk(
    runs: dict[tuple[bool, int], Path], tmp_path: Path
) -> None:
    """As after a power cut whose lost lines a resumed run took for lost frames."""
    folder = tmp_path / "run.rtfocus"
    shutil.copytree(runs[True, 1], folder)
    journal = folder / "frames.ndjson"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for number in (3, 4, 5):
        # The last one says the same place again, as no run does.
        lines[number] = {
            "sequence": number,
            "status": "missing",
            "index": lines[min(number, 4)]["index"],
            "reason": "gap",
        }
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("names no frame of" in text for text in check_run(folder).problems)
    after = check_run(folder, repair=True)
    assert after.problems == [], str(after)
    assert after.frames == FRAMES
    assert frames_journalled(folder, set(range(FRAMES))) == set(range(FRAMES))


def test_a_repair_says_what_it_did_in_numbers(
    runs: dict[tuple[bool, int], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run.rtfocus"
    shutil.copytree(runs[True, 1], folder)
    journal = folder / "frames.ndjson"
    whole = journal.read_bytes()
    journal.unlink()
    for name in ("raw", "restored"):
        shard_of(folder, name, 7, 1).unlink()
    report = check_run(folder, repair=True)
    assert report.repaired == [
        "journal was lost; made it anew from the frames on the disk",
        f"journalled {FRAMES - 1} frames that no line named",
        "journalled 1 frame as missing: neither its line nor its pixels are on the "
        "disk",
        f"wrote totals, journal columns and report of {FRAMES} lines",
    ]
    assert report.aside is None
    assert not (folder / "set_aside").exists()
    assert check_run(folder).problems == []

    journal.write_bytes(b"?" + journal.read_bytes()[1:])
    first, *_ = check_run(folder, repair=True).repaired
    kept = folder / "set_aside" / "frames.ndjson.1"
    assert first.startswith("journal was damaged (line 1: ")
    assert first.endswith(f"; it lies in '{kept}'")
    assert kept.read_bytes().startswith(b"?")
    assert len(whole.splitlines()) == len(lines_of(folder)) == FRAMES


def test_a_resumed_run_mends_what_a_power_cut_left(
    runs: dict[tuple[bool, int], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run.rtfocus"
    shutil.copytree(runs[False, 1], folder)
    journal = folder / "frames.ndjson"
    data = journal.read_bytes()
    half = len(data) // 2
    journal.write_bytes(data[:half] + bytes(len(data) - half))
    (folder / "restored.ome.zarr" / "0" / "zarr.json").write_bytes(bytes(500))
    with recording(folder, SERIES, grid=None) as run:
        assert run.writer.next_sequence == FRAMES
        run.close(FRAMES)
    report = check_run(folder)
    assert report.problems == [], str(report)
    assert report.frames == FRAMES


def test_a_check_of_strange_paths_does_not_cry_wolf(
    runs: dict[tuple[bool, int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["exp [1]", "s3::x", "100%25", "no#1", "~tilde", "{a,b}", "café μm", "-d."]
    names += [] if Path("a").drive or "\\" in str(tmp_path) else ["a*b", "what?"]
    monkeypatch.chdir(tmp_path)
    for name in names:
        folder = Path(name) / "renamed"
        shutil.copytree(runs[True, 1], folder)
        for path in (folder, folder.absolute(), Path(f"{folder}/")):
            assert check_run(path).problems == [], str(path)
        (folder / "raw.ome.zarr" / "zarr.json").write_text("{}")
        assert any("raw.ome.zarr" in text for text in check_run(folder).problems)


@pytest.mark.parametrize("name", ["raw", "defocus"])
def test_a_finished_run_ends_with_its_last_frame_also_after_a_look_behind_it(
    tmp_path: Path, name: str
) -> None:
    # The last shard has room for a frame more, which a plan without end allows.
    live, store = make_series(sizes={"t": None}), {"shard_frames": 2}
    folder = tmp_path / "run.rtfocus"
    with recording(folder, live, store=store) as run:
        for t in range(5):
            run.send(t, {"t": t})
        run.close(5)
    assert check_run(folder, repair=True).repaired == []
    array = zarr.open_array(folder / f"{name}.ome.zarr/0", mode="r+")
    assert array.shape[0] == 5
    array.resize((9, *array.shape[1:]))
    (problem,) = check_run(folder).problems
    assert problem.startswith(f"{name} has 9 time points, not 5")
    assert check_run(folder, repair=True).problems == []
