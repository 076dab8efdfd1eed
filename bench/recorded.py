"""Recorded: where the CPU time of a recorded frame goes, place by place.

The loop of the product: a publisher in a process of its own, wire, the loop's threads,
raw and restored OME-Zarr, journal, close. Frames are Poisson noise. A stand-in for a
GPU hands out defocus maps and restored frames, so that no network and no restoration
is counted. CPU time is that of both processes, from the first frame until the folder
is finished; what its end costs once is told apart. Where Linux's ``perf`` is at hand
its samples say how much of it every place took; elsewhere each thread's time is told.

``--against`` runs another checkout in turns with this one, each in fresh processes: on
a machine that does other work, too, only such a comparison counts.

Run: python -m bench.recorded [--size 2048] [--frames 300] [--rounds 3]
[--against CHECKOUT] [--folder FOLDER] [--out FILE]
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from bench import machine
from bench.writer import series_start
from rtfocus.app import SeriesLoop
from rtfocus.config import Config, parse_config
from rtfocus.config.sections import TransportConfig
from rtfocus.frame import (
    DefocusMap,
    FrameHeader,
    SeriesStart,
    TileGrid,
)
from rtfocus.monitor import Monitor
from rtfocus.processing.channel_plan import ChannelPlan
from rtfocus.processing.device import Job, Prepared
from rtfocus.processing.processor import FrameProcessor
from rtfocus.report import page
from rtfocus.transport.preview import open_preview
from rtfocus.transport.publisher import FramePublisher
from rtfocus.transport.receiver import FrameReceiver

DISTINCT = 16
"""Different frames, so that no cache holds the next one."""
GRID = TileGrid(31, 31, 84, 64.0, 64.0, signed=False)
_PER_S = 997
"""Samples per second of CPU time; prime, so that no timer keeps step with it."""
_LIBRARIES = "libraries"
_TOTALS = ("publisher", "recorder", "of that in the kernel", "at the end", "all")


def frames_of(size: int, seed: int) -> list[NDArray[np.uint16]]:
    """Return frames of Poisson noise as a 16-bit camera has it."""
    noise = np.random.default_rng(seed).poisson(400, (size, size)).astype("<u2")
    return [np.roll(noise, 37 * number) for number in range(DISTINCT)]


class StandIn:
    """A device that has every answer ready; see `rtfocus.processing.device.Device`."""

    name = "stand-in"
    ahead = 32

    def __init__(self, size: int) -> None:
        self._restored = frames_of(size, seed=2)
        shape = (GRID.rows, GRID.columns)
        rng = np.random.default_rng(3)
        self._found = DefocusMap(
            grid=GRID,
            defocus_um=rng.uniform(0, 10, shape).astype(np.float32),
            confidence=np.full(shape, 0.9, np.float32),
            level=rng.integers(0, 6, shape, dtype=np.int16),
        )

    def entered(self) -> AbstractContextManager[None]:
        """Return nothing to hold."""
        return nullcontext()

    def prepare(
        self, plans: Sequence[ChannelPlan], series: SeriesStart, slots: int
    ) -> Prepared:
        """Return what stands ready."""
        del series
        return Prepared({plan.name: GRID for plan in plans}, slots, 1, {})

    def enqueue(self, job: Job) -> None:
        """Nothing: the answer is there."""

    def estimate(self, job: Job) -> DefocusMap:
        """Return the map."""
        del job
        return self._found

    def begin_restoring(self, job: Job) -> None:
        """Nothing: the answer is there."""

    def restore(self, job: Job) -> NDArray[np.generic]:
        """Return a frame; two of them are never in work for one slot."""
        return self._restored[job.slot.index % DISTINCT]

    def close(self) -> None:
        """Nothing to free."""


class Clocks:
    """CPU seconds of this process, and of each of its threads by name."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._threads = self._spent()
        self._times = os.times()
        self._begun_s = time.process_time()

    def look(self) -> None:
        """Note the threads there are: those of libraries have no name of ours."""
        for thread in threading.enumerate():
            self.names[thread.native_id or 0] = thread.name

    def read(self) -> tuple[float, float, dict[str, float]]:
        """Return CPU seconds, those in the kernel, and those of living threads."""
        self.look()
        found: dict[str, float] = defaultdict(float)
        for number, spent_s in self._spent().items():
            name = self.names.get(number, _LIBRARIES)
            found[name] += spent_s - self._threads.get(number, 0.0)
        kernel_s = os.times().system - self._times.system
        return time.process_time() - self._begun_s, kernel_s, dict(found)

    @staticmethod
    def _spent() -> dict[int, float]:
        threads = psutil.Process().threads()
        return {one.id: one.user_time + one.system_time for one in threads}


