"""Page: ``report.html``, one file that needs no other and no network.

It begins with advice: what went wrong or is doubtful in a run, and what to do about it.
"""

import html
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rtfocus import __version__
from rtfocus.channel import FOCUS_LOST_UNITS
from rtfocus.drawing.canvas import in_html
from rtfocus.errors import RtfocusError, WriterError, writing
from rtfocus.files import replace
from rtfocus.metrics import STEPS, accounting_in_words, plan_in_words
from rtfocus.report.facts import (
    RunFacts,
    read_facts,
    shown_frames,
    throughput_in_words,
)
from rtfocus.report.pictures import (
    frame_pictures,
    histogram_chart,
    latency_chart,
    searches_failed,
    trace_charts,
)
from rtfocus.writers.header import REPORT_NAME, is_finished, series_in_words

_SHARE_FLAGGED = 0.01
_MOST_REASONS = 8
_AS_CONFIGURED = ("method is none", "no classifier is configured", "in the config")
"""Ends of the reasons, chosen in the config, why frames are not restored."""
_SLOW_MS, _SLOW_TIMES = 1000.0, 5.0
"""Frames that wait so long, and so much longer than their own work takes."""
_WORK = ("correct", "normalise", "classify", "restore")

_REMEDIES = {
    "camera_lost": (
        "raise microscope.sequence_buffer_mb, or expose slower than "
        "the camera's own buffer fills"
    ),
    "gap": (
        "they were gone before the processor had them: keep the processor running, "
        "or raise transport.slots and transport.memory_mb"
    ),
    "stall": (
        "the processor was too slow for longer than transport.stall_timeout_s: "
        "set transport.on_stall to wait or raw_only, or restore afterwards"
    ),
    "restart": "the microscope side began anew; begin a new series after a restart",
    "aborted": "the run ended while they were under way; see how it ended above",
    "store": "free space on the disk, or write to another: run.folder",
}


@dataclass(frozen=True, slots=True)
class Advice:
    """One line of the page."""

    found: str
    remedy: str = ""


def advice(facts: RunFacts) -> list[Advice]:
    """Return what a person should know of a run, the gravest first."""
    return [
        *_of_the_end(facts),
        *_of_losses(facts.accounting),
        *_of_the_microscope(facts),
        *_of_speed(facts),
        *_of_pixels(facts),
        *_of_focus(facts),
    ]


def _of_the_end(facts: RunFacts) -> Iterator[Advice]:
    report, folder = facts.report, facts.folder
    mend = f"rtfocus check {folder.name} --repair"
    if report is None and is_finished(folder):
        yield Advice(f"{REPORT_NAME} is damaged; the run is told as unfinished", mend)
        return
    if report is None:
        yield Advice(
            "the run is not finished: it is being recorded, or was cut off",
            f"if nothing records it any more: {mend}",
        )
        return
    if error := report.get("write_error"):
        yield Advice(f"writing failed: {error}", f"free space, then {mend}")
    outcome = facts.outcome
    if outcome is not None and not outcome.is_complete:
        again = "" if outcome.was_stopped else "what is written is sound; see below"
        yield Advice(str(outcome), again)
    if unknown := facts.accounting.get("unaccounted"):
        yield Advice(f"{unknown} frames are unaccounted for", f"run {mend}")
    if facts.damaged_lines:
        yield Advice(f"{facts.damaged_lines} lines of the journal are damaged", mend)
    if aside := report.get("set_aside"):
        yield Advice(
            f"shards that no line of the journal names were moved to {aside}",
            "nothing is deleted; look there if a frame is missed",
        )


def _of_losses(terms: dict[str, Any]) -> Iterator[Advice]:
    if lost := terms.get("camera_lost"):
        yield Advice(f"{lost} images were lost by the camera", _REMEDIES["camera_lost"])
    for name, word in (("dropped", "dropped"), ("in_error", "in error")):
        for place, number in terms[name].items():
            yield Advice(f"{number} frames {word} ({place})", _REMEDIES.get(place, ""))
    rejected = sum(terms.get("rejected_messages", {}).values())
    if rejected:
        kinds = ", ".join(terms["rejected_messages"])
        yield Advice(
            f"{rejected} messages were no frames and were refused ({kinds})",
            "another program may send to the same port",
        )


def _of_the_microscope(facts: RunFacts) -> Iterator[Advice]:
    for text in (facts.report or {}).get("warnings", ()):
        yield Advice(f"microscope side: {text}")
    reasons = [
        (reason, number)
        for reason, number in facts.reasons.most_common()
        if not reason.endswith(_AS_CONFIGURED)
    ]
    for reason, number in reasons[:_MOST_REASONS]:
        raw_only = "stored raw: restore them with rtfocus restore RUN/raw.ome.zarr"
        remedy = raw_only if reason.startswith("raw_only") else ""
        yield Advice(f"{number * facts.every} frames: {reason}", remedy)


