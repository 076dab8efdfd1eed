"""What useq plans ask of focus, on one virtual microscope: which z every frame has."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import useq
import yaml
from loop_kit import OPTICS
from pymmcore_plus.mda import MDAEngine

from rtfocus.autofocus.planes import FocusCalibration
from rtfocus.autofocus.policy import save_calibration
from rtfocus.config import parse_config
from rtfocus.errors import MicroscopeError, TransportError
from rtfocus.focusing import FocusEngine, focus
from rtfocus.microscope.core import open_core
from rtfocus.microscope.series import Complaints

FOCUS_UM, TILT_UM = 4.0, 1.5
NEAR_UM = 0.5 * 0.451 / 0.36**2
"""Half a depth of field, which a search promises; every other plane is farther off."""
APART_UM, RISE_UM = 3 * 166.4, 3 * TILT_UM
"""Two fields, the plate rises from one to the other; two more lie between them."""
OFFSET_UM = 4.0
AF = {"axes": ["p"], "autofocus_device_name": "rtfocus"}
HERE, BESIDE = {"x": 0, "y": 0, "z": 1}, {"x": APART_UM, "y": 0, "z": 1}
DAPI, FITC = ({"config": name, "exposure": 5} for name in ("DAPI", "FITC"))


class Bench:
    """A core with our engine, and what its plans did."""

    def __init__(self, core: Any, engine: FocusEngine) -> None:
        self.core, self.engine = core, engine
        self.config = engine.focuser.config
        self.read = engine.focuser.read
        self.frames: list[tuple[useq.MDAEvent, dict[str, Any]]] = []
        self.snapped: list[tuple[float, str]] = []
        """z and channel of every image of a search."""

    def run(self, plan: dict[str, Any], **autofocus: Any) -> list[float]:
        """Run a plan, which has been YAML meanwhile; return the z of its frames."""
        core, focuser = self.core, self.engine.focuser
        focuser.config = self.config.model_copy(update=autofocus)
        focuser.journal.drain()
        self.frames.clear()
        self.snapped.clear()
        core.setZPosition(0.0)
        written = yaml.safe_dump(
            useq.MDASequence.model_validate(
                {"stage_positions": [HERE], "channels": [DAPI]} | plan
            ).model_dump(mode="json", exclude_unset=True)
        )
        core.mda.run(useq.MDASequence(**yaml.safe_load(written)))
        return [meta["position"]["z"] for _, meta in self.frames if "position" in meta]

    def searching(self, then: Callable[[int], None]) -> None:
        """Call `then` before an image of a search is read, with its number."""
        numbers = iter(range(100))

        def read(pixels: Any, channel: str, z_um: float) -> Any:
            self.snapped.append((z_um, channel))
            then(next(numbers))
            # Both have the same optics; a change of channel opens the engine anew.
            return self.read(pixels, "DAPI", z_um)

        self.engine.focuser.read = read

    def keep(self, _: Any, event: useq.MDAEvent, meta: dict[str, Any]) -> None:
        self.frames.append((event, meta))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    # With optics that are calibrated a search needs half as many images.
    calibration = tmp_path_factory.mktemp("calibrated") / "20x.yaml"
    save_calibration(
        calibration,
        FocusCalibration(
            channel="DAPI",
            focus_um=FOCUS_UM,
            sharpest_um=FOCUS_UM,
            unexplained=0.0,
            direction=1,
            direction_of_core=1,
            backlash_um=0.0,
            level_offset_um=0.0,
            level_scale=1.0,
            level_range_um=10.0,
            unit_um=0.451 / 0.36**2,
            problems=[],
        ),
    )
    config = parse_config(
        {
            "microscope": {
                "source": "virtual",
                "height_px": 256,
                "width_px": 256,
                "specimen": {"kind": "nuclei", "seed": 3},
                "surface": {"z_um": FOCUS_UM, "tilt_x_um": TILT_UM},
            },
            "camera": {"offset_counts": 100},
            "channels": [{"name": name, "optics": OPTICS} for name in ("DAPI", "FITC")],
            "processing": {"classifier": "delpnet", "threads": 1, "device": "cpu"},
            "autofocus": {"calibration": str(calibration)},
        }
    )
    with open_core(config) as core:
        before = core.mda.engine or MDAEngine(core)
        bench = Bench(core, focus(core, config))
        # z of frames within a hardware sequence too.
        bench.engine.include_frame_position_metadata = True
        core.snapImage()
        # Its threads are the module's, not a test's.
        bench.read(core.getImage(), "DAPI", 0.0)
        core.mda.events.frameReady.connect(bench.keep)
        try:
            yield bench
        finally:
            core.mda.events.frameReady.disconnect(bench.keep)
            bench.engine.close()
            core.mda.set_engine(before)


@pytest.fixture
def bench(opened: Bench) -> Bench:
    opened.searching(lambda _: None)
    return opened


def test_a_position_with_a_stack_of_its_own_is_focused_in_the_stack_s_middle(
    bench: Bench,
) -> None:
    own = {"z_plan": {"range": 4, "step": 2}, "autofocus_plan": AF}
    heights = bench.run({"stage_positions": [HERE | {"sequence": own}, BESIDE]})
    middle = heights[1]
    assert middle == pytest.approx(FOCUS_UM, abs=NEAR_UM)
    assert heights[:3] == pytest.approx([middle - 2, middle, middle + 2])
    # Nobody asked for focus at the other position.
    assert heights[3] == 1


def test_focus_once_a_position_holds_for_all_its_tiles(bench: Bench) -> None:
    tiles = {"rows": 1, "columns": 2, "fov_width": 50, "fov_height": 50}
    left, right = bench.run({"grid_plan": tiles, "autofocus_plan": AF})
    assert left == right == pytest.approx(FOCUS_UM, abs=NEAR_UM)


def test_focus_once_a_time_point_holds_for_all_positions(bench: Bench) -> None:
    heights = bench.run(
        {
            "time_plan": {"interval": 0, "loops": 2},
            "stage_positions": [HERE, BESIDE],
            "autofocus_plan": AF | {"axes": ["t"]},
        }
    )
    assert heights == pytest.approx(4 * [FOCUS_UM], abs=NEAR_UM)
    assert heights[0] == heights[1]
    assert heights[2] == heights[3]


def test_each_position_has_a_correction_of_its_own_also_without_a_z(
    bench: Bench,
) -> None:
    places = [{k: v for k, v in place.items() if k != "z"} for place in (HERE, BESIDE)]
    plan = {
        "axis_order": "ptc",
        "time_plan": {"interval": 0, "loops": 2},
        "stage_positions": places,
        "autofocus_plan": AF,
    }
    heights = bench.run(plan)
    focused = [FOCUS_UM, FOCUS_UM, FOCUS_UM + RISE_UM, FOCUS_UM + RISE_UM]
    assert heights == pytest.approx(focused, abs=NEAR_UM)


def test_without_a_z_focus_is_searched_where_the_plan_s_set_up_sends_the_stage(
    bench: Bench,
) -> None:
    bench.searching(lambda _: None)
    sent = {"z_pos": 6.5, "action": {"type": "custom", "name": "setup"}}
    plan = {"stage_positions": [{"x": 0, "y": 0}], "autofocus_plan": AF, "setup": sent}
    heights = bench.run(plan)
    assert bench.snapped[0][0] == pytest.approx(6.5)
    assert heights == pytest.approx([FOCUS_UM], abs=NEAR_UM)


def test_images_that_come_as_fast_as_they_can_are_in_focus_too(bench: Bench) -> None:
    # They are one hardware sequence at one z, of which pymmcore-plus says no place.
    plan = {
        "axis_order": "ptc",
        "time_plan": {"interval": 0, "loops": 3},
        "stage_positions": [HERE, BESIDE],
        "autofocus_plan": AF,
    }
    stood: list[float] = []

    def note(*_: Any) -> None:
        stood.append(bench.core.getZPosition())

    bench.core.mda.events.frameReady.connect(note)
    try:
        bench.run(plan)
    finally:
        bench.core.mda.events.frameReady.disconnect(note)
    assert len(stood) == 6
    assert all(meta["hardware_triggered"] for _, meta in bench.frames)
    focused = [FOCUS_UM] * 3 + [FOCUS_UM + RISE_UM] * 3
    assert stood == pytest.approx(focused, abs=NEAR_UM)


def test_a_channel_s_own_plane_stays_beside_focus(bench: Bench) -> None:
    plan = {
        "channels": [FITC | {"z_offset": OFFSET_UM}, DAPI],
        "z_plan": {"range": 2, "step": 2},
        "autofocus_plan": AF,
    }
    heights = bench.run(plan, focus_channel="DAPI")
    assert {channel for _, channel in bench.snapped} == {"DAPI"}
    planes = [FOCUS_UM - 1, FOCUS_UM + 1]
    beside = [z + OFFSET_UM for z in planes]
    assert heights == pytest.approx([*beside, *planes], abs=NEAR_UM)
    assert heights[:2] == pytest.approx([z + OFFSET_UM for z in heights[2:]])


def test_focus_at_every_channel_is_that_of_the_channel(bench: Bench) -> None:
    bench.run({"channels": [DAPI, FITC], "autofocus_plan": AF | {"axes": ["c"]}})
    assert [channel for _, channel in bench.snapped][0::-1] == ["DAPI"]
    assert bench.snapped[-1][1] == "FITC"


def test_a_motor_offset_lies_beside_focus_and_is_not_searched_again(
    bench: Bench,
) -> None:
    heights = bench.run(
        {
            "time_plan": {"interval": 0, "loops": 2},
            "autofocus_plan": AF | {"axes": ["t"], "autofocus_motor_offset": OFFSET_UM},
        }
    )
    assert heights == pytest.approx(2 * [FOCUS_UM + OFFSET_UM], abs=NEAR_UM)
    images = bench.frames[0][1]["extra"]["rtfocus"]["autofocus"]["images"]
    # The second search begins in focus.
    assert bench.snapped[images][0] == pytest.approx(FOCUS_UM, abs=NEAR_UM)


def test_a_plan_that_was_gone_through_before_asks_for_focus_all_the_same(
    bench: Bench,
) -> None:
    plan = useq.MDASequence(stage_positions=[HERE], channels=[DAPI], autofocus_plan=AF)
    bench.frames.clear()
    list(plan)
    bench.core.mda.run(plan)
    bench.core.mda.run(plan)
    heights = [meta["position"]["z"] for _, meta in bench.frames]
    assert heights == pytest.approx(2 * [FOCUS_UM], abs=NEAR_UM)


def test_places_of_the_plan_before_are_forgotten(bench: Bench) -> None:
    bench.run({"autofocus_plan": AF})
    far = {"stage_positions": [HERE | {"z": 30.0}], "autofocus_plan": AF}
    (height,) = bench.run(far, most_images=3, max_retries=1, reach_um=15.0)
    assert abs(height - 30) <= 15
    assert all(abs(z - 30) <= 15 for z, _ in bench.snapped)


@pytest.mark.parametrize(("retries", "images"), [(None, 6), (1, 2)])
def test_a_search_that_failed_is_tried_as_often_as_configured(
    bench: Bench, retries: int | None, images: int
) -> None:
    bench.run({"autofocus_plan": AF}, most_images=2, max_retries=retries)
    assert len(bench.snapped) == images


@pytest.mark.parametrize("on_failure", ["continue", "skip"])
def test_a_processor_that_is_gone_amid_a_search_leaves_the_best_z_that_was_seen(
    bench: Bench, on_failure: str
) -> None:
    def gone(number: int) -> None:
        if number == 3:
            msg = "the processor gave no estimate"
            raise TransportError(msg)

    bench.searching(gone)
    start = {"stage_positions": [HERE | {"z": 12}], "autofocus_plan": AF}
    complaints = Complaints()
    with complaints.heard():
        heights = bench.run(start, on_failure=on_failure, calibration=None)
    assert len(bench.snapped) == 4
    assert len(complaints.texts) == 1
    assert complaints.texts[0].endswith("the processor gave no estimate")
    if on_failure == "skip":
        assert heights == []
        lines = bench.engine.focuser.journal.drain()
        assert lines[-1]["reason"] == "the processor gave no estimate"
        return
    (height,) = heights
    seen = [z for z, _ in bench.snapped[:3]]
    assert any(height == pytest.approx(z) for z in seen)
    # Of places as far on either side, chance decides.
    assert abs(height - FOCUS_UM) <= min(abs(z - FOCUS_UM) for z in seen) + 1
    note = bench.frames[0][1]["extra"]["rtfocus"]["autofocus"]
    assert note == {"focused": False, "reason": "the processor gave no estimate"}


def test_a_cancel_amid_a_search_ends_it_before_its_next_image(bench: Bench) -> None:
    bench.searching(lambda number: number == 1 and bench.core.mda.cancel())
    assert bench.run({"autofocus_plan": AF}) == []
    assert len(bench.snapped) == 2
    assert bench.engine.focuser.journal.drain()[-1]["reason"] == "canceled"


def test_ctrl_c_amid_a_search_sets_everything_back_and_another_plan_runs(
    bench: Bench,
) -> None:
    def interrupt(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    bench.searching(interrupt)
    bench.core.setExposure(33.0)
    ended: list[Any] = []
    bench.core.mda.events.sequenceFinished.connect(ended.append)
    try:
        with pytest.raises(KeyboardInterrupt):
            bench.run({"autofocus_plan": AF})
    finally:
        bench.core.mda.events.sequenceFinished.disconnect(ended.append)
    assert len(ended) == 1
    assert bench.frames == []
    assert bench.core.getExposure() == 33.0
    assert bench.core.getZPosition() == 0.0
    bench.searching(lambda _: None)
    (height,) = bench.run({"autofocus_plan": AF})
    assert height == pytest.approx(FOCUS_UM, abs=NEAR_UM)


def test_live_mode_and_light_come_back_after_a_search(bench: Bench) -> None:
    core = bench.core

    def fail(number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt

    bench.searching(fail)
    core.setConfig("Channel", "FITC")
    core.startContinuousSequenceAcquisition()
    bench.engine.focuser.config = bench.config.model_copy(
        update={"focus_channel": "DAPI"}
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            bench.engine.focuser.focus()
        assert bench.snapped[0][1] == "DAPI"
        assert core.isSequenceRunning()
        assert core.getCurrentConfig("Channel") == "FITC"
    finally:
        core.stopSequenceAcquisition()
        core.setConfig("Channel", "DAPI")


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_whatever_is_closed_first_the_core_gets_back_what_it_had(
    order: tuple[int, ...],
) -> None:
    pytest.importorskip("mm_test_adapters")
    config = parse_config({"microscope": {"source": "democamera"}})
    with open_core(config) as core:
        before = MDAEngine(core)
        core.mda.set_engine(before)
        engines = [focus(core, config) for _ in range(3)]
        for number in order:
            assert core.mda.engine is not before
            engines[number].close()
            engines[number].close()
        assert core.mda.engine is before


DEMOCAMERA = {
    "microscope": {"source": "democamera"},
    "channels": [{"name": "DAPI", "optics": OPTICS}],
    "processing": {"classifier": "delpnet", "device": "cpu"},
}


def test_a_camera_of_floats_is_told_with_what_to_choose() -> None:
    pytest.importorskip("mm_test_adapters")
    config = parse_config(DEMOCAMERA)
    with open_core(config) as core:
        core.setProperty("Camera", "PixelType", "32bit")
        with (
            closing(focus(core, config)) as engine,
            pytest.raises(MicroscopeError, match="4 bytes; set its pixel type to 8"),
        ):
            engine.focuser.focus()


def test_what_a_script_chose_of_the_stock_engine_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("mm_test_adapters")
    config = parse_config(DEMOCAMERA)
    with open_core(config) as core:
        before = MDAEngine(core, use_hardware_sequencing=False, timeout_base=7.0)
        core.mda.set_engine(before)
        engine = focus(core, config)
        try:
            assert not engine.use_hardware_sequencing
            assert engine.timeout_base == 7.0
            # The hardware's own autofocus is the stock engine's, and its way is kept.
            core.fullFocus = lambda: core.setRelativePosition(2.0)
            frames: list[float] = []

            def keep(_: Any, __: useq.MDAEvent, meta: dict[str, Any]) -> None:
                frames.append(meta["position"]["z"])

            core.mda.events.frameReady.connect(keep)
            core.mda.run(
                useq.MDASequence(
                    stage_positions=[HERE],
                    z_plan={"range": 2, "step": 2},
                    autofocus_plan=AF | {"autofocus_device_name": "Autofocus"},
                )
            )
            core.mda.events.frameReady.disconnect(keep)
            assert frames == pytest.approx([2.0, 4.0])
        finally:
            engine.close()
            core.mda.set_engine(before)
