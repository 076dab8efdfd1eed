"""The dialogue: what a recorder says, when, and what it makes of the answers."""

import pytest
from transport_kit import make_config, make_header, make_series

from rtfocus.errors import ProtocolError, TakenOverError, TransportError
from rtfocus.frame import SeriesEnd, Slot, SlotPool
from rtfocus.metrics import Accounting
from rtfocus.transport import messages as m
from rtfocus.transport.dialogue import Dialogue
from rtfocus.transport.inflow import Arrivals, Gap, Inflow

SERIES = make_series()
CONFIG = make_config(heartbeat_s=1.0, stall_timeout_s=10.0)


def welcomed() -> Dialogue:
    dialogue = Dialogue(CONFIG, 0.0)
    dialogue.handle(m.Welcome(1, dialogue.uid, "topic", SERIES), 0.0)
    return dialogue


def begun(slots: int = 16) -> tuple[Dialogue, Inflow]:
    dialogue = welcomed()
    pool = SlotPool(slots, 24 * 32 * 2)
    inflow = Inflow(SERIES, 0, pool, Arrivals(), Accounting())
    dialogue.begin(inflow, 0, 0.0)
    return dialogue, inflow


def said(dialogue: Dialogue, now_s: float) -> list[str]:
    return [type(message).__name__ for message in dialogue.say(now_s)]


def flow(inflow: Inflow, attempt: int = 1) -> None:
    inflow.take(m.pack(m.Rewind(1, SERIES.series_uid, 0, attempt)), None)


def take_frame(inflow: Inflow, sequence: int) -> None:
    pixels = memoryview(bytes(24 * 32 * 2))
    inflow.take(m.pack(make_header(sequence)), pixels)


def test_hello_is_said_every_heartbeat_until_it_is_answered() -> None:
    dialogue = Dialogue(CONFIG, 0.0)
    assert said(dialogue, 0.0) == ["Hello"]
    assert said(dialogue, 0.5) == []
    assert said(dialogue, 1.0) == ["Hello"]
    dialogue.handle(m.Welcome(1, dialogue.uid, "topic", SERIES), 1.0)
    assert dialogue.series == SERIES
    assert said(dialogue, 1.1) == ["Progress"]


def test_a_welcome_for_another_is_not_ours() -> None:
    dialogue = Dialogue(CONFIG, 0.0)
    dialogue.handle(m.Welcome(1, "somebody", "topic", SERIES), 0.0)
    assert dialogue.series is None


def test_the_flow_is_asked_for_once_and_again_when_nothing_comes() -> None:
    dialogue, inflow = begun()
    assert said(dialogue, 0.0) == ["Progress", "Resend"]
    assert said(dialogue, 1.0) == ["Progress"]
    assert said(dialogue, 6.5) == ["Progress", "Resend"]
    flow(inflow)
    assert "Resend" not in said(dialogue, 20.0)


def test_news_of_single_frames_waits_a_moment_for_more() -> None:
    dialogue, inflow = begun(slots=16)
    said(dialogue, 0.0)
    flow(inflow)
    for sequence in range(4):
        take_frame(inflow, sequence)
    dialogue.durable_upto = 1
    assert said(dialogue, 0.001) == []
    assert dialogue.next_turn_s <= 0.005
    assert said(dialogue, 0.006) == ["Progress"]
    # A batch, an eighth of the slots, is told at once.
    dialogue.durable_upto = 3
    assert said(dialogue, 0.007) == ["Progress"]


def test_a_silent_publisher_is_lost_after_the_stall_timeout() -> None:
    dialogue, inflow = begun()
    flow(inflow)
    take_frame(inflow, 0)
    dialogue.heard_s = 0.0
    for now_s in range(1, 11):
        dialogue.watch(float(now_s))
        assert not inflow.arrivals.is_over
    dialogue.watch(10.5)
    assert inflow.arrivals.end is not None
    assert "publisher is lost" in inflow.arrivals.end.reason
    assert inflow.arrivals.end.frames_sent == 1


def test_after_a_sleep_of_ones_own_the_publisher_gets_its_time() -> None:
    dialogue, inflow = begun()
    flow(inflow)
    dialogue.heard_s = 0.0
    dialogue.watch(1.0)
    dialogue.watch(3600.0)
    assert not inflow.arrivals.is_over
    for now_s in range(3601, 3612):
        dialogue.watch(float(now_s))
    assert inflow.arrivals.is_over


def test_a_publisher_that_never_sends_what_is_asked_is_given_up() -> None:
    dialogue, inflow = begun()
    for now_s in range(1, 12):
        dialogue.handle(m.Complaint(reason="no such frame"), float(now_s))
        dialogue.watch(float(now_s))
    assert inflow.arrivals.end is not None
    assert "does not send frame 0" in inflow.arrivals.end.reason
    assert "no such frame" in inflow.arrivals.end.reason


