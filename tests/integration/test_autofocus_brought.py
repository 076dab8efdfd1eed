"""A search that an installed package brings, on the virtual microscope's core."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loop_kit import OPTICS
from pydantic import TypeAdapter

from rtfocus.autofocus.appearance import amplitude_spectrum
from rtfocus.autofocus.execution import BroughtSearch
from rtfocus.autofocus.focuser import Focuser
from rtfocus.autofocus.planes import FocusCalibration
from rtfocus.autofocus.policy import (
    Decision,
    GiveUp,
    Limits,
    MoveRule,
    save_calibration,
)
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config import parse_config
from rtfocus.config.model import AutofocusConfig
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.frame import FocusReading
from rtfocus.microscope.core import open_core

SYSTEM = OpticalSystem(
    **{**OPTICS, "aberrations": Aberrations(**OPTICS["aberrations"])}
)
FOCUS_UM = 4.0
SEARCHES = '''
from types import SimpleNamespace

import numpy as np

from rtfocus.autofocus.policy import GiveUp, Move, Probe, Stay
from rtfocus.autofocus.appearance import sharpness

tasks = []


def climber(task):
    """Climbs by depths of field while images get sharper, then steps back."""
    tasks.append(task)
    best = [None]

    def decide(z_um, reading):
        now = sharpness(np.array(reading.spectrum))
        step = task.optics.defocus_unit_um
        if best[0] == "back":
            return Stay()
        if best[0] is not None and now < best[0]:
            best[0] = "back"
            return Move(-step)
        best[0] = now
        return Probe(step)

    return decide


def far(task):
    return lambda z_um, reading: Move(1e9)


def odd(task):
    return lambda z_um, reading: "up a little"


def similar(task):
    return lambda z_um, reading: SimpleNamespace(dz_um=1.0)


def broken(task):
    return lambda z_um, reading: 1 / 0
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    (site / "their_stage").mkdir(parents=True)
    (site / "their_stage" / "__init__.py").write_text("")
    (site / "their_stage" / "searches.py").write_text(SEARCHES)
    info = site / "their_stage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-lab\n")
    page = (Path(__file__).parents[2] / "docs/reference/python.md").read_text("utf-8")
    (shown,) = re.findall(r"```python\n(# my_lab/focus.py.*?)```", page, re.DOTALL)
    (site / "their_stage" / "focus.py").write_text(shown)
    names = ("climber", "far", "odd", "similar", "broken")
    lines = (f"{name} = their_stage.searches:{name}" for name in names)
    (info / "entry_points.txt").write_text(
        "\n".join(["[rtfocus.autofocus]", *lines, "gone = their_stage.gone:gone"])
        + "\nmy_search = their_stage.focus:begin\n"
    )
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture(scope="module")
def core() -> Iterator[Any]:
    microscope = {
        "source": "virtual",
        "height_px": 128,
        "width_px": 128,
        "specimen": {"kind": "nuclei", "seed": 3},
        "surface": {"z_um": FOCUS_UM},
    }
    config = {
        "microscope": microscope,
        "channels": [{"name": "DAPI", "optics": OPTICS}],
    }
    with open_core(parse_config(config)) as opened:
        yield opened


def focuser(core: Any, name: str, most_images: int = 6) -> Focuser:
    """A focuser whose images tell their spectrum; no network is needed."""

    def read(pixels: Any, channel: str, z_um: float) -> FocusReading:
        spectrum, noise = amplitude_spectrum(pixels, None)
        told = [float(value) for value in spectrum]
        return FocusReading(None, None, False, spectrum=told, noise=noise)

    core.setZPosition(0.0)
    core.waitForSystem()
    settings = AutofocusConfig(
        search=name, low_um=-20, high_um=20, most_images=most_images
    )
    return Focuser(core, settings, {"default": SYSTEM}, read)


@pytest.mark.usefixtures("package")
def test_it_is_asked_after_every_image_and_its_decisions_are_carried_out(core) -> None:
    verdict = focuser(core, "climber").focus(channel="DAPI")
    assert verdict.focused
    assert verdict.notes == ("searched by 'climber'",)
    assert 2 < verdict.images <= 6
    assert verdict.steps[-1].belief_um == verdict.end_um
    unit_um = SYSTEM.defocus_unit_um
    assert abs(core.getZPosition() - FOCUS_UM) <= unit_um
    from their_stage.searches import tasks  # type: ignore[import-not-found]

    assert tasks[0].limits == Limits(-20, 20)


@pytest.mark.usefixtures("package")
def test_the_search_that_the_page_shows_ends_at_the_sharpest_z(core) -> None:
    verdict = focuser(core, "my_search", most_images=12).focus(channel="DAPI")
    assert verdict.focused
    unit_um = SYSTEM.defocus_unit_um
    assert abs(core.getZPosition() - FOCUS_UM) <= unit_um
    assert verdict.images == 8  # seven of the sweep, and one to confirm


@pytest.mark.usefixtures("package")
def test_it_never_leads_beyond_the_limits_and_ends_where_it_was_sharpest(core) -> None:
    verdict = focuser(core, "far").focus(channel="DAPI")
    assert not verdict.focused
    assert verdict.reason == "not found in 6 images"
    places = [step.z_um for step in verdict.steps]
    assert max(places) == 20
    assert places[1] == 15  # the longest step
    assert core.getZPosition() == verdict.end_um < 20


def test_a_stage_beyond_the_limits_is_sent_nowhere_and_nobody_is_asked() -> None:
    def never(z_um: float, reading: FocusReading) -> Decision:
        raise AssertionError((z_um, reading))

    moves = MoveRule(Limits(0, 10), deadband_um=0.1, most_um=5)
    search = BroughtSearch("theirs", never, moves, unit_um=1.0, most_images=6)
    search.observe(10.5, FocusReading(None, None, False))
    assert search.decide() == GiveUp("the stage says 10.5 um, outside its limits")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("odd", MicroscopeError, "answered 'up a little'; a decision is Stay, Move"),
        ("similar", MicroscopeError, "answered namespace.*; a decision is Stay"),
        ("broken", MicroscopeError, "failed: ZeroDivisionError"),
        ("gone", ConfigError, r"\(their_stage.gone:gone\) cannot begin"),
        (
            "nobody",
            ConfigError,
            "there are rtfocus, broken, climber",
        ),
    ],
)
def test_one_that_fails_says_whose_it_is(core, name, error, message) -> None:
    with pytest.raises(error, match=message):
        focuser(core, name).focus(channel="DAPI")
    assert core.getZPosition() == 0


def test_measured_backlash_makes_every_place_be_reached_upwards(
    core: Any, tmp_path: Path
) -> None:
    optics = TypeAdapter(OpticalSystem).validate_python(OPTICS)
    found = FocusCalibration(
        channel="DAPI",
        focus_um=FOCUS_UM,
        sharpest_um=FOCUS_UM,
        unexplained=0.0,
        direction=1,
        direction_of_core=1,
        backlash_um=-2.0,
        level_offset_um=0.0,
        level_scale=1.0,
        level_range_um=10.0,
        unit_um=optics.defocus_unit_um,
        problems=[],
    )
    save_calibration(tmp_path / "play.yaml", found)
    plain = focuser(core, "rtfocus")
    config = plain.config.model_copy(update={"calibration": tmp_path / "play.yaml"})
    arrived_from: list[float] = []
    stops = [0.0]

    def read(pixels: Any, channel: str, z_um: float) -> FocusReading:
        arrived_from.append(stops[-1] - stops[-2])
        return plain.read(pixels, channel, z_um)

    def note(_: str, z_um: float) -> None:
        stops.append(z_um)

    core.events.stagePositionChanged.connect(note)
    try:
        Focuser(core, config, {"default": optics}, read).focus(channel="DAPI")
    finally:
        core.events.stagePositionChanged.disconnect(note)
    # The first place too, where nobody knows from which side the stage came.
    # From twice as far, so that a late stage is not off alike everywhere.
    assert stops[1:3] == [-6.0, 0.0]
    assert len(arrived_from) > 2
    assert min(arrived_from) > 0
    assert stops[-1] > stops[-2]


def test_a_plan_s_z_is_reached_from_the_chosen_side_as_far_as_limits_allow(
    core,
) -> None:
    taken = focuser(core, "rtfocus")  # the stage stands at 0, limits are -20 and 20
    for approach, z_um, stops in (
        ("up", 5.0, (5.0,)),
        ("up", -5.0, (-8.0, -5.0)),
        ("up", -18.0, (-18.0,)),  # passing it would pass the limit
        ("up", -17.0, (-20.0, -17.0)),
        ("down", -5.0, (-5.0,)),
        ("down", 5.0, (8.0, 5.0)),
        ("down", 17.0, (20.0, 17.0)),
        ("down", 17.5, (17.5,)),
        ("either", 5.0, (5.0,)),
        ("up", 0.0, (0.0,)),
    ):
        changes = {"approach": approach, "backlash_um": 3.0}
        taken.config = taken.config.model_copy(update=changes)
        assert taken.way_to(z_um) == stops
