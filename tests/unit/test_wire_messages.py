"""Messages of the wire protocol: what is packed comes back, the rest is refused."""

import msgspec
import numpy as np
import pytest
from transport_kit import make_estimate, make_header, make_series

from rtfocus.channel import Aberrations, Channel, OpticalSystem
from rtfocus.errors import ProtocolError, TransportError
from rtfocus.frame import Position, Role, SeriesEnd
from rtfocus.transport import messages as m
from rtfocus.transport.dialogue import check_welcome
from rtfocus.transport.messages import (
    DTYPES,
    check_estimate,
    check_header,
    most_lost,
    pixel_bytes,
)

MOST_BYTES = 256_000_000
NAN, INF = float("nan"), float("inf")


FROM_RECORDER = [
    m.Hello(version=1, role="recorder", uid="u"),
    m.Progress(uid="u", series_uid="s", credit_upto=9, received_upto=3, durable_upto=1),
    m.Resend(uid="u", series_uid="s", sequence=4, attempt=2),
    m.Ended(uid="u", series_uid="s"),
    m.Leave(uid="u", series_uid="s", reason="closed"),
    make_estimate(7),
]
FROM_PUBLISHER = [
    m.Welcome(
        version=1,
        uid="u",
        topic="s/u/",
        start=make_series(
            channels=[
                Channel(
                    "DAPI",
                    OpticalSystem(0.5, 451, 0.65, aberrations=Aberrations(0.3)),
                )
            ],
            positions=[Position("B03", 1.5, -2.5, "B", "03", 1)],
            mda_sequence={"channels": ["DAPI"], "time_plan": {"loops": 3}},
        ),
    ),
    m.Waiting(version=1),
    m.Refused(uid="u", code="occupied", reason="there is one"),
    m.Ping(version=1, series_uid="s", sent_upto=3, attempt=1),
    m.RawOnly(series_uid="s", reason="slow"),
    m.Abandon(series_uid="s", frames_sent=3, reason="stall"),
    m.Complaint(reason="what?"),
]
IN_STREAM = [
    make_header(3, role=Role.FOCUS, z_um=1.5, frame_meta={"camera": "x"}),
    SeriesEnd(version=1, series_uid="s", frames_sent=3, reason="completed"),
    m.Ping(version=1, series_uid="s", sent_upto=3, attempt=1),
    m.Rewind(version=1, series_uid="s", sequence=3, attempt=1),
]


@pytest.mark.parametrize(
    ("unpack", "messages"),
    [
        (m.unpack_from_recorder, FROM_RECORDER),
        (m.unpack_from_publisher, FROM_PUBLISHER),
        (m.unpack_in_stream, IN_STREAM),
    ],
)
def test_every_message_comes_back_as_it_was(unpack, messages) -> None:
    assert [unpack(m.pack(message)) for message in messages] == messages


def test_unknown_keys_are_ignored() -> None:
    data = msgspec.msgpack.encode(
        {"type": "hello", "version": 1, "role": "recorder", "uid": "u", "later": [1]}
    )
    assert m.unpack_from_recorder(data) == FROM_RECORDER[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "hello", "version": 2, "role": "recorder", "uid": "u"},
        {"type": "hello", "version": 2, "whatever": True},
        {"type": "salute", "version": 2},
    ],
)
def test_another_version_is_named_with_the_remedy(fields) -> None:
    with pytest.raises(ProtocolError, match=r"version 2.*same rtfocus") as caught:
        m.unpack_from_recorder(msgspec.msgpack.encode(fields))
    assert caught.value.reason == "version"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x80",
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"type": "progress", "uid": "u"}),
        msgspec.msgpack.encode({"type": "ended", "uid": 3, "series_uid": "s"}),
        b"\x91" * 4000,
        m.pack(FROM_RECORDER[0])[:-2],
    ],
)
def test_a_malformed_message_is_a_protocol_error(data) -> None:
    with pytest.raises(ProtocolError) as caught:
        m.unpack_from_recorder(data)
    assert caught.value.reason == "malformed"


