"""Display: a run as one screen on a terminal, as plain lines elsewhere.

``NO_COLOR`` turns the colours off, as everywhere in rich.
"""

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rtfocus.frame import Estimate

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from rtfocus.batch.findings import Findings
    from rtfocus.monitor import Monitor

REFRESH_S = 0.25
LINE_S = 2.0
"""Interval of plain lines where there is no terminal."""

Rows = list[tuple[str, str]]

_STEPS = "▁▂▃▄▅▆▇█"
_WIDEST = 72
"""Characters of a sparkline; wider ones are harder to read."""
_SOON_S = 600.0
_MOST_PLANES_TOLD, _WORST = 40, 10
"""Planes that get a line each; of more there is a summary."""


@contextmanager
def display(
    rows: Callable[[], Rows],
    *,
    quiet: bool,
    monitor: "Callable[[], Monitor | None]" = lambda: None,
) -> Iterator[None]:
    """Show `rows` until the block ends, on standard error.

    Parameters
    ----------
    rows
        What is going on: names and values.
    quiet
        Show nothing.
    monitor
        Of the run, where there is one: a terminal shows its course too.
    """
    if quiet:
        yield
        return
    done = threading.Event()
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    thread = threading.Thread(
        target=(lambda: _show_screen(rows, monitor, done))
        if is_terminal
        else (lambda: _show_lines(rows, done)),
        name="display",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def display_run(*, quiet: bool) -> "Iterator[Callable[[Monitor], None]]":
    """Show a run until the block ends; yields what takes its newest monitor."""
    monitors: list[Monitor] = []

    def newest() -> "Monitor | None":
        return monitors[-1] if monitors else None

    with display(lambda: processor_rows(newest()), quiet=quiet, monitor=newest):
        yield monitors.append


def _show_screen(
    rows: Callable[[], Rows],
    monitor: "Callable[[], Monitor | None]",
    done: threading.Event,
) -> None:
    # Takes long to import, and most runs of a script have no terminal.
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not done.wait(REFRESH_S):
            live.update(screen(rows(), monitor(), console), refresh=True)


def screen(
    rows: Rows, monitor: "Monitor | None", console: "Console"
) -> "RenderableType":
    """Return one screen: how far the run is, its numbers, and their course."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in rows:
        table.add_row(name, Text(value, style=_style(name, monitor)))
    if monitor is None or monitor.series is None:
        return table
    width = max(8, min(console.width - 42, _WIDEST))
    for name, line in _courses(monitor, width):
        table.add_row(name, Text(line, style="cyan"))
    if monitor.planned is None:
        return table
    written = monitor.accounting.written
    head = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(monitor.planned, 1), completed=written, width=width)
    head.add_row(bar, f"{written}/{monitor.planned}", _left(monitor))
    return Group(head, table)


def as_written(value: object) -> str:
    """Write lists and maps as people do, and words as they are.

    Examples
    --------
    >>> as_written({"by": "O'Hara [lab]", "seeds": [1, 2]})
    "(by: O'Hara [lab], seeds: 1, 2)"
    """
    if isinstance(value, Mapping):
        entries = ", ".join(f"{key}: {as_written(one)}" for key, one in value.items())
        return f"({entries})"
    if isinstance(value, list | tuple):
        return ", ".join(map(as_written, value))
    return str(value)


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw values as `width` blocks at most, the lowest and highest as the ends.

    Neighbours that share a block are averaged; a space: nothing is known.

    Examples
    --------
    >>> sparkline([0.0, 1.0, None, 2.0, 7.0], 5)
    '▁▂ ▃█'
    """
    count = min(width, len(values))
    ends = [len(values) * n // max(count, 1) for n in range(count + 1)]
    groups = [
        [v for v in values[low:high] if v is not None and math.isfinite(v)]
        for low, high in pairwise(ends)
    ]
    means = [sum(group) / len(group) if group else None for group in groups]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * count
    low, span = min(known), max(known) - min(known)
    most = len(_STEPS) - 1
    return "".join(
        " " if mean is None else _STEPS[round(most * (mean - low) / (span or 1.0))]
        for mean in means
    )


def _courses(monitor: "Monitor", width: int) -> Iterator[tuple[str, str]]:
    """Yield the course of defocus and latency over the last estimates."""
    _, samples = monitor.estimates_since(0)
    for name, unit, values in (
        ("defocus course", "um", [sample.defocus_um for sample in samples]),
        ("latency course", "ms", [sample.latency_ms for sample in samples]),
    ):
        known = [value for value in values if value is not None]
        if known:
            line = sparkline(values, width)
            yield name, f"{line}  {min(known):.3g} to {max(known):.3g} {unit}"


def _left(monitor: "Monitor") -> str:
    rate, planned = monitor.frames_per_s, monitor.planned or 0
    if rate <= 0:
        return ""
    seconds = (planned - monitor.accounting.written) / rate
    return f"{_duration(seconds)} left" if seconds > 0 else ""


def _style(name: str, monitor: "Monitor | None") -> str:
    """Return how a value is written: what needs attention stands out."""
    if monitor is None:
        return ""
    if name == "lost" and (monitor.accounting.dropped or monitor.accounting.in_error):
        return "bold red"
    left_s = monitor.time_to_full_s
    if name == "disk full in" and left_s is not None and left_s < _SOON_S:
        return "bold yellow"
    return ""


@contextmanager
def share_bar(what: str) -> Iterator[Callable[[float], None]]:
    """Show a bar with the time left on a terminal; yields what takes the share done."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda share: progress.update(task, completed=share)


@contextmanager
def counting(
    what: str, total: int | None, done: int = 0
) -> Iterator[Callable[..., None]]:
    """Show a bar with the time left on a terminal; yields what takes one more.

    A line that comes with it is written to standard error. `total` None: nobody knows
    how many there are, and so no time left.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda line=None: None if line is None else print(line, file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done)

        def show(line: str | None = None) -> None:
            if line is not None:
                progress.console.print(
                    line, highlight=False, markup=False, soft_wrap=True
                )
            progress.advance(task)

        yield show


@contextmanager
def passing_time(what: str) -> Iterator[None]:
    """Show on a terminal what is going on, and since when, where its end is unknown."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def _show_lines(rows: Callable[[], Rows], done: threading.Event) -> None:
    while not done.wait(LINE_S):
        clock = time.strftime("%H:%M:%S")
        text = "  ".join(f"{name} {value}" for name, value in rows())
        if sys.stderr is not None:
            sys.stderr.write(f"{clock}  {text}\n")
            sys.stderr.flush()


def processor_rows(monitor: "Monitor | None") -> Rows:
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
        ("defocus known", _percentiles(monitor, "arrival_to_estimate")),
        ("saved", _percentiles(monitor, "arrival_to_durable")),
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


def _percentiles(monitor: "Monitor", stage: str) -> str:
    histogram = monitor.times[stage]
    half, most = histogram.percentile(50), histogram.percentile(99)
    if half is None or most is None:
        return "-"
    return f"after {half:.0f} ms, 99 % within {most:.0f} ms"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds > 48 * 3600:
        return f"{seconds / 86400:.0f} days"
    if seconds > 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def told_of(findings: "Findings", *, each: bool) -> Iterator[str]:
    """Say, line by line, what ``classify`` found in planes and in stacks.

    Parameters
    ----------
    findings
        As in its JSON.
    each
        Say it of every plane, unless they are many: then how many are out of focus,
        and which are the farthest from it.
    """
    yield from _plane_lines(findings.planes, each=each)
    yield from _stack_lines(findings.stacks, each=each)


def _plane_lines(rows: Sequence[Mapping[str, Any]], *, each: bool) -> Iterator[str]:
    if len(rows) <= _MOST_PLANES_TOLD:
        yield from (_plane_line(row) for row in rows if each)
        return
    estimated = [row for row in rows if row["estimate"] is not None]
    off = [row for row in estimated if row["estimate"]["level"]]
    counts = {
        "out of focus": len(off),
        "in focus": sum(row["estimate"]["level"] == 0 for row in estimated),
        "background": sum(row["estimate"]["level"] is None for row in estimated),
        "without an estimate": len(rows) - len(estimated),
    }
    known = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    yield f"{len(rows)} planes: {known}"
    if off:
        off.sort(key=lambda row: -abs(row["estimate"]["defocus_um"]))
        yield f"farthest from focus, {min(len(off), _WORST)} of {len(off)}:"
        yield from (f"  {_plane_line(row)}" for row in off[:_WORST])
    yield from _worst_wells(off, rows)
    if each:
        yield "every plane: --csv FILE.csv"


def _stack_lines(stacks: Sequence[Mapping[str, Any]], *, each: bool) -> Iterator[str]:
    """Say where focus lies in every stack; of many how many have it where."""
    if len(stacks) <= _MOST_PLANES_TOLD:
        yield from map(_stack_line, stacks)
        return
    counts = Counter(stack["place"] for stack in stacks)
    within, unknown = counts.pop("within", 0), counts.pop("unknown", 0)
    yield (
        f"{len(stacks)} z-stacks: in focus within {within}, at an end or beyond "
        f"{counts.total()}, not known of {unknown}"
    )
    if each:
        yield "every stack: --json FILE"


def _stack_line(stack: Mapping[str, Any]) -> str:
    index = " ".join(f"{axis}{n}" for axis, n in stack["index"].items())
    last = stack["planes"] - 1
    low, high = stack["likely"]
    if stack["place"] == "within":
        um = stack["focus_offset_um"]
        beyond = "" if um is None else f", {um:.4g} um from the first"
        if um is not None and (rises := stack["z_rises"]) is not None:
            beyond += f" towards {'higher' if rises else 'lower'} z"
        text = f"in focus at plane {stack['focus_plane']:.1f} of 0 to {last}{beyond}"
        text += f" (likely {max(low, 0):.1f} to {min(high, last):.1f})"
    elif stack["place"] == "below":
        text = f"in focus at its first planes, to {high:.1f} of {last}, or before them"
    elif stack["place"] == "above":
        text = f"in focus at its last planes, from {low:.1f} of {last}, or after them"
    else:
        text = f"where it is in focus is not known: {stack['why']}"
    if stack["assumed"]:
        text = f"if its planes are a z-stack: {text}"
    return f"{stack['path']} ({stack['name']} {index}): {text}"


def _worst_wells(
    off: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Name the wells with most planes out of focus; with their plates, if several."""
    keys = ("plate", "well") if len({row["plate"] for row in rows}) > 1 else ("well",)
    of_off, of_all = (
        Counter(" ".join(row[key] for key in keys) for row in some if row["well"])
        for some in (off, rows)
    )
    if of_off:
        worst = of_off.most_common(_WORST)
        named = ", ".join(f"{well} {n} of {of_all[well]}" for well, n in worst)
        yield f"wells with most planes out of focus: {named}"


def _plane_line(row: Mapping[str, Any]) -> str:
    index = " ".join(f"{axis}{n}" for axis, n in row["index"].items())
    return f"{row['path']} ({row['name']} {index}): {_in_words(row['estimate'])}"


def _in_words(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "no estimate"
    if estimate["level"] is None:
        return "background"
    distance = f"{estimate['defocus_um']:+.1f} um"
    if not estimate["signed"]:
        distance = f"{estimate['defocus_um']:.1f} um from focus"
    return f"level {estimate['level']}, {distance} ({estimate['confidence']:.0%} sure)"
