"""Which search of a plan holds for which of its events, and how far places are off."""

import pytest
import useq
from hypothesis import given, settings
from hypothesis import strategies as st

from rtfocus.autofocus.plans import (
    DEVICE,
    PlacesFound,
    asking_for_focus,
    beside_held,
    is_autofocus,
    reference_um,
)

AF = useq.AxesBasedAF(
    axes=("p",), autofocus_device_name=DEVICE, autofocus_motor_offset=2.0
)


def events_of(axes: tuple[str, ...]) -> list[useq.MDAEvent]:
    """Return the events of two positions with two tiles each."""
    return list(
        useq.MDASequence(
            autofocus_plan=AF.model_copy(update={"axes": axes}),
            stage_positions=[(0, 0, 1), (900, 0, 1)],
            grid_plan={"rows": 1, "columns": 2, "fov_width": 9, "fov_height": 9},
            channels=["DAPI"],
            axis_order="tpgc",
        )
    )


def test_the_search_of_a_position_holds_for_its_tiles_alone() -> None:
    asks, first, second, asks_beside, beside, _ = events_of(("p",))
    found = PlacesFound()
    assert found.holding_for(first) is None
    assert found.search(asks) == (0, 0)
    for event in (first, second):
        assert found.holding_for(event) == (0, 0)
    assert found.holding_for(beside) is None
    found.search(asks_beside)
    assert found.holding_for(beside) == (1, 0)
    assert found.holding_for(first) == (0, 0)


def test_a_tile_with_a_search_of_its_own_is_not_that_of_the_newest() -> None:
    asks, _, second, *_ = events_of(("p",))
    found = PlacesFound()
    found.search(asks)
    found.unfocused.add((0, 1))
    assert found.holding_for(second) == (0, 1)


def test_a_search_once_a_time_point_holds_for_all_positions() -> None:
    events = events_of(("t",))
    found = PlacesFound()
    found.search(events[0])
    assert {found.holding_for(event) for event in events} == {(0, 0)}


def test_the_motor_offset_is_of_images_and_not_of_those_that_tell_focus() -> None:
    asks, first, *_, beside = events_of(("p",))
    assert is_autofocus(asks)
    found = PlacesFound()
    found.search(asks)
    found.add((0, 0), 0.5)
    found.add((0, 0), 0.25)
    assert found.found_um(asks) == 0.75
    assert found.found_um(first) == 2.75
    assert found.found_um(beside) == 0.0


heights = st.integers(-40, 40).map(lambda quarters: quarters / 4)
stacks = st.one_of(
    st.builds(dict, range=st.integers(1, 4), step=st.just(1)),
    st.builds(dict, above=st.integers(0, 3), below=st.integers(0, 3), step=st.just(1)),
    st.just({"relative": [-2, 1.5, 4]}),
)


@settings(max_examples=60)
@given(
    stack=stacks,
    own=st.none() | stacks,
    offset_um=heights,
    axes=st.sampled_from(["p", "t", "tp", "z", "c"]),
    order=st.sampled_from(["tpcz", "tpzc", "ptzc"]),
)
def test_all_events_of_a_stack_have_the_planned_z_of_their_place(
    stack, own, offset_um, axes, order
) -> None:
    # Within a stack of a position's own useq itself asks for focus at its start alone.
    own = None if axes in "zc" else own
    second = {"z": 19.5, "sequence": {"z_plan": own} if own else None}
    sequence = useq.MDASequence(
        autofocus_plan=AF.model_copy(update={"axes": tuple(axes)}),
        time_plan={"interval": 0, "loops": 2},
        stage_positions=[{"z": 10.5}, second],
        channels=["DAPI", {"config": "Cy5", "z_offset": offset_um, "do_stack": False}],
        z_plan=stack,
        axis_order=order,
    )
    events = list(sequence)
    assert {is_autofocus(event) for event in events} == {True, False}
    for event in events:
        planned_um = (10.5, 19.5)[event.index["p"]]
        assert reference_um(event) == pytest.approx(planned_um)
        if is_autofocus(event):
            continue
        asked = asking_for_focus(event)
        assert is_autofocus(asked)
        assert reference_um(asked) == pytest.approx(planned_um)
        slice_um = event.z_pos - planned_um
        assert beside_held(event, 50.0).z_pos == pytest.approx(50.0 + slice_um)
