"""A hardware focus device beside the images: left alone, or moved by its offset."""

from collections.abc import Iterator
from typing import Any

import pytest
import useq
from loop_kit import OPTICS
from pymmcore_plus.experimental.unicore import StageDevice
from pymmcore_plus.mda import MDAEngine

from rtfocus.autofocus.hold import Holder
from rtfocus.autofocus.policy import Limits
from rtfocus.config import Config, parse_config
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.focusing import focus
from rtfocus.microscope.core import open_core

adapters = pytest.importorskip("mm_test_adapters")

FOCUS_UM, UNIT_UM = 4.0, 0.451 / 0.36**2
HOLDER = "Autofocus"
PLAN = {
    "stage_positions": [{"x": 0, "y": 0, "z": 50}],
    "channels": [{"config": "DAPI", "exposure": 5}],
    "z_plan": {"range": 2, "step": 2},
    "autofocus_plan": {"axes": ["p"], "autofocus_device_name": "rtfocus"},
}


class HeldStage(StageDevice):
    """The offset of a device that holds focus: the z-drive follows it by itself."""

    def __init__(self, drive: Any) -> None:
        super().__init__()
        self._drive, self._offset = drive, 0.0
        self.sent: list[float] = []

    def set_position_um(self, val: float) -> None:
        self.sent.append(val)
        self._offset = val
        self._drive.set_position_um(2 * val)

    def get_position_um(self) -> float:
        return self._offset

    def home(self) -> None:
        self.set_position_um(0.0)

    def stop(self) -> None:
        pass

    def set_origin(self) -> None:
        raise NotImplementedError


def settings(source: str, **autofocus: Any) -> Config:
    virtual = {
        "source": "virtual",
        "height_px": 256,
        "width_px": 256,
        "specimen": {"kind": "nuclei", "seed": 3},
        "surface": {"z_um": FOCUS_UM},
    }
    return parse_config(
        {
            "microscope": virtual if source == "virtual" else {"source": source},
            "camera": {"offset_counts": 100},
            "channels": [{"name": "DAPI", "optics": OPTICS}],
            "processing": {"classifier": "delpnet", "threads": 1, "device": "cpu"},
            "autofocus": autofocus,
        }
    )


@pytest.fixture
def held() -> Iterator[tuple[Any, HeldStage]]:
    """The virtual microscope, its focus held by Micro-Manager's demo device."""
    with open_core(settings("virtual")) as core:
        folder = str(adapters.device_adapter_path())
        core.setDeviceAdapterSearchPaths([folder])
        core.loadDevice(HOLDER, "DemoCamera", "DAutoFocus")
        core.initializeDevice(HOLDER)
        core.setAutoFocusDevice(HOLDER)
        drive = core._pydevices[core.getFocusDevice()]
        offset = HeldStage(drive)
        core.loadPyDevice("Offset", offset)
        core.initializeDevice("Offset")
        core.enableContinuousFocus(True)
        yield core, offset


def test_the_offset_is_moved_in_place_of_the_stage_and_set_back(held) -> None:
    core, offset = held
    moves = {"actuator": "offset", "offset_device": "Offset", "offset_um_per_unit": 2}
    engine = focus(core, settings("virtual", **moves))
    ours: list[float] = []
    core.setZPosition = ours.append
    heights: list[float] = []

    def keep(_: Any, __: useq.MDAEvent, meta: dict[str, Any]) -> None:
        heights.append(core.getZPosition())
        verdicts.append(meta["extra"]["rtfocus"]["autofocus"])

    verdicts: list[dict[str, Any]] = []
    core.mda.events.frameReady.connect(keep)
    try:
        core.mda.run(useq.MDASequence(**PLAN))
    finally:
        core.mda.events.frameReady.disconnect(keep)
        engine.close()
        core.mda.set_engine(MDAEngine(core))
    assert ours == []
    assert heights == pytest.approx([FOCUS_UM - 1, FOCUS_UM + 1], abs=0.3 * UNIT_UM)
    assert heights[1] - heights[0] == pytest.approx(2)
    assert verdicts[0]["focused"]
    assert verdicts[0]["start_um"] == 0.0
    assert len(offset.sent) > 4
    assert offset.get_position_um() == 0.0


