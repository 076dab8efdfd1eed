"""Pictures as they travel to a page."""

import struct

import numpy as np
import pytest
from view_kit import unpacked

from rtfocus.view.codec import (
    MAGIC,
    UNKNOWN,
    Picture,
    PicturePlane,
    PlaneKind,
    numbered,
    pack,
)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("<u2", (90, 70)), ("|u1", (64, 80)), ("<u2", (50, 60, 3))]
)
def test_a_picture_arrives_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    raw = rng.poisson(200, shape).astype(dtype)
    levels = np.array([[np.nan, -2.5], [0.0, 7.25]], np.float32)
    picture = Picture(
        planes=(
            PicturePlane(PlaneKind.RAW, raw, step=2),
            PicturePlane(PlaneKind.DEFOCUS, levels, 3, 4, 48, signed=True),
        ),
        shape=(shape[0] * 2, shape[1] * 2),
        index={"t": 7, "p": 1, "c": 2, "z": 3},
        sequence=41,
        z_um=None,
        captured_s=1.5,
        signed=True,
    )
    header, planes = unpacked(numbered(pack(picture), 12345))
    assert header[:2] == (MAGIC, 1)
    assert header[4:10] == (12345, 41, 7, 1, 2, 3)
    assert np.isnan(header[10])
    assert header[12] == UNKNOWN
    np.testing.assert_array_equal(planes[0][1], raw.astype("<u2"))
    np.testing.assert_array_equal(planes[1][1], levels)
    assert planes[1][0][9:] == (3, 4, 48, 1)


def test_floats_travel_to_within_a_65535th_of_their_range() -> None:
    values = np.linspace(-3, 11, 100 * 100, dtype=np.float32).reshape(100, 100)
    _, [(plane, stored)] = unpacked(
        pack(Picture((PicturePlane(PlaneKind.RESTORED, values),), values.shape, {}))
    )
    scale, offset = plane[7:9]
    np.testing.assert_allclose(stored * scale + offset, values, atol=14 / 65535)


def test_a_cut_off_header_is_no_picture() -> None:
    with pytest.raises(struct.error):
        unpacked(pack(Picture((), (4, 4), {}))[:70])
