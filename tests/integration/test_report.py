"""The page of a run: made of its folder alone, one file, never in the run's way."""

import logging
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_kit import command, failed, succeeded
from writer_kit import make_series, recording

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.errors import ExitCode, WriterError
from rtfocus.frame import Position
from rtfocus.report import facts as facts_of_run
from rtfocus.report.facts import read_facts, shown_frames
from rtfocus.report.page import PAGE_NAME, leave_page, write_page
from rtfocus.writers.check import check_run
from rtfocus.writers.header import JOURNAL_NAME

_ALONE = ("meta", "br")


class _Page(HTMLParser):
    """Collects the words of a page; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                assert (value or "").startswith("data:"), f"{tag} asks for {value}"
        if tag not in _ALONE:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read_page(folder: Path) -> _Page:
    """Return the page, after what has to hold of every one."""
    text = (folder / PAGE_NAME).read_text("utf-8")
    assert len(text.encode()) < 2_000_000
    page = _Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    return page


def record(folder: Path, *, frames: int | None = None, **changes: object) -> Path:
    """Record a series; of fewer frames than planned where `frames` says so."""
    with recording(folder, make_series(**changes)) as opened:
        for sequence in range(frames or 6):
            opened.send(sequence, {"t": sequence})
        return opened.close(frames or 6)


def test_complete_run_shows_everything_in_one_file(tmp_path: Path) -> None:
    page = read_page(write_page(record(tmp_path / "a.rtfocus")).parent)
    assert "completed" in page.text
    assert "6 acquired = 6 written + 0 dropped + 0 in error" in page.text
    assert "delpnet@0123abcd (6)" in page.text
    # Numbered frames are 0 to 5 um out of focus.
    for title in ("Best frame: 0.00", "Median frame: 2.00", "Worst frame: 5.00"):
        assert title in page.text
    for label in (
        "distance from focus (µm)",
        "stage z (µm)",
        "saved on disk after (ms)",
    ):
        assert label in page.text
    assert page.tags.count("image") == 3 * 10, "five panels a frame, each with its bar"


def test_errors_left_in_restored_frames_are_told_where_they_are_known(
    tmp_path: Path,
) -> None:
    with recording(
        tmp_path / "known.rtfocus", make_series(), expects_error=True
    ) as run:
        known = run.close(run.send_all())
    said = "counts in median"
    write_page(known)
    assert any(said in words for words in read_page(known).words)
    unknown = record(tmp_path / "unknown.rtfocus")
    write_page(unknown)
    assert not any(said in words for words in read_page(unknown).words)


def test_incomplete_run_says_what_is_missing(tmp_path: Path) -> None:
    folder = record(tmp_path / "a.rtfocus", frames=4, planned=6)
    page = read_page(write_page(folder).parent)
    assert "incomplete: 4 of 6 planned frames" in page.text
    assert "2 not acquired" in page.text


def test_gap_and_error_are_told_with_their_remedy(tmp_path: Path) -> None:
    with recording(tmp_path / "a.rtfocus", make_series()) as opened:
        opened.send(0, {"t": 0})
        opened.writer.mark_missing(1, 2, "sent before this processor started")
        opened.accounting.count("dropped", "gap", number=2)
        opened.writer.record_error(opened.fill(3, {"t": 3}), "engine ran out of memory")
        folder = opened.close(4)
    page = read_page(write_page(folder).parent)
    assert "4 acquired = 2 written + 2 dropped (gap) + 0 in error" in page.text
    assert "2 frames dropped (gap)" in page.text
    assert "transport.slots" in page.text
    assert "1 frames: engine ran out of memory" in page.text


def test_run_that_was_cut_off_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "a.rtfocus"
    with recording(folder, make_series()) as opened:
        for sequence in range(3):
            opened.send(sequence, {"t": sequence})
        opened.writer.drain()
    with (folder / "frames.ndjson").open("ab") as journal:
        journal.write(b'{"sequence":3,"sta')
    page = read_page(Path(succeeded(command("report", folder)).strip()).parent)
    assert "not finished" in page.text
    assert "a.rtfocus --repair" in page.text
    assert "3 acquired = 3 written" in page.text
    assert "lines of the journal are damaged" not in page.text, "it is being written"


def test_damage_costs_what_is_damaged_only(tmp_path: Path) -> None:
    folder = record(tmp_path / "a.rtfocus")
    shutil.rmtree(folder / "restored.ome.zarr")
    lines = (folder / "frames.ndjson").read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * 40 + b"\n"
    lines[4] = b'{"status": 7}\n'
    (folder / "frames.ndjson").write_bytes(b"".join(lines))
    strange = '{"kind": "hold"}\n{"kind": "verdict", "time_ns": 1}\n[1]\n{"kind'
    (folder / "focus.ndjson").write_text(strange, "utf-8")
    page = read_page(write_page(folder).parent)
    assert "2 lines of the journal are damaged" in page.text
    assert "Worst frame: 5.00" in page.text
    assert "restored, detail" not in page.text
    (folder / "report.json").write_text('{"accounting": {}}', "utf-8")
    assert "not finished" in read_page(write_page(folder).parent).text


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (40, 56, 3)},
        {"dtype": "|u1"},
        {"dtype": "<f4"},
        {"shape": (5, 7)},
        {"shape": (300, 20)},
        {"shape": (900, 1100)},
    ],
    ids=str,
)
def test_every_kind_of_pixels_is_shown(tmp_path: Path, changes: dict) -> None:
    page = read_page(write_page(record(tmp_path / "a.rtfocus", **changes)).parent)
    assert "Worst frame: 5.00" in page.text


def test_names_of_others_are_words_and_nothing_else(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    series = make_series(
        sizes={"t": 3, "p": 2},
        channels=[Channel(evil, OpticalSystem(0.5, 520, 0.325))],
        positions=[Position(evil), Position("b")],
    )
    with recording(tmp_path / "a.rtfocus", series) as opened:
        folder = opened.close(opened.send_all(), reason=evil)
    page = read_page(write_page(folder).parent)
    assert page.text.count(evil) >= 3


def test_long_journal_is_sampled_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = record(tmp_path / "a.rtfocus")
    monkeypatch.setattr(facts_of_run, "MOST_FRAMES", 2)
    facts = read_facts(folder)
    assert facts.every > 1
    assert len(facts.seconds) == -(-6 // facts.every)
    assert f"every {facts.every}th frame" in read_page(write_page(folder).parent).text


def test_shown_frames_are_the_ones_of_the_store(tmp_path: Path) -> None:
    folder = record(tmp_path / "a.rtfocus")
    best, median, worst = shown_frames(read_facts(folder))
    assert [f.index["t"] for f in (best, median, worst)] == [0, 2, 5]
    assert np.array_equal(worst.raw[::-1], worst.restored)
    assert np.nanmax(worst.defocus) == 5


def test_page_that_fails_is_a_warning_and_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = record(tmp_path / "a.rtfocus")
    (folder / f".{PAGE_NAME}.part").mkdir()
    with caplog.at_level(logging.WARNING):
        leave_page(folder)
    assert f"rtfocus report {folder}" in caplog.text
    with pytest.raises(WriterError, match=r"report\.html"):
        write_page(folder)


def test_page_of_somebody_else_is_kept(tmp_path: Path) -> None:
    folder = record(tmp_path / "a.rtfocus")
    (folder / PAGE_NAME).write_text("<p>mine", "utf-8")
    assert "move or rename it" in failed(command("report", folder), ExitCode.FAILED)
    assert (folder / PAGE_NAME).read_text("utf-8") == "<p>mine"


@pytest.mark.parametrize("name", ["check", "report", "view"])
@pytest.mark.parametrize("place", [".", "missing"])
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, name: str, place: str
) -> None:
    said = failed(command(name, tmp_path / place), ExitCode.INPUT)
    assert "run folder" in said
    assert not (tmp_path / PAGE_NAME).exists()


def test_advice_tells_a_queue_and_not_what_was_wanted(tmp_path: Path) -> None:
    with recording(tmp_path / "a.rtfocus", make_series()) as opened:
        count = opened.send_all()
        opened.writer.record_focus(opened.fill(count, {}), opened.result(count, {}))
        folder = opened.close(count + 1)
    report = msgspec.json.decode((folder / "report.json").read_bytes())
    stages = {"classify": {"p50_ms": 80.0}, "arrival_to_durable": {"p95_ms": 3000.0}}
    for stage in stages.values():
        stage |= dict.fromkeys(("count", "p95_ms", "p99_ms", "max_ms"), 3000.0)
        stage.setdefault("p50_ms", 80.0)
    (folder / "report.json").write_bytes(
        msgspec.json.encode({**report, "stages": stages})
    )
    page = read_page(write_page(folder).parent)
    assert "frames waited up to 3.0 s for 80 ms of work" in page.text
    assert "7 acquired = 6 written + 1 focus probes" in page.text
    assert "1 frames: " not in page.text, "a probe is no loss"


def test_page_is_no_fault_of_a_run_and_a_check_says_how_far_it_is(
    tmp_path: Path,
) -> None:
    folder = record(tmp_path / "a.rtfocus")
    write_page(folder)
    shares: list[float] = []
    assert check_run(folder, on_progress=shares.append).problems == []
    assert len(shares) == 6
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] < 1


def test_focus_moves_are_marked_in_the_trace(tmp_path: Path) -> None:
    folder = record(tmp_path / "a.rtfocus")
    now = read_facts(folder).first_ns
    held = {"kind": "hold", "error_um": 0.5, "drift_um": 0.5, "reason": "drift"}
    look = {"kind": "look", "z_um": 1.0, "refusal": None}
    verdict = {"kind": "verdict", "end_um": 1.0, "images": 3}
    moves = [
        held | {"step_um": 0.5},
        held | {"step_um": 0.0},
        look | {"decision": "Probe", "way_um": 2.0},
        look | {"decision": "Probe", "way_um": 0.0},
        look | {"decision": "GiveUp", "way_um": -2.0},
        verdict | {"focused": True, "reason": "focused"},
        verdict | {"focused": False, "reason": "blank"},
        {"kind": "failure", "reason": "no specimen"},
    ]
    text = b"".join(
        msgspec.json.encode({"time_ns": now, **line}) + b"\n" for line in moves
    )
    (folder / "focus.ndjson").write_bytes(text)
    page = read_page(write_page(folder).parent)
    assert "autofocus moved (3)" in page.text
    assert "search failed (2)" in page.text
    assert "searches for focus that failed: 2, the last: no specimen" in page.text


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder without a report."""
    folder = tmp_path_factory.mktemp("run") / "a.rtfocus"
    record(folder)
    (folder / "report.json").unlink()
    return folder


STATUSES = ("written", "focus", "missing", "in_error")


@given(st.lists(st.sampled_from([*STATUSES, None]), max_size=30))
def test_every_line_of_a_journal_counts_once_or_is_told_as_damaged(
    unfinished: Path, statuses: list[str | None]
) -> None:
    lines = [
        '{"status": "writ'
        if status is None
        else msgspec.json.encode({"status": status, "sequence": number}).decode()
        for number, status in enumerate(statuses)
    ]
    (unfinished / JOURNAL_NAME).write_text("".join(f"{line}\n" for line in lines))
    facts = read_facts(unfinished)
    terms = facts.accounting
    assert facts.damaged_lines == statuses.count(None)
    assert terms["written"] == statuses.count("written")
    assert terms["focus"] == statuses.count("focus")
    assert sum(terms["dropped"].values()) == statuses.count("missing")
    assert sum(terms["in_error"].values()) == statuses.count("in_error")
    assert terms["acquired"] == len(statuses) - statuses.count(None)
    assert terms["unaccounted"] == 0