@contextmanager
def timed_pages() -> Iterator[list[float]]:
    """Yield a list that gets the CPU seconds of each ``report.html`` written meanwhile.

    It has a thread of its own, which is gone when those of the others are read.
    """
    spent_s: list[float] = []
    write = page.write_page

    def timed(folder: Path) -> Path:
        begun_s = time.thread_time()
        try:
            return write(folder)
        finally:
            spent_s.append(time.thread_time() - begun_s)

    page.write_page = timed
    try:
        yield spent_s
    finally:
        page.write_page = write


def send(pipe: Connection, size: int, frames: int) -> None:
    """Publish one series; runs in a process of its own."""
    config = TransportConfig(
        frames="tcp://127.0.0.1:*", control="tcp://127.0.0.1:*", connect_timeout_s=60
    )
    seen = frames_of(size, seed=1)
    series = series_start(size, frames)
    with FramePublisher(config) as publisher:
        pipe.send(publisher.endpoints)
        publisher.start(series)
        pipe.send("the recorder is ready")
        pipe.recv()
        clocks = Clocks()
        for sequence in range(frames):
            slot = publisher.acquire()
            header = FrameHeader(
                version=1,
                series_uid=series.series_uid,
                sequence=sequence,
                shape=(size, size),
                dtype="<u2",
                captured_ns=time.time_ns(),
                exposure_ms=5.0,
                index={"t": sequence},
                event_index=sequence,
                z_um=0.0,
            )
            slot.prepare(header)[...] = seen[sequence % DISTINCT]
            publisher.publish(slot)
        publisher.end("completed")
        spent = clocks.read()
        names = {number: f"publisher's {name}" for number, name in clocks.names.items()}
        pipe.send((*spent, names))
    pipe.recv()


def config_of(endpoints: tuple[str, str], folder: Path) -> Config:
    """Return the processor side's configuration: everything is written."""
    optics = {"numerical_aperture": 0.36, "wavelength_nm": 451, "pixel_size_um": 0.65}
    return parse_config(
        {
            "run": {"folder": str(folder), "name": "recorded"},
            "microscope": {"source": "virtual"},
            "acquisition": {"mda": {"time_plan": {"interval": 0, "loops": 1}}},
            "channels": [{"name": "default", "optics": optics}],
            "processing": {
                "classifier": "delpnet",
                "restoration": {"method": "wiener"},
            },
            "transport": {
                "frames": endpoints[0],
                "control": endpoints[1],
                "preview": {"endpoint": "tcp://127.0.0.1:*"},
            },
        }
    )


