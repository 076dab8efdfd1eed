"""Memory that both sides see: what is read is what was announced, and nothing stays."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from transport_kit import SHAPE, make_config, make_header, make_series, number_of

from rtfocus.errors import ProtocolError
from rtfocus.frame import Slot
from rtfocus.metrics import Accounting
from rtfocus.transport import messages as m
from rtfocus.transport.inflow import Arrivals, Inflow
from rtfocus.transport.memory import (
    Segment,
    SharedFrames,
    SharedSlots,
    open_segment,
    slot_pool,
)

FRAME_BYTES = 2 * SHAPE[0] * SHAPE[1]

pytestmark = pytest.mark.skipif(
    sys.platform not in ("linux", "win32"), reason="no shared memory that ends"
)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def filled(pool: SharedSlots, sequence: int) -> Slot:
    slot = pool.acquire(timeout_s=0)
    assert slot is not None
    slot.prepare(make_header(sequence)).fill(sequence)
    return slot


def recording(pool: SharedSlots) -> tuple[Inflow, Arrivals, Accounting]:
    """Return a recorder that reads this pool, its first resend answered."""
    arrivals, accounting = Arrivals(), Accounting()
    slots = slot_pool(make_config(), FRAME_BYTES)
    shared = SharedFrames(pool.segment)
    inflow = Inflow(make_series(), 0, slots, arrivals, accounting, shared)
    rewind = m.Rewind(version=1, series_uid="series-1", sequence=0, attempt=1)
    inflow.take(m.pack(rewind), None)
    return inflow, arrivals, accounting


def test_frames_are_read_where_they_lie() -> None:
    pool = SharedSlots(3, FRAME_BYTES)
    inflow, arrivals, accounting = recording(pool)
    for sequence in range(7):
        slot = filled(pool, sequence)
        inflow.take(m.pack(pool.place(slot)), None)
        pool.release(slot)
    inflow.stop()
    found = [one for one in arrivals if isinstance(one, Slot)]
    assert [number_of(slot) for slot in found] == list(range(7))
    assert accounting.came_by == {"shared memory": 7}


def test_a_frame_that_was_let_go_is_not_taken_for_what_came_into_its_slot() -> None:
    """As for a recorder that slept while another took its place."""
    pool = SharedSlots(1, FRAME_BYTES)
    inflow, arrivals, accounting = recording(pool)
    slot = filled(pool, 0)
    announced = m.pack(pool.place(slot))
    pool.release(slot)
    filled(pool, 1)
    free = inflow.credit_upto
    with pytest.raises(ProtocolError, match="let go") as e:
        inflow.take(announced, None)
    assert e.value.reason == "replaced"
    assert inflow.credit_upto == free
    assert inflow.sequencer.expected == 0
    inflow.stop()
    assert list(arrivals) == []
    assert accounting.came_by == {}


def test_a_slot_that_is_let_go_during_the_copy_shows_after_it() -> None:
    pool = SharedSlots(1, FRAME_BYTES)
    slot = filled(pool, 0)
    placed, frames = pool.place(slot), SharedFrames(pool.segment)
    pixels = np.frombuffer(frames.pixels(placed, FRAME_BYTES), "<u2")
    first_half = pixels[: pixels.size // 2].copy()
    assert frames.holds(placed)
    pool.release(slot)
    again = filled(pool, 1)
    torn = np.concatenate([first_half, pixels[pixels.size // 2 :]])
    assert set(torn.tolist()) == {0, 1}
    assert not frames.holds(placed)
    assert frames.holds(pool.place(again))


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": -1},
        {"offset": 1 << 40},
        {"counter": -8},
        {"counter": 1 << 40},
        {"counter": 65},
    ],
)
def test_a_place_beyond_the_segment_is_refused(wrong: dict[str, int]) -> None:
    pool = SharedSlots(2, FRAME_BYTES)
    inflow, _, _ = recording(pool)
    placed = msgspec.structs.replace(pool.place(filled(pool, 0)), **wrong)
    with pytest.raises(ProtocolError, match="lies beyond") as e:
        inflow.take(m.pack(placed), None)
    assert e.value.reason == "place"


def test_what_is_read_cannot_be_written() -> None:
    pool = SharedSlots(2, FRAME_BYTES)
    placed = pool.place(filled(pool, 0))
    assert SharedFrames(pool.segment).pixels(placed, FRAME_BYTES).readonly


@on_linux
def test_a_segment_that_is_none_means_tcp(tmp_path: Path) -> None:
    """A peer's words open no other file, and no memory that could shrink."""
    config, pool = make_config(), SharedSlots(2, FRAME_BYTES)
    good = pool.segment
    reading, writing = os.pipe()
    unsealed = os.memfd_create("unsealed")
    plain = tmp_path / "plain"
    plain.write_bytes(good.nonce + bytes(good.size))
    os.write(unsealed, plain.read_bytes())
    file = os.open(plain, os.O_RDONLY)
    here = f"/proc/{os.getpid()}/fd"
    try:
        for changes in (
            {"nonce": bytes(16)},
            {"nonce": b""},
            {"size": good.size + 1},
            {"size": -1},
            {"size": 0},
            {"name": ""},
            {"name": str(plain)},
            {"name": f"{here}/../fd/{good.name.rpartition('/')[2]}"},
            {"name": f"{here}/{reading}"},
            {"name": f"{here}/{unsealed}"},
            {"name": f"{here}/{file}"},
            {"name": f"{here}/99999"},
            {"name": "/proc/1\x00/fd/1"},
        ):
            assert (
                open_segment(config, msgspec.structs.replace(good, **changes)) is None
            )
        assert open_segment(config, None) is None
        assert open_segment(make_config(shared_memory="off"), good) is None
        assert open_segment(config, good) is not None
    finally:
        for descriptor in (reading, writing, unsealed, file):
            os.close(descriptor)


