"""Geometry: a series has the one its first event sets up, or the plan is refused."""

import threading
from pathlib import Path
from typing import Any

import pytest
from microscope_kit import RecordingSink, democamera

from rtfocus.errors import ConfigError, MicroscopeError, RtfocusError
from rtfocus.microscope.acquisition import AcquisitionReport, acquire
from rtfocus.microscope.core import open_core

mm_test_adapters = pytest.importorskip(
    "mm_test_adapters", reason="the DemoCamera is not installed"
)

CAMERA = {"OnCameraCCDXSize": 64, "OnCameraCCDYSize": 48, "PixelType": "16bit"}
PROPERTIES = {"Camera": {**CAMERA, "BitDepth": 12}}
DAPI = {"config": "DAPI", "exposure": 1}
LOW = {"config": "LowRes", "group": "Camera", "exposure": 1}
HIGH = {"config": "HighRes", "group": "Camera", "exposure": 1}
FILM = {"time_plan": {"interval": 0.01, "loops": 2}}
BINNED = [["Camera", "Binning", "2"]]


def run(
    plan: dict[str, Any], **microscope: Any
) -> tuple[RecordingSink, AcquisitionReport]:
    """Run a plan; the camera must be as before when it is refused."""
    config = democamera({"mda": plan}, **{"properties": PROPERTIES, **microscope})
    sink = RecordingSink()
    with open_core(config) as core:
        camera = core.getCameraDevice()
        before = [
            core.getProperty(camera, name)
            for name in ("Binning", "PixelType", "BitDepth")
        ]
        try:
            return sink, acquire(config, sink, core=core, stop=threading.Event())
        except RtfocusError:
            assert sink.series is None
            assert core.getCameraDevice() == camera
            after = ("Binning", "PixelType", "BitDepth")
            assert [core.getProperty(camera, name) for name in after] == before
            assert tuple(core.getROI()) == (0, 0, 64, 48)
            raise


@pytest.mark.parametrize(
    ("plan", "shape", "pixel_size_um"),
    [
        ({"channels": [LOW], **FILM}, (12, 16), 4.0),
        # A preset that says nothing of the camera leaves it as the one before did.
        ({"channels": [LOW, DAPI], **FILM}, (12, 16), 4.0),
        ({"setup": {"properties": BINNED}, "channels": [DAPI]}, (24, 32), 2.0),
        (
            {
                "stage_positions": [
                    {"x": 0, "properties": BINNED},
                    {"x": 1, "properties": BINNED},
                ],
                "channels": [DAPI],
            },
            (24, 32),
            2.0,
        ),
        (
            {"channels": [{"config": "40X", "group": "Objective"}, DAPI]},
            (48, 64),
            0.25,
        ),
    ],
)
def test_the_first_set_up_gives_the_geometry(plan, shape, pixel_size_um):
    sink, report = run(plan)
    assert sink.series is not None
    assert (sink.series.shape, sink.series.pixel_size_um) == (shape, pixel_size_um)
    assert {pixels.shape for pixels in sink.pixels} == {shape}
    assert sink.series.planned == report.frames == report.planned
    assert report.outcome.is_complete
    described = sink.series.summary["image_infos"][0]
    assert tuple(described["plane_shape"]) == shape


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            {"channels": [DAPI, LOW], **FILM},
            r"'DAPI' of group 'Channel' \(first at image 0\): 64 x 48 px.*"
            r"'LowRes' of group 'Camera' \(first at image 1\): 16 x 12 px",
        ),
        ({"channels": [HIGH, LOW], **FILM}, "'LowRes'.*16 x 12 px"),
        # The second time point begins where the first ended.
        ({"channels": [{**LOW, "acquire_every": 2}, HIGH], **FILM}, "'HighRes'"),
        (
            {
                "stage_positions": [{"x": 0}, {"x": 1, "properties": BINNED}],
                "channels": [DAPI],
            },
            r"Camera-Binning=2 \(first at image 1\): 32 x 24 px",
        ),
        (
            {"channels": [{"config": c, "group": "Objective"} for c in ("10X", "40X")]},
            "pixel size Res10x.*pixel size Res40x",
        ),
    ],
)
def test_a_plan_of_several_geometries_is_refused_before_the_first_exposure(plan, said):
    with pytest.raises(ConfigError, match=said):
        run(plan)


