"""Transport flow: slow, paused, killed, second and restarted peers; stalls."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from transport_kit import (
    DEADLINE_S,
    Background,
    Recording,
    end_without_a_word,
    facing,
    make_config,
    make_estimate,
    make_header,
    make_series,
    number_of,
    publish,
    receiving,
    record,
    until,
)

from rtfocus.config.sections import PreviewConfig
from rtfocus.errors import (
    ConfigError,
    EngineError,
    ExitCode,
    ProtocolError,
    StoppedError,
    TransportError,
)
from rtfocus.frame import Estimate, FocusReading, Role
from rtfocus.transport.inflow import Gap
from rtfocus.transport.preview import PreviewPublisher
from rtfocus.transport.publisher import FramePublisher
from rtfocus.transport.viewer import PreviewViewer, ShownSeries

CHILD = Path(__file__).with_name("recorder_child.py")


def send_series(publisher: FramePublisher, count: int, uid: str = "series-1") -> None:
    publisher.start(make_series(uid))
    publish(publisher, count, uid=uid)
    publisher.end("completed")


@contextmanager
def child_recorder(
    publisher: FramePublisher, journal: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, str(CHILD), *publisher.endpoints, str(journal)]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def journalled(journal: Path) -> list[int]:
    if not journal.exists():
        return []
    return [int(line) for line in journal.read_text("utf-8").split("\n")[:-1]]


def test_a_slow_receiver_slows_the_publisher_and_loses_nothing() -> None:
    """The publisher never has more under way than both sides have slots."""
    with FramePublisher(make_config(slots=4)) as publisher:
        sending = Background(lambda: send_series(publisher, 60))
        with sending, receiving(facing(publisher, slots=2)) as (receiver, _):
            taken = []
            for slot in receiver.frames():
                assert not isinstance(slot, Gap)
                taken.append(number_of(slot))
                until(
                    lambda: (
                        publisher.status().free_slots == 0
                        or publisher._outbox.published == 60
                    ),
                    "the publisher to fill its slots",
                )
                assert publisher.status().sent <= len(taken) + 1
                receiver.report_durable(slot.frame().sequence)
                receiver.release(slot)
        assert taken == list(range(60))
        status = publisher.status()
        assert (status.sent, status.durable_upto, status.resent) == (60, 60, 0)


def test_slots_are_kept_until_the_frame_is_durable() -> None:
    """Received is not enough: a killed processor would lose what it holds."""
    with FramePublisher(make_config(slots=4)) as publisher:
        sending = Background(lambda: send_series(publisher, 4))
        with sending, receiving(facing(publisher)) as (receiver, _):
            slots = [next(iter(receiver.frames())) for _ in range(4)]
            until(lambda: publisher.status().received_upto == 4, "the receipt")
            assert publisher.status().free_slots == 0
            receiver.report_durable(1)
            until(lambda: publisher.status().free_slots == 2, "two slots")
            receiver.report_durable(3)
            assert list(receiver.frames()) == []
            assert len(slots) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot pause a process")
def test_a_paused_receiver_is_lost_and_comes_back(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with FramePublisher(make_config(connect_timeout_s=DEADLINE_S)) as publisher:
        sending = Background(lambda: send_series(publisher, 400))
        with sending, child_recorder(publisher, journal) as child:
            until(lambda: len(journalled(journal)) > 20, "the first frames")
            child.send_signal(signal.SIGSTOP)
            until(lambda: not publisher.status().recorder_alive, "the silence")
            child.send_signal(signal.SIGCONT)
            assert child.wait(DEADLINE_S) == 0
        assert journalled(journal) == list(range(400))


def test_a_killed_receiver_is_replaced_without_loss(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    killed = threading.Semaphore(0)
    with FramePublisher(make_config(connect_timeout_s=DEADLINE_S)) as publisher:

        def act() -> None:
            publisher.start(make_series())
            for first in range(0, 600, 150):
                # No child can have recorded all before it is killed.
                publish(publisher, 150, first)
                if first < 450:
                    assert killed.acquire(timeout=DEADLINE_S)
            publisher.end("completed")

        with Background(act):
            for _ in range(3):
                before = len(journalled(journal))
                with child_recorder(publisher, journal) as child:
                    until(lambda: len(journalled(journal)) > before + 30, "frames")  # noqa: B023
                    child.kill()
                    child.wait(DEADLINE_S)
                killed.release()
            durable = len(journalled(journal))
            assert journalled(journal) == list(range(durable))
            with receiving(facing(publisher), durable) as (receiver, accounting):
                recording = record(receiver)
        assert recording.sequences == list(range(durable, 600))
        assert recording.gaps == []
        assert accounting.rejected == {}


def test_a_second_subscriber_gets_nothing_and_holds_nobody_up() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with FramePublisher(make_config()) as publisher:
        stranger = context.socket(zmq.SUB)
        stranger.rcvhwm = 1
        stranger.subscribe(b"")
        stranger.connect(publisher.endpoints[0])
        sending = Background(lambda: send_series(publisher, 500))
        with sending, receiving(facing(publisher)) as (receiver, _):
            assert record(receiver).sequences == list(range(500))
        assert not stranger.poll(0)
    context.destroy(linger=0)


def test_one_series_follows_the_other() -> None:
    with FramePublisher(make_config()) as publisher:

        def act() -> None:
            for uid in ("first", "second"):
                send_series(publisher, 10, uid)

        with Background(act), receiving(facing(publisher), None) as (receiver, _):
            for uid in ("first", "second"):
                series = receiver.wait_series(DEADLINE_S)
                assert series is not None
                assert series.series_uid == uid
                receiver.begin()
                assert record(receiver).sequences == list(range(10))


def test_a_restarted_publisher_ends_the_old_series_and_begins_its_own() -> None:
    with FramePublisher(make_config()) as publisher:
        frames, control = publisher.endpoints
        with receiving(facing(publisher), None) as (receiver, accounting):
            with Background(lambda: publisher.start(make_series("old"))):
                assert receiver.wait_series(DEADLINE_S) is not None
                receiver.begin()
            publish(publisher, 3, uid="old")
            arrivals = receiver.frames()
            old = [next(arrivals) for _ in range(3)]
            for slot in old:
                assert not isinstance(slot, Gap)
                receiver.release(slot)
            end_without_a_word(publisher)
            with FramePublisher(make_config(frames=frames, control=control)) as again:
                assert list(arrivals) == []
                assert receiver.end is not None
                assert receiver.end.reason == "the publisher restarted"
                assert receiver.end.frames_sent == accounting.acquired == 3
                with Background(lambda: send_series(again, 5, "new")):
                    series = receiver.wait_series(DEADLINE_S)
                    assert series is not None
                    assert series.series_uid == "new"
                    receiver.begin()
                    assert record(receiver).sequences == list(range(5))


def test_a_closed_publisher_says_that_the_rest_will_not_come() -> None:
    with FramePublisher(make_config()) as publisher:
        config = facing(publisher, slots=2)
        with receiving(config, None) as (receiver, accounting):
            with Background(lambda: publisher.start(make_series())):
                assert receiver.wait_series(DEADLINE_S) is not None
                receiver.begin()
            publish(publisher, 5)
            arrivals = receiver.frames()
            held = [next(arrivals), next(arrivals)]
            publisher.close()
            assert list(arrivals) == [Gap(2, 3, "publisher closed")]
            assert len(held) == 2
            assert accounting.acquired == 5
            assert accounting.dropped == {"gap": 3}


def test_focus_frames_count_in_the_sequence_like_others() -> None:
    with FramePublisher(make_config()) as publisher:

        def act() -> None:
            publisher.start(make_series())
            for sequence in range(6):
                slot = publisher.acquire()
                role = Role.FOCUS if sequence % 2 else Role.RECORD
                slot.prepare(make_header(sequence, role=role)).fill(sequence)
                publisher.publish(slot)
            publisher.end("completed")

        roles = []
        with Background(act), receiving(facing(publisher)) as (receiver, accounting):
            for slot in receiver.frames():
                assert not isinstance(slot, Gap)
                roles.append(slot.frame().role)
                receiver.report_durable(slot.frame().sequence)
                receiver.release(slot)
        assert roles == [Role.RECORD, Role.FOCUS] * 3
        assert accounting.acquired == 6


def test_a_series_without_frames_ends_well() -> None:
    with FramePublisher(make_config()) as publisher:
        sending = Background(lambda: send_series(publisher, 0))
        with sending, receiving(facing(publisher)) as (receiver, _):
            assert record(receiver) == Recording()
            assert receiver.end is not None
            assert receiver.end.frames_sent == 0


def test_a_run_folder_that_is_ahead_of_the_series_is_refused() -> None:
    with (
        FramePublisher(make_config(connect_timeout_s=30)) as publisher,
        Background(lambda: publisher.start(make_series())) as starting,
    ):
        config = facing(publisher, stall_timeout_s=0.4)
        with (
            receiving(config, 7) as (receiver, _),
            pytest.raises(TransportError, match="another series"),
        ):
            record(receiver)
        publisher.stop()
        assert isinstance(starting.join(), TransportError)


class TestStalls:
    def test_no_recorder_is_an_error_with_the_remedy(self) -> None:
        with (
            FramePublisher(make_config(connect_timeout_s=0.2)) as publisher,
            pytest.raises(TransportError, match="start `rtfocus process`"),
        ):
            publisher.start(make_series())

    def test_stopped_before_a_recorder_came_is_an_interruption(self) -> None:
        with FramePublisher(make_config(connect_timeout_s=30)) as publisher:
            publisher.stop()
            with pytest.raises(StoppedError, match="nothing was acquired") as e:
                publisher.start(make_series())
        assert e.value.exit_code is ExitCode.INTERRUPTED

    def test_abort_ends_the_wait_for_a_slot_and_says_why(self) -> None:
        config = make_config(on_stall="abort", stall_timeout_s=1.0, slots=4)
        with FramePublisher(config) as publisher:
            starting = Background(lambda: publisher.start(make_series()))
            with receiving(facing(publisher, slots=2), None) as (receiver, accounting):
                with starting:
                    assert receiver.wait_series(DEADLINE_S) is not None
                    receiver.begin()
                with pytest.raises(TransportError, match=r"no free slot.*too slow"):
                    publish(publisher, 5)
                with pytest.raises(TransportError, match="4 frames are not durable"):
                    publisher.end("stalled")
                publisher.close()
                arrived = list(receiver.frames())
                assert arrived[2:] == [Gap(2, 2, "stalled")]
                assert accounting.dropped == {"gap": 2}
                assert accounting.acquired == 4

    def test_raw_only_is_asked_and_nothing_is_lost(self) -> None:
        config = make_config(on_stall="raw_only", stall_timeout_s=1.0, slots=4)
        with FramePublisher(config) as publisher:
            sending = Background(lambda: send_series(publisher, 20))
            with sending, receiving(facing(publisher)) as (receiver, _):
                assert receiver.wants_raw_only() is None
                until(lambda: receiver.wants_raw_only() is not None, "the request")
                assert "no free slot" in str(receiver.wants_raw_only())
                assert record(receiver).sequences == list(range(20))
            status = publisher.status()
            assert status.raw_only == receiver.wants_raw_only()
            assert status.stalls == 1

    def test_wait_outlasts_every_stall_until_a_recorder_is_there_again(self) -> None:
        config = make_config(on_stall="wait", stall_timeout_s=0.1, slots=4)
        with FramePublisher(config) as publisher:
            sending = Background(lambda: send_series(publisher, 20))
            with sending:
                with receiving(facing(publisher)):
                    until(lambda: publisher.status().stalls > 0, "a stall")
                until(lambda: not publisher.status().recorder_alive, "the farewell")
                with receiving(facing(publisher)) as (receiver, _):
                    assert record(receiver).sequences == list(range(20))

    def test_stop_wakes_whoever_waits_for_a_lost_recorder(self) -> None:
        with FramePublisher(make_config(slots=4)) as publisher:
            sending = Background(lambda: send_series(publisher, 20))
            with sending:
                with receiving(facing(publisher)):
                    until(lambda: publisher.status().free_slots == 0, "full slots")
                assert not sending.is_done
                publisher.stop()
                error = sending.join()
        assert isinstance(error, TransportError)
        assert "left (receiver closed)" in str(error)

    def test_a_recorder_that_fails_says_of_what_as_it_leaves(self) -> None:
        with FramePublisher(make_config(), waits_for_another=False) as publisher:
            sending = Background(lambda: send_series(publisher, 20))
            with sending:
                with (
                    suppress(EngineError),
                    receiving(facing(publisher), next_sequence=None) as (receiver, _),
                ):
                    assert receiver.wait_series(DEADLINE_S) is not None
                    raise EngineError("engine 'nowhere' not found")
                error = sending.join()
        assert "does not take the series: engine 'nowhere' not found" in str(error)

    def test_close_wakes_whoever_waits(self) -> None:
        publisher = FramePublisher(make_config(slots=4))
        sending = Background(lambda: send_series(publisher, 20))
        with sending, receiving(facing(publisher)):
            until(lambda: publisher.status().free_slots == 0, "full slots")
            publisher.close()
            error = sending.join()
        assert isinstance(error, TransportError)
        assert "closed" in str(error)

    def test_a_port_in_use_names_the_endpoint_and_the_remedy(self) -> None:
        with (
            FramePublisher(make_config()) as publisher,
            pytest.raises(TransportError, match=r"frames: cannot bind.*another port"),
        ):
            FramePublisher(facing(publisher))


class TestEstimates:
    def test_the_newest_reaches_the_publisher(self) -> None:
        came: list[Estimate] = []
        with FramePublisher(make_config(), on_estimate=came.append) as publisher:
            sending = Background(lambda: send_series(publisher, 3))
            with sending, receiving(facing(publisher)) as (receiver, _):
                for number in range(100):
                    receiver.send_estimate(make_estimate(number))
                until(lambda: bool(came) and came[-1].sequence == 99, "the newest")
                record(receiver)
            assert publisher.status().estimate == make_estimate(99)
            numbers = [estimate.sequence for estimate in came]
            assert numbers == sorted(set(numbers))
            dropped = publisher._loop.registrar.estimates.dropped
            unsent = receiver._loop.estimates.dropped
            assert len(came) + unsent + dropped == 100

    def test_a_look_is_not_replaced_by_an_older_frames_estimate_nor_shown(self) -> None:
        look = FocusReading(None, None, signed=False, refusal=None, early=True)
        early = msgspec.structs.replace(make_estimate(7), focus=look)
        came: list[Estimate] = []
        with FramePublisher(make_config(), on_estimate=came.append) as publisher:
            sending = Background(lambda: send_series(publisher, 3))
            with sending, receiving(facing(publisher)) as (receiver, _):
                receiver.send_estimate(make_estimate(5))
                until(lambda: bool(came), "an estimate")

                def both() -> None:  # before the next turn sends the newest of them
                    receiver._loop.estimates.put(early)
                    receiver._loop.estimates.put(make_estimate(6))

                receiver._thread.call(both)
                until(lambda: len(came) > 1, "the newest")
                record(receiver)
            assert came == [make_estimate(5), early]
            assert publisher.status().estimate == make_estimate(5)

    def test_a_failing_consumer_surfaces_in_the_next_call(self) -> None:
        def fail(estimate: Estimate) -> None:
            msg = f"no z-stage for frame {estimate.sequence}"
            raise RuntimeError(msg)

        with FramePublisher(make_config(), on_estimate=fail) as publisher:
            starting = Background(lambda: publisher.start(make_series()))
            with receiving(facing(publisher), None) as (receiver, _):
                with starting:
                    assert receiver.wait_series(DEADLINE_S) is not None
                    receiver.begin()
                receiver.send_estimate(make_estimate(4))
                until(lambda: publisher._thread.failure is not None, "the failure")
                with pytest.raises(TransportError, match="no z-stage for frame 4"):
                    publish(publisher, 1)


class TestPreview:
    CONFIG = PreviewConfig(
        endpoint="tcp://127.0.0.1:*", max_side_px=16, interval_s=1e-6
    )

    def test_the_viewer_gets_the_newest_reduced(self) -> None:
        preview = PreviewPublisher(self.CONFIG)
        assert preview.endpoint is not None
        with PreviewViewer(preview.endpoint) as viewer:
            shown = None

            def offered() -> bool:
                nonlocal shown
                pixels = np.arange(40 * 60, dtype="<u2").reshape(40, 60)
                preview.offer(pixels, make_estimate(8), {"frames_per_s": 3.5})
                shown = viewer.newest(0.01)
                return shown is not None

            # Offered again until the subscription has arrived.
            until(offered, "a preview")
            assert shown is not None
            full = np.arange(40 * 60, dtype="<u2").reshape(40, 60)
            np.testing.assert_array_equal(shown.pixels, full[::4, ::4])
            assert shown.header.reduced == 4
            assert shown.header.estimate == make_estimate(8)
            assert shown.header.metrics == {"frames_per_s": 3.5}
            # Old ones are drained: what is seen is the last one that was sent.
            number = 0

            def newest_is_seen() -> bool:
                nonlocal number
                number += 1
                preview.offer(full, make_estimate(number), {})
                seen = viewer.newest(0.05)
                return seen is not None and seen.header.estimate == make_estimate(
                    number
                )

            until(newest_is_seen, "the newest")
        preview.close()

    def test_offers_never_wait_for_a_viewer_that_does_not_read(self) -> None:
        preview = PreviewPublisher(self.CONFIG)
        assert preview.endpoint is not None
        with PreviewViewer(preview.endpoint) as viewer:
            pixels = np.zeros((16, 16, 3), "u1")
            until(
                lambda: (
                    preview.offer(pixels, None, {}) or viewer.newest(0.01) is not None
                ),
                "the subscription",
            )
            for number in range(3000):
                pixels[:] = number % 251
                preview.offer(pixels, None, {"number": number})
            seen = viewer.newest(1.0)
            assert seen is not None
            assert seen.pixels.shape == (16, 16, 3)
        preview.close()

    def test_a_lost_state_loses_no_point_and_a_late_viewer_gets_those_kept(
        self, tmp_path: Path
    ) -> None:
        preview = PreviewPublisher(self.CONFIG)
        preview.begin(ShownSeries(make_series(), tmp_path, dict))
        states = []
        for number in range(0, 100, 5):
            for sequence in range(number, number + 5):
                preview.note(make_header(sequence), None)
                preview.note_focus([{"number": sequence}])
            states.append(preview.status())
        for lost in range(len(states) - 1):
            told = [one for n, one in enumerate(states) if n != lost]
            assert {p.sequence for one in told for p in one.points} == {*range(100)}
            assert {n for one in told for n, _ in one.focus} == {*range(100)}
        assert max(len(one.points) for one in states[17:]) == 10
        preview.welcome()
        assert [p.sequence for p in preview.status().points] == [*range(100)]
        preview.close()

    def test_within_the_interval_offers_are_dropped_and_counted(self) -> None:
        config = PreviewConfig(endpoint="tcp://127.0.0.1:*", interval_s=1000)
        preview = PreviewPublisher(config)
        for _ in range(5):
            preview.offer(np.zeros((4, 4), "u1"), None, {})
        assert preview.dropped == 4
        preview.close()

    def test_no_endpoint_means_nothing_to_do(self) -> None:
        preview = PreviewPublisher(PreviewConfig(endpoint=None))
        preview.offer(np.zeros((4, 4), "u1"), None, {})
        preview.close()

    def test_nothing_comes_is_none(self) -> None:
        with PreviewViewer("tcp://127.0.0.1:9") as viewer:
            assert viewer.newest(0.01) is None

    def test_an_open_preview_needs_keys_or_consent(self) -> None:
        config = PreviewConfig(endpoint="tcp://0.0.0.0:*")
        with pytest.raises(ConfigError, match="insecure"):
            PreviewPublisher(config)
        PreviewPublisher(config, insecure=True).close()

    def test_what_is_no_preview_is_a_protocol_error(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.PUB)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        with PreviewViewer(f"tcp://127.0.0.1:{port}") as viewer:

            def refused() -> bool:
                socket.send_multipart([b"\xc1", b"rubbish"])
                try:
                    assert viewer.newest(0.01) is None
                except ProtocolError:
                    return True
                return False

            until(refused, "the refusal")
        context.destroy(linger=0)
