"""Plans: every image of a useq plan has one place, whatever the plan looks like."""

import json
from typing import Any

import pytest
import useq
import yaml

from rtfocus.errors import ConfigError
from rtfocus.microscope.acquisition import anchored
from rtfocus.microscope.plan import image_events, lay_out, sequence_json
from rtfocus.microscope.sequence import read_sequence
from rtfocus.microscope.series import with_field_of_view

STACK = {"range": 2.0, "step": 1.0}
ROI = {"offset_x": 4, "offset_y": 8, "width": 32, "height": 24}
TILES = {"rows": 1, "columns": 2}
EVERY = {"acquire_every": 2}
ONE, MANY = {"interval": 1, "loops": 1}, {"interval": 0, "loops": 10**9}
DEEP: dict[str, Any] = {}
for _ in range(600):
    DEEP = {"deeper": DEEP}


def test_regular_plan_is_numbered_in_acquisition_order():
    sequence = read_sequence(
        {
            "axis_order": "tpcz",
            "time_plan": {"interval": 2, "loops": 2},
            "stage_positions": [{"x": 0, "y": 1}, {"x": 5, "y": 6, "name": "b"}],
            "channels": ["DAPI", "FITC"],
            "z_plan": STACK,
        }
    )
    plan = lay_out(sequence)
    assert plan.sizes == {"t": 2, "p": 2, "c": 2, "z": 3}
    assert list(plan.sizes) == ["t", "p", "c", "z"]
    assert len(plan) == 24
    assert plan.index(0) == {"t": 0, "p": 0, "c": 0, "z": 0}
    assert plan.index(4) == {"t": 0, "p": 0, "c": 1, "z": 1}
    assert plan.index(23) == {"t": 1, "p": 1, "c": 1, "z": 2}
    assert [p.name for p in plan.positions] == ["p0", "b"]
    assert (plan.positions[1].x_um, plan.positions[1].y_um) == (5, 6)
    assert plan.channel_names == ["DAPI", "FITC"]
    assert plan.z_offsets_um[:3].tolist() == [-1, 0, 1]
    assert (plan.z_step_um, plan.interval_s) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("plan", "step_um"),
    [
        ({"z_plan": {"absolute": [0, 0.3, 0.6, 0.9]}}, 0.3),
        ({"z_plan": {"absolute": [0, 1, 5, 7.5]}}, None),
        ({"z_plan": {"top": 4, "bottom": 0, "step": 2, "go_up": False}}, 2.0),
        (
            {
                "z_plan": STACK,
                "stage_positions": [
                    {"x": 0},
                    {"x": 1, "sequence": {"z_plan": {"range": 4, "step": 2}}},
                ],
            },
            None,
        ),
        ({"z_plan": {"relative": [0]}}, None),
    ],
)
def test_slices_have_one_distance_or_none(plan, step_um):
    sequence = read_sequence({"channels": ["DAPI"], **plan})
    assert lay_out(sequence).z_step_um == step_um


@pytest.mark.parametrize(
    ("phases", "interval_s", "is_timed"),
    [
        ([{"interval": 5, "loops": 3}, {"interval": 60, "loops": 2}], None, True),
        ([{"interval": 5, "loops": 3}, {"interval": 5, "duration": 20}], 5.0, True),
        ([{"interval": 5, "loops": 3}, {"interval": 60, "loops": 1}], 5.0, True),
        ([{"interval": 0, "loops": 3}, {"interval": 60, "loops": 2}], None, True),
        ([{"interval": 0, "loops": 3}], None, False),
    ],
)
def test_time_points_have_one_interval_or_none(phases, interval_s, is_timed):
    plan = lay_out(read_sequence({"channels": ["DAPI"], "time_plan": phases}))
    assert (plan.interval_s, plan.is_timed) == (interval_s, is_timed)


def test_an_interval_of_a_position_of_its_own_counts_too():
    own = {"x": 1, "sequence": {"time_plan": {"interval": 9, "loops": 2}}}
    plan = {"channels": ["DAPI"], "time_plan": {"interval": 5, "loops": 2}}
    plan["stage_positions"] = [{"x": 0}]
    assert lay_out(read_sequence(plan)).interval_s == 5.0
    plan["stage_positions"] = [own]
    assert lay_out(read_sequence({**plan, "time_plan": None})).interval_s == 9.0