def _of_speed(facts: RunFacts) -> Iterator[Advice]:
    """Tell when frames queued: the loop was slower than the camera."""
    stages = (facts.report or {}).get("stages", {})
    work_ms = sum((stages.get(name) or {}).get("p50_ms") or 0.0 for name in _WORK)
    waited_ms = (stages.get("arrival_to_durable") or {}).get("p95_ms") or 0.0
    if waited_ms > max(_SLOW_MS, _SLOW_TIMES * work_ms):
        yield Advice(
            f"frames waited up to {waited_ms / 1e3:.1f} s for {work_ms:.0f} ms of work",
            "nothing is lost by it; a faster engine, a GPU, or fewer frames per second",
        )


def _of_pixels(facts: RunFacts) -> Iterator[Advice]:
    frames = max(len(facts.frames), 1)
    texts = {
        "saturated": (
            "have saturated pixels",
            "expose shorter or with less light: what is saturated cannot be restored",
        ),
        "below_offset": (
            "lie mostly below camera.offset_counts and are taken for dark",
            "give the counts of an image taken in the dark; restore RUN/raw.ome.zarr",
        ),
        "nan": ("have pixels that are no number", "look at the camera's output"),
    }
    for flag, number in facts.flags.items():
        said, remedy = texts.get(flag, (f"are marked '{flag}'", ""))
        if number / frames >= _SHARE_FLAGGED or flag == "nan":
            yield Advice(f"{number * facts.every} frames {said}", remedy)


def _of_focus(facts: RunFacts) -> Iterator[Advice]:
    if text := facts.left_out_by_hold:
        yield Advice(text, "no harm: those looked at show a drift soon enough")
    failed = searches_failed(facts.focus_log)
    if failed:
        why = failed[-1].reason
        yield Advice(
            f"searches for focus that failed: {len(failed)}, the last: {why}",
            "rtfocus calibrate checks autofocus on this microscope",
        )
    known = np.abs(facts.defocus_um[np.isfinite(facts.defocus_um)])
    optics = next((c.optics for c in facts.header.series.channels if c.optics), None)
    one_plane = facts.header.series.sizes.get("z", 1) == 1
    if optics is None or not known.size or not one_plane:
        return
    middle = float(np.median(known))
    if middle > FOCUS_LOST_UNITS * optics.defocus_unit_um:
        yield Advice(
            f"half of the frames lie farther than {middle:.1f} um from focus "
            f"(depth of field {optics.defocus_unit_um:.1f} um)",
            "rtfocus autofocus finds focus before a run, autofocus.mode: hold keeps it",
        )


PAGE_NAME = "report.html"
MOST_WAIT_S = 10.0
"""How long the end of a run waits for its page; a slow disk makes it later."""

