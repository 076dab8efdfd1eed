"""GPU bench: what the processor reaches on this card, and what the card would allow.

Stages alone by CUDA events; the pipeline at several sizes, slots and engines;
overlap efficiency = slowest of {copy in, compute, copy out} / time per frame in the
pipeline; a roofline whose ceilings are measured in the same run; latency at a
camera's rate; a picture of the steady state. Then the whole loop, as fast as it goes
and at a camera's rates, and with `--series` the memory that starts leave behind.
Says why and ends where there is no GPU; with `--smoke` it then takes the stand-in
driver of the tests, whose figures mean nothing.

Run: python -m bench.gpu [--sizes 512 1024 2048 3200] [--methods wiener ...]
     [--minutes 20] [--series 100] [--out FILE.json [--resume]]
     python -m bench.gpu --table FILE ...    results as Markdown
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import gpu_ceilings, machine
from bench.gpu_ceilings import ceilings, network_multiply_adds
from bench.gpu_loop import RATES, used_mb, whole_loop
from bench.gpu_table import table_of
from bench.gpu_timeline import draw_timeline
from rtfocus.channel import Channel
from rtfocus.config import parse_config
from rtfocus.engines.registry import find_engine, parts
from rtfocus.errors import EngineError
from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, Position, SeriesStart, SlotPool
from rtfocus.processing.device import Ticket
from rtfocus.processing.gpu.cuda.driver import (
    CUFFT,
    NVRTC,
    find_device,
    why_no_gpu,
    why_not_loadable,
)
from rtfocus.processing.gpu.device import GpuDevice
from rtfocus.processing.processor import FrameProcessor
from rtfocus.processing.restore import METHODS
from rtfocus.runtimes.gpu import Gpu
from rtfocus.specimens import draw_specimen

STAGES = ("copy in", "classify", "restore", "copy out")
WARM_UP = 10
SHOWN = 12
"""Frames in the picture."""
CAMERA_FPS = 100.0
CASE_S = 20.0
"""That each part of a case may take: slow restorers get fewer frames."""


@dataclass(frozen=True)
class Case:
    """One set-up of the pipeline."""

    side: int
    method: str
    frames_in_flight: int
    precision: str = "auto"
    cuda_graphs: bool = True


class Clock:
    """The time that the bench may take.

    Parameters
    ----------
    minutes
        None: as much as it needs.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def is_up(self) -> bool:
        """Whether nothing more may be begun."""
        return self._end is not None and time.monotonic() >= self._end


ENDLESS = Clock(None)


def settings_of(case: Case, engine: str, index: int) -> dict[str, Any]:
    """Return the settings of a case in the optics the engine was trained for."""
    card = find_engine(engine).card
    _, trained = parts(card)
    reference = trained.reference
    optics = {
        "numerical_aperture": reference.numerical_aperture,
        "wavelength_nm": reference.wavelength_nm,
        "pixel_size_um": reference.pixel_size_um,
    }
    return {
        "processing": {
            "classifier": engine,
            "device": "gpu",
            "restoration": {"method": case.method},
            "gpu": {
                "index": index,
                "frames_in_flight": case.frames_in_flight,
                "precision": case.precision,
                "cuda_graphs": case.cuda_graphs,
            },
        },
        "channels": [{"name": "default", "optics": optics}],
    }


def series_of(side: int, pixel_size_um: float) -> SeriesStart:
    """Return a series of square uint16 frames."""
    return SeriesStart(
        version=PROTOCOL_VERSION,
        series_uid="bench",
        name="bench",
        started_ns=0,
        shape=(side, side),
        dtype="<u2",
        sizes={"t": None, "c": 1},
        channels=[Channel("bench")],
        positions=[Position("p")],
        pixel_size_um=pixel_size_um,
    )


def frame_of(side: int) -> np.ndarray:
    """Return a square frame of nuclei, uint16."""
    rng = np.random.default_rng(1)
    sharp = np.maximum(draw_specimen("nuclei", (side, side), rng), 0)
    return rng.poisson(sharp * 2500 + 100).astype(np.uint16)


