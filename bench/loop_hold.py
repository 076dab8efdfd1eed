"""Loop hold: how long from an exposure to the command of a stage that holds focus.

The specimen drifts, the camera runs freely and rtfocus holds focus: first at the
highest rate, then at 80 % of it, where every frame's way from the end of its exposure
to the command of the z-stage is timed place by place.

    python -m bench.loop_hold [--frames 600] [--set microscope.height_px=1024 ...]
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench import machine
from bench.loop import CONFIG
from rtfocus.autofocus.focuser import FocusJournal
from rtfocus.autofocus.hold import Correction
from rtfocus.config import Config, load_config
from rtfocus.config.sections import VirtualMicroscopeConfig
from rtfocus.focusing import Focusing
from rtfocus.frame import Estimate, FrameHeader, Role
from rtfocus.holding import LiveHold
from rtfocus.launch import SideProcess, on_free_ports
from rtfocus.microscope.acquisition import acquire
from rtfocus.microscope.core import open_core
from rtfocus.microscope.virtual_specimen import drift_um
from rtfocus.transport.publisher import FramePublisher

HOLD = (
    "autofocus={mode: hold, low_um: -50, high_um: 200}",
    "microscope.surface={z_um: 5.0, drift_um_per_min: 120.0, drift_from_s: 4.0}",
    "channels.0.optics.aberrations.spherical_waves=-0.2",
)
"""Overrides of a held run: it drifts 0.6 depths of field/s, for many commands."""


class TimedFocusing(Focusing):
    """Notes when each frame of a held live run was where.

    Times are Unix ns by the end of the frame's exposure, which tells frames apart.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.frames: dict[int, FrameHeader] = {}
        self.times: dict[str, dict[int, int]] = {
            place: {} for place in ("sent", "looked", "heard", "decided", "commanded")
        }
        self._moving: int | None = None

    def sent(self, header: FrameHeader) -> None:
        """Note a frame that was handed to the publisher."""
        self.frames[header.captured_ns] = header
        self.times["sent"][header.captured_ns] = time.time_ns()

    def heard(self, estimate: Estimate) -> None:
        """Note an estimate that came back, and pass it on."""
        if estimate.is_early:
            self.times["looked"].setdefault(estimate.captured_ns, estimate.estimated_ns)
            self.times["heard"].setdefault(estimate.captured_ns, time.time_ns())
        self.inbox.take(estimate)

    def commanded(self, *_: object) -> None:
        """Note a command of the z-stage."""
        if self._moving is not None:
            self.times["commanded"].setdefault(self._moving, time.time_ns())
            self._moving = None

    def _note(self, journal: FocusJournal, correction: Correction) -> None:
        """Note the first decision that took a frame into account."""
        decided = self.times["decided"]
        if correction.captured_ns not in decided:
            decided[correction.captured_ns] = time.time_ns()
            self._moving = correction.captured_ns if correction.step_um else None
        super()._note(journal, correction)


PLACES = ("sent", "received", "looked", "heard", "decided", "commanded")


def hold_once(config: Config, folder: Path) -> dict[str, Any]:
    """Hold one live run, its processor in another process; return what it was like."""
    run = config.run.model_copy(update={"folder": folder})
    config = on_free_ports(config.model_copy(update={"run": run}))
    focusing = TimedFocusing(config)
    with (
        SideProcess(config, "process") as side,
        FramePublisher(config.transport, on_estimate=focusing.heard) as publisher,
        open_core(config) as core,
    ):
        core.events.stagePositionChanged.connect(focusing.commanded)
        acquire(
            config,
            publisher,
            stop=threading.Event(),
            core=core,
            on_frame=focusing.sent,
            make_hold=lambda core: LiveHold(focusing, core),
        )
    if side.failed():
        raise SystemExit(side.said)
    (report,) = folder.glob("*.rtfocus/report.json")
    lines = (report.parent / "frames.ndjson").read_text("utf-8").splitlines()
    arrived = {
        line["captured_ns"]: line["received_ns"] for line in map(json.loads, lines)
    }
    focusing.times["received"] = arrived
    found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    recorded = [ns for ns, f in focusing.frames.items() if f.role is Role.RECORD]
    return found | {
        "frames_per_s": (len(recorded) - 1) * 1e9 / (recorded[-1] - recorded[0]),
        "ways_ms": ways_ms(focusing),
        "off": off_focus(config, focusing),
    }


