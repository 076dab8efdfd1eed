"""Outbox, stall policy, arrivals, registrar and sizing: no socket involved."""

import math
import re

import msgspec
import pytest
from transport_kit import make_config, make_estimate, make_header, make_series

from rtfocus.errors import ConfigError, ProtocolError, TransportError
from rtfocus.frame import SeriesEnd, Slot, SlotPool
from rtfocus.transport import messages as m
from rtfocus.transport.inflow import Arrivals, Gap
from rtfocus.transport.io_thread import Rejections
from rtfocus.transport.memory import slot_pool
from rtfocus.transport.publisher import LinkWatch, Stall
from rtfocus.transport.registrar import LOST_HEARTBEATS, Outbox, Registrar
from rtfocus.transport.sockets import Context, control_server, frames_server


def filled(count: int, first: int = 0) -> list[Slot]:
    pool = SlotPool(max(count, 1), 24 * 32 * 2)
    slots = [pool.acquire() for _ in range(count)]
    for sequence, slot in enumerate(slots, first):
        assert slot is not None
        slot.prepare(make_header(sequence))
    return [slot for slot in slots if slot is not None]


def outbox_of(count: int) -> Outbox:
    outbox = Outbox(make_series())
    for slot in filled(count):
        outbox.append(slot)
    return outbox


def sent(outbox: Outbox, credit_upto: int) -> list[int]:
    numbers = []
    while (slot := outbox.take(credit_upto)) is not None:
        numbers.append(slot.frame().sequence)
    return numbers


class TestOutbox:
    def test_frames_leave_within_credit_and_stay_until_durable(self) -> None:
        outbox = outbox_of(5)
        assert sent(outbox, 0) == []
        assert sent(outbox, 3) == [0, 1, 2]
        assert [s.frame().sequence for s in outbox.settle(2)] == [0, 1]
        assert outbox.settle(2) == []
        assert sent(outbox, 99) == [3, 4]
        assert (outbox.durable_upto, outbox.sent_upto, outbox.most_sent) == (2, 5, 5)

    def test_rewind_sends_again_what_is_held(self) -> None:
        outbox = outbox_of(5)
        sent(outbox, 5)
        outbox.settle(2)
        assert outbox.rewind(3) == 3
        assert sent(outbox, 5) == [3, 4]
        assert outbox.rewind(0) == 2
        assert sent(outbox, 5) == [2, 3, 4]
        assert outbox.most_sent == 5

    def test_rewind_beyond_what_exists_is_refused(self) -> None:
        with pytest.raises(TransportError, match="only 2 exist"):
            outbox_of(2).rewind(3)

    def test_sequence_must_have_no_holes(self) -> None:
        outbox = outbox_of(2)
        with pytest.raises(TransportError, match="where 2 was next"):
            outbox.append(filled(1, first=3)[0])

    def test_no_frame_follows_the_end(self) -> None:
        outbox = outbox_of(1)
        outbox.finish("completed")
        with pytest.raises(TransportError, match="after the end"):
            outbox.append(filled(1, first=1)[0])

    def test_complete_means_sent_durable_and_confirmed(self) -> None:
        outbox = outbox_of(1)
        outbox.finish("completed")
        assert not outbox.is_sent
        sent(outbox, 1)
        assert outbox.is_sent
        outbox.confirm_end()
        assert not outbox.is_complete
        outbox.settle(1)
        assert outbox.is_complete

    def test_a_frame_that_could_not_be_sent_is_the_next_again(self) -> None:
        outbox = outbox_of(2)
        outbox.take(2)
        outbox.untake()
        assert sent(outbox, 2) == [0, 1]