class Feed:
    """Frames handed to a processor, as many in flight as there are slots.

    Parameters
    ----------
    processor
        Started for `series`.
    series
        Of the frames.
    slots
        Frames held at once.
    """

    def __init__(self, processor: FrameProcessor, series: SeriesStart, slots: int):
        self.pixels = frame_of(series.shape[0])
        self.pool = SlotPool(slots, self.pixels.nbytes)
        self.processor = processor
        self.series = series
        self.sequence = 0

    def submit(self) -> Ticket:
        """Hand over one more frame; pixels are in the slot already but at first."""
        slot = self.pool.acquire()
        assert slot is not None
        header = FrameHeader(
            version=PROTOCOL_VERSION,
            series_uid="bench",
            sequence=self.sequence,
            shape=self.series.shape,
            dtype="<u2",
            captured_ns=time.time_ns(),
            exposure_ms=1.0,
            index={"t": self.sequence, "c": 0},
        )
        target = slot.prepare(header)
        if self.sequence < self.pool.count:
            target[...] = self.pixels
        self.sequence += 1
        return self.processor.submit(slot)

    def run(self, frames: int, clock: Clock = ENDLESS) -> float:
        """Process frames as fast as they go; returns frames/s.

        Fewer than asked for, but some, when the time is up.
        """
        waiting: list[Ticket] = []

        def take() -> None:
            ticket = waiting.pop(0)
            ticket.result.result()
            self.pool.release(ticket.slot)

        begun, first = time.perf_counter(), self.sequence
        for _ in range(frames):
            if len(waiting) == self.pool.count:
                take()
                if clock.is_up:
                    break
            waiting.append(self.submit())
        while waiting:
            take()
        return (self.sequence - first) / (time.perf_counter() - begun)

    def paced(self, frames: int, rate: float) -> dict[str, dict[str, float]]:
        """Process frames at a camera's rate; latency from host memory, in ms."""
        handed: list[tuple[Ticket, float]] = []
        estimate, result = [], []
        more = threading.Semaphore(0)

        def take() -> None:
            for number in range(frames):
                more.acquire()
                ticket, begun = handed[number]
                ticket.estimate.result()
                estimate.append((time.perf_counter() - begun) * 1e3)
                ticket.result.result()
                result.append((time.perf_counter() - begun) * 1e3)
                self.pool.release(ticket.slot)

        taker = threading.Thread(target=take)
        taker.start()
        start = time.perf_counter()
        for number in range(frames):
            while time.perf_counter() < start + number / rate:
                time.sleep(2e-4)
            begun = time.perf_counter()
            handed.append((self.submit(), begun))
            more.release()
        taker.join()
        return {"to_estimate_ms": spread(estimate), "to_result_ms": spread(result)}


def spread(values: list[float]) -> dict[str, float]:
    """Return median, 99th percentile and maximum."""
    return {
        "p50": statistics.median(values),
        "p99": float(np.percentile(values, 99)),
        "max": max(values),
    }


