"""Loop: how much of what its parts allow does the whole reach, and is nothing lost.

Every stage is measured alone in CPU seconds per frame, the virtual microscope
included; as in the whole, nothing before the first frame or after the last one counts.
Two cores could at best do ``2 / sum`` frames/s; the ratio printed is what the loop
reaches of that, everything written. A second run at 80 % of that rate gives the
latency of the focus estimate.

On ext4 a folder beside which thousands of files were deleted within five minutes (as
the last bench did) makes every new file dearer: 0.4 to 0.9 ms instead of 0.1, for four
files a frame. Wait as long before, or give another folder: ``--folder``.

    python -m bench.loop [--frames 2000] [--folder FOLDER] [--smoke] [--out FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench import machine
from rtfocus.config import Config, load_config
from rtfocus.frame import (
    FrameHeader,
    SeriesEnd,
    SeriesStart,
    Slot,
    SlotPool,
)
from rtfocus.machine import usable_threads
from rtfocus.metrics import Accounting
from rtfocus.microscope.acquisition import acquire
from rtfocus.processing.processor import open_processor
from rtfocus.transport.publisher import FramePublisher
from rtfocus.transport.receiver import FrameReceiver
from rtfocus.writers.run import open_writer

CONFIG = Path(__file__).with_name("loop.yaml")


class KeepingSink:
    """Takes frames and keeps the first few: the virtual microscope measured alone."""

    def __init__(self, keep: int) -> None:
        self.series: SeriesStart | None = None
        self.frames: list[tuple[FrameHeader, np.ndarray]] = []
        self.ms_per_frame = 0.0
        """CPU milliseconds of this process for every frame after the first."""
        self._keep, self._taken = keep, 0

    def start(self, series: SeriesStart) -> None:
        """Note the series."""
        self.series = series
        size = int(np.prod(series.shape)) * np.dtype(series.dtype).itemsize
        self._pool = SlotPool(4, size)

    def acquire(self) -> Slot:
        """Return a slot at once: nobody holds them for long."""
        slot = self._pool.acquire()
        assert slot is not None
        return slot

    def publish(self, slot: Slot) -> None:
        """Keep a copy of the first frames."""
        if self._taken == 0:
            self._begun_s = time.process_time()
        self._taken += 1
        if len(self.frames) < self._keep:
            self.frames.append((slot.frame(), slot.pixels.copy()))
        self._pool.release(slot)

    def end(self, reason: str, **_missed: object) -> None:
        """Accept whatever ended the series."""
        if reason != "completed":
            raise SystemExit(f"the virtual microscope ended: {reason}")
        self.ms_per_frame = ms_since(self._begun_s, max(self._taken - 1, 1))


def cpu_ms_per_frame(work: Callable[[], int]) -> float:
    """Return this process's CPU milliseconds per frame of `work`."""
    begun_s = time.process_time()
    return ms_since(begun_s, work())


def ms_since(begun_s: float, frames: int) -> float:
    """Return CPU milliseconds of each of so many frames."""
    return (time.process_time() - begun_s) * 1e3 / frames


def measure_simulator(config: Config) -> tuple[float, KeepingSink]:
    """Measure Micro-Manager's core with the virtual devices and the frame handler."""
    sink = KeepingSink(keep=16)
    # Planes of the specimen are blurred on first use: that is set-up.
    acquire(config, KeepingSink(0), stop=threading.Event())
    acquire(config, sink, stop=threading.Event())
    return sink.ms_per_frame, sink


def measure_transport(config: Config, sink: KeepingSink, frames: int) -> float:
    """Measure publisher and receiver together, both in this process."""
    transport = config.transport.model_copy(
        update={"frames": "tcp://127.0.0.1:*", "control": "tcp://127.0.0.1:*"}
    )
    assert sink.series is not None
    series = sink.series

    with FramePublisher(transport) as publisher:
        endpoints = dict(zip(("frames", "control"), publisher.endpoints, strict=True))
        receiver = FrameReceiver(transport.model_copy(update=endpoints), Accounting())
        thread = threading.Thread(target=_receive, args=(receiver,))
        thread.start()
        publisher.start(series)
        begun_s = time.process_time()
        for number in range(frames):
            header, pixels = sink.frames[number % len(sink.frames)]
            slot = publisher.acquire()
            numbered = _numbered(header, number)
            slot.prepare(numbered)[...] = pixels
            publisher.publish(slot)
        publisher.end("completed")
        thread.join()
        return ms_since(begun_s, frames)


def _receive(receiver: FrameReceiver) -> None:
    receiver.wait_series()
    receiver.begin()
    for arrived in receiver.frames():
        assert isinstance(arrived, Slot)
        sequence = arrived.frame().sequence
        receiver.release(arrived)
        receiver.report_durable(sequence)
    receiver.close()


def _numbered(header: FrameHeader, number: int) -> FrameHeader:
    fields = {name: getattr(header, name) for name in header.__struct_fields__}
    index = header.index | {"t": number}
    return FrameHeader(**(fields | {"sequence": number, "index": index}))


