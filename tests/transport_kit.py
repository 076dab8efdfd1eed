"""Transport kit: both sides on free ports, with frames that hold their sequence."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rtfocus.channel import Channel
from rtfocus.config.sections import TransportConfig
from rtfocus.frame import Estimate, FrameHeader, Position, SeriesStart, Slot
from rtfocus.metrics import Accounting
from rtfocus.transport.inflow import Gap
from rtfocus.transport.publisher import FramePublisher
from rtfocus.transport.receiver import FrameReceiver

SHAPE = (24, 32)
DEADLINE_S = 60.0
"""No wait in a test outlasts it; none comes near when things are right."""


def make_config(**changes: Any) -> TransportConfig:
    """Return a config on free ports with short times."""
    values: dict[str, Any] = {
        "frames": "tcp://127.0.0.1:*",
        "control": "tcp://127.0.0.1:*",
        "slots": 8,
        "heartbeat_s": 0.05,
        "stall_timeout_s": 1.0,
        "connect_timeout_s": 30.0,
    }
    return TransportConfig(**(values | changes))


def facing(publisher: FramePublisher, **changes: Any) -> TransportConfig:
    """Return the config of a receiver for this publisher."""
    frames, control = publisher.endpoints
    return make_config(frames=frames, control=control, **changes)


def make_series(uid: str = "series-1", **changes: Any) -> SeriesStart:
    """Return the start of a small grey series without an end."""
    values: dict[str, Any] = {
        "version": 1,
        "series_uid": uid,
        "name": "numbers",
        "started_ns": time.time_ns(),
        "shape": SHAPE,
        "dtype": "<u2",
        "sizes": {"t": None},
        "channels": [Channel("default")],
        "positions": [Position("here")],
        "pixel_size_um": 0.5,
    }
    return SeriesStart(**(values | changes))


def make_header(sequence: int, uid: str = "series-1", **changes: Any) -> FrameHeader:
    """Return the header of one frame of `make_series`."""
    values: dict[str, Any] = {
        "version": 1,
        "series_uid": uid,
        "sequence": sequence,
        "shape": SHAPE,
        "dtype": "<u2",
        "captured_ns": time.time_ns(),
        "exposure_ms": 1.0,
        "index": {"t": sequence},
    }
    return FrameHeader(**(values | changes))


def make_estimate(sequence: int, uid: str = "series-1") -> Estimate:
    """Return an estimate of one frame."""
    return Estimate(
        series_uid=uid,
        sequence=sequence,
        level=3,
        defocus_um=6.0,
        signed=False,
        confidence=0.9,
        foreground=0.5,
        z_um=None,
        z_offset_um=0.0,
        index={"t": sequence},
        captured_ns=0,
        estimated_ns=1,
    )


def publish(
    publisher: FramePublisher, count: int, first: int = 0, uid: str = "series-1"
) -> None:
    """Publish frames whose pixels all hold their sequence."""
    for sequence in range(first, first + count):
        slot = publisher.acquire()
        slot.prepare(make_header(sequence, uid)).fill(sequence)
        publisher.publish(slot)


def number_of(slot: Slot) -> int:
    """Return the sequence all pixels hold; fails when they differ."""
    values = np.unique(slot.pixels)
    assert values.size == 1, f"frame {slot.frame().sequence} is torn: {values[:5]}"
    assert int(values[0]) == slot.frame().sequence
    return int(values[0])


@dataclass
class Recording:
    """What came out of a receiver."""

    sequences: list[int] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)


def record(receiver: FrameReceiver, into: Recording | None = None) -> Recording:
    """Take frames until the series ends, each durable as soon as it is there."""
    recording = into or Recording()
    for arrived in receiver.frames():
        if isinstance(arrived, Gap):
            recording.gaps.append(arrived)
            receiver.report_durable(arrived.first + arrived.count - 1)
            continue
        recording.sequences.append(number_of(arrived))
        receiver.report_durable(arrived.frame().sequence)
        receiver.release(arrived)
    return recording


def holds_identity(accounting: Accounting, recording: Recording) -> bool:
    """Tell whether every acquired frame was recorded or counted as lost."""
    accounting.count("written", number=len(recording.sequences))
    return accounting.unaccounted == 0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; fail at the deadline."""
    deadline_s = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        pause.wait(0.002)


class Background:
    """A function in a thread; leaving the block joins it and raises its error."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self.error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> BaseException | None:
        """Wait for the end; return its error instead of raising it."""
        self._thread.join(DEADLINE_S)
        assert self.is_done, "background function hangs"
        error, self.error = self.error, None
        return error

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        error = self.join()
        if error is not None and kind is None:
            raise error


@contextmanager
def receiving(
    config: TransportConfig, next_sequence: int | None = 0
) -> Iterator[tuple[FrameReceiver, Accounting]]:
    """Open a receiver that has begun (None: that has not) the next series."""
    accounting = Accounting()
    with FrameReceiver(config, accounting) as receiver:
        if next_sequence is not None:
            assert receiver.wait_series(DEADLINE_S) is not None
            receiver.begin(next_sequence)
        yield receiver, accounting


def end_without_a_word(publisher: FramePublisher) -> None:
    """Close a publisher that tells its recorder nothing, as when its process dies."""
    publisher._loop.registrar.recorder = None
    publisher.close()