def test_axis_order_of_the_plan_is_kept():
    sequence = read_sequence(
        {
            "axis_order": "tpzc",
            "time_plan": {"interval": 0, "loops": 1},
            "channels": ["DAPI", "FITC"],
            "z_plan": STACK,
        }
    )
    plan = lay_out(sequence)
    assert list(plan.sizes) == ["t", "p", "z", "c"]
    assert plan.index(1) == {"t": 0, "p": 0, "c": 1, "z": 0}


def test_grids_of_positions_become_positions():
    grid = {"rows": 1, "columns": 2, "fov_width": 10, "fov_height": 10}
    sequence = read_sequence(
        {
            "stage_positions": [
                {"x": 1, "y": 2, "name": "a", "sequence": {"grid_plan": grid}},
                {"x": 50, "y": 60},
            ],
            "channels": ["DAPI", "FITC"],
        }
    )
    plan = lay_out(sequence)
    assert plan.sizes["p"] == 3
    assert [p.name for p in plan.positions] == ["a_g0", "a_g1", "p1"]
    assert [p.x_um for p in plan.positions] == [-4, 6, 50]
    assert len({tuple(place) for place in plan.places.tolist()}) == len(plan) == 6


def test_plates_name_row_column_and_field():
    sequence = read_sequence(
        {
            "stage_positions": {
                "plate": "96-well",
                "a1_center_xy": [0, 0],
                "selected_wells": [[1, 2], [2, 11]],
                "well_points_plan": {
                    "rows": 1,
                    "columns": 2,
                    "fov_width": 1,
                    "fov_height": 1,
                },
            },
            "z_plan": STACK,
        }
    )
    plan = lay_out(sequence)
    wells = [(p.plate_row, p.plate_column, p.field) for p in plan.positions]
    assert wells == [("B", "03", 0), ("B", "03", 1), ("C", "12", 0), ("C", "12", 1)]


def test_skipped_images_leave_holes_not_shifts():
    sequence = read_sequence(
        {
            "axis_order": "tcz",
            "time_plan": {"interval": 0, "loops": 3},
            "channels": [
                {"config": "DAPI"},
                {"config": "FITC", "acquire_every": 2, "do_stack": False},
            ],
            "z_plan": STACK,
        }
    )
    plan = lay_out(sequence)
    fitc = plan.places[plan.places[:, 2] == 1]
    assert fitc.tolist() == [[0, 0, 1, 1], [2, 0, 1, 1]]
    assert len(plan) == 9 + 2


def test_absolute_stacks_are_measured_from_their_middle():
    plan = lay_out(read_sequence({"z_plan": {"top": 14, "bottom": 10, "step": 2}}))
    assert plan.z_offsets_um.tolist() == [-2, 0, 2]


def test_relative_stacks_start_where_the_stage_is():
    sequence = read_sequence({"z_plan": STACK, "channels": ["DAPI"]})
    heights = [event.z_pos for event in anchored(sequence, 40.0)]
    assert heights == [39, 40, 41]
    given = read_sequence({"z_plan": STACK, "stage_positions": [{"z": 3}, {"x": 1}]})
    heights = [event.z_pos for event in anchored(given, 40.0)]
    assert heights == [2, 3, 4, 39, 40, 41]
    sent = read_sequence({"z_plan": STACK, "setup": {"z_pos": 60}})
    assert [event.z_pos for event in anchored(sent, 40.0)] == [59, 60, 61]


def test_autofocus_events_are_no_images():
    sequence = useq.MDASequence(
        time_plan={"interval": 0, "loops": 2},
        stage_positions=[(0, 0), (1, 1)],
        autofocus_plan={"autofocus_motor_offset": 25, "axes": ("p",)},
    )
    assert len(list(sequence)) > 4
    assert len(lay_out(sequence)) == 4


@pytest.mark.parametrize("channels", [["A", "B"], ["A", {"config": "B", **EVERY}]])
@pytest.mark.parametrize("order", ["tpgcz", "ptgzc"])
def test_the_time_points_of_a_plan_are_laid_out_like_each_event(channels, order):
    sequence = read_sequence(
        {
            "time_plan": {"interval": 0.5, "loops": 5},
            "stage_positions": [{"x": 0, "z": 1}, {"x": 1, "z": 1}],
            "channels": channels,
            "z_plan": STACK,
            "axis_order": order,
        }
    )
    plan, events = lay_out(sequence), list(sequence)
    axes = [[event.index[axis] for axis in "tpcz"] for event in events]
    assert plan.places.tolist() == axes
    assert plan.z_offsets_um.tolist() == [event.z_pos - 1 for event in events]
    assert plan.interval_s == 0.5