def measure_processing(
    config: Config, sink: KeepingSink, frames: int
) -> tuple[float, float]:
    """Measure classification alone, and what restoration adds to it."""
    assert sink.series is not None
    processor = open_processor(config)
    processor.start(sink.series, 4)
    pool = SlotPool(4, sink.frames[0][1].nbytes)

    def work(*, restore: bool, frames: int = frames) -> int:
        for number in range(frames):
            header, pixels = sink.frames[number % len(sink.frames)]
            slot = pool.acquire()
            assert slot is not None
            slot.prepare(header)[...] = pixels
            ticket = processor.submit(slot, unrestored=None if restore else "bench")
            # One frame at a time: two at once share caches and are not "alone".
            ticket.result.result()
            pool.release(slot)
        return frames

    work(restore=True, frames=8)
    classify = cpu_ms_per_frame(lambda: work(restore=False))
    both = cpu_ms_per_frame(lambda: work(restore=True))
    processor.close()
    return classify, both - classify


def measure_writer(
    config: Config, sink: KeepingSink, frames: int, folder: Path
) -> float:
    """Measure all three stores, journal and close, with real results."""
    assert sink.series is not None
    series = sink.series
    processor = open_processor(config)
    slots = len(sink.frames)
    grid = processor.start(series, slots)
    pool = SlotPool(slots, sink.frames[0][1].nbytes)
    results = []
    for header, pixels in sink.frames:
        slot = pool.acquire()
        assert slot is not None
        slot.prepare(header)[...] = pixels
        results.append((slot, processor.submit(slot).result.result()))
    free = threading.Semaphore(slots)
    accounting = Accounting()

    with open_writer(
        folder / "alone.rtfocus",
        series,
        config.store,
        grid=grid,
        accounting=accounting,
        on_durable=lambda _: None,
        on_free=lambda _: free.release(),
        provenance={},
    ) as writer:
        begun_s = time.process_time()
        for number in range(frames):
            free.acquire()
            slot, result = results[number % slots]
            slot.header = _numbered(slot.frame(), number)
            writer.append(slot, result)
        writer.drain()
        cost = ms_since(begun_s, frames)
        writer.close(SeriesEnd(1, series.series_uid, frames, "completed"), {})

    processor.close()
    return cost


def run_loop(settings: list[str], folder: Path) -> dict[str, Any]:
    """Run `rtfocus run` and return its report with the memory it took over time."""
    command = [sys.executable, "-m", "rtfocus", "run", str(CONFIG), "--quiet"]
    for setting in [*settings, f"run.folder={folder}"]:
        command += ["--set", setting]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    memory_mb: list[float] = []
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [watched, *watched.children(recursive=True)]
            memory_mb.append(sum(p.memory_info().rss for p in family) / 1e6)
        except psutil.Error:
            continue
        time.sleep(0.5)
    if process.returncode != 0:
        raise SystemExit(f"the loop failed with exit code {process.returncode}")
    (report,) = folder.glob("*.rtfocus/report.json")
    found = json.loads(report.read_text("utf-8"))
    found["memory_mb"] = memory_mb
    return found


def main() -> None:
    """Measure the parts, then the whole, then latency at 80 % of the rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument(
        "--folder", type=Path, help="where runs lie, and are removed; else as always"
    )
    parser.add_argument("--smoke", action="store_true", help="a few frames only")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--set", action="append", default=[], help="config override")
    options = parser.parse_args()
    frames = 60 if options.smoke else options.frames
    alone = max(30, frames // 8)
    plan = f"acquisition.mda.time_plan.loops={alone}"
    config = load_config(CONFIG, [plan, *options.set])

    simulator, sink = measure_simulator(config)
    stages = {
        "simulator": simulator,
        "transport": measure_transport(config, sink, alone),
    }
    stages["classify"], stages["restore"] = measure_processing(config, sink, alone)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stages["write"] = measure_writer(config, sink, alone, Path(folder))
        ceiling = min(usable_threads(), 2) / (sum(stages.values()) / 1e3)
        plan = f"acquisition.mda.time_plan.loops={frames}"
        fast = run_loop([plan, *options.set], Path(folder) / "fast")
        rate = float(fast["throughput"]["frames_per_s"])
        slow = run_loop(
            [plan, f"microscope.frames_per_s={0.8 * rate:.2f}", *options.set],
            Path(folder) / "slow",
        )
    half = len(fast["memory_mb"]) // 2
    payload = {
        "cpu_ms_per_frame_alone": stages,
        "ceiling_frames_per_s": ceiling,
        "frames_per_s": rate,
        "ratio": rate / ceiling,
        "accounting": fast["accounting"],
        "cpu_s_per_frame_processor": fast["throughput"]["cpu_s_per_frame"],
        "estimate_at_80_percent": slow["stages"]["arrival_to_estimate"],
        "memory_mb": {
            "after a third": fast["memory_mb"][len(fast["memory_mb"]) // 3],
            "median of second half": float(np.median(fast["memory_mb"][half:])),
            "most": max(fast["memory_mb"]),
        },
        "config": config.model_dump(mode="json"),
    }
    machine.write("loop", payload, options.out)
    print(f"CPU ms per frame alone: { {k: round(v, 1) for k, v in stages.items()} }")
    print(
        f"loop {rate:.1f} frames/s of a ceiling of {ceiling:.1f}: {rate / ceiling:.2f}"
    )
    print(f"estimate p99 at 80 %: {payload['estimate_at_80_percent']['p99_ms']:.0f} ms")


if __name__ == "__main__":
    main()