def test_memory_is_shared_where_it_is_wanted_and_there_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config()
    assert isinstance(slot_pool(config, FRAME_BYTES, shared=True), SharedSlots)
    off = make_config(shared_memory="off")
    for plain in (slot_pool(config, FRAME_BYTES), slot_pool(off, FRAME_BYTES)):
        assert not isinstance(plain, SharedSlots)
    if sys.platform == "linux":
        # As where the kernel, or a container, does not let a process have it.
        def refuse(*_: object) -> int:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(os, "memfd_create", refuse)
        pool = slot_pool(config, FRAME_BYTES, shared=True)
        assert not isinstance(pool, SharedSlots)
        assert pool.count == config.slots


_HOLDING = """
import sys
import msgspec
from transport_kit import make_header
from rtfocus.transport.memory import SharedSlots

pool = SharedSlots(2, 2 * 24 * 32)
slot = pool.acquire()
slot.prepare(make_header(0)).fill(7)
for said in (pool.segment, pool.place(slot)):
    sys.stdout.write(msgspec.msgpack.encode(said).hex() + "\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def test_a_killed_publisher_leaves_no_memory_behind() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLDING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with child:
        assert child.stdout is not None
        told = [bytes.fromhex(child.stdout.readline()) for _ in range(2)]
        segment = msgspec.msgpack.decode(told[0], type=Segment)
        placed = msgspec.msgpack.decode(told[1], type=m.Placed)
        frames = open_segment(make_config(), segment)
        assert frames is not None
        child.kill()
    # What a recorder has, it has: a frame under way is read to its end.
    pixels = np.frombuffer(frames.pixels(placed, FRAME_BYTES), "<u2")
    assert frames.holds(placed)
    assert np.all(pixels == 7)
    if sys.platform == "linux":
        # Nobody else can have it: it was never in a folder.
        assert open_segment(make_config(), segment) is None


@on_linux
def test_slots_that_nobody_has_any_more_are_given_back() -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text("utf-8").count("/memfd:rtfocus")

    def files() -> int:
        # Listing them takes one that is gone by then.
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        opened = [str(link.readlink()) for link in links if link.is_symlink()]
        return sum("/memfd:rtfocus" in path for path in opened)

    gc.collect()
    before = mappings(), files()
    pool = SharedSlots(2, FRAME_BYTES)
    slot, frames = filled(pool, 0), SharedFrames(pool.segment)
    assert mappings() == before[0] + 2
    sending = slot.pixels.data
    del pool, slot, frames
    gc.collect()
    # Whoever still sends from it keeps the memory; nobody new can open it.
    assert mappings() == before[0] + 1
    assert bytes(sending) == bytes(FRAME_BYTES)
    del sending
    gc.collect()
    assert (mappings(), files()) == before
