"""Transport bench: rtfocus against a bare pyzmq loop, filled slot to filled slot.

Two processes on one machine. Sender and receiver of all contenders live in the same
two processes and take turns, so that load from outside hits all. rtfocus runs twice:
with pixels by TCP and, as it does by itself on one machine, by shared memory. The
bare loop is PUSH/PULL with a header part, sends without a copy and copies each
frame into one of a ring of preallocated arrays: what a careful person writes by
hand, without credit, resend, accounting or durability.

Run: python -m bench.transport [--rounds 7] [--frames 150] [--size 2048]
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zmq

from bench import machine
from rtfocus.channel import Channel
from rtfocus.config.sections import TransportConfig
from rtfocus.frame import FrameHeader, Position, SeriesStart
from rtfocus.metrics import Accounting
from rtfocus.transport import messages
from rtfocus.transport.inflow import Gap
from rtfocus.transport.publisher import FramePublisher
from rtfocus.transport.receiver import FrameReceiver
from rtfocus.transport.sockets import create_keys, secure_client, secure_server

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as Connection
else:
    from multiprocessing.connection import Connection

RING = 32
"""Slots, and the bare loop's arrays and high-water mark."""
WAYS: dict[str, Literal["auto", "off"]] = {"rtfocus": "off", "shared": "auto"}
"""rtfocus by TCP and by shared memory, as the config says it."""


def series_start(uid: str, size: int) -> SeriesStart:
    """Return a series of square 16-bit frames."""
    return SeriesStart(
        version=1,
        series_uid=uid,
        name="bench",
        started_ns=time.time_ns(),
        shape=(size, size),
        dtype="<u2",
        sizes={"t": None},
        channels=[Channel("default")],
        positions=[Position("p0")],
        pixel_size_um=0.65,
    )


def header(uid: str, sequence: int, size: int) -> FrameHeader:
    """Return one frame's header."""
    return FrameHeader(
        version=1,
        series_uid=uid,
        sequence=sequence,
        shape=(size, size),
        dtype="<u2",
        captured_ns=time.time_ns(),
        exposure_ms=10.0,
        index={"t": sequence},
        z_um=0.0,
    )


def sender(pipe: Connection, size: int, keys: Path | None) -> None:
    """Serve rounds until told to end; runs in a process of its own."""
    configs = {
        kind: TransportConfig(
            frames="tcp://127.0.0.1:*",
            control="tcp://127.0.0.1:*",
            slots=RING,
            curve_keys=keys,
            shared_memory=way,
        )
        for kind, way in WAYS.items()
    }
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.sndhwm = RING
    if keys is not None:
        secure_server(push, keys)
    port = push.bind_to_random_port("tcp://127.0.0.1")
    random = np.random.default_rng(0)
    ring = [random.integers(0, 4096, (size, size), "u2") for _ in range(RING)]
    with ExitStack() as opened:
        publishers = {
            kind: opened.enter_context(FramePublisher(config))
            for kind, config in configs.items()
        }
        endpoints = {kind: one.endpoints for kind, one in publishers.items()}
        pipe.send((endpoints, f"tcp://127.0.0.1:{port}"))
        while (order := pipe.recv()) is not None:
            kind, uid, frames = order
            if (publisher := publishers.get(kind)) is not None:
                publisher.start(series_start(uid, size))
            # Allocating slots is set-up: neither clock sees it.
            cpu_s = time.process_time()
            if publisher is not None:
                for sequence in range(frames):
                    slot = publisher.acquire()
                    slot.prepare(header(uid, sequence, size))
                    publisher.publish(slot)
                publisher.end("completed")
            else:
                for sequence in range(frames):
                    push.send(messages.pack(header(uid, sequence, size)), zmq.SNDMORE)
                    push.send(ring[sequence % RING].data, copy=False)
                pipe.recv()
            pipe.send(time.process_time() - cpu_s)
    context.destroy(linger=0)


