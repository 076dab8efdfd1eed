"""Slots: preallocated frame buffers, the one place frames live in memory.

A frame is copied once into a slot and stays there until it is durable; after
`SlotPool` is built nothing is allocated per frame. A full pool is the
backpressure of rtfocus: whoever wants a slot waits.
"""

import threading
import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import FrameHeader


class Slot:
    """One frame's buffer with the header of the frame that is in it."""

    __slots__ = ("_buffer", "header", "index", "pixels", "received_ns")

    def __init__(self, index: int, buffer: NDArray[np.uint8]) -> None:
        self.index = index
        """Position in the pool; stable, so that others keep per-slot buffers."""
        self._buffer = buffer
        self.header: FrameHeader | None = None
        self.pixels: NDArray[np.generic] = buffer[:0]
        """View of the buffer with the frame's shape and dtype."""
        self.received_ns = 0
        """Arrival by this process's ``time.monotonic_ns``."""

    def frame(self) -> FrameHeader:
        """Return the header of the frame in this slot; ValueError when empty."""
        if self.header is None:
            msg = f"slot {self.index} holds no frame"
            raise ValueError(msg)
        return self.header

    def prepare(self, header: FrameHeader) -> NDArray[np.generic]:
        """Make this the slot of `header` and return its pixels to be filled.

        Raises
        ------
        ValueError
            If the frame is larger than the slot.
        """
        dtype = np.dtype(header.dtype)
        size_bytes = dtype.itemsize * int(np.prod(header.shape))
        if size_bytes > self._buffer.size:
            msg = f"frame of {size_bytes} bytes in a slot of {self._buffer.size}"
            raise ValueError(msg)
        self.header = header
        self.pixels = self._buffer[:size_bytes].view(dtype).reshape(header.shape)
        return self.pixels


class SlotPool:
    """Fixed number of equal slots, handed out and given back from any thread."""

    def __init__(self, count: int, slot_bytes: int) -> None:
        # One allocation, each slot aligned to a page: pinning and O_DIRECT like it.
        stride = -(-slot_bytes // 4096) * 4096
        memory = np.empty(count * stride, dtype=np.uint8)
        # Written to, because a fresh page costs more at first use than the copy of
        # what is in it: the first frames of a run must not be the slowest.
        memory.fill(0)
        self.count = count
        self.slot_bytes = slot_bytes
        self._free = deque(
            Slot(i, memory[i * stride : i * stride + slot_bytes]) for i in range(count)
        )
        self._changed = threading.Condition()
        self._closed = False
        self._lowest_free = count

    @property
    def free(self) -> int:
        """Slots nobody holds."""
        with self._changed:
            return len(self._free)

    @property
    def lowest_free(self) -> int:
        """Fewest free slots seen so far: 0 means somebody had to wait."""
        return self._lowest_free

    def acquire(self, timeout_s: float | None = None) -> Slot | None:
        """Take a free slot, waiting for one; None on time-out or after `close`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._free and not self._closed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            if self._closed:
                return None
            slot = self._free.popleft()
            self._lowest_free = min(self._lowest_free, len(self._free))
            return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back; its frame is gone from here on."""
        with self._changed:
            if slot in self._free:
                msg = f"slot {slot.index} was released twice"
                raise ValueError(msg)
            slot.header = None
            self._free.append(slot)
            self._changed.notify()

    def close(self) -> None:
        """Wake everybody who waits; `acquire` returns None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
