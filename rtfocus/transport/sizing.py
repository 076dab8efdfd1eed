"""Sizing: how many slots of one side fit its memory."""

from rtfocus.config.processor import TransportConfig
from rtfocus.errors import TransportError
from rtfocus.slots import SlotPool
from rtfocus.transport.sockets import max_frame_bytes


def slot_pool(config: TransportConfig, frame_bytes: int) -> SlotPool:
    """Allocate up to `config.slots` slots for frames of this size.

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
    return SlotPool(count, frame_bytes)