def ways_ms(focusing: TimedFocusing) -> dict[str, list[float]]:
    """Return how long frames took to each place from the one before, and in all, ms."""
    ways: dict[str, list[float]] = {place: [] for place in PLACES}
    whole: dict[str, list[float]] = {"to decision": [], "to command": []}
    for captured_ns in focusing.times["decided"]:
        if captured_ns not in focusing.frames:
            continue
        before_ns = captured_ns
        for place in PLACES:
            at_ns = focusing.times[place].get(captured_ns)
            if at_ns is not None:
                ways[place].append((at_ns - before_ns) / 1e6)
                before_ns = at_ns
        decided_ns = focusing.times["decided"][captured_ns]
        whole["to decision"].append((decided_ns - captured_ns) / 1e6)
        if captured_ns in focusing.times["commanded"]:
            whole["to command"].append((before_ns - captured_ns) / 1e6)
    return ways | whole


def off_focus(config: Config, focusing: TimedFocusing) -> list[float]:
    """Return how far every frame was from focus, in depths of field; it is not told."""
    optics, microscope = config.channels[0].optics, config.microscope
    assert optics is not None
    assert isinstance(microscope, VirtualMicroscopeConfig)
    begun_ns = min(focusing.frames)
    surface = microscope.surface
    return [
        (surface.z_um + drift_um(surface, (captured_ns - begun_ns) / 1e9) - frame.z_um)
        / optics.defocus_unit_um
        for captured_ns, frame in focusing.frames.items()
        if frame.role is Role.RECORD and frame.z_um is not None
    ]


def percentiles(values: list[float]) -> dict[str, float]:
    """Return how many there are, p50, p95, p99 and the largest."""
    if not values:
        return {"count": 0}
    shares = {f"p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)}
    return {"count": len(values), **shares, "max": max(values)}


def measure_hold(options: argparse.Namespace, frames: int) -> dict[str, Any]:
    """Hold at the highest rate, then at 80 % of it; print and return the figures."""
    live = f"acquisition.live={{frames: {frames}, exposure_ms: 1}}"
    settings = ["acquisition.mda=null", live, *HOLD, *options.set]
    with tempfile.TemporaryDirectory() as folder:
        fast = hold_once(load_config(CONFIG, settings), Path(folder) / "fast")
        rate = fast["frames_per_s"]
        paced = [*settings, f"microscope.frames_per_s={0.8 * rate:.2f}"]
        slow = hold_once(load_config(CONFIG, paced), Path(folder) / "slow")
    found = {
        "frames_per_s": rate,
        "load_1min": [round(load, 2) for load in psutil.getloadavg()],
        "at_80_percent": {
            "frames_per_s": slow["frames_per_s"],
            "accounting": slow["accounting"],
            "held": slow["held"],
            "classified_ms": slow["stages"]["arrival_to_estimate"],
            "ms": {name: percentiles(ms) for name, ms in slow["ways_ms"].items()},
            "depths_of_field": percentiles(np.abs(slow["off"]).tolist())
            | {"mean": float(np.mean(np.abs(slow["off"])))},
        },
    }
    print(json.dumps(found, indent=1))
    return found


def main() -> None:
    """Hold twice, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--smoke", action="store_true", help="a few frames only")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--set", action="append", default=[], help="config override")
    options = parser.parse_args()
    frames = 60 if options.smoke else options.frames
    machine.write("loop_hold", measure_hold(options, frames), options.out)


if __name__ == "__main__":
    main()
