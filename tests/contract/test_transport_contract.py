"""What a receiver promises: rtfocus' publisher and one in bare pyzmq, by both ways."""

import getpass
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from transport_kit import (
    DEADLINE_S,
    SHAPE,
    Background,
    holds_identity,
    make_config,
    make_series,
    number_of,
    publish,
    receiving,
    record,
)

from rtfocus.errors import TransportError
from rtfocus.frame import PROTOCOL_VERSION
from rtfocus.metrics import Accounting
from rtfocus.transport.publisher import FramePublisher
from rtfocus.transport.receiver import FrameReceiver

Endpoints = tuple[str, str]
Publishing = Callable[..., AbstractContextManager[Endpoints]]
HOST = socket.gethostname()
INDEPENDENT = Path(__file__).parents[1] / "integration" / "independent_publisher.py"
SHARED = INDEPENDENT.with_name("independent_shared_publisher.py")


@contextmanager
def rtfocus_publishing(
    frames: int, pairing: str | None = None, *, shared_memory: str = "auto"
) -> Iterator[Endpoints]:
    config = make_config(pairing=pairing, shared_memory=shared_memory)
    with FramePublisher(config) as publisher:

        def act() -> None:
            publisher.start(make_series(sizes={"t": frames}))
            publish(publisher, frames)
            publisher.end("completed")

        with Background(act):
            yield publisher.endpoints
        who = f"process {os.getpid()} ({getpass.getuser()}) on host {HOST}"
        assert str(publisher.status().recorder).startswith(who)


@contextmanager
def independent_publishing(
    frames: int, pairing: str | None = None, *, script: Path = INDEPENDENT
) -> Iterator[Endpoints]:
    command = [sys.executable, str(script), str(frames), str(SHAPE[1])]
    command += [] if pairing is None else [pairing]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    try:
        with process.stdout as lines:
            yield lines.readline().strip(), lines.readline().strip()
            assert lines.readline().startswith(f"{os.getpid()} {HOST} ")
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


by_tcp = partial(rtfocus_publishing, shared_memory="off")
independent_shared = partial(independent_publishing, script=SHARED)
WAYS = dict.fromkeys([rtfocus_publishing, independent_shared], "shared memory")
"""How frames come from a publisher; from all others by TCP."""
has_shared_memory = pytest.mark.skipif(
    sys.platform not in ("linux", "win32"), reason="no shared memory that ends"
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="is written for Linux")


@pytest.fixture(
    params=[
        pytest.param(rtfocus_publishing, marks=has_shared_memory),
        by_tcp,
        independent_publishing,
        pytest.param(independent_shared, marks=on_linux),
    ],
    ids=["rtfocus-shared", "rtfocus-tcp", "independent", "independent-shared"],
)
def publishing(request: pytest.FixtureRequest) -> Publishing:
    """Each publisher and way there is: a series of so many frames on two endpoints."""
    return request.param


def test_a_recorder_that_wants_no_shared_memory_gets_pixels_by_tcp() -> None:
    with rtfocus_publishing(20) as (frames, control):
        config = make_config(frames=frames, control=control, shared_memory="off")
        with receiving(config) as (receiver, accounting):
            assert record(receiver).sequences == list(range(20))
            assert accounting.came_by == {"TCP": 20}


def independent_record(publisher: FramePublisher, frames: int) -> list[int]:
    """Record by bare pyzmq and msgpack; return the number that each frame holds."""
    context = zmq.Context()
    stream, control = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    try:
        for endpoint, end in zip(publisher.endpoints, (stream, control), strict=True):
            end.rcvtimeo = int(1000 * DEADLINE_S)
            end.connect(endpoint)

        def say(kind: str, **keys: object) -> None:
            control.send(msgpack.packb({"type": kind, "uid": "foreign", **keys}))

        welcome: dict[str, Any] = {}
        while welcome.get("type") != "welcome":
            say("hello", version=1, role="recorder")
            welcome = msgpack.unpackb(control.recv())
        series = {"series_uid": welcome["start"]["series_uid"]}
        stream.subscribe(welcome["topic"])
        say("resend", **series, sequence=0, attempt=1)
        numbers: list[int] = []
        while True:
            reached = {"received_upto": len(numbers), "durable_upto": len(numbers)}
            say("progress", **series, credit_upto=len(numbers) + 4, **reached)
            _, packed, *pixels = stream.recv_multipart()
            header = msgpack.unpackb(packed)
            if header["type"] == "frame":
                assert header["sequence"] == len(numbers)
                (number,) = set(memoryview(pixels[0]).cast("H"))
                numbers.append(number)
            elif header["type"] == "end" and len(numbers) == frames:
                say("ended", **series)
                return numbers
            else:
                assert header["type"] in {"rewind", "ping", "end"}
    finally:
        context.destroy(linger=500)


