"""Transport faults: whatever comes over the wire, every frame is accounted for."""

import os
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest
import zmq
from hostile_kit import Damage, HostilePublisher, Parts
from transport_kit import (
    SHAPE,
    Background,
    Recording,
    facing,
    holds_identity,
    make_config,
    make_header,
    make_series,
    publish,
    receiving,
    record,
    until,
)

from rtfocus.config.sections import PreviewConfig
from rtfocus.errors import ConfigError, OutputError, ProtocolError, TransportError
from rtfocus.frame import FrameHeader
from rtfocus.metrics import Accounting
from rtfocus.transport import messages as m
from rtfocus.transport.inflow import Gap
from rtfocus.transport.preview import PreviewPublisher
from rtfocus.transport.publisher import FramePublisher
from rtfocus.transport.sockets import create_keys
from rtfocus.transport.viewer import PreviewViewer


def recorded(
    frames: int, damage: Damage, **changes: object
) -> tuple[Recording, Accounting, HostilePublisher]:
    """Record one hostile series to its end; the loss identity must hold."""
    hostile = HostilePublisher(frames, damage)
    endpoints = dict(zip(("frames", "control"), hostile.endpoints, strict=True))
    with (
        Background(hostile.run),
        receiving(make_config(**endpoints, **changes)) as (receiver, accounting),
    ):
        recording = record(receiver)
        assert receiver.end is not None
        assert receiver.end.frames_sent == frames
    assert holds_identity(accounting, recording)
    return recording, accounting, hostile


def test_a_lost_frame_is_resent() -> None:
    def lose_first(number: int, transmission: int, parts: Parts) -> list[Parts]:
        return [] if number in {3, 19} and transmission == 0 else [parts]

    recording, accounting, hostile = recorded(20, lose_first)
    assert recording.sequences == list(range(20))
    assert recording.gaps == []
    resends = [x for x in hostile.heard if isinstance(x, m.Resend)]
    assert [x.sequence for x in resends] == [0, 3, 19]
    assert accounting.rejected == {}


def test_a_frame_that_never_comes_is_a_gap_at_its_place() -> None:
    def lose(number: int, _: int, parts: Parts) -> list[Parts]:
        return [] if number in {0, 7, 8, 19} else [parts]

    recording, accounting, _ = recorded(20, lose)
    assert recording.sequences == [n for n in range(20) if n not in {0, 7, 8, 19}]
    lost = [n for g in recording.gaps for n in range(g.first, g.first + g.count)]
    assert lost == [0, 7, 8, 19]
    assert accounting.dropped == {"gap": 4}


def test_every_kind_of_bad_message_is_counted_under_its_reason() -> None:
    other = m.pack(make_header(5, "another-series"))
    newer = msgspec.msgpack.encode({"type": "frame", "version": 9})
    unseen = m.Placed(1, "series-1", make_header(5), 4096, 64, 0)
    place = m.pack(make_header(5, index={"t": 5, "z": 1}))
    pixels = np.full(SHAPE, 5, "<u2").tobytes()
    bad: dict[str, list[Parts]] = {
        "malformed": [[b"\xc1", pixels], [b"", b""]],
        "version": [[newer, pixels]],
        "series": [[other, pixels]],
        "index": [[place, pixels]],
        "truncated": [[m.pack(make_header(5)), pixels[:-1]], [m.pack(make_header(5))]],
        "place": [[m.pack(unseen)]],
        "parts": [[], [m.pack(make_header(5)), pixels, b"more"]],
        "duplicate": [[m.pack(make_header(4)), np.full(SHAPE, 4, "<u2").tobytes()]],
    }

    def damage(number: int, _: int, parts: Parts) -> list[Parts]:
        before = [x for kind in bad.values() for x in kind] if number == 5 else []
        return [*before, parts]

    recording, accounting, _ = recorded(10, damage)
    assert recording.sequences == list(range(10))
    assert accounting.rejected == {kind: len(found) for kind, found in bad.items()}


