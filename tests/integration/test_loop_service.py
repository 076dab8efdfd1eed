"""`rtfocus process` as a service outlives its microscope sides and loses nothing."""

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hostile_kit import HostilePublisher, Parts
from loop_kit import (
    DEADLINE_S,
    assert_whole,
    lines_written,
    read_report,
    small,
    started,
    wait_for,
    write_config,
)
from transport_kit import (
    Background,
    end_without_a_word,
    make_config,
    make_header,
    make_series,
    publish,
)

from rtfocus import app
from rtfocus.config import Config
from rtfocus.errors import PeerLostError, RtfocusError
from rtfocus.transport import messages as m
from rtfocus.transport.publisher import FramePublisher

INDEPENDENT = Path(__file__).with_name("independent_publisher.py")
HASTE = {"heartbeat_s": 0.05, "stall_timeout_s": 1.5, "connect_timeout_s": 0.3}


def facing(config: Config, endpoints: tuple[str, str], **changes: object) -> Config:
    update = dict(zip(("frames", "control"), endpoints, strict=True)) | changes
    transport = config.transport.model_copy(update=update)
    return config.model_copy(update={"transport": transport})


class Serving:
    """`app.serve` in a thread, and what it told."""

    def __init__(self, config: Config) -> None:
        self.finished: list[Path] = []
        self.failures: list[RtfocusError] = []
        self._stop = threading.Event()
        self._running = Background(
            lambda: app.serve(
                config,
                stop=self._stop,
                on_finished=self.finished.append,
                on_failure=self.failures.append,
            )
        )

    def __enter__(self) -> "Serving":
        self._running.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        assert self._running.join() is None

    @property
    def is_running(self) -> bool:
        return not self._running.is_done


