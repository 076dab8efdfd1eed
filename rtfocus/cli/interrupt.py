"""Interrupt: Ctrl-C ends the acquisition, a second one abandons the rest."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Yield events ``stop`` and ``abandon``, set by the first and second Ctrl-C.

    A termination request (SIGTERM) counts as Ctrl-C.
    """
    stop, abandon = threading.Event(), threading.Event()

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        (abandon if stop.is_set() else stop).set()

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, abandon
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