def damaged(random: np.random.Generator, parts: Parts) -> Parts:
    """Return a message that is no frame of the series any more."""
    while True:
        header, pixels = bytearray(parts[0]), parts[1]
        kind = random.integers(4)
        if kind == 0:
            for place in random.integers(len(header), size=random.integers(1, 6)):
                header[place] = random.integers(256)
        elif kind == 1:
            del header[random.integers(len(header)) :]
        elif kind == 2:
            pixels = pixels[: random.integers(len(pixels))]
        else:
            header = bytearray(random.bytes(random.integers(200)))
        try:
            read = m.unpack_in_stream(bytes(header))
        except ProtocolError:
            return [bytes(header), pixels]
        # Some bytes may change without harm, and some make another valid message.
        if kind == 2 and isinstance(read, FrameHeader):
            return [bytes(header), pixels]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_damaged_messages_lose_only_what_they_replace(seed: int) -> None:
    random = np.random.default_rng(seed)
    doomed = set(random.integers(0, 200, 5).tolist())

    def damage(number: int, transmission: int, parts: Parts) -> list[Parts]:
        noise = [damaged(random, parts) for _ in range(random.integers(4, 9))]
        hit = number in doomed or (transmission == 0 and random.random() < 0.1)
        return noise if hit else [*noise, parts]

    recording, accounting, hostile = recorded(200, damage)
    assert set(range(200)) - set(recording.sequences) == doomed
    assert recording.sequences == sorted(recording.sequences)
    assert accounting.dropped == {"gap": len(doomed)}
    assert sum(accounting.rejected.values()) >= 1000
    # Asked once for what is missing, not once for every bad message.
    resends = [x for x in hostile.heard if isinstance(x, m.Resend)]
    assert len(resends) < 100


def test_an_oversize_message_breaks_the_connection_and_loses_one_frame() -> None:
    huge = bytes(6 << 20)

    def damage(number: int, _: int, parts: Parts) -> list[Parts]:
        return [[parts[0], huge]] if number == 4 else [parts]

    recording, accounting, _ = recorded(12, damage, max_frame_mb=1)
    assert recording.sequences == [n for n in range(12) if n != 4]
    assert recording.gaps[0].first == 4
    assert accounting.dropped == {"gap": 1}
    assert accounting.rejected["disconnected"] >= 2


def test_noise_on_the_control_socket_disturbs_no_recorder() -> None:
    random = np.random.default_rng(3)
    hostile = HostilePublisher(30, lambda _n, _t, parts: [parts])
    hostile.control_noise = [random.bytes(n % 60) for n in range(200)]
    endpoints = dict(zip(("frames", "control"), hostile.endpoints, strict=True))
    with (
        Background(hostile.run),
        receiving(make_config(**endpoints)) as (receiver, accounting),
    ):
        assert record(receiver).sequences == list(range(30))
        assert set(accounting.rejected) <= {"malformed", "version"}


def test_a_frame_of_another_form_ends_the_series_and_keeps_what_came() -> None:
    def damage(number: int, _: int, parts: Parts) -> list[Parts]:
        if number != 5:
            return [parts]
        header = make_header(5, shape=(4, 4))
        return [[m.pack(header), bytes(32)]]

    hostile = HostilePublisher(10, damage)
    endpoints = dict(zip(("frames", "control"), hostile.endpoints, strict=True))
    with Background(hostile.run):
        with receiving(make_config(**endpoints)) as (receiver, accounting):
            recording = record(receiver)
            assert recording.sequences == [0, 1, 2, 3, 4]
            assert receiver.end is not None
            assert "frame 5 is (4, 4) <u2" in receiver.end.reason
            assert accounting.in_error == {"form": 1}
            assert holds_identity(accounting, recording)


def test_a_publisher_that_vanishes_is_an_error_after_what_came() -> None:
    hostile = HostilePublisher(1000, lambda _n, _t, parts: [parts])
    endpoints = dict(zip(("frames", "control"), hostile.endpoints, strict=True))
    recording = Recording()
    with (
        Background(hostile.run),
        receiving(make_config(**endpoints, stall_timeout_s=1.5, slots=4)) as (
            receiver,
            accounting,
        ),
    ):
        arrivals = receiver.frames()
        for _ in range(4):
            slot = next(arrivals)
            assert not isinstance(slot, Gap)
            recording.sequences.append(slot.frame().sequence)
        hostile.stop()
        with pytest.raises(TransportError, match="publisher is lost"):
            next(arrivals)
        assert receiver.end is not None
        assert "publisher is lost" in receiver.end.reason
        assert holds_identity(accounting, recording)