def test_damaged_messages_are_refused_or_still_messages() -> None:
    random = np.random.default_rng(5)
    packed = [m.pack(message) for message in IN_STREAM]
    refused = 0
    for _ in range(3000):
        data = bytearray(packed[random.integers(len(packed))])
        for place in random.integers(len(data), size=random.integers(1, 4)):
            data[place] = random.integers(256)
        try:
            message = m.unpack_in_stream(bytes(data))
        except ProtocolError:
            refused += 1
        else:
            assert isinstance(message, m.InStream)
    assert 1000 < refused < 3000


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"shape": (4,)}, "shape="),
        ({"shape": (4, 4, 4)}, "shape="),
        ({"shape": (0, 4)}, "shape="),
        ({"dtype": "|O"}, "dtype="),
        ({"dtype": ">u2"}, "dtype="),
        ({"channels": []}, "channels"),
        ({"positions": []}, "positions"),
        ({"pixel_size_um": 0.0}, "pixel_size_um"),
        ({"pixel_size_um": float("nan")}, "pixel_size_um"),
        ({"sizes": {"y": 3}}, "sizes"),
        ({"series_uid": ""}, "series_uid"),
        ({"shape": (2**32, 2**32)}, "more than transport.max_frame_mb=256"),
        ({"sizes": {"t": 0}}, "sizes.*>= 1"),
        ({"sizes": {"t": -5}}, "sizes.*>= 1"),
        ({"sizes": {"t": 2**62}}, "sizes.*places"),
        ({"sizes": {"t": 3, "z": None}}, "only t may be without an end, not z"),
        ({"sizes": {"t": 3, "c": 2}}, "sizes.*channels has 1 entries"),
        ({"channels": [Channel("a")] * 2, "sizes": {"c": 2}}, "'a' is there twice"),
        ({"channels": [Channel(str(n)) for n in range(5000)]}, "5000 entries"),
        ({"pixel_size_um": INF}, "pixel_size_um"),
        ({"z_step_um": 0.0}, "z_step_um"),
        ({"z_step_um": NAN}, "z_step_um"),
        ({"interval_s": NAN}, "interval_s"),
        ({"bit_depth": -3}, "bit_depth"),
        ({"bit_depth": 10**9}, "bit_depth"),
        ({"planned": -1}, "planned"),
        ({"planned": 2**62}, "planned"),
        ({"started_ns": -(2**63)}, "started_ns"),
        ({"started_ns": 2**64 - 1}, "started_ns"),
        ({"positions": [Position("here", NAN)]}, r"positions\[0\].x_um"),
        ({"positions": [Position("here", field=-7)]}, r"positions\[0\].field"),
        ({"summary": {"a": msgspec.msgpack.Ext(5, b"")}}, "summary.*JSON"),
        ({"mda_sequence": {"metadata": {(1, 2): 3}}}, "mda_sequence.*JSON"),
    ],
)
def test_a_series_that_cannot_be_received_names_the_field(fault, named) -> None:
    check_welcome("topic", make_series(), MOST_BYTES)
    with pytest.raises(TransportError, match=named):
        check_welcome("topic", make_series(**fault), MOST_BYTES)


