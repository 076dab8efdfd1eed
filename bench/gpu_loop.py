"""GPU loop: the whole loop on a GPU, as fast as it goes and at a camera's rates."""

import json
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import tifffile

from rtfocus.app import run
from rtfocus.config import parse_config
from rtfocus.processing.gpu.cuda.driver import current_context, import_driver

RATES = (30.0, 100.0, 300.0)
"""Frames/s of a camera at which latency is measured through the whole loop."""
_RECORDED = 8
"""Different frames that are played again and again."""


def whole_loop(
    settings: dict[str, Any],
    frame: np.ndarray,
    frames: int,
    rates: Iterable[float],
) -> dict[str, Any]:
    """Replay frames through ZeroMQ, the GPU and the writer: as fast as they go, paced.

    Parameters
    ----------
    settings
        Of the processor side, as `parse_config` takes them.
    frame
        What is played, shifted from frame to frame.
    frames
        Of each run.
    rates
        Of the camera in the paced runs, frames/s.
    """
    with _fast_folder() as folder:
        recording = folder / "played.tif"
        played = [np.roll(frame, 16 * shift, axis=0) for shift in range(_RECORDED)]
        tifffile.imwrite(recording, np.stack(played), photometric="minisblack")
        with ThreadTimes() as times:
            full = _run(settings, recording, frames, None)
        paced = {rate: _run(settings, recording, frames, rate) for rate in rates}
    throughput = full["throughput"]
    return {
        "frames_per_s": throughput["frames_per_s"],
        "cpu_ms_per_frame": 1e3 * throughput["cpu_s_per_frame"],
        "cpu_s_by_thread": times.seconds(),
        "accounting": full["accounting"],
        "devices": full["devices"],
        "stages": full["stages"],
        "at_rate": [_at(rate, report) for rate, report in paced.items()],
    }


class ThreadTimes:
    """CPU seconds of this process's threads, start and end of a series included.

    Threads that end are seen to a tenth of a second. Those of libraries (ZeroMQ,
    tensorstore, CUDA) have no name of ours and are added up.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="bench")

    def __enter__(self) -> Self:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    def seconds(self) -> dict[str, float]:
        """Return CPU seconds by thread, the most expensive first."""
        total: dict[str, float] = defaultdict(float)
        for number, spent_s in self._seen.items():
            total[self._names.get(number, "libraries")] += spent_s
        return dict(sorted(total.items(), key=lambda one: -one[1]))

    def _watch(self) -> None:
        process = psutil.Process()
        before = {one.id: one.user_time + one.system_time for one in process.threads()}
        while not self._over.wait(0.1):
            for thread in threading.enumerate():
                self._names[thread.native_id or 0] = thread.name
            for one in process.threads():
                spent_s = one.user_time + one.system_time
                self._seen[one.id] = spent_s - before.get(one.id, 0.0)


def _at(rate: float, report: dict[str, Any]) -> dict[str, Any]:
    stages = report["stages"]
    return {
        "wanted_frames_per_s": rate,
        "frames_per_s": report["throughput"]["frames_per_s"],
        "to_estimate_ms": _spread(stages["arrival_to_estimate"]),
        "to_result_ms": _spread(stages["arrival_to_result"]),
        "accounting": report["accounting"],
    }


def _spread(stage: dict[str, float]) -> dict[str, float]:
    return {name: stage[f"{name}_ms"] for name in ("p50", "p99", "max")}


def _run(
    settings: dict[str, Any], recording: Path, frames: int, rate: float | None
) -> dict[str, Any]:
    """Run both sides for one series; returns its report, the pixels are removed."""
    folder = recording.parent / "runs"
    source = {"source": "replay", "path": str(recording), "frames_per_s": rate}
    pixel_size_um = settings["channels"][0]["optics"]["pixel_size_um"]
    source |= {"repeats": -(-frames // _RECORDED), "pixel_size_um": pixel_size_um}
    config = parse_config(
        settings | {"microscope": source, "run": {"folder": str(folder)}}
    )
    try:
        ended = run(config, stop=threading.Event(), abandon=threading.Event())
        assert ended is not None
        report: dict[str, Any] = json.loads((ended / "report.json").read_text("utf-8"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


@contextmanager
def _fast_folder() -> Iterator[Path]:
    """Yield a folder in memory where the system has one: no disk is measured."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


def used_mb(index: int) -> float:
    """Return the memory of a GPU that is in use, by whomever."""
    with current_context(index):
        free, total = import_driver().mem_get_info()
    return float(total - free) / 1e6