@pytest.mark.parametrize("phases", [[10**6], [3, 10**6 - 3, 2]])
def test_a_million_images_are_laid_out_without_a_walk_through_them(phases):
    # Phases share the time points where they meet.
    plan = [{"interval": 1 + loops % 2, "loops": loops} for loops in phases]
    sequence = read_sequence({"time_plan": plan if len(plan) > 1 else plan[0]})
    assert lay_out(sequence).sizes["t"] == 10**6
    assert len(list(image_events(sequence))) == 2


def test_tiles_that_the_camera_divides_are_counted_once_it_is_known():
    sequence = read_sequence({"grid_plan": {"width": 1e6, "height": 1e6}})
    with pytest.raises(ConfigError, match="10,000,000,000 images"):
        with_field_of_view(sequence, 10, 10, 1.0)


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
def test_plans_are_read_from_files(tmp_path, dump):
    path = tmp_path / "plan.txt"
    path.write_text(dump({"channels": ["DAPI"], "z_plan": STACK}))
    assert len(lay_out(read_sequence(path))) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tme_plan": {"interval": 1, "loops": 2}}, "'acquisition.mda.tme_plan'"),
        (
            {"time_plan": {"interval": 1, "loops": 2, "lops": 3}},
            "'acquisition.mda.time_plan.lops'",
        ),
        ({"z_plan": {"range": "wide", "step": 1}}, "z_plan"),
        ({"time_plan": {"duration": 5, "interval": 0}}, "interval of more than 0"),
        ({"time_plan": {"loops": 10**30, "interval": 0}}, "more than 10,000,000"),
        ({"z_plan": {"range": 1e9, "step": 1e-6}}, "more than 10,000,000"),
        ({"grid_plan": {"rows": 10**5, "columns": 10**5}}, "more than 10,000,000"),
        (
            {"grid_plan": {"num_points": 10**8, "max_width": 9, "max_height": 9}},
            "more than 10,000,000",
        ),
        (
            {"stage_positions": [{"sequence": {"time_plan": [ONE, MANY]}}]},
            "more than 10,000,000",
        ),
        (
            {"grid_plan": {"rows": 10**3, "columns": 10**3}},
            "1,000,000 positions, tiles",
        ),
        (
            {
                "stage_positions": {
                    "plate": "96-well",
                    "a1_center_xy": [0, 0],
                    "selected_wells": [[0, 1], [0, 0]],
                    "well_points_plan": {"rows": 10**4, "columns": 10**4},
                }
            },
            "stage_positions has 200,000,000 points in wells",
        ),
        ({"metadata": DEEP, "channels": ["A"]}, "nested more than 64 deep"),
    ],
)
def test_faults_of_a_plan_are_named(given, said):
    with pytest.raises(ConfigError, match=said):
        read_sequence(given)


