"""View bench: what a viewer costs the loop, and how soon there is a picture.

One processor records 2048 x 2048 frames from a publisher in another process, without a
break. In turns nobody looks, a page is open, and a page is open that has stopped
reading; frames/s and the processor's CPU time per frame are compared as ratios of
neighbouring turns, so that load from outside hits all of them. `rtfocus view` is a
process of its own, and so is what stands for the page: it unpacks nothing.

- *loop share*: time the loop's own threads spend on the preview, of all time.
- *first picture*: from opening the page's socket to its first picture.

Run: python -m bench.view [--seconds 6] [--rounds 6] [--work raw|restored] [--smoke]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from websockets import Origin
from websockets.sync.client import ClientConnection, connect

from bench import machine
from rtfocus import app
from rtfocus.channel import Channel
from rtfocus.config import Config, parse_config
from rtfocus.errors import RtfocusError
from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, Position, SeriesStart
from rtfocus.launch import on_free_ports
from rtfocus.monitor import Monitor
from rtfocus.transport.preview import PreviewPublisher, open_preview
from rtfocus.transport.publisher import FramePublisher
from rtfocus.view.codec import HEADER

OPTICS = {
    "numerical_aperture": 0.36,
    "wavelength_nm": 451,
    "pixel_size_um": 0.65,
    "aberrations": {"spherical_waves": -0.38},
}
TURNS = ("nobody", "page", "stopped")
HERE = "ws://127.0.0.1:{}/socket"


def config_of(work: str, folder: Path) -> Config:
    """Return the config of the loop: all of it, or recording alone."""
    restored = work == "restored"
    return on_free_ports(
        parse_config(
            {
                "run": {"name": "view", "folder": str(folder)},
                "channels": [{"name": "bench", "optics": OPTICS}],
                "processing": {
                    "classifier": "delpnet" if restored else None,
                    "restoration": {"method": "wiener" if restored else "none"},
                },
                "store": {"restored": restored, "min_free_mb": 1},
                "transport": {
                    "slots": 8,
                    "preview": {"endpoint": "tcp://127.0.0.1:*"},
                },
            }
        )
    )


def _set_at_end(over: threading.Event) -> None:
    """Set an event when standard input ends."""
    sys.stdin.read()
    over.set()


def publish(config: Config, side: int) -> None:
    """Send noise as fast as it is taken, until standard input ends."""
    over = threading.Event()
    threading.Thread(target=_set_at_end, args=(over,), daemon=True).start()
    rng = np.random.default_rng(1)
    pixels = rng.poisson(400, (side, side)).astype("<u2")
    series = SeriesStart(
        version=PROTOCOL_VERSION,
        series_uid="view",
        name="view",
        started_ns=time.time_ns(),
        shape=(side, side),
        dtype="<u2",
        sizes={"t": None},
        channels=[Channel("bench")],
        positions=[Position("p")],
        pixel_size_um=0.65,
        bit_depth=12,
    )
    with FramePublisher(config.transport) as publisher:
        publisher.start(series)
        sequence = 0
        while not over.is_set():
            slot = publisher.acquire()
            header = FrameHeader(
                version=PROTOCOL_VERSION,
                series_uid="view",
                sequence=sequence,
                shape=pixels.shape,
                dtype="<u2",
                captured_ns=time.time_ns(),
                exposure_ms=1.0,
                index={"t": sequence},
            )
            slot.prepare(header)[:] = pixels
            publisher.publish(slot)
            sequence += 1
        publisher.end("completed")


class TimedPreview:
    """Adds up what the loop's threads spend in a preview."""

    def __init__(self, preview: PreviewPublisher) -> None:
        self.spent_s = 0.0
        self.calls = 0
        for name in ("offer", "note", "show"):
            setattr(preview, name, self._timed(getattr(preview, name)))

    def _timed(self, call: Any) -> Any:
        def timed(*values: Any) -> None:
            begun_s = time.perf_counter()
            call(*values)
            self.spent_s += time.perf_counter() - begun_s
            self.calls += 1

        return timed


@contextmanager
def processor(config: Config) -> Iterator[tuple[Monitor, PreviewPublisher]]:
    """Run the processor in a thread of this process."""
    monitor, stop = Monitor(), threading.Event()
    with open_preview(config.transport) as preview:

        def run() -> None:
            try:
                app._process(config, preview, monitor, stop=stop)  # noqa: SLF001
            except RtfocusError as error:
                print(f"the processor ended: {error}", file=sys.stderr)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield monitor, preview
        finally:
            stop.set()
            thread.join()


@contextmanager
def view_of(endpoint: str) -> Iterator[int]:
    """Run `rtfocus view`; yield its port."""
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "rtfocus", "view", endpoint),
            *("--port", "0", "--stop-on-end-of-input"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline().rsplit(":", 1)[1].strip("/\n"))
        assert process.stdin is not None
        process.stdin.close()