class Contenders:
    """The receiving ends of all."""

    def __init__(self, pipe: Connection, size: int, keys: Path | None) -> None:
        self._pipe = pipe
        self._size = size
        endpoints, bare = pipe.recv()
        self._came = Accounting()
        self._receivers = {
            kind: FrameReceiver(
                TransportConfig(
                    frames=frames,
                    control=control,
                    slots=RING,
                    curve_keys=keys,
                    shared_memory=WAYS[kind],
                ),
                self._came,
            )
            for kind, (frames, control) in endpoints.items()
        }
        self._context = zmq.Context()
        self._pull = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = RING
        if keys is not None:
            secure_client(self._pull, keys)
        self._pull.connect(bare)
        self._ring = [np.zeros((size, size), "u2") for _ in range(RING)]
        self._rounds = 0

    def round(self, kind: str, frames: int) -> dict[str, float]:
        """Send one series; return its rate and CPU time of both processes."""
        self._rounds += 1
        self._pipe.send((kind, f"round-{self._rounds}", frames))
        if kind in self._receivers:
            seconds, cpu_s = self._rtfocus(self._receivers[kind])
        else:
            seconds, cpu_s = self._bare(frames)
        sender_cpu_s = self._pipe.recv()
        megabytes = (frames - 1) * self._size**2 * 2 / 1e6
        return {
            "frames_per_s": (frames - 1) / seconds,
            "mb_per_s": megabytes / seconds,
            "sender_cpu_ms_per_frame": 1e3 * sender_cpu_s / frames,
            "receiver_cpu_ms_per_frame": 1e3 * cpu_s / (frames - 1),
        }

    def _rtfocus(self, receiver: FrameReceiver) -> tuple[float, float]:
        series = receiver.wait_series()
        if series is None:
            msg = "no series came"
            raise RuntimeError(msg)
        receiver.begin()
        marks: list[tuple[float, float]] = []
        for slot in receiver.frames():
            if isinstance(slot, Gap):
                msg = f"frames were lost: {slot}"
                raise RuntimeError(msg)
            marks.append((time.perf_counter(), time.process_time()))
            receiver.report_durable(slot.frame().sequence)
            receiver.release(slot)
        return marks[-1][0] - marks[0][0], marks[-1][1] - marks[0][1]

    def _bare(self, frames: int) -> tuple[float, float]:
        marks: list[tuple[float, float]] = []
        for number in range(frames):
            head, pixels = self._pull.recv_multipart(copy=False)
            messages.unpack_in_stream(head.bytes)
            target = self._ring[number % RING]
            np.copyto(target, np.frombuffer(pixels.buffer, "u2").reshape(target.shape))
            marks.append((time.perf_counter(), time.process_time()))
        self._pipe.send("received")
        return marks[-1][0] - marks[0][0], marks[-1][1] - marks[0][1]

    def close(self) -> None:
        """End all, and show by which way their frames came."""
        print(f"frames came by {dict(self._came.came_by)}")
        for receiver in self._receivers.values():
            receiver.close()
        self._context.destroy(linger=0)
        self._pipe.send(None)


def compare(
    rounds: int, frames: int, size: int, keys: Path | None = None
) -> dict[str, Any]:
    """Run all in turn; return figures per round, medians and their ratio."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=sender, args=(there, size, keys))
    process.start()
    contenders = Contenders(here, size, keys)
    kinds = ("bare", *WAYS)
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        # Whoever goes second finds a warmer machine: they take turns in that too.
        for kind in kinds if number % 2 else reversed(kinds):
            figures = contenders.round(kind, frames)
            if number > 0:
                results[kind].append(figures)
    contenders.close()
    process.join()
    medians = {
        kind: {key: statistics.median(r[key] for r in values) for key in values[0]}
        for kind, values in results.items()
    }
    pairs = zip(results["rtfocus"], results["bare"], strict=True)
    ratios = [mine["frames_per_s"] / bare["frames_per_s"] for mine, bare in pairs]
    return {
        "ratio": medians["rtfocus"]["frames_per_s"] / medians["bare"]["frames_per_s"],
        "shared_to_tcp": medians["shared"]["frames_per_s"]
        / medians["rtfocus"]["frames_per_s"],
        "ratio_per_round": ratios,
        "median": medians,
        "rounds": results,
    }


def show(title: str, result: dict[str, Any]) -> None:
    """Print one comparison."""
    print(title)
    for kind, figures in result["median"].items():
        print(
            f"  {kind:8s} {figures['frames_per_s']:7.1f} frames/s "
            f"{figures['mb_per_s']:7.0f} MB/s  CPU per frame: sender "
            f"{figures['sender_cpu_ms_per_frame']:.2f} ms, receiver "
            f"{figures['receiver_cpu_ms_per_frame']:.2f} ms"
        )
    low, high = min(result["ratio_per_round"]), max(result["ratio_per_round"])
    print(f"  ratio    {result['ratio']:.3f}  (rounds {low:.2f} to {high:.2f})")
    print(f"  shared memory against TCP {result['shared_to_tcp']:.2f}")


def main() -> None:
    """Compare in clear text and with CURVE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--no-curve", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="a few small frames")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.frames, options.size = 1, 10, 256
    plain = compare(options.rounds, options.frames, options.size)
    show(f"{options.size}^2 uint16, one machine", plain)
    payload = {
        "question": "rtfocus frames/s over bare pyzmq frames/s; bar 0.9",
        "config": {"rounds": options.rounds, "frames": options.frames},
        "size_px": options.size,
        "plain": plain,
    }
    if not options.no_curve:
        with tempfile.TemporaryDirectory() as folder:
            keys = create_keys(Path(folder))
            frames = max(options.frames // 5, 2)
            curve = compare(max(options.rounds // 2, 1), frames, options.size, keys)
        show("the same with CURVE", curve)
        payload["curve"] = curve
    print(f"written to {machine.write('transport', payload, options.out)}")


if __name__ == "__main__":
    main()
