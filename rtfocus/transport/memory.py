"""Memory: the slots of both sides, which on one machine a recorder reads in place.

A publisher holds its frames until they are durable, in a *segment* that other processes
of its machine and user can map, and offers it with the welcome. A recorder that reads
the offered nonce there copies frames from it, and headers alone cross the wire. Whoever
cannot, because it runs elsewhere, in another container or as another user, gets pixels
by TCP.

A segment lies in no folder: it is gone with the last process that has it, however that
ends. Linux offers it as an open file of the publisher, Windows as a named mapping.

A slot's *generation* is counted on when its frame is let go, before it can be filled
anew. What was copied while the generation stayed the same is the frame announced.
"""

import ctypes
import logging
import mmap
import os
import re
import secrets
import sys
import weakref
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import TransportConfig
from rtfocus.errors import ProtocolError, TransportError
from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, Slot, SlotPool
from rtfocus.transport.sockets import max_frame_bytes

if sys.platform == "linux":
    import fcntl

_NONCE_BYTES = 16
_COUNTERS_AT = 64
"""Where the generations begin, 8 bytes per slot; slots follow on the next page."""

logger = logging.getLogger(__name__)


class Segment(msgspec.Struct, frozen=True):
    """Where a publisher holds its frames, for the recorder."""

    name: str
    """Linux: ``/proc/PID/fd/N``; Windows: of the mapping."""
    nonce: bytes
    """Its first 16 bytes."""
    size: int
    """In bytes."""


class Placed(msgspec.Struct, frozen=True, tag="placed", tag_field="type"):
    """A frame whose pixels lie in the segment."""

    version: int
    series_uid: str
    frame: FrameHeader
    offset: int
    """Of its pixels, in bytes."""
    counter: int
    """Offset of its slot's generation, 8 bytes, a multiple of 8."""
    generation: int
    """What stands there as long as the frame does."""


class SharedSlots(SlotPool):
    """Slots in a segment.

    Raises
    ------
    OSError
        If this system offers no such memory, or has not as much.
    """

    def _allocate(self, size_bytes: int) -> NDArray[np.uint8]:
        self._stride = size_bytes // self.count
        head_bytes = _COUNTERS_AT + 8 * self.count
        self._slots_at = -(-head_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        size_bytes += self._slots_at
        mapping, name, descriptor = _make(size_bytes)
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)
        self.segment = Segment(name, secrets.token_bytes(_NONCE_BYTES), size_bytes)
        mapping[:_NONCE_BYTES] = self.segment.nonce
        # The arrays keep the mapping, and ZeroMQ the array that it sends from.
        memory = np.frombuffer(mapping, np.uint8)
        table = memory[_COUNTERS_AT : _COUNTERS_AT + 8 * self.count]
        self._generations = table.view("<u8")
        return memory[self._slots_at :]

    def release(self, slot: Slot) -> None:
        """Give a slot back; from here on no recorder takes its memory for the frame."""
        # The next user of the slot takes the pool's lock first: it writes no pixel
        # before this.
        self._generations[slot.index] += 1
        super().release(slot)

    def place(self, slot: Slot) -> Placed:
        """Say where the frame in a slot lies."""
        frame = slot.frame()
        return Placed(
            version=PROTOCOL_VERSION,
            series_uid=frame.series_uid,
            frame=frame,
            offset=self._slots_at + slot.index * self._stride,
            counter=_COUNTERS_AT + 8 * slot.index,
            generation=int(self._generations[slot.index]),
        )


