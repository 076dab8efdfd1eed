"""Which search of a plan holds for which of its events, and how far places are off."""

import useq

from rtfocus.autofocus.plans import DEVICE, PlacesFound, is_autofocus

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
