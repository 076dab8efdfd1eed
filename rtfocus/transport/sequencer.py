"""Sequencer: decides what becomes of each arriving frame, by sequence alone.

Pure: no socket, no clock. A hole leads to one request to resend; until the
publisher's rewind answers it, everything older in the stream is discarded. What
is missing again after its own rewind is a gap.
"""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Gap:
    """Frames that will never come."""

    first: int
    """Sequence of the first."""
    count: int
    reason: str


class Verdict(Enum):
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

    def judge(self, sequence: int) -> Verdict:
        """Decide about a frame; accepting it is not yet counted, see `accept`."""
        if self.waiting:
            return Verdict.DISCARD
        if sequence < self.expected:
            return Verdict.DUPLICATE
        return Verdict.ACCEPT if self.reach(sequence) else Verdict.DISCARD

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
