"""Traces: the frames of a run as columns that only grow, for the plots."""

import threading
from typing import Any

from rtfocus.frame import Role

MOST_POINTS = 200_000
"""A page draws no more; a longer run is shown from here on with gaps between."""
_CHUNK = 20_000


class Traces:
    """Points by sequence, each taken once, from whichever source is first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: set[int] = set()
        self._rows: list[list[Any]] = []
        self._marks: list[list[Any]] = []
        self._keep_every = 1

    def add(
        self,
        sequence: int,
        *,
        seconds: float,
        place: tuple[int, int, int, int],
        role: str = Role.RECORD.value,
        z_um: float | None = None,
        defocus_um: float | None = None,
        confidence: float = 0.0,
    ) -> None:
        """Take a frame in; `place` is (t, p, c, z)."""
        with self._lock:
            if sequence in self._seen or sequence % self._keep_every:
                return
            self._seen.add(sequence)
            is_probe = int(role == Role.FOCUS.value)
            self._rows.append(
                [seconds, z_um, defocus_um, confidence, is_probe, *place, sequence]
            )
            if len(self._rows) >= MOST_POINTS:
                # Those drawn stay; of those to come every second one is taken.
                self._keep_every *= 2
                self._rows = self._rows[: MOST_POINTS + 1]
                if self._keep_every > 1024:
                    self._keep_every = 1 << 62

    def mark(self, kind: str, seconds: float, text: str, z_um: float | None) -> None:
        """Take an event in, as a ``move``, ``refusal``, ``verdict`` or ``loss``."""
        with self._lock:
            if len(self._marks) < MOST_POINTS:
                self._marks.append([kind, seconds, text, z_um])

    def since(self, rows: int, marks: int) -> dict[str, Any] | None:
        """Return what was added after so many rows and marks; None: nothing."""
        with self._lock:
            new = self._rows[rows : rows + _CHUNK]
            events = self._marks[marks : marks + _CHUNK]
        return {"rows": new, "marks": events} if new or events else None


def note_focus_line(traces: Traces, line: dict[str, Any], started_ns: int) -> None:
    """Take a line of ``focus.ndjson`` in, where it says something to look at."""
    try:
        seconds = (int(line["time_ns"]) - started_ns) / 1e9
        found = _mark_of(line)
    except (KeyError, TypeError, ValueError):
        # What a peer sends may lack a key or hold a text for a number.
        return
    if found is not None:
        kind, text, z_um = found
        traces.mark(kind, seconds, text, z_um)


def _mark_of(line: dict[str, Any]) -> tuple[str, str, float | None] | None:
    kind = line["kind"]
    if kind == "hold" and line["step_um"]:
        return "move", f"held {float(line['step_um']):+.2f} µm", None
    if kind == "look" and line.get("refusal"):
        return "refusal", f"refused: {line['refusal']}", float(line["z_um"])
    if kind == "look" and line.get("decision") in ("Move", "Probe"):
        way = float(line.get("way_um") or 0)
        what = "probe" if line["decision"] == "Probe" else "move"
        return what, f"{what} {way:+.2f} µm", float(line["z_um"])
    if kind == "verdict":
        good = bool(line["focused"])
        word = "focused" if good else f"not focused: {line['reason']}"
        return "verdict" if good else "refusal", word, float(line["end_um"])
    if kind == "failure":
        return "refusal", f"failed: {line['reason']}", None
    asked = f"asked for: {line['what']}".replace("_", " ") if kind == "request" else ""
    return ("request", asked, None) if asked else None