logger = logging.getLogger(__name__)

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:0 auto;padding:1.2rem}
h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .2rem}
table{border-collapse:collapse;margin:.4rem 0}
td,th{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
th{font-weight:600}tr+tr td{border-top:1px solid var(--line)}
svg{max-width:100%;height:auto;font-family:system-ui,sans-serif}
pre{background:var(--soft);padding:.8rem;overflow-x:auto;font-size:13px}
.badge{display:inline-block;padding:.1rem .6rem;border-radius:.8rem;color:#fff}
.good{background:#00734f}.bad{background:#b03a00}.open{background:#555}
.sum{font-size:1.05rem;background:var(--soft);padding:.6rem .8rem;border-radius:.4rem}
.faint{opacity:.75}
li{margin:.3rem 0}.remedy{display:block;opacity:.85}
"""
_MARK = '<meta name="generator" content="rtfocus">'
"""By which a page is known as ours."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_page(folder: Path) -> Path:
    """Make the page of a run folder, finished or not; an earlier one is replaced.

    Raises
    ------
    WriterError
        If the folder is no run folder, or the page cannot be written.
    """
    text = page(read_facts(folder))
    path = folder / PAGE_NAME
    part = folder / f".{PAGE_NAME}.part"
    try:
        with writing(path, WriterError):
            if path.exists() and _MARK not in path.read_text("utf-8", errors="replace"):
                msg = f"'{path}' is no page of rtfocus; move or rename it"
                raise WriterError(msg)
            part.write_text(text, "utf-8")
            replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def leave_page(folder: Path) -> None:
    """Make the page at the end of a run: bounded in time, and no failure of it.

    What goes wrong is a warning in the log, with the command that makes it anew.
    """
    again = f"make it with: rtfocus report {folder}"

    def make() -> None:
        try:
            write_page(folder)
        # Whatever it is, the run itself is sound.
        except Exception as error:
            reason = error if isinstance(error, RtfocusError) else repr(error)
            logger.warning("%s is not written (%s); %s", PAGE_NAME, reason, again)

    thread = threading.Thread(target=make, name="report", daemon=True)
    thread.start()
    thread.join(MOST_WAIT_S)
    if thread.is_alive():
        logger.warning("%s takes longer than %g s; %s", PAGE_NAME, MOST_WAIT_S, again)


def page(facts: RunFacts) -> str:
    """Return the page as HTML."""
    name = in_html(facts.folder.name)
    frames = shown_frames(facts)
    sections = [
        ("What to know", _advice(facts)),
        ("What became of the frames", _losses(facts)),
        ("What ran", _engines(facts)),
        ("Before and after", frame_pictures(facts, frames)),
        ("Focus over time", trace_charts(facts)),
        ("Defocus found", histogram_chart(facts)),
        ("Time of every step", _stages(facts)),
        ("Config", _config(facts)),
    ]
    body = "".join(f"<h2>{title}</h2>{text}" for title, text in sections if text)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{_MARK}<title>{name}</title><style>{_STYLE}</style></head><body>"
        f"{_head(facts)}{body}{_foot(facts)}</body></html>\n"
    )


def _head(facts: RunFacts) -> str:
    outcome, series = facts.outcome, facts.header.series
    if outcome is None:
        badge, words = "open", "not finished"
    else:
        badge = "good" if outcome.is_complete else "bad"
        words = "completed" if outcome.is_plain else str(outcome)
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(series.started_ns / 1e9))
    about = f"frames of {series_in_words(series)}"
    return (
        f"<h1>{in_html(facts.folder.name)}</h1>"
        f'<p><span class="badge {badge}">{in_html(words)}</span></p>'
        f'<p class="faint">began {began}; {in_html(about)}</p>'
    )


def _advice(facts: RunFacts) -> str:
    lines = advice(facts)
    if not lines:
        return "<p>Nothing went wrong, and nothing is doubtful.</p>"
    items = (
        f"<li>{in_html(line.found)}"
        + (
            f'<span class="remedy">→ {in_html(line.remedy)}</span>'
            if line.remedy
            else ""
        )
        + "</li>"
        for line in lines
    )
    return f"<ul>{''.join(items)}</ul>"


def _losses(facts: RunFacts) -> str:
    """Spell the loss identity out, every term with its place."""
    terms = facts.accounting
    rows = [("written", "", terms["written"]), ("focus probes", "", terms["focus"])]
    for key, word in (("dropped", "dropped"), ("in_error", "in error")):
        rows += [(word, place, number) for place, number in terms[key].items()]
    plan = ""
    if terms.get("planned") is not None and facts.report is not None:
        plan = f"{plan_in_words(terms)}<br>"
    sampled = ""
    if facts.every > 1:
        sampled = (
            f'<p class="faint">The journal is long: charts show every '
            f"{facts.every}th frame.</p>"
        )
    return (
        f'<p class="sum">{plan}{in_html(accounting_in_words(terms))}</p>'
        + _table(
            ("what", "where", "frames"), [row for row in rows if row[2]], numbers=1
        )
        + sampled
    )


def _engines(facts: RunFacts) -> str:
    report = facts.report or {}
    rows = [
        (channel, ", ".join(f"{name} ({n * facts.every})" for name, n in used.items()))
        for channel, used in facts.engines.items()
    ]
    text = _table(("channel", "engines (frames)"), rows) + in_html(facts.errors_said)
    backends = [(name, where) for name, where in report.get("backends", {}).items()]
    text += _table(("engine", "runs on"), backends)
    devices = [(name, str(n)) for name, n in report.get("devices", {}).items()]
    if len(devices) > 1:
        text += _table(("device", "frames"), devices, numbers=1)
    ways = [(way, str(n)) for way, n in report.get("came_by", {}).items()]
    text += _table(("frames came by", "frames"), ways, numbers=1)
    return text + in_html(throughput_in_words(report) or "")


def _stages(facts: RunFacts) -> str:
    report = facts.report or {}
    keys = ("count", "p50_ms", "p95_ms", "p99_ms", "max_ms")
    rows = [
        (
            STEPS.get(name, name),
            *("-" if times.get(k) is None else _number(times[k]) for k in keys),
        )
        for name, times in report.get("stages", {}).items()
    ]
    heads = (
        "step",
        "frames",
        "median (ms)",
        "95 % within (ms)",
        "99 % within (ms)",
        "longest (ms)",
    )
    return latency_chart(report) + _table(heads, rows, numbers=5)


def _config(facts: RunFacts) -> str:
    config = facts.header.provenance.get("config")
    if not config:
        return ""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    shown = f"<pre>{html.escape(text)}</pre>"
    return f"<details><summary>as recorded</summary>{shown}</details>"


def _foot(facts: RunFacts) -> str:
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        f'<p class="faint">Made {written} by rtfocus {__version__} from the run '
        f"folder; series {html.escape(facts.header.series.series_uid)}. "
        "Made anew by: rtfocus report RUN.</p>"
    )


def _number(value: float) -> str:
    return f"{value}" if isinstance(value, int) else f"{value:.1f}"


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: int = 0
) -> str:
    """Return a table; its last `numbers` columns are aligned as numbers."""
    listed = list(rows)
    if not listed:
        return ""
    marks = [
        ' class="n"' if n >= len(heads) - numbers else "" for n in range(len(heads))
    ]
    top = "".join(
        f"<th{m}>{in_html(h)}</th>" for m, h in zip(marks, heads, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{m}>{in_html(str(v))}</td>" for m, v in zip(marks, r, strict=True)
        )
        + "</tr>"
        for r in listed
    )
    return f"<table><tr>{top}</tr>{body}</table>"
