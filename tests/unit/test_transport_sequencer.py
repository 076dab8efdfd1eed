"""The sequencer: what becomes of frames that are lost, late or doubled."""

from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest

from rtfocus.transport.inflow import Gap, Judgement, Sequencer


def begun(next_sequence: int = 0) -> Sequencer:
    sequencer = Sequencer(next_sequence)
    sequencer.rewound(next_sequence, 1)
    return sequencer


def take(sequencer: Sequencer, sequence: int) -> Judgement:
    verdict = sequencer.judge(sequence)
    if verdict is Judgement.ACCEPT:
        sequencer.accept()
    return verdict


def test_nothing_is_taken_before_the_first_rewind() -> None:
    sequencer = Sequencer(0)
    assert sequencer.attempt == 1
    assert take(sequencer, 0) is Judgement.DISCARD
    sequencer.rewound(0, 1)
    assert take(sequencer, 0) is Judgement.ACCEPT


def test_a_hole_is_asked_for_once_and_filled() -> None:
    sequencer = begun()
    assert take(sequencer, 0) is Judgement.ACCEPT
    assert take(sequencer, 2) is Judgement.DISCARD
    assert sequencer.attempt == 2
    # What is still under way from before the rewind does not matter.
    assert take(sequencer, 3) is Judgement.DISCARD
    assert take(sequencer, 1) is Judgement.DISCARD
    assert sequencer.attempt == 2
    sequencer.rewound(1, 2)
    assert [take(sequencer, s) for s in (1, 2, 3)] == [Judgement.ACCEPT] * 3
    assert sequencer.take_gaps() == []


def test_what_is_missing_again_after_its_rewind_is_a_gap() -> None:
    sequencer = begun()
    take(sequencer, 1)
    sequencer.rewound(0, 2)
    assert take(sequencer, 1) is Judgement.ACCEPT
    assert sequencer.take_gaps() == [Gap(0, 1, "missing again after a resend")]
    assert sequencer.expected == 2


def test_only_the_frame_known_to_be_lost_is_given_up() -> None:
    """Frames behind it went down with the connection: they are asked for."""
    sequencer = begun()
    take(sequencer, 3)
    sequencer.rewound(0, 2)
    assert take(sequencer, 3) is Judgement.DISCARD
    assert sequencer.take_gaps() == [Gap(0, 1, "missing again after a resend")]
    assert (sequencer.attempt, sequencer.expected) == (3, 1)
    sequencer.rewound(1, 3)
    assert [take(sequencer, s) for s in (1, 2, 3)] == [Judgement.ACCEPT] * 3


def test_a_rewind_beyond_the_request_is_a_gap_at_once() -> None:
    sequencer = begun()
    take(sequencer, 100)
    sequencer.rewound(100, 2)
    assert sequencer.take_gaps() == [Gap(0, 100, "no longer held by the publisher")]
    assert take(sequencer, 100) is Judgement.ACCEPT


def test_an_old_rewind_is_ignored() -> None:
    sequencer = begun()
    take(sequencer, 2)
    sequencer.rewound(0, 1)
    assert sequencer.waiting


def test_a_frame_that_came_before_is_a_duplicate() -> None:
    sequencer = begun()
    take(sequencer, 0)
    assert take(sequencer, 0) is Judgement.DUPLICATE


def test_the_last_frame_is_missed_through_what_was_sent() -> None:
    sequencer = begun()
    take(sequencer, 0)
    assert not sequencer.reach(2)
    assert sequencer.attempt == 2
    sequencer.rewound(1, 2)
    take(sequencer, 1)
    assert sequencer.reach(2)


def test_a_lost_answer_is_asked_for_again_without_giving_up_the_frame() -> None:
    sequencer = Sequencer(0)
    sequencer.ask_again()
    sequencer.rewound(0, 2)
    assert take(sequencer, 1) is Judgement.DISCARD
    assert sequencer.take_gaps() == []


def test_abandoned_frames_are_a_gap() -> None:
    sequencer = begun()
    take(sequencer, 0)
    sequencer.abandon(4, "stall")
    sequencer.abandon(4, "stall")
    assert sequencer.take_gaps() == [Gap(1, 3, "stall")]


class LossyStream:
    """A publisher and its line: breaks, drops, and frames that never make it."""

    def __init__(self, seed: int, count: int) -> None:
        self._random = np.random.default_rng(seed)
        self._count = count
        self.doomed = set(self._random.integers(0, count, 3).tolist())
        self._line = deque[tuple[str, int, int]]()
        self._answered = self._sent = 0

    def send(self, sequencer: Sequencer) -> None:
        if self._answered < sequencer.attempt:
            self._answered, self._sent = sequencer.attempt, sequencer.expected
            self._line.append(("rewind", self._sent, self._answered))
        for _ in range(min(5, self._count - self._sent)):
            self._line.append(("frame", self._sent, self._answered))
            self._sent += 1
        self._line.append(("ping", self._sent, self._answered))
        if self._random.random() < 0.02:
            # A connection that breaks takes with it all that is under way.
            self._line.clear()

    def arrive(self) -> Iterator[tuple[str, int, int]]:
        for _ in range(min(self._random.integers(1, 6), len(self._line))):
            kind, sequence, attempt = self._line.popleft()
            dropped = sequence in self.doomed or self._random.random() < 0.01
            if kind != "frame" or not dropped:
                yield kind, sequence, attempt


@pytest.mark.parametrize("seed", range(20))
def test_every_frame_is_taken_once_or_is_in_a_gap(seed: int) -> None:
    count = 60
    stream, sequencer = LossyStream(seed, count), Sequencer(0)
    taken: list[int] = []
    gaps: list[Gap] = []
    for _ in range(20_000):
        stream.send(sequencer)
        for kind, sequence, attempt in stream.arrive():
            if kind == "frame" and take(sequencer, sequence) is Judgement.ACCEPT:
                taken.append(sequence)
            elif kind == "rewind":
                sequencer.rewound(sequence, attempt)
            elif kind == "ping" and attempt == sequencer.attempt:
                if sequencer.waiting:
                    sequencer.ask_again()
                sequencer.reach(sequence)
            gaps += sequencer.take_gaps()
        if sequencer.expected == count:
            break
    lost = [s for gap in gaps for s in range(gap.first, gap.first + gap.count)]
    assert sorted(taken + lost) == list(range(count))
    assert stream.doomed <= set(lost)
    assert taken == sorted(taken)
