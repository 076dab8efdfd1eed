"""The screen of a run: fits the terminal, shows the course, and tells what is wrong."""

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console
from writer_kit import make_series

from rtfocus.batch.findings import Findings
from rtfocus.channel import Channel
from rtfocus.cli.display import processor_rows, screen, sparkline, told_of
from rtfocus.frame import Estimate, FrameHeader, SlotPool
from rtfocus.monitor import Monitor
from rtfocus.report.facts import focus_in_words
from rtfocus.transport.viewer import FailureLine, HoldLine, VerdictLine


def running(*found: float | None, planned: int | None = 40, before: int = 0) -> Monitor:
    """Return the monitor of a run with these estimates, resumed after `before`."""
    monitor = Monitor()
    monitor.accounting.count("written", number=before)
    series = make_series(channels=[Channel("DAPI")], planned=planned)
    monitor.begin(series)
    slot = SlotPool(1, 8).acquire(timeout_s=1)
    assert slot is not None
    header = FrameHeader(1, "uid-1", 0, (2, 2), "<u2", 0, 1.0, {"t": 0})
    slot.prepare(header)
    slot.received_ns = time.perf_counter_ns()
    for number, um in enumerate(found):
        told = Estimate(
            "uid-1", number, 0, um, False, 0.5, 1.0, 3.0, 0.0, {"t": number}, 0, 0
        )
        monitor.arrived(slot)
        monitor.estimated(slot, told)
        monitor.committed(slot)
        monitor.accounting.count("written")
    monitor.accounting.set_acquired(len(found))
    return monitor


def shown(monitor: Monitor | None, width: int, **options: bool) -> str:
    """Return what a terminal of this width gets."""
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, highlight=False, **options
    )
    console.print(screen(processor_rows(monitor), monitor, console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_screen_fits_the_terminal_and_shows_the_course(width: int) -> None:
    monitor = running(*(float(n % 9) for n in range(30)))
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown(monitor, width, no_color=True))
    lines = plain.splitlines()
    text = "\n".join(lines)
    assert all(len(line.rstrip()) <= width for line in lines)
    assert "30/40" in text
    if width >= 80:
        assert "0 to 8 um" in text
        assert " left" in text
    assert any("\u2588" in line for line in lines if "defocus" in line)


def test_a_defocus_is_known_no_sooner_after_the_exposure_than_after_arrival() -> None:
    monitor = running()
    captured_ns = time.time_ns()
    slot = SlotPool(1, 8).acquire(timeout_s=1)
    assert slot is not None
    slot.prepare(FrameHeader(1, "uid-1", 0, (2, 2), "<u2", captured_ns, 1.0, {"t": 0}))
    slot.received_ns = time.perf_counter_ns()
    # Read at once, told later: both are until it is told.
    told = Estimate(
        *("uid-1", 0, 0, 1.0, False, 0.5, 1.0, 3.0, 0.0, {"t": 0}),
        *(captured_ns, captured_ns),
    )
    monitor.estimated(slot, told)
    steps = monitor.times.summary()
    arrived_ms = steps["arrival_to_estimate"]["max_ms"]
    assert 0 < arrived_ms <= steps["capture_to_estimate"]["max_ms"]


def test_a_search_that_broke_off_is_one_of_those_that_were_begun() -> None:
    lines = [
        VerdictLine(time_ns=1, focused=True, reason="in focus", end_um=0, images=4),
        VerdictLine(time_ns=2, focused=False, reason="blank", end_um=0, images=2),
        FailureLine(time_ns=3, reason="the stage stands outside of its limits"),
    ]
    said = "autofocus: 1 of 3 searches found focus, 6 images, 1 broke off"
    assert focus_in_words(lines) == said
    holds = [
        HoldLine(time_ns=n, step_um=step, error_um=0, drift_um=0.5, reason="")
        for n, step in enumerate((0.0, 0.4))
    ]
    said += "; held 2 stacks with 1 correction, drift +0.5 um"
    assert focus_in_words([*lines, *holds]) == said


def test_a_resumed_run_does_not_count_earlier_frames_as_its_own_speed() -> None:
    through = running(1.0, 2.0, before=1000).throughput()
    assert through["frames_per_s"] is not None
    assert through["seconds"] is not None
    assert through["frames_per_s"] * through["seconds"] == pytest.approx(2)


def test_screen_before_the_series_and_without_an_end() -> None:
    assert "waiting for the microscope side" in shown(None, 80)
    endless = shown(running(None, planned=None), 80)
    assert "background" in endless
    assert "left" not in endless


def test_what_needs_somebody_stands_out_unless_colours_are_off() -> None:
    monitor = running(1.0)
    calm = shown(monitor, 80)
    monitor.accounting.count("dropped", "gap", number=3)
    monitor.time_to_full_s = 100.0
    alarmed = shown(monitor, 80)
    assert "\x1b[1;31m3" in alarmed
    assert "\x1b[1;33m2 min" in alarmed
    assert "\x1b[1;31m" not in calm
    assert "\x1b[1;31m" not in shown(monitor, 80, no_color=True)


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([None, float("nan")], 8, "  "),
        ([5.0, 5.0], 8, "\u2581\u2581"),
        ([-7.0, 7.0], 8, "\u2581\u2588"),
        ([0.0, 2.0, 14.0, 14.0], 2, "\u2581\u2588"),
    ],
)
def test_sparkline(values: list[float | None], width: int, line: str) -> None:
    assert sparkline(values, width) == line