def test_a_recorder_that_knows_of_no_shared_memory_gets_every_pixel() -> None:
    with FramePublisher(make_config()) as publisher:

        def act() -> None:
            publisher.start(make_series())
            publish(publisher, 20)
            publisher.end("completed")

        with Background(act):
            assert independent_record(publisher, 20) == list(range(20))


def test_frames_arrive_once_in_order_and_whole(publishing: Publishing) -> None:
    with publishing(300) as (frames, control):
        config = make_config(frames=frames, control=control)
        with receiving(config) as (receiver, accounting):
            recording = record(receiver)
            assert recording.sequences == list(range(300))
            assert recording.gaps == []
            assert receiver.end is not None
            assert receiver.end.reason == "completed"
            assert receiver.end.frames_sent == 300
            assert accounting.rejected == {}
            assert accounting.came_by == {WAYS.get(publishing, "TCP"): 300}
            assert holds_identity(accounting, recording)


def test_series_start_says_what_comes(publishing: Publishing) -> None:
    with publishing(3) as (frames, control):
        config = make_config(frames=frames, control=control)
        with receiving(config, None) as (receiver, _):
            series = receiver.wait_series(DEADLINE_S)
            assert series is not None
            assert series.version == PROTOCOL_VERSION
            assert series.dtype == "<u2"
            assert series.sizes == {"t": 3}
            receiver.begin()
            assert record(receiver).sequences == [0, 1, 2]


def test_credit_is_never_exceeded(publishing: Publishing) -> None:
    """Whoever keeps all slots gets no frame more, and nothing was lost by it."""
    with publishing(50) as (frames, control):
        config = make_config(frames=frames, control=control, slots=4)
        with receiving(config) as (receiver, accounting):
            arrivals = receiver.frames()
            for _ in range(12):
                held = [next(arrivals) for _ in range(4)]
                assert receiver.slots.free == 0
                for slot in held:
                    number_of(slot)
                    receiver.report_durable(slot.frame().sequence)
                    receiver.release(slot)
            assert record(receiver).sequences == [48, 49]
            assert accounting.rejected == {}


def test_a_second_recorder_is_refused(publishing: Publishing) -> None:
    with publishing(20) as (frames, control):
        config = make_config(frames=frames, control=control)
        with receiving(config) as (receiver, _):
            with (
                receiving(config, None) as (second, _),
                pytest.raises(TransportError, match="recorder"),
            ):
                second.wait_series(DEADLINE_S)
            assert record(receiver).sequences == list(range(20))


def test_only_a_recorder_of_the_same_pairing_is_welcome(publishing: Publishing) -> None:
    with publishing(20, "violet") as (frames, control):
        for pairing in (None, "ultramarine"):
            config = make_config(frames=frames, control=control, pairing=pairing)
            with (
                receiving(config, None) as (stranger, _),
                pytest.raises(TransportError, match=r"refused: .*pair"),
            ):
                stranger.wait_series(DEADLINE_S)
        config = make_config(frames=frames, control=control, pairing="violet")
        with receiving(config) as (receiver, _):
            assert record(receiver).sequences == list(range(20))


def test_stop_ends_the_iteration_after_what_has_arrived(
    publishing: Publishing,
) -> None:
    with publishing(40) as (frames, control):
        config = make_config(frames=frames, control=control, slots=4)
        with receiving(config) as (receiver, _):
            arrivals = receiver.frames()
            first = [next(arrivals) for _ in range(4)]
            receiver.stop()
            assert list(arrivals) == []
            assert receiver.end is not None
            assert receiver.end.reason == "stopped"
            assert receiver.wait_series() is None
            for slot in first:
                receiver.release(slot)
        # Another recorder finishes what this one left.
        with receiving(config) as (receiver, _):
            assert record(receiver).sequences == list(range(40))


def test_nobody_there_is_an_error_with_the_remedy() -> None:
    config = make_config(
        frames="tcp://127.0.0.1:9", control="tcp://127.0.0.1:9", connect_timeout_s=0.2
    )
    with (
        receiving(config, None) as (receiver, _),
        pytest.raises(TransportError, match="start `rtfocus acquire`"),
    ):
        receiver.wait_series()


def test_a_reachable_publisher_without_a_series_is_waited_for() -> None:
    with FramePublisher(make_config()) as publisher:
        frames, control = publisher.endpoints
        config = make_config(frames=frames, control=control, connect_timeout_s=0.2)
        with receiving(config, None) as (receiver, _):
            assert receiver.wait_series(timeout_s=0.5) is None


def test_close_twice_and_unused() -> None:
    config = make_config(frames="tcp://127.0.0.1:9", control="tcp://127.0.0.1:9")
    receiver = FrameReceiver(config, Accounting())
    receiver.close()
    receiver.close()
