"""Inflow: what arrives on the frames socket, put in order, into slots and gaps.

`Sequencer` is pure, without socket or clock: by sequence alone it decides what becomes
of each frame. A hole leads to one request to resend; until the publisher's rewind
answers it, everything older in the stream is discarded. What is missing again after
its own rewind is a gap.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from rtfocus.errors import PeerLostError, ProtocolError, TakenOverError, TransportError
from rtfocus.frame import (
    PROTOCOL_VERSION,
    FrameHeader,
    SeriesEnd,
    SeriesStart,
    Slot,
    SlotPool,
)
from rtfocus.metrics import Accounting
from rtfocus.transport.memory import Placed, SharedFrames
from rtfocus.transport.messages import (
    Ping,
    Rewind,
    check_header,
    end_fault,
    most_lost,
    pixel_bytes,
    readable_end,
    unpack_in_stream,
)


@dataclass(frozen=True)
class Gap:
    """Frames that will never come."""

    first: int
    """Sequence of the first."""
    count: int
    reason: str


class Judgement(Enum):
    """What to do with a frame."""

    ACCEPT = "accept"
    """It is the next one."""
    DUPLICATE = "duplicate"
    """It arrived before."""
    DISCARD = "discard"
    """A hole lies before it; it will be sent again."""


class Sequencer:
    """Follows one series from `next_sequence` on.

    Its user sends a `Resend` whenever `attempt` has grown, and hands on `gaps`.
    """

    def __init__(self, next_sequence: int) -> None:
        self.expected = next_sequence
        """All frames before it arrived or are gaps."""
        self.attempt = 1
        """Requests to resend so far; the first opens the flow."""
        self.waiting = True
        """True until the rewind of the newest attempt comes."""
        self.gaps: list[Gap] = []
        """Found and not yet taken."""
        self._asked_for: int | None = None

    def take_gaps(self) -> list[Gap]:
        """Return the gaps found since the last call."""
        gaps, self.gaps = self.gaps, []
        return gaps

    def judge(self, sequence: int) -> Judgement:
        """Decide about a frame; accepting it is not yet counted, see `accept`."""
        if self.waiting:
            return Judgement.DISCARD
        if sequence < self.expected:
            return Judgement.DUPLICATE
        return Judgement.ACCEPT if self.reach(sequence) else Judgement.DISCARD

    def accept(self) -> None:
        """Count the expected frame as arrived."""
        self.expected += 1

    def reach(self, sent_upto: int) -> bool:
        """Tell whether all frames before `sent_upto`, which were sent, are here."""
        if self.waiting:
            return False
        if self.expected >= sent_upto:
            return True
        if self._asked_for == self.expected:
            # Only this one is known to be lost for good: those behind it may have
            # been swept away with it, for example by a broken connection.
            self._give_up(1, "missing again after a resend")
            if self.expected == sent_upto:
                return True
        self._asked_for = self.expected
        self.ask_again()
        return False

    def rewound(self, sequence: int, attempt: int) -> None:
        """Take note that the frames from `sequence` on follow."""
        if attempt != self.attempt:
            return
        self.waiting = False
        if sequence > self.expected:
            self._give_up(sequence - self.expected, "no longer held by the publisher")

    def ask_again(self) -> None:
        """Request the expected frame and all after it."""
        self.attempt += 1
        self.waiting = True

    def abandon(self, frames_sent: int, reason: str) -> None:
        """Take note that nothing more comes, although `frames_sent` exist."""
        if frames_sent > self.expected:
            self._give_up(frames_sent - self.expected, reason)

    def _give_up(self, count: int, reason: str) -> None:
        self.gaps.append(Gap(self.expected, count, reason))
        self.expected += count


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


class Inflow:
    """One series from its first frame to its end; used by the I/O thread alone.

    Parameters
    ----------
    series
        Its frames are received.
    next_sequence
        Where to begin: 0, or the first frame that is not durable.
    pool
        Free slots in it are the credit.
    arrivals
        Where frames and gaps go, and the end.
    accounting
        Counts frames, gaps and errors.
    shared
        Where the publisher's frames lie; None: their pixels come by TCP.
    """

    def __init__(
        self,
        series: SeriesStart,
        next_sequence: int,
        pool: SlotPool,
        arrivals: Arrivals,
        accounting: Accounting,
        shared: SharedFrames | None = None,
    ) -> None:
        self.series = series
        self.sequencer = Sequencer(next_sequence)
        self.arrivals = arrivals
        self.has_all = False
        """The publisher said the end; all before it arrived or is a gap."""
        self.end_to_confirm = False
        """It said so since the last receipt."""
        self._pool = pool
        self._accounting = accounting
        self._shared = shared
        self._sent_upto = next_sequence
        self._most_lost = most_lost(series)

    @property
    def is_shared(self) -> bool:
        """Tell whether frames are read where the publisher has them."""
        return self._shared is not None

    @property
    def batch(self) -> int:
        """Frames whose news may wait for each other: a small part of the slots."""
        return max(self._pool.count // 8, 1)

    @property
    def credit_upto(self) -> int:
        """First sequence there is no slot for."""
        if self.arrivals.is_over:
            return self.sequencer.expected
        return self.sequencer.expected + self._pool.free

    def take(self, header_part: bytes, pixels: memoryview | None) -> None:
        """Take one message of the frames socket.

        Raises
        ------
        ProtocolError
            If it cannot be used; its frame, if it was one, will be asked for
            again because it is missing.
        """
        message = unpack_in_stream(header_part)
        if message.series_uid != self.series.series_uid:
            msg = f"'{message.series_uid}', not '{self.series.series_uid}'"
            raise ProtocolError(msg, "series")
        match message:
            case FrameHeader():
                self._take_frame(message, pixels)
            case Placed():
                self._take_frame(message.frame, self._pixels_at(message), message)
            case Rewind():
                self._note_rewind(message)
            case Ping():
                self._note_ping(message)
            case SeriesEnd():
                self._note_end(message)
        self._count_gaps()

    def abandon(self, reason: str, frames_sent: int | None = None) -> None:
        """End the series although frames are missing; those are a gap.

        `frames_sent` is how many the publisher has; None: as many as it showed.
        """
        if self.arrivals.is_over:
            return
        if frames_sent is None:
            frames_sent = self._sent_upto
        elif self._is_absurd(frames_sent, f"breaks off ({reason})"):
            return
        self.sequencer.abandon(frames_sent, reason)
        self._count_gaps()
        self._finish(reason)

    def lose(self, reason: str, kind: type[TransportError] = TransportError) -> None:
        """End the series with an error; what came is kept.

        After a PeerLostError the series may go on later: what did not come is no
        gap yet.
        """
        if self.arrivals.is_over:
            return
        if kind is not PeerLostError:
            self.sequencer.abandon(self._sent_upto, reason)
            self._count_gaps()
        self._finish(reason, kind(reason))

    def yield_to_another(self, reason: str) -> None:
        """End the series because another recorder has it: nothing is lost by that."""
        self._finish(reason, TakenOverError(reason))

    def stop(self) -> None:
        """End the series because this side wants it."""
        self._finish("stopped")

    def _pixels_at(self, placed: Placed) -> memoryview:
        if self._shared is None:
            msg = f"frame {placed.frame.sequence} lies in memory that is not seen here"
            raise ProtocolError(msg, "place")
        return self._shared.pixels(placed, pixel_bytes(placed.frame))

    def _take_frame(
        self,
        header: FrameHeader,
        pixels: memoryview | None,
        placed: Placed | None = None,
    ) -> None:
        check_header(header, self.series)
        most = self.sequencer.expected + self._most_lost
        if header.sequence > most:
            msg = f"frame {header.sequence} is beyond {most}"
            raise ProtocolError(msg, "range")
        expected_bytes = pixel_bytes(header)
        found_bytes = 0 if pixels is None else pixels.nbytes
        if pixels is None or found_bytes != expected_bytes:
            msg = (
                f"frame {header.sequence} has {found_bytes} bytes of pixels, "
                f"{header.shape} {header.dtype} needs {expected_bytes}"
            )
            raise ProtocolError(msg, "truncated")
        if self.arrivals.is_over:
            return
        judged = self.sequencer.judge(header.sequence)
        if judged is Judgement.DUPLICATE:
            msg = f"frame {header.sequence} arrived before"
            raise ProtocolError(msg, "duplicate")
        if judged is Judgement.DISCARD:
            return
        # A gap comes before the frame that revealed it.
        self._count_gaps()
        series = self.series
        if (header.shape, header.dtype) != (series.shape, series.dtype):
            self._end_at_other_form(header)
            return
        self._fill_slot(header, pixels, placed)

    def _fill_slot(
        self, header: FrameHeader, pixels: memoryview, placed: Placed | None
    ) -> None:
        slot = self._pool.acquire(timeout_s=0)
        if slot is None:
            msg = f"frame {header.sequence} was sent beyond the credit"
            raise ProtocolError(msg, "credit")
        slot.received_ns = time.perf_counter_ns()
        target = slot.prepare(header)
        # The one copy of this side: from ZeroMQ's message or the publisher's memory.
        np.copyto(target, np.frombuffer(pixels, target.dtype).reshape(target.shape))
        if placed and self._shared and not self._shared.holds(placed):
            # Only one that was replaced meanwhile hears of a frame that is gone.
            self._pool.release(slot)
            msg = f"frame {header.sequence} was let go while it was read"
            raise ProtocolError(msg, "replaced")
        self._accounting.count("came_by", "shared memory" if placed else "TCP")
        self.sequencer.accept()
        self._accounting.set_acquired(self.sequencer.expected)
        self.arrivals.put(slot)

    def _end_at_other_form(self, header: FrameHeader) -> None:
        self.sequencer.accept()
        self._accounting.set_acquired(self.sequencer.expected)
        self._accounting.count("in_error", "form")
        self._finish(
            f"frame {header.sequence} is {header.shape} {header.dtype}, the series "
            f"{self.series.shape} {self.series.dtype}: start a new series"
        )

    def _note_ping(self, ping: Ping) -> None:
        if ping.attempt != self.sequencer.attempt:
            return
        # A smaller one than expected is old, and harmless.
        is_news = ping.sent_upto > self.sequencer.expected
        if is_news and self._is_absurd(ping.sent_upto, "has come"):
            return
        self._sent_upto = max(self._sent_upto, ping.sent_upto)
        if self.sequencer.waiting:
            # It has answered the request, and the answer was lost on the way.
            self.sequencer.ask_again()
        else:
            self.sequencer.reach(ping.sent_upto)

    def _note_rewind(self, rewind: Rewind) -> None:
        is_ours = rewind.attempt == self.sequencer.attempt
        is_news = rewind.sequence > self.sequencer.expected
        if is_ours and is_news and self._is_absurd(rewind.sequence, "goes on"):
            return
        self.sequencer.rewound(rewind.sequence, rewind.attempt)

    def _note_end(self, end: SeriesEnd) -> None:
        if not self.has_all and self._is_absurd(end.frames_sent, "ends"):
            return
        if (fault := end_fault(end)) is not None:
            self.lose(f"the publisher ends its series with {fault}")
            return
        if not self.sequencer.reach(end.frames_sent):
            return
        self._count_gaps()
        self.has_all = self.end_to_confirm = True
        self._accounting.set_acquired(end.frames_sent)
        self.arrivals.finish(readable_end(end))

    def _is_absurd(self, sequence: int, what: str) -> bool:
        """Tell whether a peer names a frame that cannot be; that ends the series.

        It is no noise, which would not name our series and attempt, and there is
        no way on from it: waiting for such a frame would never end.
        """
        most = self.sequencer.expected + self._most_lost
        if self.sequencer.expected <= sequence <= most:
            return False
        self.lose(
            f"the publisher says that its series {what} at frame {sequence}, which is "
            f"not from {self.sequencer.expected} to {most}"
        )
        return True

    def _count_gaps(self) -> None:
        for gap in self.sequencer.take_gaps():
            self._accounting.set_acquired(gap.first + gap.count)
            self._accounting.count("dropped", "gap", gap.count)
            self.arrivals.put(gap)

    def _finish(self, reason: str, error: TransportError | None = None) -> None:
        end = SeriesEnd(
            version=PROTOCOL_VERSION,
            series_uid=self.series.series_uid,
            frames_sent=self.sequencer.expected,
            reason=reason,
        )
        self.arrivals.finish(end, error)