def test_latencies_are_counted_finer_than_windows_counts_seconds(monkeypatch):
    # Up to Python 3.12 its monotonic clock goes in steps of 16 ms.
    monkeypatch.setattr(time, "monotonic_ns", lambda: 0)
    half_ms = running(1.0, 2.0).times["arrival_to_estimate"].percentile(50)
    assert 0 <= half_ms < 10_000


def plane(number: int, level: int | None, *, well: str | None = None) -> dict[str, Any]:
    """Return a row of ``classify``."""
    um = None if level is None else 1.5 * level
    known = {"level": level, "defocus_um": um, "signed": True, "confidence": 0.8}
    return {
        **{"path": f"f{number}.tif", "name": f"f{number}", "plate": None, "well": well},
        **{"index": {"t": 0, "c": 0, "z": 0}, "estimate": known},
    }


def test_a_few_planes_are_told_one_by_one_and_not_twice() -> None:
    rows = [plane(0, -2), plane(1, None)]
    assert list(told_of(Findings(rows, []), each=True)) == [
        "f0.tif (f0 t0 c0 z0): level -2, -3.0 um (80% sure)",
        "f1.tif (f1 t0 c0 z0): background",
    ]
    assert not list(told_of(Findings(rows, []), each=False))


def test_of_many_planes_the_farthest_from_focus_are_told() -> None:
    levels = [0] * 25 + [None] * 3 + list(range(-6, 7))
    rows = [plane(n, level, well="B3") for n, level in enumerate(levels)]
    rows += [plane(50, 9, well="C12"), {**plane(51, 1), "estimate": None}]
    head, title, *worst, wells, more = told_of(Findings(rows, []), each=True)
    assert head == (
        "43 planes: 13 out of focus, 26 in focus, 3 background, 1 without an estimate"
    )
    assert title == "farthest from focus, 10 of 13:"
    assert len(worst) == 10
    assert worst[0] == "  f50.tif (f50 t0 c0 z0): level 9, +13.5 um (80% sure)"
    assert "level -6" in worst[1]
    assert "level 6" in worst[2]
    assert wells == "wells with most planes out of focus: B3 12 of 41, C12 1 of 1"
    two = [{**row, "plate": f"p{n % 2}"} for n, row in enumerate(rows) if row["well"]]
    assert "of focus: p0 B3 6 of 21, p1 B3 6 of 20, p1 C12 1 of 1" in " ".join(
        told_of(Findings(two, []), each=True)
    )
    assert more == "every plane: --csv FILE.csv"
    assert [head, title] == list(told_of(Findings(rows, []), each=False))[:2]
    assert "--csv" not in " ".join(told_of(Findings(rows, []), each=False))