def test_what_the_hardware_holds_is_left_alone_and_said(held) -> None:
    core, offset = held
    engine = focus(core, settings("virtual"))
    try:
        with pytest.raises(MicroscopeError, match=r"'Autofocus' holds the focus"):
            engine.focuser.focus()
        core.enableContinuousFocus(False)
        engine.focuser.config = settings("virtual", actuator="offset").autofocus
        with pytest.raises(MicroscopeError, match="does not hold the focus"):
            engine.focuser.focus()
        core.enableContinuousFocus(True)
        engine.focuser.config = settings(
            "virtual", actuator="offset", offset_device="PFSOffset"
        ).autofocus
        with pytest.raises(ConfigError, match=r"'PFSOffset' is not loaded"):
            engine.focuser.focus()
    finally:
        engine.close()
        core.mda.set_engine(MDAEngine(core))
    assert offset.sent == []
    assert core.getZPosition() == 0.0


def test_a_plan_that_holds_searches_anew_what_the_hardware_held(held) -> None:
    core, offset = held
    engine = focus(core, settings("virtual", mode="hold"))
    focuser, sites = engine.focuser, (0.0, 40.0)
    models = focuser.models("DAPI")
    rule = focuser.move_rule(models.unit_um, Limits(-50.0, 50.0))
    engine.holder = holder = Holder(models, rule)
    heights: list[float] = []
    lines: list[dict[str, Any]] = []

    def keep(_: Any, event: useq.MDAEvent, meta: dict[str, Any]) -> None:
        heights.append(core.getZPosition())
        lines.extend(meta["extra"]["rtfocus"].get("focus_log", []))
        if event.index["p"] == 1 and event.index["t"] < 2:
            # From the second time point on, and until the third.
            core.enableContinuousFocus(event.index["t"] == 0)

    plan = useq.MDASequence(
        time_plan={"interval": 0, "loops": 3},
        stage_positions=[{"x": x, "y": 0, "z": 0} for x in sites],
        channels=[{"config": "DAPI", "exposure": 5}],
    )
    core.enableContinuousFocus(False)
    core.mda.events.frameReady.connect(keep)
    try:
        core.mda.run(plan)
    finally:
        core.mda.events.frameReady.disconnect(keep)
        engine.close()
        core.mda.set_engine(MDAEngine(core))
    searched = [line for line in lines if line["kind"] == "verdict"]
    assert [line["p"] for line in searched] == [0, 1, 0, 1]
    assert all(line["focused"] for line in searched)
    assert [holder.knows((p, None)) for p in (0, 1)] == [True, True]
    found = [*heights[:2], *heights[4:]]
    assert found == pytest.approx([FOCUS_UM] * 4, abs=0.6 * UNIT_UM)
    assert offset.sent == []


def test_the_core_s_own_offset_is_moved_within_its_limits(held) -> None:
    del held
    limits = {"low_um": -6, "high_um": 6}
    config = settings(
        "democamera", actuator="offset", most_images=3, max_retries=1, **limits
    )
    with open_core(config) as core:
        engine = focus(core, config)
        core.enableContinuousFocus(True)
        core.setAutoFocusOffset(2.0)
        sent: list[float] = []
        moves: list[float] = []
        set_offset = core.setAutoFocusOffset

        def note(units: float) -> None:
            sent.append(units)
            set_offset(units)

        core.setAutoFocusOffset = note
        core.setZPosition = moves.append
        try:
            verdict = engine.focuser.focus()
        finally:
            engine.close()
            core.mda.set_engine(MDAEngine(core))
    assert verdict.start_um == 2.0
    assert sent
    assert all(-6 <= units <= 6 for units in sent)
    assert moves == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": "hold", "actuator": "offset"}, "the hardware holds focus already"),
        ({"offset_um_per_unit": 0}, "moves nothing"),
    ],
)
def test_what_contradicts_itself_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings("virtual", **wrong)
