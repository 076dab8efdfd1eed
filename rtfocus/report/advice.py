"""Advice: what went wrong or is doubtful in a run, each with what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rtfocus.report.facts import RunFacts

_FAR_UNITS = 3.0
"""Depths of field: where half of the frames lie farther away, focus was not kept."""
_SHARE_FLAGGED = 0.01
_MOST_REASONS = 8
_AS_CONFIGURED = ("method is none", "no classifier is configured", "in the config")
"""Ends of reasons why frames are not restored that somebody wanted."""
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
    told = [
        (reason, number)
        for reason, number in facts.reasons.most_common()
        if not reason.endswith(_AS_CONFIGURED)
    ]
    for reason, number in told[:_MOST_REASONS]:
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
        "nan": ("have pixels that are no number", "look at the camera's output"),
    }
    for flag, number in facts.flags.items():
        said, remedy = texts.get(flag, (f"are marked '{flag}'", ""))
        if number / frames >= _SHARE_FLAGGED or flag == "nan":
            yield Advice(f"{number * facts.every} frames {said}", remedy)


def _of_focus(facts: RunFacts) -> Iterator[Advice]:
    failed = [line for line in facts.focus_log if line.get("kind") == "failure"]
    if failed:
        why = failed[-1].get("reason", "no reason given")
        yield Advice(
            f"{len(failed)} searches for focus failed, the last: {why}",
            "rtfocus calibrate checks autofocus on this microscope",
        )
    known = np.abs(facts.defocus_um[np.isfinite(facts.defocus_um)])
    optics = next((c.optics for c in facts.header.series.channels if c.optics), None)
    one_plane = facts.header.series.sizes.get("z", 1) == 1
    if optics is None or not known.size or not one_plane:
        return
    middle = float(np.median(known))
    if middle > _FAR_UNITS * optics.defocus_unit_um:
        yield Advice(
            f"half of the frames lie farther than {middle:.1f} um from focus "
            f"(depth of field {optics.defocus_unit_um:.1f} um)",
            "rtfocus autofocus finds focus before a run, autofocus.mode: hold keeps it",
        )