def test_refusals_are_told_apart() -> None:
    dialogue = Dialogue(CONFIG, 0.0)
    dialogue.handle(m.Refused(dialogue.uid, "occupied", "there is one"), 0.0)
    assert dialogue.broken is None
    dialogue.handle(m.Refused(dialogue.uid, "role", "no such role"), 0.0)
    assert isinstance(dialogue.broken, TransportError)

    dialogue, inflow = begun()
    dialogue.handle(m.Refused(dialogue.uid, "unknown", "who?"), 0.0)
    assert inflow.arrivals.end is not None
    assert inflow.arrivals.end.reason == "the publisher restarted"

    dialogue, inflow = begun()
    dialogue.handle(m.Refused(dialogue.uid, "occupied", "another"), 0.0)
    assert inflow.arrivals.end is not None
    assert "another recorder" in inflow.arrivals.end.reason


def test_frames_that_a_broken_off_series_still_had_are_a_gap() -> None:
    for told in (5, None):  # None: as many as its pings have shown
        inflow = begun()[1]
        flow(inflow)
        take_frame(inflow, 0)
        inflow.take(m.pack(m.Ping(1, SERIES.series_uid, 3, 1)), None)
        inflow.abandon("canceled", told)
        _, gap = inflow.arrivals
        count = 4 if told else 2
        assert gap == Gap(1, count, "canceled")
        end = inflow.arrivals.end
        assert end is not None
        assert (end.frames_sent, end.reason) == (1 + count, "canceled")


def test_a_gap_comes_before_the_frame_that_reveals_it() -> None:
    inflow = begun()[1]
    flow(inflow)
    take_frame(inflow, 0)
    take_frame(inflow, 2)  # 1 is asked for again
    inflow.take(m.pack(m.Rewind(1, SERIES.series_uid, 1, 2)), None)
    take_frame(inflow, 2)
    inflow.stop()
    first, gap, last = inflow.arrivals
    assert isinstance(gap, Gap)
    assert (gap.first, gap.count) == (1, 1)
    assert isinstance(first, Slot)
    assert isinstance(last, Slot)
    assert (first.frame().sequence, last.frame().sequence) == (0, 2)


def test_a_ping_shows_what_was_lost_last_and_what_was_never_answered() -> None:
    inflow = begun()[1]
    uid = SERIES.series_uid
    inflow.take(m.pack(m.Ping(1, uid, 0, 1)), None)
    assert inflow.sequencer.attempt == 2, "the first request got lost on its way"
    flow(inflow, attempt=2)
    take_frame(inflow, 0)
    for sent_upto, attempt, asked in ((1, 2, 2), (2, 1, 2), (2, 2, 3)):
        inflow.take(m.pack(m.Ping(1, uid, sent_upto, attempt)), None)
        assert inflow.sequencer.attempt == asked


def test_a_frame_out_of_range_or_for_the_second_time_is_refused_by_its_reason() -> None:
    inflow = begun()[1]
    flow(inflow)
    take_frame(inflow, 0)
    most = 1 + m.most_lost(SERIES)
    for sequence, reason in ((0, "duplicate"), (most + 1, "range")):
        with pytest.raises(ProtocolError) as refused:
            take_frame(inflow, sequence)
        assert refused.value.reason == reason
    assert inflow.sequencer.attempt == 1
    take_frame(inflow, most)  # so many may be lost: they are asked for
    assert inflow.sequencer.attempt == 2
    inflow.stop()
    assert len(list(inflow.arrivals)) == 1


ABSURD = (2**62, 10**8, -5)


@pytest.mark.parametrize("number", ABSURD)
@pytest.mark.parametrize("kind", ["abandon", "end", "ping", "rewind"])
def test_a_number_that_cannot_be_ends_the_series_at_once(
    kind: str, number: int
) -> None:
    series = make_series(sizes={"t": 30})
    inflow = Inflow(series, 0, SlotPool(16, 24 * 32 * 2), Arrivals(), Accounting())
    flow(inflow)
    for sequence in range(3):
        take_frame(inflow, sequence)
    uid = series.series_uid
    if kind == "abandon":
        inflow.abandon("x", number)
    elif kind == "end":
        inflow.take(m.pack(SeriesEnd(1, uid, number, "x")), None)
    elif kind == "ping":
        inflow.take(m.pack(m.Ping(1, uid, number, 1)), None)
    else:
        inflow.take(m.pack(m.Rewind(1, uid, number, 1)), None)
    if number < 0 and kind in ("ping", "rewind"):
        # It says nothing that is not known already.
        assert not inflow.arrivals.is_over
        return
    came = iter(inflow.arrivals)
    assert [next(came).frame().sequence for _ in range(3)] == [0, 1, 2]
    with pytest.raises(TransportError, match=f"at frame {number}, which is not"):
        next(came)
    assert inflow.arrivals.end is not None
    assert inflow.arrivals.end.frames_sent == 3