def once(size: int, frames: int, folder: Path) -> dict[str, Any]:
    """Record one series; return its CPU ms per frame: all, by thread, by place."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    sender = spawn.Process(target=send, args=(there, size, frames))
    sender.start()
    config = config_of(here.recv(), folder)
    monitor, samples = Monitor(), Samples(folder)
    with (
        timed_pages() as pages_s,
        open_preview(config.transport) as preview,
        closing(FrameReceiver(config.transport, monitor.accounting)) as receiver,
        closing(FrameProcessor(config, [StandIn(size)])) as processor,
    ):
        series = receiver.wait_series()
        assert series is not None
        loop = SeriesLoop(config, series, receiver, processor, preview, monitor)
        over, clocks = threading.Event(), Clocks()

        def watch() -> None:
            # Memory of slots and engines is set-up: the clocks start when it is there.
            here.recv()
            samples.begin(os.getpid(), sender.pid or 0)
            clocks.begin()
            here.send("go")
            while not over.wait(0.2):
                clocks.look()

        watcher = threading.Thread(target=watch, name="bench")
        watcher.start()
        loop.run()
        received_s, kernel_s, threads = clocks.read()
        over.set()
        watcher.join()
        sent_s, sender_kernel_s, sender_threads, names = here.recv()
        places = samples.end(clocks.names | names)
        here.send(None)
        sender.join()
    if monitor.accounting.written != frames:
        raise SystemExit(f"only {monitor.accounting.written} of {frames} were written")
    # Does not grow with the number of frames: the folder's end and `report.html`.
    places.pop(_END, None)
    total = sum(places.values()) or 1
    all_ms = 1e3 * (sent_s + received_s) / frames
    threads.pop("report", None)
    end_ms = 1e3 * (threads.pop("MainThread") + sum(pages_s)) / frames
    return {
        "all": all_ms - end_ms,
        "at the end": end_ms,
        "publisher": 1e3 * sent_s / frames,
        "recorder": 1e3 * received_s / frames,
        "of that in the kernel": 1e3 * (kernel_s + sender_kernel_s) / frames,
        "places": {
            place: number / total * (all_ms - end_ms)
            for place, number in places.most_common()
        },
        "threads": {
            **{f"publisher: {k}": 1e3 * s / frames for k, s in sender_threads.items()},
            **{f"recorder: {k}": 1e3 * s / frames for k, s in threads.items()},
        },
    }


class Samples:
    """What ``perf`` sees of two processes; nothing where there is none."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "perf.data"
        self._perf: subprocess.Popen[bytes] | None = None

    def begin(self, *processes: int) -> None:
        """Sample these processes from now on, and the threads that they will start."""
        if shutil.which("perf") is None:
            return
        (order, say), (hear, answer) = os.pipe(), os.pipe()
        watched = ",".join(map(str, processes))
        # Begins at our word: a thread that starts while it looks for them is missed.
        self._perf = subprocess.Popen(
            [
                *("perf", "record", "-q", "-F", str(_PER_S), "-p", watched, "-D", "-1"),
                *("--control", f"fd:{order},{answer}", "-o", str(self._file)),
            ],
            pass_fds=(order, answer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(order)
        os.close(answer)
        os.write(say, b"enable\n")
        if not os.read(hear, 16):
            raise SystemExit("perf does not sample: may it (perf_event_paranoid)?")
        self._pipes = say, hear

    def end(self, names: dict[int, str]) -> Counter[str]:
        """Return the samples by place."""
        if self._perf is None:
            return Counter()
        self._perf.send_signal(signal.SIGINT)
        self._perf.wait()
        for pipe in self._pipes:
            os.close(pipe)
        told = subprocess.run(
            ["perf", "script", "-i", self._file, "-F", "comm,tid,ip,sym,dso"],
            capture_output=True,
            check=False,
            encoding="utf-8",
        )
        found: Counter[str] = Counter()
        for line in told.stdout.splitlines():
            sample = re.match(r"\s*(.+?)\s+(\d+)\s+[0-9a-f]+ (.*) \((.*)\)$", line)
            if sample is not None:
                comm, thread, symbol, file = sample.groups()
                name = names.get(int(thread), _LIBRARIES)
                found[place_of(comm, name, symbol, file)] += 1
        return found


_PAGES = r"clear_page|page_fault|exc_page|zap_|unmap_|do_anonymous|madvise"
_END = "at the end"
_ZMQ = "ZeroMQ and TCP, both sides"
_TENSORSTORE = (
    (r"blosc|LZ4|shuffle|fastcopy|bitunshuffle", "two images: blosc (shuffle, LZ4)"),
    (r"[Cc][Rr][Cc]", "two images: CRC32C of the chunks"),
    (r"memmove|memcpy|[Cc]opy|IterateOver", "two images: frame into chunks"),
)


def place_of(comm: str, thread: str, symbol: str, file: str) -> str:
    """Return the place in the frame's way that a sample is of."""
    in_kernel = "kernel" in file or "vmlinux" in file
    if thread in ("MainThread", "report"):
        return _END
    if in_kernel and re.search(_PAGES, symbol):
        return f"page faults: {thread if thread != _LIBRARIES else comm}"
    if comm.startswith("ZMQbg") or "zmq" in file:
        return _ZMQ
    copies = "memmove" in symbol or "memcpy" in symbol or "_multiarray" in file
    if thread == "receive-io" and copies:
        return "message into the receiver's slot, its one copy"
    if thread == "publisher's MainThread" and copies:
        return "camera's copy into a slot"
    if thread != _LIBRARIES and "tensorstore" not in file:
        return f"thread {thread}"
    if in_kernel:
        return "two images: file into the page cache"
    for pattern, place in _TENSORSTORE:
        if re.search(pattern, symbol):
            return place
    return "two images: the rest of tensorstore"


def compare(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run every checkout once per round, each time in fresh processes."""
    checkouts = {"this": Path(__file__).parents[1]}
    if options.against is not None:
        checkouts = {"against": options.against.resolve(), **checkouts}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for turn in range(options.rounds):
        # Whoever goes second finds a warmer machine: they take turns in that, too.
        for name in sorted(checkouts, reverse=bool(turn % 2)):
            checkout = checkouts[name]
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                answer = subprocess.run(
                    [
                        *(sys.executable, __file__, "--once", folder),
                        *("--size", str(options.size)),
                        *("--frames", str(options.frames)),
                    ],
                    env=os.environ | {"PYTHONPATH": str(checkout)},
                    stdout=subprocess.PIPE,
                    check=True,
                )
            results[name].append(json.loads(answer.stdout.splitlines()[-1]))
    return results


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the medians of all rounds, a column per checkout."""

    def median(rounds: list[dict[str, Any]], kind: str, name: str) -> float:
        return statistics.median(r[kind].get(name, 0.0) for r in rounds)

    print("CPU ms per frame".ljust(56), *(f"{name:>8}" for name in results))
    for kind in ("threads", "places"):
        rows: dict[str, list[float]] = {}
        for name in {name for rounds in results.values() for name in rounds[0][kind]}:
            rows[name] = [median(rounds, kind, name) for rounds in results.values()]
        for name, found in sorted(rows.items(), key=lambda row: -row[1][-1]):
            if max(found) >= 0.05:
                print(f"  {name:54}", *(f"{value:8.2f}" for value in found))
        print()
    for total in (
        "publisher",
        "recorder",
        "of that in the kernel",
        "at the end",
        "all",
    ):
        spread = [
            f"{statistics.median(r[total] for r in rounds):8.2f}"
            f" ({min(r[total] for r in rounds):.2f} to "
            f"{max(r[total] for r in rounds):.2f})"
            for rounds in results.values()
        ]
        print(f"{total:56}", *spread)


def main() -> None:
    """Record, and print where the time went."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout")
    memory = Path("/dev/shm")
    parser.add_argument(
        "--folder",
        type=Path,
        default=memory if memory.is_dir() else None,
        help="where runs lie, and are removed; memory where the system has it",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a few small frames")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.size, options.frames, options.rounds = 256, 20, 1
    if options.once is not None:
        print(json.dumps(once(options.size, options.frames, options.once)))
        return
    results = compare(options)
    show(results)
    payload = {"size_px": options.size, "frames": options.frames, "rounds": results}
    print(machine.write("recorded", payload, options.out))


if __name__ == "__main__":
    main()
