"""Places of frames in the plan, and of frames that never came."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import useq
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.channel import Channel
from rtfocus.errors import WriterError
from rtfocus.frame import Position, SeriesStart
from rtfocus.writers.places import (
    MOST_SAMPLED,
    FrameSample,
    GapFinder,
    Missing,
    Plan,
    Planned,
    TakenPlaces,
    complete,
    position_paths,
    thinned,
)


def series(
    sizes: dict[str, int | None], mda_sequence: dict[str, Any] | None = None
) -> SeriesStart:
    return SeriesStart(
        version=1,
        series_uid="u",
        name="n",
        started_ns=0,
        shape=(4, 4),
        dtype="<u2",
        sizes=sizes,
        channels=[Channel(str(i)) for i in range(sizes.get("c") or 1)],
        positions=[Position(str(i)) for i in range(sizes.get("p") or 1)],
        pixel_size_um=1.0,
        mda_sequence=mda_sequence,
    )


def planned(sizes: dict[str, int]) -> list[Planned]:
    """All frames of a regular plan, in order."""
    places = product(*(range(size) for size in sizes.values()))
    return [
        Planned(i, complete(dict(zip(sizes, place, strict=True))))
        for i, place in enumerate(places)
    ]


def walk(finder: GapFinder, frames: list[Planned], lost: set[int]) -> list[Missing]:
    """Send the frames that are not lost; return what was found missing."""
    found = []
    for sequence, frame in enumerate(frames):
        if sequence in lost:
            finder.lose(sequence, 1, "gap")
        else:
            found += finder.arrive(frame)
    return found + finder.end()


plans = st.permutations("tpcz").flatmap(
    lambda axes: st.fixed_dictionaries({axis: st.integers(1, 4) for axis in axes})
)


@given(sizes=plans, data=st.data())
def test_every_lost_frame_is_found_at_its_place(
    sizes: dict[str, int], data: st.DataObject
) -> None:
    frames = planned(sizes)
    # One frame must come, or nothing says that the plan was followed.
    most = len(frames) - 1
    lost = data.draw(st.sets(st.integers(0, len(frames) - 1), max_size=most))
    found = walk(GapFinder(Plan(series(dict(sizes)))), frames, lost)
    assert [m.sequence for m in found] == sorted(lost)
    assert [m.index for m in found] == [frames[i].index for i in sorted(lost)]


@given(sizes=plans)
def test_flat_numbers_are_unique_and_places_are_taken_once(
    sizes: dict[str, int],
) -> None:
    plan = Plan(series(dict(sizes)))
    taken = TakenPlaces(plan)
    for frame in planned(sizes):
        assert frame.index not in taken
        taken.take(frame.index)
        assert frame.index in taken


def test_frames_without_a_plan_are_placed_between_their_neighbours() -> None:
    finder = GapFinder(Plan(series({"t": None, "c": 2})))
    finder.arrive(Planned(None, complete({"t": 0, "c": 1})))
    finder.lose(2, 3, "gap")
    found = finder.arrive(Planned(None, complete({"t": 2, "c": 1})))
    places = [(m.index["t"], m.index["c"]) for m in found if m.index]
    assert places == [(1, 0), (1, 1), (2, 0)]


def test_an_irregular_plan_is_followed_by_its_useq_sequence() -> None:
    """Channel b is taken at every second time point only."""
    sequence = useq.MDASequence(
        time_plan={"interval": 0, "loops": 4},
        channels=["a", {"config": "b", "acquire_every": 2}],
    )
    plan = series({"t": 4, "c": 2}, sequence.model_dump(mode="json"))
    events = [complete(dict(event.index)) for event in sequence]
    frames = [Planned(i, index) for i, index in enumerate(events)]
    assert len(frames) == 6
    found = walk(GapFinder(Plan(plan)), frames, {3, 4})
    assert [m.index for m in found] == [events[3], events[4]]


def test_a_gap_told_early_gets_its_place_from_the_next_frame() -> None:
    frames = planned({"t": 6})
    finder = GapFinder(Plan(series({"t": 6})))
    finder.arrive(frames[0])
    finder.lose(1, 1, "gap")
    assert finder.postpone() == [Missing(1, None, "gap")]
    assert finder.postpone() == []
    finder.lose(2, 1, "corrupt")
    found = finder.arrive(frames[4])
    assert found == [
        Missing(None, frames[1].index, "gap"),
        Missing(2, frames[2].index, "corrupt"),
        Missing(None, frames[3].index, "not sent"),
    ]


def test_places_told_at_the_end_are_not_told_again() -> None:
    frames = planned({"t": 6})
    finder = GapFinder(Plan(series({"t": 6})))
    finder.arrive(frames[0])
    finder.lose(1, 2, "gap")
    assert [m.index for m in finder.end()] == [frames[1].index, frames[2].index]
    assert finder.arrive(frames[3]) == []


def test_a_lost_probe_leaves_no_hole() -> None:
    """Events 0 and 1 are neighbours, so the frame lost between had no place."""
    frames = planned({"t": 3})
    finder = GapFinder(Plan(series({"t": 3})))
    finder.arrive(frames[0])
    finder.lose(1, 1, "gap")
    assert finder.arrive(frames[1]) == [Missing(1, None, "gap")]


def test_a_frame_that_the_sender_never_had_is_missing_too() -> None:
    frames = planned({"t": 4})
    finder = GapFinder(Plan(series({"t": 4})))
    finder.arrive(frames[0])
    found = finder.arrive(frames[3])
    assert [(m.sequence, m.reason) for m in found] == [(None, "not sent")] * 2
    assert [m.index for m in found] == [frames[1].index, frames[2].index]


def test_a_place_that_cannot_be_known_is_not_guessed() -> None:
    """The neighbours follow no order that the plan knows."""
    finder = GapFinder(Plan(series({"t": 4, "c": 2})))
    finder.arrive(Planned(0, complete({"t": 3, "c": 1})))
    finder.lose(1, 1, "gap")
    found = finder.arrive(Planned(2, complete({"t": 0, "c": 0})))
    assert found == [Missing(1, None, "gap")]


@pytest.mark.parametrize(
    ("index", "inside"),
    [({"t": 1}, True), ({"t": 2}, False), ({"t": -1}, False), ({"z": 1}, False)],
)
def test_only_planned_places_are_contained(index: dict[str, int], inside: bool) -> None:
    assert Plan(series({"t": 2})).contains(complete(index)) is inside


@pytest.mark.parametrize(
    "plan",
    [
        {"time_plan": {"interval": 0, "loops": 10**12}, "channels": ["0"]},
        {"time_plan": {"interval": 0, "duration": 1e12}},
        {"time_plan": [{"interval": 0, "loops": 10**12}, {"interval": 1, "loops": 3}]},
        {"z_plan": {"range": 1e9, "step": 1e-6}},
        {"grid_plan": {"rows": 10**9, "columns": 10**9}},
        {"stage_positions": [{"sequence": {"z_plan": {"top": 1e9, "bottom": 0.0}}}]},
        {"axis_order": "qq", "x": [1]},
        {"z_plan": {"range": float("nan"), "step": 1}},
    ],
)
@pytest.mark.parametrize("length", [None, 100])
def test_a_plan_that_nobody_can_expand_leaves_a_gap_without_a_place(
    plan: dict[str, Any], length: int | None
) -> None:
    finder = GapFinder(Plan(series({"t": length, "c": 1}, plan)))
    finder.arrive(Planned(0, complete({"t": 0})))
    finder.lose(1, 1, "gap")
    # A rank that the regular order does not explain: the plan would be asked.
    found = finder.arrive(Planned(17, complete({"t": 2})))
    assert found == [Missing(1, None, "gap")]


def test_a_frame_that_names_a_place_absurdly_far_on_costs_no_time() -> None:
    finder = GapFinder(Plan(series({"t": None, "p": 4, "z": 10})))
    finder.arrive(Planned(0, complete({"t": 0})))
    finder.lose(1, 2, "gap")
    after = Planned(40 * 10**9, complete({"t": 10**9}))
    assert finder.arrive(after) == [Missing(1, None, "gap"), Missing(2, None, "gap")]
    assert finder.arrive(Planned(40 * 10**9 + 1, complete({"t": 10**9, "z": 1}))) == []


@pytest.mark.parametrize("frames", [1, 8, 9, 150, 1000])
def test_a_sample_is_spread_over_all_frames_and_keeps_values_of_its_own(
    frames: int,
) -> None:
    known, unknown = FrameSample(), FrameSample()
    plane = np.empty((300, 200), np.float32)
    for t in range(frames):
        plane[...] = t  # as a slot that is used again
        plane[0, 0] = np.nan
        for sample, pixels in ((known, {"raw": plane}), (unknown, {})):
            sample.note(["raw", "restored"], complete({"t": t}), pixels)
    times = [index["t"] for index, _ in known.frames("raw", 0)]
    assert min(frames, MOST_SAMPLED // 2) <= len(times) <= MOST_SAMPLED
    assert len(set(np.diff(times))) <= 1, "not evenly spread"
    assert frames - 1 - times[-1] < max(frames / (len(times) - 0.5), 1)
    for index, values in known.frames("raw", 0):
        assert values is not None
        assert set(values.tolist()) == {index["t"]}
        assert values.size == thinned(plane).size
    for image, sample in (("restored", known), ("raw", unknown)):
        assert sample.frames(image, 0) == [(complete({"t": t}), None) for t in times]


def in_wells(*wells: str) -> list[Position]:
    places = [well.split("/") for well in wells]
    return [
        Position(row + column + field, None, None, row, column, int(field))
        for row, column, field in places
    ]


def test_wells_have_a_folder_each_on_every_file_system() -> None:
    assert position_paths(in_wells("A/01/0", "A/01/1", "B/01/0")) == [
        "A/01/0",
        "A/01/1",
        "B/01/0",
    ]
    for twice in (["A/01/0", "a/01/0"], ["A/01/0", "a/02/0"], ["A/x/0", "A/X/1"]):
        with pytest.raises(WriterError, match="case makes no difference"):
            position_paths(in_wells(*twice))
    with pytest.raises(WriterError, match=r"no folders called \['CON'\]"):
        position_paths(in_wells("A/01/0", "CON/01/0"))


@given(sizes=plans, endless=st.booleans(), data=st.data())
def test_rank_and_place_undo_each_other_in_the_order_of_acquisition(
    sizes: dict[str, int], endless: bool, data: st.DataObject
) -> None:
    frames = planned(sizes)
    plan = Plan(series({**sizes, "t": None} if endless else dict(sizes)))
    assert plan.places == plan.images == (None if endless else len(frames))
    first = next(iter(sizes))
    for frame in data.draw(st.lists(st.sampled_from(frames), min_size=1, max_size=8)):
        if endless and first != "t":
            # Its rank would grow with a length that nobody knows: dense in t it is.
            assert plan.rank(frame.index) == plan.flat(frame.index)
        else:
            assert plan.rank(frame.index) == frame.event_index
            assert plan.place(plan.rank(frame.index)) == frame.index
    assert plan.place(-1) is None
    if not endless:
        assert plan.place(len(frames)) is None


@given(
    every=st.integers(1, 4), skipped=st.sampled_from([0, 1]), loops=st.integers(1, 5)
)
def test_a_plan_that_leaves_places_out_ranks_those_it_has_without_holes(
    every: int, skipped: int, loops: int
) -> None:
    sequence = useq.MDASequence(
        time_plan={"interval": 0, "loops": loops},
        z_plan={"range": 2, "step": 1},
        channels=[
            "a",
            {"config": "b", "acquire_every": every, "do_stack": not skipped},
        ],
    )
    places = [complete(dict(event.index)) for event in sequence]
    sizes = {"t": loops, "c": 2, "z": 3}
    plan = Plan(series(sizes, sequence.model_dump(mode="json")))
    assert [plan.rank(place) for place in places] == list(range(len(places)))
    assert [plan.place(rank) for rank in range(len(places))] == places
    assert plan.place(len(places)) is None
    assert plan.images is None, "the sender states how many"
    for frame in planned(sizes):
        if frame.index not in places:
            assert plan.rank(frame.index) == plan.flat(frame.index)