def test_a_missing_plan_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_sequence(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_a_stack_without_a_plane_is_refused(kind):
    plan = read_sequence({"z_plan": {kind: []}, "channels": ["A"]})
    with pytest.raises(ConfigError, match="names no height"):
        lay_out(plan)


@pytest.mark.parametrize(
    "setup",
    [
        {"z_pos": 60, "properties": [["Camera", "Binning", "2"]]},
        {"roi": ROI, "exposure": 5},
        {"channel": {"config": "DAPI", "group": "Channel"}, "x_pos": 1, "y_pos": 2},
    ],
)
def test_a_plan_that_is_kept_is_read_again(setup):
    sequence = read_sequence({"z_plan": STACK, "channels": ["DAPI"], "setup": setup})
    kept = json.loads(json.dumps(sequence_json(sequence)))
    again = useq.MDASequence.model_validate(kept)
    assert list(again) == list(sequence)
    assert again.setup == sequence.setup
    assert kept["z_plan"] == STACK


def test_a_plan_without_images_is_refused():
    with pytest.raises(ConfigError, match="takes no image"):
        lay_out(useq.MDASequence())


def test_a_plan_that_useq_cannot_walk_through_is_refused():
    sequence = read_sequence(
        {
            "z_plan": {"relative": [1]},
            "stage_positions": [{"z": 5, "sequence": {"z_plan": STACK}}],
            "autofocus_plan": {"axes": ["z"]},
        }
    )
    for walk in (lay_out, lambda plan: list(image_events(plan))):
        with pytest.raises(ConfigError, match="amid a z-stack of a position's own"):
            walk(sequence)


def test_two_images_at_one_place_are_refused():
    # The position's own plan counts its time points from 0 once more.
    film = {"time_plan": {"interval": 0, "loops": 2}}
    sequence = read_sequence(
        {
            "time_plan": {"interval": 0, "loops": 2},
            "stage_positions": [{"x": 0, "sequence": film}],
        }
    )
    with pytest.raises(ConfigError, match="two images at t=0 p=0"):
        lay_out(sequence)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"chanels": ["DAPI"]}, r"mda\.chanels'; did you mean 'channels'"),
        (
            {"channels": [{"config": "DAPI", "exposre": 123}]},
            r"mda\.channels\[0\]\.exposre'; did you mean 'exposure'",
        ),
        (
            {"channels": ["A", {"config": "B", "aquire_every": 2}]},
            r"channels\[1\]\.aquire_every'; did you mean 'acquire_every'",
        ),
        (
            {"stage_positions": [{"x": 0, "Z": 55}]},
            r"stage_positions\[0\]\.Z'; did you mean 'z'",
        ),
        (
            {"stage_positions": [{"z": 5, "sequence": {"z_plam": STACK}}]},
            r"stage_positions\[0\]\.sequence\.z_plam'; did you mean 'z_plan'",
        ),
        (
            {"time_plan": [{"interval": 1, "loops": 2, "intervall": 9}]},
            r"time_plan\[0\]\.intervall'; did you mean 'interval'",
        ),
        (
            {"time_plan": {"phases": [{"interval": 1, "loops": 2, "lops": 9}]}},
            r"time_plan\.phases\[0\]\.lops'; did you mean 'loops'",
        ),
        ({"time_plan": {"interval": 1, "lops": 9}}, r"lops'; did you mean 'loops'"),
        ({"z_plan": {**STACK, "go_upp": False}}, r"z_plan\.go_upp'; did you mean"),
        ({"grid_plan": {"rows": 2, "colums": 2}}, r"colums'; did you mean 'columns'"),
        (
            {"channels": ["A"], "autofocus_plan": {"axis": ["p"]}},
            r"autofocus_plan\.axis'; did you mean 'axes'",
        ),
        (
            {"setup": {"roi": {"width": 3, "heigth": 3}}, "channels": ["A"]},
            r"setup\.roi\.heigth'; did you mean 'height'",
        ),
        # A property of useq's models is no key.
        ({"stage_positions": [{"is_relative": True}]}, r"is_relative'; valid: x, y, z"),
        # Settings that useq or Micro-Manager would pass over.
        (
            {"channels": ["A", {"config": "B", "z_offset": 3}]},
            r"channels\[1\]\.z_offset=3 is ignored without a z_plan.*relative: \[0\]",
        ),
        ({"axis_order": "tc", "z_plan": STACK}, "z_plan is ignored because 'z' is not"),
        ({"channels": [{"config": "A", "camera": "B"}]}, "camera='B' is ignored"),
        ({"stage_positions": [{"plate_row": 1}]}, "only one of plate_row and plate"),
        (
            {"stage_positions": [{"plate_row": 1, "plate_col": 1}, {"x": 2}]},
            r"stage_positions\[1\] names no well",
        ),
        (
            {
                "grid_plan": {"top": 1, "left": 0, "bottom": 0, "right": 1},
                "stage_positions": [{"x": 5}],
            },
            "x=5.0, y=None is ignored",
        ),
        (
            {"channels": ["A"], "autofocus_plan": {"axes": ["p", "g"]}},
            "mda.autofocus_plan focuses whenever p or g changes, which is never: the "
            "plan has c",
        ),
        (
            {
                "channels": ["A"],
                "stage_positions": [
                    {"x": 1, "sequence": {"autofocus_plan": {"axes": ["z"]}}}
                ],
            },
            r"\[0\]\.sequence\.autofocus_plan focuses whenever z changes",
        ),
    ],
)
def test_what_would_be_passed_over_in_silence_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        read_sequence(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time_plan": {"interval": 1, "loops": 0}}, r"time_plan\.loops: .*\(got 0\)"),
        ({"time_plan": {"interval": 1}}, "time_plan lacks duration or loops"),
        (
            {"time_plan": [{"interval": 1, "loops": 2}, {"interval": 1, "loops": -2}]},
            r"time_plan\.phases\[1\]\.loops: .*\(got -2\)",
        ),
        ({"z_plan": {"range": 4}}, "z_plan lacks step"),
        ({"z_plan": {"top": 4}}, "z_plan lacks bottom and step"),
        ({"grid_plan": {"rows": 2, "columns": "a"}}, r"columns: .*\(got 'a'\)"),
    ],
)
def test_a_value_is_told_by_the_rules_of_the_kind_of_plan_that_was_meant(given, said):
    with pytest.raises(ConfigError, match=rf"{said}$"):
        read_sequence(given)