def open_page(port: int) -> ClientConnection:
    """Open the socket of a page."""
    return connect(
        HERE.format(port),
        origin=Origin(f"http://127.0.0.1:{port}"),
        max_size=None,
        proxy=None,
        compression=None,
    )


def look(port: int) -> None:
    """Take pictures and acknowledge each, until standard input ends."""
    over = threading.Event()
    threading.Thread(target=_set_at_end, args=(over,), daemon=True).start()
    taken = 0
    begun_s = time.perf_counter()
    with open_page(port) as page:
        while not over.is_set():
            try:
                said = page.recv(timeout=0.2)
            except TimeoutError:
                continue
            if isinstance(said, bytes):
                taken += 1
                if taken == 1:
                    print(time.perf_counter() - begun_s, flush=True)
                number = HEADER.unpack(said[: HEADER.size])[4]
                page.send(json.dumps({"type": "ack", "number": number}))
    print(taken)


@contextmanager
def looking(turn: str, port: int, told: list[tuple[float, int]]) -> Iterator[None]:
    """Have a page open, or one that reads nothing, or none, while the block runs."""
    if turn == "nobody":
        yield
    elif turn == "stopped":
        with open_page(port):  # nobody calls recv: its buffers fill and stay full
            yield
    else:
        with subprocess.Popen(
            [sys.executable, "-m", "bench.view", "--look", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        ) as page:
            assert page.stdin is not None
            assert page.stdout is not None
            first_s = float(page.stdout.readline())
            yield
            page.stdin.close()
            told.append((first_s, int(page.stdout.read())))


def measured(monitor: Monitor, seconds: float) -> tuple[float, float]:
    """Return frames/s and CPU ms per frame of this process over so long, or longer."""
    first, pause = monitor.accounting.written, threading.Event()
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    done, passed_s = 0, 0.0
    while done < 2 or passed_s < seconds:
        pause.wait(0.01)
        done = monitor.accounting.written - first
        passed_s = time.perf_counter() - begun_s
    return done / passed_s, 1e3 * (time.process_time() - cpu_s) / done


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="of every turn")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--work", choices=("raw", "restored"), default="restored")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--look", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--publish", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.look is not None:
        look(given.look)
        return
    if given.publish is not None:
        config = parse_config(json.loads(given.publish.read_text("utf-8")))
        publish(config, given.side)
        return
    if given.smoke:
        given.seconds, given.rounds, given.side, given.work = 0.5, 1, 256, "raw"
    figures = bench(given.work, given.side, given.seconds, given.rounds)
    print(json.dumps(figures, indent=1))
    machine.write("view", figures, given.out)


def bench(work: str, side: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Run the turns and return ratios to the turns in which nobody looked."""
    told: list[tuple[float, int]] = []
    found: dict[str, list[tuple[float, float, float]]] = {turn: [] for turn in TURNS}
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(work, Path(folder))
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config.model_dump(mode="json")), "utf-8")
        with (
            processor(config) as (monitor, preview),
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "bench.view", "--publish", str(path)),
                    *("--side", str(side)),
                ],
                stdin=subprocess.PIPE,
            ) as sender,
            view_of(str(preview.endpoint)) as port,
        ):
            spent = TimedPreview(preview)
            measured(monitor, seconds)
            for turn in TURNS * rounds:
                with looking(turn, port, told):
                    before_s, begun_s = spent.spent_s, time.perf_counter()
                    rate, cpu_ms = measured(monitor, seconds)
                    share = (spent.spent_s - before_s) / (time.perf_counter() - begun_s)
                found[turn].append((rate, cpu_ms, share))
            assert sender.stdin is not None
            sender.stdin.close()
    return summary(work, side, found, told)


def summary(
    work: str,
    side: int,
    found: dict[str, list[tuple[float, float, float]]],
    told: list[tuple[float, int]],
) -> dict[str, Any]:
    """Return medians, and medians of the ratios of neighbouring turns."""
    figures: dict[str, Any] = {"work": work, "side_px": side}
    for turn in TURNS:
        pairs = list(zip(found[turn], found["nobody"], strict=True))
        figures[turn] = {
            "frames_per_s": statistics.median(one[0] for one in found[turn]),
            "rate_ratio": statistics.median(a[0] / b[0] for a, b in pairs),
            "cpu_ratio": statistics.median(a[1] / b[1] for a, b in pairs),
            "loop_share": statistics.median(one[2] for one in found[turn]),
        }
    figures["first_picture_s"] = statistics.median(first_s for first_s, _ in told)
    figures["pictures_taken"] = sum(taken for _, taken in told)
    return figures


if __name__ == "__main__":
    main()
