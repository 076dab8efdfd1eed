"""Preview messages: a viewer sees what was sent, or a ProtocolError, whatever came."""

from contextlib import suppress

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rtfocus.errors import ProtocolError
from rtfocus.frame import PROTOCOL_VERSION
from rtfocus.transport.messages import DTYPES
from rtfocus.transport.viewer import (
    Answer,
    PlaneHeader,
    Preview,
    PreviewHeader,
    PreviewStatus,
    Request,
    saturation_blocks,
    unpack_answer,
    unpack_preview,
    unpack_request,
)

SHAPES = arrays.array_shapes(min_dims=2, max_dims=3, min_side=0, max_side=5)
IMAGES = st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, SHAPES))
SIZES = st.one_of(st.integers(-3, 6), st.integers(-(2**63), 2**64 - 1))


def header(
    shape: tuple[int, ...], dtype: str, planes: tuple[PlaneHeader, ...] = ()
) -> PreviewHeader:
    """Return the header of a picture of which nothing else is known."""
    return PreviewHeader(PROTOCOL_VERSION, shape, dtype, 1, None, {}, planes=planes)


@given(IMAGES, st.lists(IMAGES, max_size=3))
def test_a_picture_comes_back_pixel_by_pixel(pixels, planes) -> None:
    named = tuple(
        PlaneHeader(f"plane {number}", plane.shape, plane.dtype.str)
        for number, plane in enumerate(planes)
    )
    head = header(pixels.shape, pixels.dtype.str, named)
    parts = [msgspec.msgpack.encode(head), *(a.tobytes() for a in (pixels, *planes))]
    # A part more: of a version to come.
    found = unpack_preview([*parts, b"later"])
    assert isinstance(found, Preview)
    assert found.header == head
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.pixels.dtype == pixels.dtype
    assert list(found.planes) == [plane.name for plane in named]
    for plane, shown in zip(planes, found.planes.values(), strict=True):
        np.testing.assert_array_equal(shown, plane)


@given(
    st.lists(SIZES, max_size=4).map(tuple),
    st.sampled_from((*DTYPES, "O", "<U4", "|V8", "nonsense", "")),
    st.binary(max_size=64),
)
def test_a_picture_is_as_its_header_says_or_is_refused(shape, dtype, data) -> None:
    for parts in (
        [msgspec.msgpack.encode(header(shape, dtype)), data],
        [
            msgspec.msgpack.encode(
                header((0, 0), "|u1", (PlaneHeader("restored", shape, dtype),))
            ),
            b"",
            data,
        ],
    ):
        try:
            found = unpack_preview(parts)
        except ProtocolError:
            continue
        assert isinstance(found, Preview)
        shown = found.planes.get("restored", found.pixels)
        assert (shown.shape, shown.dtype.str) == (shape, dtype)


@given(st.lists(st.binary(max_size=80), max_size=3), st.data())
def test_whatever_came_is_a_message_or_a_protocol_error(parts, data) -> None:
    good = [
        header((2, 3), "<u2"),
        PreviewStatus(PROTOCOL_VERSION, "running", folder="runs/a.rtfocus"),
        Request(PROTOCOL_VERSION, "uid", "stop"),
        Answer(False, "not allowed"),
    ]
    whole = msgspec.msgpack.encode(data.draw(st.sampled_from(good)))
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:place] + data.draw(st.binary(max_size=9)) + whole[place + 1 :]
    for tried in (parts, [damaged, *parts], [whole, *parts]):
        first = tried[0] if tried else b""
        for unpack in (
            lambda tried=tried: unpack_preview(tried),
            lambda first=first: unpack_request(first),
            lambda first=first: unpack_answer(first),
        ):
            with suppress(ProtocolError):
                found = unpack()
                assert isinstance(found, Preview | PreviewStatus | Request | Answer)


@pytest.mark.parametrize("what", ["delete", "", None, 3])
def test_nothing_but_what_a_viewer_may_ask_is_a_request(what) -> None:
    asked = {"type": "request", "version": 1, "series_uid": "uid", "what": what}
    with pytest.raises(ProtocolError, match="not a request"):
        unpack_request(msgspec.msgpack.encode(asked))


@given(
    st.sampled_from(["|u1", "<u2", "<i2", "<f4"]).flatmap(
        lambda dtype: arrays.arrays(
            dtype,
            st.tuples(st.integers(1, 300), st.integers(1, 5)),
            elements=st.integers(0, 100),
            fill=st.integers(0, 100),
        )
    ),
    st.floats(0.0, 120.0),
)
def test_every_saturated_pixel_lies_in_a_block_and_every_block_has_one(
    pixels, level
) -> None:
    number, blocks, block_px = saturation_blocks(pixels, level)
    high = pixels >= level
    assert number == int(high.sum())
    if blocks is None:
        assert number == 0
        return
    shown = np.kron(blocks, np.ones((block_px, block_px), np.uint8)).astype(bool)
    assert not (high & ~shown[: high.shape[0], : high.shape[1]]).any()
    rows, columns = np.nonzero(blocks)
    for row, column in zip(rows * block_px, columns * block_px, strict=True):
        assert high[row : row + block_px, column : column + block_px].any()
    assert max(blocks.shape) <= 128