@pytest.mark.parametrize("term", ["camera_lost", "not_acquired"])
@pytest.mark.parametrize("number", [-1, 2**40 + 1, 2**63 - 1])
def test_losses_that_cannot_be_end_the_series_as_broken(term: str, number: int) -> None:
    _, inflow = begun()
    flow(inflow)
    end = SeriesEnd(1, SERIES.series_uid, 0, "completed", **{term: number})
    inflow.take(m.pack(end), None)
    with pytest.raises(TransportError, match=f"{term}={number}"):
        next(iter(inflow.arrivals))


def test_the_words_at_the_end_are_cut_to_what_can_be_read() -> None:
    _, inflow = begun()
    flow(inflow)
    warnings = ("\x1b[2J" + 9999 * "x", *map(str, range(5000)))
    end = SeriesEnd(1, SERIES.series_uid, 0, "a\nb", warnings=warnings)
    inflow.take(m.pack(end), None)
    assert list(inflow.arrivals) == []
    kept = inflow.arrivals.end
    assert kept is not None
    assert kept.reason == "a?b"
    assert kept.warnings[:2] == ("?[2J" + 396 * "x" + "...", "0")
    assert kept.warnings[99:] == ("98", "4901 further warnings")
    few = SeriesEnd(1, SERIES.series_uid, 0, "completed", warnings=("one", "two"))
    assert m.readable_end(few) == few


def test_a_service_waits_for_a_silent_publisher_as_long_as_it_may_come_back() -> None:
    gone = False
    dialogue = Dialogue(CONFIG, 0.0, patient=True, is_gone=lambda: gone)
    dialogue.handle(m.Welcome(1, dialogue.uid, "topic", SERIES), 0.0)
    inflow = Inflow(SERIES, 0, SlotPool(4, 2048), Arrivals(), Accounting())
    dialogue.begin(inflow, 0, 0.0)
    flow(inflow)
    for now_s in range(1, 100):
        dialogue.watch(float(now_s))
    assert not inflow.arrivals.is_over
    gone = True
    for now_s in range(100, 120):
        dialogue.watch(float(now_s))
    assert inflow.arrivals.end is not None
    assert "its port is closed" in inflow.arrivals.end.reason


def test_a_series_that_is_not_wanted_is_declined_and_another_waited_for() -> None:
    unwanted = {SERIES.series_uid: "the disk was full"}
    dialogue = Dialogue(CONFIG, 0.0, patient=True, unwanted=unwanted)
    assert said(dialogue, 0.0) == ["Hello"]
    dialogue.handle(m.Welcome(1, dialogue.uid, "topic", SERIES), 0.0)
    (leave,) = dialogue.say(0.1)
    assert leave == m.Leave(dialogue.uid, SERIES.series_uid, "the disk was full")
    assert said(dialogue, 1.1) == ["Hello"]
    other = make_series("other")
    dialogue.handle(m.Welcome(1, dialogue.uid, "topic", other), 1.2)
    assert dialogue.series == other


def test_what_happened_before_begin_is_not_forgotten() -> None:
    dialogue = welcomed()
    dialogue.handle(m.Abandon(SERIES.series_uid, 0, "canceled"), 0.0)
    inflow = Inflow(SERIES, 0, SlotPool(2, 2048), Arrivals(), Accounting())
    dialogue.begin(inflow, 0, 0.0)
    assert inflow.arrivals.end is not None
    assert inflow.arrivals.end.reason == "canceled"


def test_a_recorder_that_was_replaced_loses_nothing_and_says_so() -> None:
    """Frames that it did not get are the other's: none of them is a gap."""
    dialogue, inflow = begun()
    flow(inflow)
    take_frame(inflow, 0)
    inflow.take(m.pack(m.Ping(1, SERIES.series_uid, 5, 1)), None)
    dialogue.handle(m.Refused(dialogue.uid, "occupied", "another records"), 1.0)
    arrivals = iter(inflow.arrivals)
    slot = next(arrivals)
    assert isinstance(slot, Slot)
    assert slot.frame().sequence == 0
    with pytest.raises(TakenOverError, match="taken over"):
        next(arrivals)


def test_leaving_is_said_unless_everything_is_done() -> None:
    dialogue, inflow = begun()
    flow(inflow)
    take_frame(inflow, 0)
    assert [type(x).__name__ for x in dialogue.last_words("bye")] == [
        "Progress",
        "Leave",
    ]
    end = SeriesEnd(1, SERIES.series_uid, 1, "completed")
    inflow.take(m.pack(end), None)
    assert len(list(dialogue.last_words("bye"))) == 2
    dialogue.durable_upto = 1
    assert [type(x).__name__ for x in dialogue.last_words("bye")] == ["Progress"]