def test_a_series_that_cannot_be_received_is_refused_at_once() -> None:
    series = make_series(dtype="|O")
    hostile = HostilePublisher(1, lambda _n, _t, parts: [parts], series)
    endpoints = dict(zip(("frames", "control"), hostile.endpoints, strict=True))
    with Background(hostile.run):
        with (
            receiving(make_config(**endpoints), None) as (receiver, _),
            pytest.raises(TransportError, match="dtype="),
        ):
            receiver.wait_series()
        hostile.stop()


def test_rubbish_to_the_publisher_disturbs_no_recorder() -> None:
    random = np.random.default_rng(4)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with FramePublisher(make_config()) as publisher:
        frames, control = publisher.endpoints
        rogue = context.socket(zmq.DEALER)
        rogue.connect(control)
        raw = []
        for endpoint in (frames, control):
            address = urlsplit(endpoint)
            raw.append(socket.create_connection((address.hostname, address.port)))

        def act() -> None:
            publisher.start(make_series())
            for first in range(0, 100, 10):
                publish(publisher, 10, first)
                for _ in range(100):
                    rogue.send_multipart(
                        [random.bytes(random.integers(80))] * random.integers(1, 3)
                    )
                for connection in raw:
                    connection.send(random.bytes(500))
            publisher.end("completed")

        with Background(act), receiving(facing(publisher)) as (receiver, _):
            recording = record(receiver)
        assert recording.sequences == list(range(100))
        until(
            lambda: publisher._loop.rejections.counts["malformed"] >= 1000,
            "all rubbish to be counted",
        )
        # It was told what is wrong.
        assert rogue.poll(1000)
        answer = m.unpack_from_publisher(rogue.recv())
        assert isinstance(answer, m.Complaint)
        for connection in raw:
            connection.close()
        context.destroy(linger=0)


