"""Slots: fixed memory, one holder at a time, waiting as backpressure."""

import platform
import subprocess
import sys
import threading

import numpy as np
import pytest

from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, SlotPool
from rtfocus.transport.memory import keep_freed_memory


def header(shape: tuple[int, ...], dtype: str) -> FrameHeader:
    return FrameHeader(
        version=PROTOCOL_VERSION,
        series_uid="u",
        sequence=0,
        shape=shape,
        dtype=dtype,
        captured_ns=0,
        exposure_ms=1.0,
        index={"t": 0},
    )


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<f4"])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_a_slot_takes_the_shape_and_dtype_of_its_frame(shape, dtype: str) -> None:
    pool = SlotPool(3, 4 * 5 * 3 * 4)
    slots = [pool.acquire() for _ in range(3)]
    for value, slot in enumerate(slots):
        assert slot is not None
        slot.prepare(header(shape, dtype))[...] = value
    for value, slot in enumerate(slots):
        assert slot is not None
        assert slot.pixels.shape == shape
        assert slot.pixels.dtype == np.dtype(dtype)
        assert np.all(slot.pixels == value), "slots must not share memory"


def test_a_frame_larger_than_the_slot_is_refused() -> None:
    slot = SlotPool(1, 10).acquire()
    assert slot is not None
    with pytest.raises(ValueError, match="22 bytes in a slot of 10"):
        slot.prepare(header((11,), "<u2"))


def test_an_empty_pool_makes_its_taker_wait_and_a_release_wakes_it() -> None:
    pool = SlotPool(1, 16)
    slot = pool.acquire()
    assert slot is not None
    assert pool.acquire(timeout_s=0.01) is None
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire(timeout_s=10)))
    thread.start()
    pool.release(slot)
    thread.join()
    assert got == [slot]


def test_close_wakes_waiters_with_none_and_double_release_is_an_error() -> None:
    pool = SlotPool(1, 16)
    slot = pool.acquire()
    assert slot is not None
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(pool.acquire()))
    thread.start()
    pool.close()
    thread.join()
    assert got == [None]
    pool.release(slot)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(slot)


def printed_by(script: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers that a script prints in a process of its own."""
    # distributed sets it for its workers, in whatever process starts them.
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    said = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return [int(word) for word in said.stdout.split()]


_ALLOCATING = """
import resource
from rtfocus.transport.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        held = [b"x" * (8 << 20) for _ in range(4)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
assert keep_freed_memory(64 << 20)
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_memory_of_frames_that_are_gone_is_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else every message of a frame costs the clearing of its pages."""
    given_back, kept = printed_by(_ALLOCATING, monkeypatch)
    if given_back < 3 * 4 * (8 << 20) // 65536:
        pytest.skip(f"{given_back} faults: huge pages, or glibc keeps memory by itself")
    assert kept < given_back / 50


_KEEPING = """
import psutil
from rtfocus.transport.memory import give_back_memory, keep_freed_memory

mb = lambda: psutil.Process().memory_info().rss >> 20
assert keep_freed_memory(64 << 20)
before = mb()
held = [b"x" * (1 << 20) for _ in range(100)]
last = held.pop()  # above all others: nothing below is at the heap's end
del held
kept = mb()
give_back_memory()
print(before, kept, mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_memory_that_was_kept_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service's runs would keep more and more."""
    before, kept, after = printed_by(_KEEPING, monkeypatch)
    assert kept > before + 80
    assert after < before + 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_what_the_user_tells_glibc_stands(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory(64 << 20)