class TestStall:
    def test_wait_has_no_end(self) -> None:
        stall = Stall("wait", 1.0)
        for waited_s in (0.5, 1.5, 1e6):
            assert stall.watch("no slot", waited_s, alive=False, stopped=False) is None
        assert stall.count == 1

    def test_a_new_wait_is_a_new_stall(self) -> None:
        stall = Stall("wait", 1.0)
        for waited_s in (0.5, 1.5, 2.5, 0.1, 1.1, 1.2):
            stall.watch("no slot", waited_s, alive=True, stopped=False)
        assert stall.count == 2

    def test_abort_says_what_was_waited_for(self) -> None:
        stall = Stall("abort", 1.0)
        assert stall.watch("no slot", 1.0, alive=True, stopped=False) is None
        with pytest.raises(
            TransportError, match=r"no slot for 1 s.*too slow.*on_stall"
        ):
            stall.watch("no slot", 1.1, alive=True, stopped=False)

    def test_raw_only_is_asked_of_a_living_recorder_alone(self) -> None:
        stall = Stall("raw_only", 1.0)
        assert stall.watch("no slot", 2.0, alive=False, stopped=False) is None
        assert stall.watch("no slot", 2.1, alive=True, stopped=False) is not None

    def test_stop_ends_patience_with_a_lost_recorder(self) -> None:
        stall = Stall("wait", 1.0)
        assert stall.watch("no slot", 0.5, alive=True, stopped=True) is None
        with pytest.raises(TransportError, match=r"left \(disk full\)"):
            stall.watch("no slot", 0.1, alive=False, stopped=True, left="disk full")
        with pytest.raises(TransportError, match="too slow"):
            stall.watch("no slot", 1.1, alive=True, stopped=True)


class TestLinkWatch:
    def test_a_link_that_carries_less_than_the_camera_gives_is_told(self) -> None:
        link = LinkWatch(frame_bytes=2_000_000)
        for second in range(10):
            # Ten frames on their way, one at the recorder; one arrives a second.
            arrived = second + 20
            link.waited(
                second,
                second + 0.5,
                sent=arrived + 10,
                received=arrived,
                durable=arrived - 1,
            )
        said = link.warning(lasted_s=12.0)
        assert said is not None
        # Nine frames of 2 MB in 9.5 s.
        assert "carried 1.89 MB/s, and the camera waited 5.0 s of 12.0 s" in said

    def test_a_slow_recorder_is_no_slow_link(self) -> None:
        link = LinkWatch(frame_bytes=2_000_000)
        link.waited(0.0, 9.0, sent=32, received=32, durable=0)
        assert link.warning(lasted_s=10.0) is None

    def test_a_short_wait_is_not_told(self) -> None:
        link = LinkWatch(frame_bytes=2_000_000)
        link.waited(0.0, 0.9, sent=32, received=2, durable=0)
        assert link.warning(lasted_s=1.0) is None
        link.waited(2.0, 3.0, sent=32, received=2, durable=0)
        assert link.warning(lasted_s=100.0) is None
        assert link.warning(lasted_s=10.0) is not None


class TestArrivals:
    END = SeriesEnd(version=1, series_uid="s", frames_sent=9, reason="completed")

    def test_neighbouring_gaps_merge_so_that_the_hand_off_is_bounded(self) -> None:
        arrivals = Arrivals()
        slots = filled(1)
        for item in (Gap(0, 1, "a"), Gap(1, 2, "b"), slots[0], Gap(4, 1, "c")):
            arrivals.put(item)
        arrivals.finish(self.END)
        assert list(arrivals) == [Gap(0, 3, "a"), slots[0], Gap(4, 1, "c")]

    def test_the_error_comes_after_what_arrived(self) -> None:
        arrivals = Arrivals()
        arrivals.put(Gap(0, 1, "a"))
        arrivals.finish(self.END, TransportError("lost"))
        arrivals.finish(SeriesEnd(1, "s", 1, "too late"))
        came = iter(arrivals)
        assert next(came) == Gap(0, 1, "a")
        with pytest.raises(TransportError, match="lost"):
            next(came)
        assert arrivals.end == self.END


