"""Display: a live table on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rtfocus.frame import Estimate
from rtfocus.monitor import Monitor

REFRESH_S = 0.25
LINE_S = 2.0
"""Interval of plain lines where there is no terminal."""

Rows = list[tuple[str, str]]


@contextmanager
def display(rows: Callable[[], Rows], *, quiet: bool) -> Iterator[None]:
    """Show `rows` until the block ends; lines on standard error without a terminal."""
    if quiet:
        yield
        return
    console = Console(stderr=True)
    done = threading.Event()
    show = _show_table if console.is_terminal else _show_lines
    thread = threading.Thread(
        target=show, args=(console, rows, done), name="display", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show_table(
    console: Console, rows: Callable[[], Rows], done: threading.Event
) -> None:
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not done.wait(REFRESH_S):
            table = Table.grid(padding=(0, 2))
            for name, value in rows():
                table.add_row(f"[dim]{name}[/]", value)
            live.update(table, refresh=True)


def _show_lines(
    console: Console, rows: Callable[[], Rows], done: threading.Event
) -> None:
    while not done.wait(LINE_S):
        clock = time.strftime("%H:%M:%S")
        text = "  ".join(f"{name} {value}" for name, value in rows())
        console.print(f"{clock}  {text}", markup=False, highlight=False, soft_wrap=True)


def processor_rows(monitor: Monitor | None) -> Rows:
    """Return what a run is doing, a line each."""
    if monitor is None or monitor.series is None:
        return [("state", "waiting for the microscope side")]
    accounting = monitor.accounting
    lost = sum(accounting.dropped.values()) + sum(accounting.in_error.values())
    return [
        ("frames", f"{accounting.written} written of {accounting.acquired} acquired"),
        ("frames/s", f"{monitor.frames_per_s:.1f}"),
        ("defocus", defocus_text(monitor.estimate)),
        *([("autofocus", monitor.focus)] if monitor.focus else []),
        ("estimate", _percentiles(monitor, "arrival_to_estimate")),
        ("durable", _percentiles(monitor, "arrival_to_durable")),
        ("free slots", f"{monitor.free_slots}/{monitor.slots}"),
        (
            "queues",
            " ".join(f"{q.name} {len(q)}/{q.capacity}" for q in monitor.queues),
        ),
        ("lost", str(lost)),
        ("disk full in", _duration(monitor.time_to_full_s)),
    ]


def defocus_text(estimate: Estimate | None) -> str:
    """Return an estimate in one line."""
    if estimate is None:
        return "-"
    where = "" if estimate.z_um is None else f" at z {estimate.z_um:.2f} um"
    if estimate.defocus_um is None:
        return f"background{where}"
    sign = "" if estimate.signed else "|dz| "
    return (
        f"{sign}{estimate.defocus_um:.1f} um ({100 * estimate.confidence:.0f} %){where}"
    )


def _percentiles(monitor: Monitor, stage: str) -> str:
    histogram = monitor.times[stage]
    half, most = histogram.percentile(50), histogram.percentile(99)
    return "-" if half is None or most is None else f"p50 {half:.0f} p99 {most:.0f} ms"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds > 48 * 3600:
        return f"{seconds / 86400:.0f} days"
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min"
