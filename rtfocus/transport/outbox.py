"""Outbox: the frames of one series that the publisher holds until durable.

Safe to use from any thread: the acquisition appends, the I/O thread sends and
settles, waiters are notified.
"""

import threading
from collections import deque

from rtfocus.errors import TransportError
from rtfocus.frame import PROTOCOL_VERSION, SeriesEnd, SeriesStart
from rtfocus.slots import Slot


class Outbox:
    """Slots of `series` in the order of their sequence."""

    def __init__(self, series: SeriesStart) -> None:
        self.series = series
        self.changed = threading.Condition()
        """Notified whenever something below changes."""
        self.ending: str | None = None
        """Reason of the end, once the acquisition has said that no frame follows."""
        self.end: SeriesEnd | None = None
        """The message that says so."""
        self.end_received = False
        """The recorder has confirmed the end."""
        self._held: deque[Slot] = deque()
        self._first = 0
        self._next = 0
        self.most_sent = 0
        """Frames sent at least once."""

    @property
    def published(self) -> int:
        """Frames handed over so far."""
        with self.changed:
            return self._first + len(self._held)

    @property
    def durable_upto(self) -> int:
        """All frames with a smaller sequence are durable and gone from here."""
        return self._first

    @property
    def sent_upto(self) -> int:
        """All frames with a smaller sequence were sent since the last rewind."""
        return self._next

    @property
    def is_sent(self) -> bool:
        """Tell whether every frame of the ended series was sent."""
        with self.changed:
            return self.ending is not None and self._next == self.published

    @property
    def is_complete(self) -> bool:
        """Tell whether the recorder has everything, for good, and knows the end."""
        with self.changed:
            return self.end_received and self._first == self.published

    def append(self, slot: Slot) -> None:
        """Hand over a filled slot.

        Raises
        ------
        TransportError
            If its sequence is not the next one or the series has ended.
        """
        sequence = slot.frame().sequence
        with self.changed:
            if self.ending is not None:
                msg = f"frame {sequence} published after the end of the series"
                raise TransportError(msg)
            if sequence != self.published:
                msg = (
                    f"frame {sequence} published where {self.published} was next; "
                    "sequence counts frames without holes"
                )
                raise TransportError(msg)
            self._held.append(slot)

    def take(self, credit_upto: int) -> Slot | None:
        """Return the next frame to send; None without credit or frame."""
        with self.changed:
            if self._next >= min(credit_upto, self.published):
                return None
            slot = self._held[self._next - self._first]
            self._next += 1
            self.most_sent = max(self.most_sent, self._next)
            return slot

    def untake(self) -> None:
        """Take back the last `take`: the frame could not be sent now."""
        with self.changed:
            self._next -= 1

    def rewind(self, sequence: int) -> int:
        """Send again from `sequence`, or from the first frame held; return which.

        Raises
        ------
        TransportError
            If `sequence` was never published.
        """
        with self.changed:
            if sequence > self.published:
                msg = (
                    f"the recorder asks for frame {sequence}, only {self.published} "
                    "exist; its run folder belongs to another series"
                )
                raise TransportError(msg)
            self._next = max(sequence, self._first)
            return self._next

    def settle(self, durable_upto: int) -> list[Slot]:
        """Let go of the frames before `durable_upto`; return their slots."""
        with self.changed:
            count = min(durable_upto, self.published) - self._first
            if count <= 0:
                return []
            settled = [self._held.popleft() for _ in range(count)]
            self._first += count
            self._next = max(self._next, self._first)
            self.changed.notify_all()
            return settled

    def finish(
        self,
        reason: str,
        *,
        camera_lost: int = 0,
        not_acquired: int = 0,
        warnings: tuple[str, ...] = (),
    ) -> None:
        """Say that no frame follows; see `SeriesEnd`."""
        with self.changed:
            self.end = SeriesEnd(
                version=PROTOCOL_VERSION,
                series_uid=self.series.series_uid,
                frames_sent=self.published,
                reason=reason,
                camera_lost=camera_lost,
                not_acquired=not_acquired,
                warnings=warnings,
            )
            self.ending = reason

    def confirm_end(self) -> None:
        """Note that the recorder knows the end."""
        with self.changed:
            self.end_received = True
            self.changed.notify_all()