class TestRegistrar:
    def hello(self, uid: str = "u") -> m.Hello:
        return m.Hello(version=1, role="recorder", uid=uid)

    def opened(self, frames: int = 4) -> Registrar:
        registrar = Registrar(heartbeat_s=1.0)
        registrar.open(outbox_of(frames))
        return registrar

    def progress(self, durable: int, received: int, uid: str = "u") -> m.Progress:
        return m.Progress(uid, "series-1", 9, received, durable)

    def test_without_a_series_everybody_waits(self) -> None:
        (answer,) = Registrar(1.0).handle(b"a", self.hello(), 0.0)
        assert answer == m.Waiting(version=1)

    def test_the_same_hello_gets_the_same_welcome(self) -> None:
        registrar = self.opened()
        first = registrar.handle(b"a", self.hello(), 0.0)
        assert isinstance(first[0], m.Welcome)
        assert registrar.handle(b"a", self.hello(), 1.0) == first

    def test_another_gets_in_only_when_the_first_is_lost(self) -> None:
        registrar = self.opened()
        registrar.handle(b"a", self.hello(), 0.0)
        (answer,) = registrar.handle(b"b", self.hello("v"), LOST_HEARTBEATS - 0.1)
        assert isinstance(answer, m.Refused)
        assert answer.code == "occupied"
        (answer,) = registrar.handle(b"b", self.hello("v"), LOST_HEARTBEATS)
        assert isinstance(answer, m.Welcome)
        (answer,) = registrar.handle(b"a", self.progress(0, 0), 7.0)
        assert isinstance(answer, m.Refused)
        assert answer.code == "occupied"

    def test_who_was_replaced_is_so_after_the_other_has_left(self) -> None:
        registrar = self.opened()
        registrar.handle(b"a", self.hello(), 0.0)
        registrar.handle(b"b", self.hello("v"), LOST_HEARTBEATS)
        series_uid = registrar.outbox.series.series_uid
        registrar.handle(b"b", m.Leave("v", series_uid, "its folder is locked"), 6.5)
        (answer,) = registrar.handle(b"a", self.progress(0, 0), 7.0)
        assert isinstance(answer, m.Refused)
        assert answer.code == "occupied"

    def test_a_lost_recorder_is_back_when_it_speaks(self) -> None:
        registrar = self.opened()
        registrar.handle(b"a", self.hello(), 0.0)
        assert not registrar.is_alive(100.0)
        assert registrar.handle(b"a", self.progress(0, 0), 100.0) == []
        assert registrar.is_alive(100.0)

    def test_a_publisher_that_slept_does_not_give_its_recorder_away(self) -> None:
        registrar = self.opened()
        registrar.watch(0.0)
        registrar.handle(b"a", self.hello(), 0.0)
        registrar.watch(1.0)
        # Frozen for a minute; asked by another thread before the first turn, too.
        assert registrar.is_alive(60.0)
        registrar.watch(60.0)
        (answer,) = registrar.handle(b"b", self.hello("v"), 60.0)
        assert isinstance(answer, m.Refused)
        assert answer.code == "occupied"
        for turn in range(LOST_HEARTBEATS + 1):
            registrar.watch(60.0 + turn)
        assert not registrar.is_alive(60.0 + LOST_HEARTBEATS)

    def test_a_role_that_does_not_exist_is_refused(self) -> None:
        hello = m.Hello(version=1, role="viewer", uid="u")
        (answer,) = self.opened().handle(b"a", hello, 0.0)
        assert isinstance(answer, m.Refused)
        assert answer.code == "role"

    def test_another_pairing_is_refused_before_anything_else(self) -> None:
        registrar = Registrar(heartbeat_s=1.0, pairing="config a of anna")
        for pairing in ("", "config b of bob", "a word"):
            hello = m.Hello(1, "recorder", "v", pairing, "scope", 7, "bob")
            (answer,) = registrar.handle(b"b", hello, 0.0)
            assert isinstance(answer, m.Refused)
            assert answer.code == "pairing"
            assert "config a of anna" in answer.reason
            assert "a word," not in answer.reason
            assert "process 7 (bob) on host scope" in str(registrar.stranger)
        registrar.open(outbox_of(1))
        hello = m.Hello(1, "recorder", "u", "config a of anna")
        (answer,) = registrar.handle(b"a", hello, 0.0)
        assert isinstance(answer, m.Welcome)

    def test_whoever_comes_second_is_told_who_was_first_and_where(self) -> None:
        registrar = self.opened()
        first = m.Hello(1, "recorder", "u", "", "scope", 7, "anna")
        registrar.handle(b"a", first, 0.0)
        resend = m.Resend("u", "series-1", 0, 1, folder="/data/night.rtfocus")
        assert registrar.handle(b"a", resend, 0.0) == []
        (answer,) = registrar.handle(b"b", self.hello("v"), 0.0)
        assert isinstance(answer, m.Refused)
        who = "process 7 (anna) on host scope in '/data/night.rtfocus'"
        assert who in answer.reason
        assert registrar.recorded_by == who

    @pytest.mark.parametrize(("sequence", "attempt"), [(-7, 1), (0, 0), (0, 2**63)])
    def test_a_request_for_what_cannot_be_is_refused(
        self, sequence: int, attempt: int
    ) -> None:
        registrar = self.opened()
        registrar.handle(b"a", self.hello(), 0.0)
        with pytest.raises(ProtocolError, match="resend from"):
            registrar.handle(b"a", m.Resend("u", "series-1", sequence, attempt), 0.0)

    def test_progress_of_an_unknown_series_is_refused(self) -> None:
        registrar = self.opened()
        registrar.handle(b"a", self.hello(), 0.0)
        (answer,) = registrar.handle(b"a", m.Progress("u", "old", 9, 0, 0), 0.0)
        assert isinstance(answer, m.Refused)
        assert answer.code == "unknown"

    @pytest.mark.parametrize(
        ("durable", "received"), [(2, 1), (5, 5), (0, 99), (-5, 0)]
    )
    def test_progress_beyond_the_possible_frees_nothing(
        self, durable: int, received: int
    ) -> None:
        registrar = self.opened()
        registrar.handle(b"a", self.hello(), 0.0)
        with pytest.raises(ProtocolError, match="ascending"):
            registrar.handle(b"a", self.progress(durable, received), 0.0)
        assert registrar.settled == []

    def test_durable_frames_give_their_slots_back(self) -> None:
        registrar = self.opened()
        registrar.handle(b"a", self.hello(), 0.0)
        registrar.handle(b"a", self.progress(2, 3), 0.0)
        assert registrar.recorder is not None
        assert registrar.recorder.credit_upto == 9
        assert registrar.recorder.received_upto == 3
        assert [s.frame().sequence for s in registrar.settled] == [0, 1]

    def test_the_newest_estimate_wins_and_the_rest_is_counted(self) -> None:
        registrar = self.opened()
        registrar.handle(b"a", self.hello(), 0.0)
        for sequence in (0, 2, 1):
            registrar.handle(b"a", make_estimate(sequence), 0.0)
        assert registrar.estimates.take() == make_estimate(2)
        assert registrar.estimates.dropped == 2
        with pytest.raises(ProtocolError, match="not the recorder"):
            registrar.handle(b"b", make_estimate(3), 0.0)
        with pytest.raises(ProtocolError, match="of series 'old'"):
            registrar.handle(b"a", make_estimate(3, "old"), 0.0)
        no_number = msgspec.structs.replace(make_estimate(3), defocus_um=math.nan)
        with pytest.raises(ProtocolError, match="defocus_um is not finite"):
            registrar.handle(b"a", no_number, 0.0)
        assert registrar.estimates.take() is None

    def test_whoever_leaves_makes_room(self) -> None:
        registrar = self.opened()
        registrar.handle(b"a", self.hello(), 0.0)
        registrar.handle(b"a", m.Leave("u", "series-1", "disk full"), 0.0)
        assert registrar.left == "disk full"
        (answer,) = registrar.handle(b"b", self.hello("v"), 0.0)
        assert isinstance(answer, m.Welcome)