def test_a_setting_that_cannot_be_made_is_named_before_the_first_exposure():
    positions = [{"x": 0}, {"x": 1, "properties": [["Camera", "Binning", "7"]]}]
    with pytest.raises(MicroscopeError, match="Camera-Binning=7"):
        run({"stage_positions": positions, "channels": [DAPI]})


CAMERAS = """
Device,Camera,DemoCamera,DCam
Device,Camera2,DemoCamera,DCam
Device,Both,Utilities,Multi Camera"""
PRESETS = """
Property,Both,Physical Camera 1,Camera
Property,Both,Physical Camera 2,Camera2
ConfigGroup,Channel,DAPI,Core,Camera,Camera
ConfigGroup,Channel,FITC,Core,Camera,Camera2
ConfigGroup,Channel,Rhodamine,Core,Camera,Both
"""


@pytest.mark.parametrize(
    ("preset", "pixels", "said"),
    [
        ("FITC", "16bit", None),
        ("FITC", "8bit", r"'FITC'.*first at image 1\): 64 x 48 px from \(0, 0\), \|u1"),
        ("Rhodamine", "16bit", r"image 1 of the plan, channel 'Rhodamine'.*joins 2"),
    ],
)
def test_presets_that_choose_the_camera(preset, pixels, said, tmp_path):
    demo = Path(mm_test_adapters.device_adapter_path()) / "MMConfig_demo.cfg"
    text = demo.read_text().replace("\nDevice,Camera,DemoCamera,DCam", CAMERAS)
    file = tmp_path / "two.cfg"
    file.write_text(text + PRESETS)
    depth = 12 if pixels == "16bit" else 8
    second = {**CAMERA, "PixelType": pixels, "BitDepth": depth}
    properties = {**PROPERTIES, "Camera2": second}
    plan = {"channels": [DAPI, {"config": preset, "exposure": 2}], **FILM}
    if said is not None:
        with pytest.raises(RtfocusError, match=said):
            run(plan, config_file=str(file), properties=properties)
        return
    sink, report = run(plan, config_file=str(file), properties=properties)
    assert report.outcome.is_complete
    cameras = [header.frame_meta["camera_device"] for header in sink.headers]
    assert cameras == ["Camera", "Camera2"] * 2


def test_a_preset_that_is_there_and_does_not_work_is_named_at_once(tmp_path):
    demo = Path(mm_test_adapters.device_adapter_path()) / "MMConfig_demo.cfg"
    file = tmp_path / "broken.cfg"
    file.write_text(demo.read_text() + "\nConfigGroup,Channel,Odd,Camera,Binning,3\n")
    plan = {"channels": [{"config": "Odd", "exposure": 1}]}
    with pytest.raises(MicroscopeError, match=r"'Odd'.*Binning=3"):
        run(plan, config_file=str(file))


@pytest.mark.parametrize(
    ("plan", "x_um"),
    [
        # Tiles of a grid that names no field of view lie side by side.
        ({"grid_plan": {"rows": 1, "columns": 2}}, [-32, 32]),
        ({"grid_plan": {"rows": 1, "columns": 2, "fov_width": 10}}, [-5, 5]),
        (
            {
                "stage_positions": [
                    {"x": 5, "sequence": {"grid_plan": {"rows": 1, "columns": 2}}}
                ]
            },
            [-27, 37],
        ),
    ],
)
def test_tiles_are_where_the_series_says(plan, x_um):
    sink, report = run({**plan, "channels": [DAPI]})
    assert sink.series is not None
    assert report.outcome.is_complete
    assert sorted(p.x_um for p in sink.series.positions) == x_um
    stood = [header.frame_meta["position"]["x"] for header in sink.headers]
    assert sorted(stood) == pytest.approx(x_um, abs=0.1)