class TestCurve:
    def test_the_right_keys_are_let_in(self, tmp_path: Path) -> None:
        keys = create_keys(tmp_path / "keys")
        with FramePublisher(make_config(curve_keys=keys)) as publisher:

            def act() -> None:
                publisher.start(make_series())
                publish(publisher, 20)
                publisher.end("completed")

            config = facing(publisher, curve_keys=keys)
            with Background(act), receiving(config) as (receiver, _):
                assert record(receiver).sequences == list(range(20))

    def test_a_key_that_is_not_in_the_list_is_refused(self, tmp_path: Path) -> None:
        keys, others = (create_keys(tmp_path / name) for name in ("ours", "theirs"))
        # The stranger knows the server's public key; it is no secret.
        (others / "server.key").write_bytes((keys / "server.key").read_bytes())
        with FramePublisher(make_config(curve_keys=keys)) as publisher:
            config = facing(publisher, curve_keys=others)
            with (
                receiving(config, None) as (receiver, _),
                pytest.raises(TransportError, match=r"copy client\.key"),
            ):
                receiver.wait_series()

    @pytest.mark.parametrize("own", [True, False])
    def test_clear_text_and_the_wrong_server_get_no_answer(
        self, tmp_path: Path, own: bool
    ) -> None:
        keys, others = (create_keys(tmp_path / name) for name in ("ours", "theirs"))
        waiting = make_config(curve_keys=keys, connect_timeout_s=0.4)
        with FramePublisher(waiting) as publisher:
            used = others if own else None
            config = facing(publisher, curve_keys=used, connect_timeout_s=0.4)
            with receiving(config, None) as (receiver, _):
                with pytest.raises(TransportError, match="curve_keys of both sides"):
                    receiver.wait_series()
                with pytest.raises(TransportError, match="same config and curve_keys"):
                    publisher.start(make_series())

    def test_a_preview_is_shown_to_those_who_are_listed_alone(
        self, tmp_path: Path
    ) -> None:
        keys, others = (create_keys(tmp_path / name) for name in ("ours", "theirs"))
        # Each side has its own secret alone.
        (keys / "server.key_secret").unlink()
        # The stranger knows the processor's public key; it is no secret.
        stranger = tmp_path / "stranger"
        shutil.copytree(others, stranger)
        (stranger / "client.key").write_bytes((keys / "client.key").read_bytes())
        config = PreviewConfig(endpoint="tcp://127.0.0.1:*", interval_s=1e-6)
        preview = PreviewPublisher(config, curve_keys=keys)
        assert preview.endpoint is not None
        with (
            PreviewViewer(preview.endpoint, stranger) as refused,
            PreviewViewer(preview.endpoint) as clear,
            PreviewViewer(preview.endpoint, keys) as listed,
        ):

            def is_seen() -> bool:
                preview.offer(np.zeros((4, 4), "u1"), None, {})
                return listed.newest(0.01) is not None

            until(is_seen, "a preview")
            for _ in range(20):
                is_seen()
            assert refused.newest(0.05) is None
            assert clear.newest(0.05) is None
        preview.close()

    def test_each_side_needs_its_own_secret_alone(self, tmp_path: Path) -> None:
        keys = create_keys(tmp_path / "keys")
        scope, gpu = tmp_path / "scope", tmp_path / "gpu"
        for folder, names in (
            (scope, ("server.key_secret", "clients/client.key")),
            (gpu, ("client.key_secret", "server.key")),
        ):
            (folder / "clients").mkdir(parents=True)
            for name in names:
                shutil.copy(keys / name, folder / name)
        with FramePublisher(make_config(curve_keys=scope)) as publisher:

            def act() -> None:
                publisher.start(make_series())
                publish(publisher, 5)
                publisher.end("completed")

            config = facing(publisher, curve_keys=gpu)
            preview = PreviewPublisher(
                PreviewConfig(endpoint="tcp://127.0.0.1:*"), curve_keys=gpu
            )
            with Background(act), receiving(config) as (receiver, _):
                assert record(receiver).sequences == list(range(5))
            preview.close()

    def test_an_open_endpoint_is_fine_with_keys(self, tmp_path: Path) -> None:
        keys = create_keys(tmp_path / "keys")
        config = make_config(
            frames="tcp://0.0.0.0:*", control="tcp://0.0.0.0:*", curve_keys=keys
        )
        with FramePublisher(config) as publisher:
            assert all(e.startswith("tcp://0.0.0.0:") for e in publisher.endpoints)

    def test_an_open_endpoint_without_keys_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="insecure: true"):
            FramePublisher(make_config(control="tcp://0.0.0.0:*"))

    def test_keys_are_never_replaced(self, tmp_path: Path) -> None:
        create_keys(tmp_path)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*.key*")}
        with pytest.raises(OutputError, match="already holds"):
            create_keys(tmp_path)
        (tmp_path / "server.key_secret").unlink()
        with pytest.raises(OutputError, match="already holds"):
            create_keys(tmp_path)
        assert all(
            path.read_bytes() == content
            for path, content in before.items()
            if path.name != "server.key_secret"
        )

    def test_nobody_else_can_read_them(self, tmp_path: Path) -> None:
        keys = create_keys(tmp_path / "keys")
        if os.name == "posix":
            assert keys.stat().st_mode & 0o077 == 0
            for secret in keys.glob("*.key_secret"):
                assert secret.stat().st_mode & 0o077 == 0
        taken = tmp_path / "file"
        taken.write_text("x", "utf-8")
        with pytest.raises(OutputError, match="cannot write keys"):
            create_keys(taken / "keys")

    def test_missing_keys_name_the_file_and_the_remedy(self, tmp_path: Path) -> None:
        (tmp_path / "clients").mkdir()
        with pytest.raises(ConfigError, match="client"):
            FramePublisher(make_config(curve_keys=tmp_path))
        with (
            pytest.raises(ConfigError, match="rtfocus keys"),
            receiving(
                make_config(
                    curve_keys=tmp_path,
                    frames="tcp://127.0.0.1:9",
                    control="tcp://127.0.0.1:9",
                ),
                None,
            ),
        ):
            pass