def test_a_series_that_uses_every_axis_and_says_everything_is_received() -> None:
    channels = [Channel("a"), Channel("b")]
    positions = [Position("here", field=1, x_um=0.0), Position("there", y_um=-1e5)]
    series = make_series(
        shape=(24, 32, 3),
        dtype="|u1",
        sizes={"t": 4, "p": 2, "c": 2, "z": 5},
        channels=channels,
        positions=positions,
        z_step_um=0.3,
        interval_s=0.0,
        bit_depth=8,
        planned=80,
        started_ns=0,
    )
    check_welcome("topic", series, 24 * 32 * 3)
    most = [Channel(str(number)) for number in range(256)]
    check_welcome("topic", make_series(channels=most, sizes={"c": 256}), MOST_BYTES)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"numerical_aperture": 0.0}, "numerical_aperture"),
        ({"numerical_aperture": 1.2}, "not below refractive_index"),
        ({"numerical_aperture": NAN}, "numerical_aperture"),
        ({"wavelength_nm": -451.0}, "wavelength_nm"),
        ({"wavelength_nm": INF}, "wavelength_nm"),
        ({"wavelength_nm": 1e30}, "wavelength_nm"),
        ({"pixel_size_um": 1e-9}, "pixel_size_um"),
        ({"aberrations": {"spherical_waves": 1e30}}, "spherical"),
        ({"aberrations": {"spherical_waves": NAN}}, "spherical"),
    ],
)
def test_optics_that_no_microscope_has_end_the_series_by_name(fault, named) -> None:
    good = {"numerical_aperture": 0.5, "wavelength_nm": 451.0, "pixel_size_um": 0.5}
    welcome = msgspec.to_builtins(m.Welcome(1, "mine", "topic", make_series()))
    welcome["start"]["channels"] = [{"name": "DAPI", "optics": good}]
    m.unpack_from_publisher(msgspec.msgpack.encode(welcome))
    welcome["start"]["channels"][0]["optics"] = good | fault
    with pytest.raises(TransportError, match=f"cannot be received.*{named}"):
        m.unpack_from_publisher(msgspec.msgpack.encode(welcome))
    # What is no series at all is noise, and ends nothing.
    welcome["start"]["channels"] = "DAPI"
    with pytest.raises(ProtocolError):
        m.unpack_from_publisher(msgspec.msgpack.encode(welcome))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"series_uid": "other"}, "series"),
        ({"sequence": -1}, "malformed"),
        ({"event_index": -1}, "malformed"),
        ({"index": {"t": -1}}, "index"),
        ({"index": {"t": 0, "c": 1}}, "index"),
        ({"index": {"t": 0, "z": 3}}, "index"),
        ({"index": {"y": 0}}, "index"),
        ({"index": {"t": 2**36}}, "range"),
        ({"event_index": 10**9}, "range"),
        ({"captured_ns": 2**64 - 1}, "range"),
        ({"captured_ns": -5}, "range"),
        ({"camera_image_number": 2**64 - 1}, "range"),
        ({"exposure_ms": NAN}, "range"),
        ({"exposure_ms": -1.0}, "range"),
        ({"z_um": INF}, "range"),
        ({"z_offset_um": NAN}, "range"),
        ({"planned_s": NAN}, "range"),
        ({"actual_s": -INF}, "range"),
    ],
)
def test_a_header_outside_its_series_is_refused(fault, reason) -> None:
    series = make_series(sizes={"t": None, "z": 3})
    check_header(make_header(5, index={"t": 70000, "z": 2}, exposure_ms=0.0), series)
    header = msgspec.structs.replace(make_header(5), **fault)
    with pytest.raises(ProtocolError) as caught:
        check_header(header, series)
    assert caught.value.reason == reason


def test_what_a_series_without_limits_would_mean_is_bounded_by_its_plan() -> None:
    assert most_lost(make_series(sizes={"t": 30})) < 5000
    # Every place, and a probe of autofocus before each.
    assert most_lost(make_series(sizes={"t": 100_000})) > 200_000
    assert most_lost(make_series(sizes={"t": None})) == 2**20
    assert most_lost(make_series(sizes={"t": 2**36})) < 2**37


@pytest.mark.parametrize(
    "fault",
    [
        {"sequence": -1},
        {"sequence": 2**64 - 1},
        {"captured_ns": 2**64 - 1},
        {"defocus_um": NAN},
        {"z_um": INF},
        {"confidence": 1e9},
        {"foreground": -1.0},
    ],
)
def test_nobody_focuses_by_an_estimate_that_is_no_number(fault) -> None:
    check_estimate(make_estimate(3))
    with pytest.raises(ProtocolError, match="estimate of frame"):
        check_estimate(msgspec.structs.replace(make_estimate(3), **fault))


def test_an_empty_topic_would_subscribe_to_everything() -> None:
    with pytest.raises(TransportError, match="topic is empty"):
        check_welcome("", make_series(), MOST_BYTES)


def test_what_a_peer_says_does_a_terminal_no_harm() -> None:
    said = m.printable("a\x1b[31mb\n\0" + "c" * 1000)
    assert said.startswith("a?[31mb??ccc")
    assert said.isprintable()
    assert len(said) < 500


def test_pixel_bytes_follow_shape_and_dtype() -> None:
    sizes = [pixel_bytes(make_header(0, shape=(3, 5, 3), dtype=d)) for d in DTYPES]
    assert sizes == [45 * np.dtype(d).itemsize for d in DTYPES]
    for fault in ({"dtype": "|O"}, {"shape": ()}, {"shape": (3, -5)}):
        with pytest.raises(ProtocolError):
            pixel_bytes(make_header(0, **fault))