class SharedFrames:
    """A recorder's view of a publisher's slots, to read only.

    Raises
    ------
    OSError, ValueError
        If the segment cannot be seen from here.
    """

    def __init__(self, segment: Segment) -> None:
        if len(segment.nonce) != _NONCE_BYTES or segment.size < _COUNTERS_AT:
            msg = f"a segment of {segment.size} bytes is none"
            raise ValueError(msg)
        mapping = _open(segment)
        self._bytes = memoryview(mapping)
        self._words = np.frombuffer(mapping, "<u8", len(mapping) // 8)
        if self._bytes[:_NONCE_BYTES] != segment.nonce:
            msg = f"another memory is at '{segment.name}'"
            raise ValueError(msg)

    def pixels(self, placed: Placed, size_bytes: int) -> memoryview:
        """Return the bytes of a frame, to be copied, and believed if it `holds` then.

        Raises
        ------
        ProtocolError
            If it lies beyond the segment.
        """
        first, last = placed.offset, placed.offset + size_bytes
        is_counter = 0 <= placed.counter < 8 * len(self._words)
        if first < 0 or last > len(self._bytes) or not is_counter or placed.counter % 8:
            msg = (
                f"frame {placed.frame.sequence} at {first} to {last}, counted at "
                f"{placed.counter}, lies beyond a segment of {len(self._bytes)} bytes"
            )
            raise ProtocolError(msg, "place")
        return self._bytes[first:last]

    def holds(self, placed: Placed) -> bool:
        """Tell whether the frame is still in its slot; ask after copying it."""
        return int(self._words[placed.counter // 8]) == placed.generation


def slot_pool(
    config: TransportConfig, frame_bytes: int, *, shared: bool = False
) -> SlotPool:
    """Allocate up to `config.slots` slots for frames of this size.

    Parameters
    ----------
    config
        Says how many, and whether memory may be shared.
    frame_bytes
        Of one frame.
    shared
        Return `SharedSlots` where the config and the system allow it.

    Raises
    ------
    TransportError
        If a frame exceeds `max_frame_mb`, or two do not fit `memory_mb`.
    """
    if frame_bytes > max_frame_bytes(config):
        msg = (
            f"frames of {frame_bytes / 1e6:.0f} MB exceed transport.max_frame_mb="
            f"{config.max_frame_mb:g}; raise it on both sides"
        )
        raise TransportError(msg)
    count = min(config.slots, int(config.memory_mb * 1e6) // frame_bytes)
    if count < 2:
        msg = (
            f"transport.memory_mb={config.memory_mb:g} holds {count} frames of "
            f"{frame_bytes / 1e6:.0f} MB, two are needed; raise it"
        )
        raise TransportError(msg)
    if shared and config.shared_memory == "auto":
        try:
            return SharedSlots(count, frame_bytes)
        except OSError as error:
            logger.info("frames go by TCP: %s", error)
    return SlotPool(count, frame_bytes)


def open_segment(
    config: TransportConfig, segment: Segment | None
) -> SharedFrames | None:
    """Open what a publisher offers; None: frames are to come by TCP."""
    if segment is None or config.shared_memory == "off":
        return None
    try:
        return SharedFrames(segment)
    except (OSError, ValueError, OverflowError) as error:
        logger.info("frames come by TCP: %s", error)
        return None


if sys.platform == "linux":

    def _make(size_bytes: int) -> tuple[mmap.mmap, str, int | None]:
        """Return new memory, its name, and what to close once all have opened it.

        Not in /dev/shm: a container limits that, and there it would outlive a kill.
        """
        descriptor = os.memfd_create("rtfocus", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Said now, where it can be answered, that there is not as much.
            os.posix_fallocate(descriptor, 0, size_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            mapping = mmap.mmap(descriptor, size_bytes)
        except OSError:
            os.close(descriptor)
            raise
        return mapping, f"/proc/{os.getpid()}/fd/{descriptor}", descriptor

    def _open(segment: Segment) -> mmap.mmap:
        """Map a segment; a name that a peer made up opens nothing else."""
        path = Path(segment.name)
        # To open a pipe or a device would do something.
        if not re.fullmatch(r"/proc/\d+/fd/\d+", str(path)) or not path.is_file():
            msg = f"'{path}' is no memory"
            raise ValueError(msg)
        with path.open("rb", buffering=0) as file:
            # Memory that could shrink could kill who reads it.
            if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                msg = f"'{path}' may shrink"
                raise ValueError(msg)
            # All pages now: the first frames of a run must not be the slowest.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            return mmap.mmap(
                file.fileno(), segment.size, flags=flags, prot=mmap.PROT_READ
            )

elif sys.platform == "win32":

    def _make(size_bytes: int) -> tuple[mmap.mmap, str, int | None]:
        """Return new memory and its name; it ends with its last mapping."""
        name = f"rtfocus-{secrets.token_hex(16)}"
        return mmap.mmap(-1, size_bytes, tagname=name), name, None

    def _open(segment: Segment) -> mmap.mmap:
        """Map a segment; a name that is not there becomes a page of zeros."""
        name, to_read = segment.name, mmap.ACCESS_READ
        with closing(mmap.mmap(-1, 4096, tagname=name, access=to_read)) as page:
            if page[:_NONCE_BYTES] != segment.nonce:
                msg = f"'{name}' is not seen here"
                raise ValueError(msg)
            return mmap.mmap(-1, segment.size, tagname=name, access=to_read)


else:
    _NONE = "this system has no shared memory that ends with its processes"

    def _make(size_bytes: int) -> tuple[mmap.mmap, str, int | None]:
        """Say that there is none."""
        raise OSError(_NONE)

    def _open(segment: Segment) -> mmap.mmap:
        """Say that there is none."""
        raise OSError(_NONE)


_IS_LINUX = sys.platform == "linux"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``malloc.h``."""
_MOST_FROM_HEAP = 32 << 20
"""glibc's own limit: a heap of a thread has 64 MB."""
_USERS_WORD = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}


def keep_freed_memory(most_bytes: int) -> bool:
    """Let glibc keep up to `most_bytes` of freed memory; elsewhere do nothing.

    ZeroMQ and tensorstore allocate every frame anew. What glibc gives back to the
    system comes again as pages that the system clears: a quarter of what a received
    frame of 2048 x 2048 costs. Returns whether it was done: the
    environment's word stands.
    """
    if not _IS_LINUX or _USERS_WORD & os.environ.keys():
        return False
    else:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        return mallopt is not None and bool(
            mallopt(_M_TRIM_THRESHOLD, min(most_bytes, (1 << 31) - 1))
            and mallopt(_M_MMAP_THRESHOLD, _MOST_FROM_HEAP)
        )


def give_back_memory() -> None:
    """Give the system what glibc keeps freed; elsewhere do nothing.

    At the end of a run: kept from one to the next it would be spread over more and
    more pages, 0.4 to 0.8 MB for each run of four small frames.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _IS_LINUX else None
    if trim is not None:
        trim(0)