def measure(
    case: Case, engine: str, index: int, frames: int, clock: Clock = ENDLESS
) -> dict[str, Any]:
    """Run one case: stages alone, pipeline, latency, memory."""
    config = parse_config(settings_of(case, engine, index))
    series = series_of(case.side, config.optics_of("default")[1].pixel_size_um)
    spans: list[tuple[int, dict[str, tuple[float, float]]]] = []
    device = GpuDevice(config, trace=lambda *span: spans.append(span))
    processor = FrameProcessor(config, [device])
    slots = case.frames_in_flight + 2
    try:
        processor.start(series, slots)
        feed = Feed(processor, series, slots)
        frames = fewer(frames, feed.run(WARM_UP, clock))
        alone = stages_alone(feed, min(frames, max(10, frames // 10)))
        spans.clear()
        rate = feed.run(frames, clock)
        steady = spans[len(spans) // 2 : len(spans) // 2 + SHOWN]
        per_frame_ms = 1e3 / rate
        # Faster than it can go it would measure a queue.
        paced = feed.paced(frames, min(CAMERA_FPS, 0.8 * rate))
        # Both streams of kernels share the card: their times add up.
        compute = alone["classify"] + alone["restore"]
        slowest = max(alone["copy in"], compute, alone["copy out"])
        return {
            "case": vars(case),
            "stages_alone_ms": alone,
            "frames_per_s": rate,
            "megapixels_per_s": rate * case.side**2 / 1e6,
            "ms_per_frame": per_frame_ms,
            "overlap_efficiency": slowest / per_frame_ms,
            "timeline_ms": steady,
            "latency": paced | {"frames_per_s": min(CAMERA_FPS, 0.8 * rate)},
            "device_memory_mb": device.memory_bytes / 1e6,
            "backends": processor.backends(),
        }
    except EngineError as error:
        return {"case": vars(case), "refused": str(error)}
    finally:
        processor.close()


def fewer(frames: int, rate: float) -> int:
    """Return how many frames to measure where so many are done in a second."""
    return max(2, min(frames, int(CASE_S * rate)))


def stages_alone(feed: Feed, frames: int) -> dict[str, float]:
    """Return the median of every stage with one frame in flight, in ms."""
    found: list[dict[str, float]] = []
    for _ in range(frames):
        ticket = feed.submit()
        found.append(ticket.result.result().stage_ms)
        feed.pool.release(ticket.slot)
    return {
        stage: statistics.median([stages.get(stage, 0.0) for stages in found])
        for stage in STAGES
    }


def cases(options: argparse.Namespace) -> list[Case]:
    """Return sizes times methods, then slots, precisions and graphs at one size.

    The usual size comes first: time may be up before the last.
    """
    usual = usual_side(options)
    sides = sorted(options.sizes, key=lambda side: bool(side != usual))
    listed = [Case(side, m, 4) for side in sides for m in options.methods]
    first = options.methods[0]
    if options.smoke:
        return [*listed, Case(usual, first, 4, cuda_graphs=False)]
    listed += [Case(usual, first, count) for count in (1, 2, 3, 6)]
    listed += [Case(usual, first, 4, precision="fp32")]
    listed += [Case(usual, first, 4, cuda_graphs=False)]
    return listed


def roofline(
    row: dict[str, Any], limits: dict[str, float], macs_per_px: float | None
) -> dict[str, Any]:
    """Compare a pipeline with what the card's copies and matrix units allow."""
    if macs_per_px is None:
        return {"unknown": "multiply-adds: pip install openvino, or onnx"}
    pixels = row["case"]["side"] ** 2
    copies_s = 2 * pixels / (limits["copy_in_gb_s"] * 1e9)
    compute_s = 2 * macs_per_px * pixels / (limits["matrix_tflop_s"] * 1e12)
    bound_s = max(copies_s, compute_s)
    return {
        "network_multiply_adds_per_px": macs_per_px,
        "bytes_over_the_bus_per_frame": 4 * pixels,
        "bound_frames_per_s": 1 / bound_s,
        "bound_by": "copies" if copies_s >= compute_s else "matrix units",
        "fraction_reached": row["frames_per_s"] * bound_s,
    }


def multiply_adds_of(case: Case, engine: str) -> float | None:
    """Return the multiply-adds per pixel of all networks of a case; None: unknown.

    Of restorers that take a frame as one tile without what tiles spend on halos.
    """
    networks = {engine, case.method} - set(METHODS)
    found = [network_multiply_adds(find_engine(name)) for name in networks]
    return None if None in found else sum(macs for macs in found if macs)


def why_not() -> str | None:
    """Return why nothing can be measured here; None: it can."""
    return why_no_gpu() or why_not_loadable(NVRTC) or why_not_loadable(CUFFT)


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and write the JSON and the picture, or print results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 3200])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["wiener", "richardson_lucy", "richardson_lucy_accelerated"],
    )
    parser.add_argument("--engine", default="delpnet")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--minutes", type=float, help="begin nothing after so many")
    parser.add_argument("--series", type=int, default=0, help="starts and closes")
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument("--table", type=Path, nargs="+", help="results to print")
    parser.add_argument("--out", type=Path, help="a .json file, written as it grows")
    parser.add_argument("--resume", action="store_true", help="only what --out lacks")
    parser.add_argument("--smoke", action="store_true", help="a few frames only")
    options = parser.parse_args(arguments)
    if options.table:
        print(table_of(options.table), end="")
        return
    with tempfile.TemporaryDirectory() as folder:
        why = why_not()
        if options.smoke:
            options.sizes, options.methods, options.frames = [512], ["wiener"], 20
            options.series, options.rates = 3, [30.0]
            if why is not None and (why := take_standin(Path(folder))) is None:
                # Its transforms are slow, its networks are not.
                options.engine, options.methods = "rtfocus-1", ["rtfocus-1"]
                options.sizes, options.frames = [96], 4
        if why is not None:
            print(f"skipped: {why}")
            print(machine.write("gpu", {"skipped": why}, options.out))
            return
        found = run(options, lambda part: machine.write("gpu", part, options.out))
        written = machine.write("gpu", found, options.out)
    print(table_of([written]), written, sep="")


def take_standin(folder: Path) -> str | None:
    """Build the stand-in driver and make it this process's GPU; says why it cannot."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import gpu_standin_kit as kit

    if (why := kit.why_impossible()) is not None:
        return str(why)
    built = kit.build_standin(folder)
    os.environ["RTFOCUS_STANDIN_KERNELS"] = str(built["kernels"])
    driver = ctypes.CDLL(str(built["driver"]), ctypes.RTLD_GLOBAL)
    kit.pretend(driver, ctypes.CDLL(str(built["cufft"])), setattr)
    gpu_ceilings.COPY_BYTES = 1 << 16
    vars(gpu_ceilings)["compile_for"] = lambda *_: b"kernels"
    return None


def run(
    options: argparse.Namespace, keep: Callable[[dict[str, Any]], object] | None = None
) -> dict[str, Any]:
    """Measure ceilings, every case, the whole loop and what starts leave behind.

    `keep` is called with all there is so far whenever something more was measured:
    a card that is taken away leaves a file.
    """
    clock = Clock(options.minutes)
    device = find_device(options.gpu)
    print(f"{device.name}, compute capability {device.compute_capability}")
    before = measured_before(options, device)
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {
        "engine": options.engine,
        "left_out": [],
        "gpu": {
            "name": device.name,
            "compute_capability": list(device.compute_capability),
            "memory_gb": device.memory_bytes / 1e9,
        },
        "ceilings": before.get("ceilings") or ceilings(device),
        "rows": rows,
    }
    say = keep or (lambda _: None)
    known = {str(row["case"]): row for row in before.get("rows", [])}
    for case in cases(options):
        if (row := known.get(str(vars(case)))) is not None:
            rows.append(row)
        elif clock.is_up:
            found["left_out"].append(str(case))
        else:
            row = measure(case, options.engine, options.gpu, options.frames, clock)
            said = row.get("refused")
            if said is None:
                macs = multiply_adds_of(case, options.engine)
                row["roofline"] = roofline(row, found["ceilings"], macs)
                said = f"{row['frames_per_s']:.0f} frames/s"
            print(case, said, flush=True)
            rows.append(row)
            say(found)
    for name, part in (("loop", loop), ("series", series)):
        if name in before:
            found[name] = before[name]
        elif clock.is_up:
            found["left_out"].append(name)
        elif (measured := part(options, rows, clock)) is not None:
            found[name] = measured
            say(found)
    for what in found["left_out"]:
        print(f"not measured, the time was up: {what}", flush=True)
    found["timeline"] = draw_timeline(rows, results_file(options).with_suffix(".svg"))
    return found


def results_file(options: argparse.Namespace) -> Path:
    """Return where the results lie."""
    target: Path = options.out or Path(__file__).parent / "results"
    return target if target.suffix == ".json" else target / "gpu.json"


def measured_before(options: argparse.Namespace, device: Gpu) -> dict[str, Any]:
    """Return what `--resume` need not measure again: of this GPU and this engine."""
    path = results_file(options)
    if not options.resume or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    was = found.get("gpu", {}).get("name"), found.get("engine")
    if was != (device.name, options.engine):
        raise SystemExit(
            f"{path} is of {was[0]} and engine {was[1]}, here are {device.name} and "
            f"{options.engine}: name another --out"
        )
    return found


def usual_case(options: argparse.Namespace) -> Case:
    """Return what the loop and the starts are measured with."""
    return Case(usual_side(options), options.methods[0], 4)


def usual_side(options: argparse.Namespace) -> int:
    """Return the side of the frames that most is measured with."""
    sizes: list[int] = options.sizes
    return 2048 if 2048 in sizes else max(sizes)


def loop(
    options: argparse.Namespace, rows: list[dict[str, Any]], clock: Clock
) -> dict[str, Any]:
    """Measure the whole loop, and compare it with the GPU alone.

    Of the camera's rates those are left out for which there is no time.
    """
    case = usual_case(options)
    settings = settings_of(case, options.engine, options.gpu)
    alone = [
        r["frames_per_s"]
        for r in rows
        if r["case"] == vars(case) and "refused" not in r
    ]
    rates = (rate for rate in options.rates if not clock.is_up)
    frames = fewer(options.frames, alone[0] if alone else 1 / CASE_S)
    found = whole_loop(settings, frame_of(case.side), frames, rates)
    found["of_gpu_alone"] = found["frames_per_s"] / alone[0] if alone else None
    print(f"the whole loop: {found['frames_per_s']:.0f} frames/s", flush=True)
    return found


def series(
    options: argparse.Namespace, rows: list[dict[str, Any]], clock: Clock
) -> dict[str, Any] | None:
    """Start and close a processor again and again; None: not asked for."""
    del rows
    case, used = usual_case(options), []
    config = parse_config(settings_of(case, options.engine, options.gpu))
    begun = series_of(case.side, config.optics_of("default")[1].pixel_size_um)
    for _ in range(options.series):
        if clock.is_up:
            break
        processor = FrameProcessor(config, [GpuDevice(config)])
        processor.start(begun, 4)
        Feed(processor, begun, 4).run(WARM_UP)
        processor.close()
        used.append(used_mb(options.gpu))
    if len(used) < 2:
        return None
    print(f"after {len(used)} series: {used[-1] - used[1]:+.1f} MB", flush=True)
    return {"used_mb": used, "grown_mb": used[-1] - used[1]}


if __name__ == "__main__":
    main()
