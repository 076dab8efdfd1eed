"""OME-XML: what is written is read again, whatever a position or channel is called."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.images.ome_xml import OmeImage, OmeMetadata, read_ome_xml, write_ome_xml
from rtfocus.images.series import ImageChannel, StagePosition, writable_text

TEXT = st.text(st.characters(), max_size=12)
LENGTH = st.none() | st.floats(1e-6, 1e6)
PLACE = st.none() | st.floats(-1e7, 1e7)
NUMBERS = st.sampled_from(["", "x", "nan", "-1", "0", "1e400", "1e9", "7", "9" * 400])

CHANNELS = st.lists(
    st.builds(
        ImageChannel,
        name=st.none() | TEXT,
        color=st.none() | st.integers(0, 0xFFFFFF).map("{:06X}".format),
        emission_nm=LENGTH,
        excitation_nm=LENGTH,
    ),
    min_size=1,
    max_size=3,
).map(tuple)


@st.composite
def ome_images(draw: st.DrawFn) -> OmeImage:
    """Draw an image with facts, some of them unknown."""
    channels = draw(CHANNELS)
    stage = draw(st.none() | st.builds(StagePosition, PLACE, PLACE, PLACE))
    sizes = {axis: draw(st.integers(1, 99)) for axis in "tzyx"}
    return OmeImage(
        name=draw(TEXT),
        sizes=sizes | {"c": len(channels)},
        facts={
            "pixel_size_y_um": draw(LENGTH),
            "pixel_size_x_um": draw(LENGTH),
            "z_step_um": draw(LENGTH),
            "time_step_s": draw(LENGTH),
            "position": draw(st.none() | TEXT),
            "stage": stage,
            "channels": channels,
        },
    )


def near(number: float | None) -> object:
    """Return what equals a number but for the digits that a conversion leaves."""
    return number if number is None else pytest.approx(number, rel=1e-8, abs=1e-9)


@given(
    st.lists(ome_images(), min_size=1, max_size=3),
    st.sampled_from("|u1 <u2 <f4".split()),
)
def test_what_is_written_is_read_again(images, kind) -> None:
    found = read_ome_xml(write_ome_xml([(one, np.dtype(kind)) for one in images]))
    assert len(found.images) == len(images)
    for one, read in zip(images, found.images, strict=True):
        facts, again = one.facts, read.facts
        assert (read.name, read.sizes) == (writable_text(one.name), one.sizes)
        for name in ("pixel_size_y_um", "pixel_size_x_um", "z_step_um", "time_step_s"):
            assert again[name] == near(facts[name]), name
        position = facts["position"]
        assert again.get("position") == (position and writable_text(position))
        for channel, seen in zip(facts["channels"], again["channels"], strict=True):
            assert (seen.name, seen.color) == (channel.name, channel.color)
            assert seen.emission_nm == near(channel.emission_nm)
            assert seen.excitation_nm == near(channel.excitation_nm)
        stage = facts["stage"] or StagePosition()
        seen_stage = again["stage"] or StagePosition()
        for axis in ("x_um", "y_um", "z_um"):
            assert getattr(seen_stage, axis) == near(getattr(stage, axis)), axis


@given(ome_images(), st.sampled_from(['"1"', '"0"', "µm", "Size", "</"]), NUMBERS)
def test_what_is_damaged_is_metadata_or_a_value_error(image, what, instead) -> None:
    text = write_ome_xml([(image, np.dtype("<u2"))]).decode()
    with suppress(ValueError):
        assert isinstance(
            read_ome_xml(text.replace(what, f'"{instead}"').encode()), OmeMetadata
        )


def plate_xml(wells, size: str = "") -> str:
    """OME-XML of a plate whose n-th well, a row and a column, holds image n."""
    inside = "".join(
        f'<Well Row="{row}" Column="{column}"><WellSample><ImageRef ID="Image:{n}"/>'
        "</WellSample></Well>"
        for n, (row, column) in enumerate(wells)
    )
    images = "".join(f'<Image ID="Image:{n}"><Pixels/></Image>' for n in range(5))
    return f"<OME><Plate {size}>{inside}</Plate>{images}</OME>"


def test_a_plate_without_a_size_is_as_large_as_its_wells_lie_apart() -> None:
    first, second, *rest = read_ome_xml(plate_xml([(0, 3), (5, 1)])).images
    for image, row, column in ((first, 0, 3), (second, 5, 1)):
        place = image.facts["place"]
        assert place is not None
        assert (place.row, place.column) == (row, column)
        assert place.rows == tuple("ABCDEF")
        assert place.columns == tuple("1234")
    assert [image.facts["place"] for image in rest] == [None] * 3
    larger = read_ome_xml(plate_xml([(0, 3)], 'Rows="8" Columns="12"')).images
    assert larger[0].facts["place"] is not None
    assert len(larger[0].facts["place"].columns) == 12


@pytest.mark.parametrize(
    ("wells", "size"),
    [
        ([(3, 3), (-1, 0)], ""),
        ([(0, -1), (3, 3)], ""),
        ([(0, 0)], 'Rows="1000000"'),
        ([(0, 10**6)], ""),
    ],
)
def test_a_plate_that_cannot_be_is_refused(wells, size) -> None:
    with pytest.raises(ValueError, match=r"a plate of .* is none"):
        read_ome_xml(plate_xml(wells, size))


def test_a_stage_label_says_where_planes_do_not() -> None:
    label = '<StageLabel Name="B" X="2" XUnit="mm" Y="-5" YUnit="µm"/>'
    for plane, x_um in (("", 2000), ('<Plane PositionX="7" PositionXUnit="µm"/>', 7)):
        xml = f"<OME><Image><Pixels>{plane}</Pixels>{label}</Image></OME>"
        (image,) = read_ome_xml(xml).images
        stage = image.facts["stage"]
        assert stage is not None
        assert stage.x_um == x_um
        assert stage.y_um == (None if plane else -5)
        assert image.facts["position"] == "B"


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), NUMBERS, NUMBERS)
def test_a_plate_has_the_wells_it_names_or_is_refused(wells, rows, columns) -> None:
    xml = plate_xml(wells, f'Rows="{rows}" Columns="{columns}"')
    try:
        found = read_ome_xml(xml).images
    except ValueError:
        return
    assert found[4].facts["place"] is None
    for one, (row, column) in zip(found, wells, strict=False):
        place = one.facts["place"]
        assert place is not None
        assert (place.row, place.column) == (int(row), int(column))
        assert len(place.rows) > place.row >= 0
        assert len(place.columns) > place.column >= 0
        assert len(set(place.rows)) == len(place.rows)