@pytest.mark.parametrize(
    "given",
    [
        {"metadata": {"exposre": {"x": 1}}, "channels": ["A"]},
        {"stage_positions": [{"x": 1, "row": 1, "col": 2}]},
        {"channels": [{"config": "A", "z_offset": 3}], "z_plan": {"relative": [0]}},
        {"time_plan": {"phases": [{"interval": 1, "loops": 2}]}, "z_plan": STACK},
        {"setup": {"properties": [["Camera", "Binning", "2"]]}, "channels": ["A"]},
        # Without a position a relative stack is taken at one.
        {"z_plan": STACK, "autofocus_plan": {"axes": ["p"]}},
        {
            "stage_positions": [{"x": 1, "sequence": {"grid_plan": TILES}}],
            "autofocus_plan": {"axes": ["g"]},
        },
    ],
)
def test_what_useq_follows_is_taken_and_left_as_it_was_given(given):
    before = json.dumps(given)
    assert len(lay_out(read_sequence(given))) > 0
    assert json.dumps(given) == before


def test_positions_that_name_their_well_are_fields_of_it():
    positions = [
        {"x": 0, "plate_row": 0, "plate_col": 0},
        {"x": 1, "plate_row": 27, "plate_col": 11},
        {"x": 2, "plate_row": 0, "plate_col": 0},
    ]
    grid = {"rows": 1, "columns": 2, "fov_width": 1, "fov_height": 1}
    plan = lay_out(read_sequence({"stage_positions": positions, "grid_plan": grid}))
    wells = [(p.plate_row, p.plate_column, p.field) for p in plan.positions]
    assert wells == [
        ("A", "01", 0),
        ("A", "01", 1),
        ("AB", "12", 0),
        ("AB", "12", 1),
        ("A", "01", 2),
        ("A", "01", 3),
    ]


def test_sites_have_names_of_their_own():
    names = ["same", "same", "same_1", "", "A/1", "x" * 300]
    positions = [{"x": x, "name": name} for x, name in enumerate(names)]
    found = [
        p.name for p in lay_out(read_sequence({"stage_positions": positions})).positions
    ]
    assert len(set(found)) == len(names)
    assert found[0] == "same"
    assert found[2:] == ["same_1_2", "p3", "A/1", "x" * 300]


def test_thousands_of_sites_are_laid_out_at_once():
    positions = [{"x": x, "name": f"site{x}"} for x in range(5000)]
    plan = lay_out(read_sequence({"stage_positions": positions}))
    assert [p.name for p in plan.positions] == [p["name"] for p in positions]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"z_plan": {"range": 4, "step": -1}}, r"z_plan\.step.*got -1"),
        ({"z_plan": {"range": 4, "step": 0}}, r"z_plan\.step"),
        ({"z_plan": {"relative": [0, float("nan")]}}, r"relative\.1.*finite"),
        ({"stage_positions": [[float("inf"), 0, 0]]}, r"stage_positions\.0\.0"),
        ({"time_plan": {"interval": -1, "loops": 3}}, r"interval.*at least 0"),
    ],
)
def test_numbers_that_no_microscope_can_follow_are_refused(plan, said):
    with pytest.raises(ConfigError, match=said):
        read_sequence(plan)