@contextmanager
def independent(
    frames: int,
) -> Iterator[tuple["subprocess.Popen[str]", tuple[str, str]]]:
    """Start the publisher that knows nothing of rtfocus."""
    command = [sys.executable, str(INDEPENDENT), str(frames), "32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    try:
        with process.stdout as lines:
            yield process, (lines.readline().strip(), lines.readline().strip())
    finally:
        process.kill()
        process.wait()


def send(publisher: FramePublisher, uid: str, frames: int) -> None:
    publisher.start(make_series(uid))
    publish(publisher, frames, uid=uid)
    publisher.end("completed")


def test_it_outlives_silence_and_a_publisher_that_is_gone(tmp_path: Path) -> None:
    ports = make_config()
    with FramePublisher(ports) as publisher:
        endpoints = publisher.endpoints
        config = facing(small(tmp_path, None, transport=HASTE), endpoints)
        with Serving(config) as serving:
            send(publisher, "first", 5)
            with Background(lambda: publisher.start(make_series("second"))):
                wait_for(lambda: publisher.status().recorder_alive, "a recorder")
            publish(publisher, 3, uid="second")
            wait_for(lambda: publisher.status().durable_upto == 3, "three frames")
            end_without_a_word(publisher)
            wait_for(lambda: bool(serving.failures), "the end of the second series")
            assert "its port is closed" in str(serving.failures[0])
            # Longer than connect_timeout_s without anybody there.
            frames, control = endpoints
            with FramePublisher(make_config(frames=frames, control=control)) as again:
                send(again, "third", 4)
                wait_for(lambda: len(serving.finished) == 2, "the third folder")
            assert serving.is_running
    for name, reason, number in (
        ("small", "completed", 5),
        ("small-2", "its port is closed", 3),
        ("small-3", "completed", 4),
    ):
        folder = tmp_path / f"{name}.rtfocus"
        assert_whole(folder, number)
        assert reason in read_report(folder)["reason"]


def test_one_bad_series_ends_alone_and_is_not_tried_again(tmp_path: Path) -> None:
    with FramePublisher(make_config(connect_timeout_s=1.0)) as publisher:
        config = facing(small(tmp_path, None, transport=HASTE), publisher.endpoints)
        with Serving(config) as serving:
            bad = make_series("bad", bit_depth=-3)
            with pytest.raises(RtfocusError, match="bit_depth=-3 is not from 1 to 16"):
                publisher.start(bad)
            send(publisher, "good", 4)
            wait_for(lambda: bool(serving.finished), "the good folder")
    assert [path.name for path in tmp_path.glob("*")] == ["small.rtfocus"]
    assert_whole(tmp_path / "small.rtfocus", 4)


def test_a_series_that_ends_here_alone_is_not_begun_again(tmp_path: Path) -> None:
    """A frame of another form ends a series that its publisher would go on with."""

    def damage(number: int, _: int, parts: Parts) -> list[Parts]:
        other = [m.pack(make_header(3, shape=(4, 4))), bytes(32)]
        return [other] if number == 3 else [parts]

    hostile = HostilePublisher(9, damage)
    assert len(hostile.endpoints) == 2
    ends = (hostile.endpoints[0], hostile.endpoints[1])
    with Serving(facing(small(tmp_path, None, transport=HASTE), ends)) as serving:
        with Background(hostile.run):
            wait_for(lambda: bool(serving.finished), "the end of the series")
        with (
            FramePublisher(make_config(frames=ends[0], control=ends[1])) as publisher,
            Background(lambda: publisher.start(hostile.series)) as starting,
        ):
            wait_for(lambda: publisher.status().left is not None, "the farewell")
            assert "small.rtfocus'; begin a new one" in str(publisher.status().left)
            publisher.stop()
            assert isinstance(starting.join(), RtfocusError)
    assert [path.name for path in tmp_path.glob("*")] == ["small.rtfocus"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP to freeze a process")
@pytest.mark.parametrize("is_service", [True, False])
def test_a_frozen_publisher_goes_on_in_the_same_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_service: bool
) -> None:
    number = 400
    folder = tmp_path / "small.rtfocus"
    with independent(number) as (process, endpoints):
        transport = HASTE | {"slots": 4}
        config = facing(small(tmp_path, None, transport=transport), endpoints)
        if is_service:
            with Serving(config) as serving, caplog.at_level(logging.WARNING):
                wait_for(lambda: lines_written(folder) >= 10, "ten frames")
                process.send_signal(signal.SIGSTOP)
                wait_for(lambda: "waiting for it" in caplog.text, "the loss")
                process.send_signal(signal.SIGCONT)
                wait_for(lambda: bool(serving.finished), "the end of the series")
                assert serving.failures == []
        else:
            never = threading.Event()
            lost = Background(lambda: app.process(config, stop=never))
            with lost:
                wait_for(lambda: lines_written(folder) >= 10, "ten frames")
                process.send_signal(signal.SIGSTOP)
                error = lost.join()
            assert isinstance(error, PeerLostError), error
            assert "start the same command again" in str(error)
            process.send_signal(signal.SIGCONT)
            # However long the publisher takes to wake on a busy machine.
            again = facing(config, endpoints, connect_timeout_s=30.0)
            assert app.process(again, stop=never) == folder
        assert process.wait(DEADLINE_S) == 0
    assert [path.name for path in tmp_path.glob("*")] == ["small.rtfocus"]
    assert_whole(folder, number)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX processes")
def test_an_interrupt_ends_the_service(tmp_path: Path) -> None:
    with FramePublisher(make_config(connect_timeout_s=DEADLINE_S)) as publisher:
        config = facing(small(tmp_path, None, transport=HASTE), publisher.endpoints)
        path = write_config(tmp_path / "config.yaml", config)
        with started("process", path, "--quiet", cwd=tmp_path) as service:
            send(publisher, "only", 3)
            service.send_signal(signal.SIGINT)
            out, errors = service.communicate(timeout=DEADLINE_S)
    assert (service.returncode, errors) == (0, "")
    assert "3 acquired = 3 written" in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP to freeze a process")
def test_a_run_waits_for_its_own_microscope_side_that_is_frozen(tmp_path: Path) -> None:
    haste = {"heartbeat_s": 0.1, "stall_timeout_s": 1.0, "connect_timeout_s": 1.0}
    config = small(
        tmp_path,
        None,
        transport=haste,
        acquisition={"live": {"frames": 60, "exposure_ms": 1}},
        microscope={"frames_per_s": 30},
    )
    path = write_config(tmp_path / "config.yaml", config)
    folder = tmp_path / "small.rtfocus"
    with started("run", path, "--quiet", cwd=tmp_path) as process:
        wait_for(lambda: lines_written(folder) >= 5, "five frames")
        (child,) = psutil.Process(process.pid).children()
        child.suspend()
        assert process.stderr is not None
        assert "waiting for it" in process.stderr.readline()
        child.resume()
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (0, "")
    assert_whole(folder, 60)