def test_slots_fit_the_memory() -> None:
    config = make_config(slots=8, memory_mb=0.1)
    assert slot_pool(config, 10_000).count == 8
    assert slot_pool(config, 30_000).count == 3
    with pytest.raises(TransportError, match=r"memory_mb=0\.1 holds 1 frames"):
        slot_pool(config, 60_000)
    with pytest.raises(TransportError, match="max_frame_mb=256"):
        slot_pool(config, 300_000_000)


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://*:5571", "tcp://0.0.0.0:5571", "tcp://eth0:5571", "tcp://[::]:1"],
)
def test_an_open_endpoint_needs_encryption_or_consent(endpoint: str) -> None:
    context: Context = Context()
    config = make_config(frames=endpoint)
    with pytest.raises(ConfigError, match=r"curve_keys.*insecure: true"):
        frames_server(context, config)
    context.term()


@pytest.mark.parametrize("endpoint", ["ipc:///tmp/x", "tcp://host", "inproc://x"])
def test_an_endpoint_that_is_not_tcp_is_refused(endpoint: str) -> None:
    context: Context = Context()
    with pytest.raises(ConfigError, match=re.escape("tcp://HOST:PORT")):
        control_server(context, make_config().model_copy(update={"control": endpoint}))
    context.term()


def test_a_flood_is_counted_in_full_and_logged_in_part(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counted: list[str] = []
    rejections = Rejections("frames", counted.append)
    for _ in range(250):
        rejections.reject("truncated", "frame 3")
    assert rejections.counts == {"truncated": 250}
    assert len(counted) == 250
    assert len(caplog.records) == 3
