"""Arrivals: frames and gaps on their way from the socket to the processor."""

import threading
from collections import deque
from collections.abc import Iterator

from rtfocus.errors import TransportError
from rtfocus.frame import SeriesEnd
from rtfocus.slots import Slot
from rtfocus.transport.sequencer import Gap


class Arrivals:
    """Hand-off from the I/O thread to the one that iterates.

    Bounded without a limit of its own: there are as many frames as slots, and
    at most one gap between two of them, because neighbouring gaps merge.
    """

    def __init__(self) -> None:
        self._items: deque[Slot | Gap] = deque()
        self._changed = threading.Condition()
        self._over = False
        self._error: TransportError | None = None
        self.end: SeriesEnd | None = None
        """How the series ended; None while it runs."""

    def put(self, item: Slot | Gap) -> None:
        """Append a frame or a gap."""
        with self._changed:
            last = self._items[-1] if self._items else None
            if isinstance(item, Gap) and isinstance(last, Gap):
                # Contiguous, because only a frame could lie between them.
                self._items[-1] = Gap(last.first, last.count + item.count, last.reason)
            else:
                self._items.append(item)
            self._changed.notify()

    def finish(self, end: SeriesEnd, error: TransportError | None = None) -> None:
        """Say that nothing more comes; the first call counts."""
        with self._changed:
            if not self._over:
                self._over = True
                self.end = end
                self._error = error
                self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Tell whether nothing more comes."""
        return self._over

    def __iter__(self) -> Iterator[Slot | Gap]:
        """Yield what arrives until the series ends; its error comes last."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._over)
                if not self._items:
                    break
                item = self._items.popleft()
            yield item
        if self._error is not None:
            raise self._error
