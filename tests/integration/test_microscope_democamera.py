"""DemoCamera: the real C++ camera of Micro-Manager, plan after plan."""

import threading
import time
from itertools import product

import pytest
from microscope_kit import (
    RecordingSink,
    democamera,
    let_last_image_come_late,
    record,
    wait_for,
)

from rtfocus.errors import ConfigError, ExitCode, MicroscopeError
from rtfocus.microscope.acquisition import acquire
from rtfocus.microscope.core import open_core

pytest.importorskip("mm_test_adapters", reason="the DemoCamera is not installed")

PLAN = {
    "axis_order": "tpcz",
    "time_plan": {"interval": 0.05, "loops": 2},
    "stage_positions": [{"x": 0, "y": 0, "z": 5}, {"x": 100, "y": 50, "z": 6}],
    "channels": [{"config": "DAPI", "exposure": 1}, {"config": "FITC", "exposure": 2}],
    "z_plan": {"range": 2.0, "step": 1.0},
}
SMALL = {"Camera": {"OnCameraCCDXSize": 64, "OnCameraCCDYSize": 48}}
TRIGGERED = {**SMALL, "Z": {"UseSequences": "Yes"}}


@pytest.mark.parametrize("properties", [SMALL, TRIGGERED], ids=["snapped", "sequenced"])
def test_every_frame_of_an_mda_is_at_its_index(properties):
    sink, report = record(democamera({"mda": PLAN}, properties=properties))
    expected = list(product(range(2), range(2), range(2), range(3)))
    indices = [tuple(h.index[a] for a in "tpcz") for h in sink.headers]
    assert indices == expected
    assert [h.sequence for h in sink.headers] == list(range(24))
    assert [h.event_index for h in sink.headers] == list(range(24))
    for header, (_, p, c, z) in zip(sink.headers, expected, strict=True):
        assert header.z_um == pytest.approx(5 + p + z - 1, abs=0.01)
        assert header.z_offset_um == z - 1
        assert header.exposure_ms == c + 1
        triggered = header.frame_meta.get("hardware_triggered", False)
        assert triggered is (properties is TRIGGERED)
        assert header.camera_image_number == (z if triggered else None)
    assert sink.reasons == ["completed"]
    assert (report.frames, report.planned, report.camera_lost) == (24, 24, 0)
    assert report.lateness is not None
    assert report.warnings == ()


def test_the_series_says_all_that_is_known_before_frame_0():
    settings = democamera({"mda": PLAN}, properties=SMALL)
    sink, _ = record(settings)
    series = sink.series
    assert series is not None
    assert series.shape == (48, 64)
    assert series.sizes == {"t": 2, "p": 2, "c": 2, "z": 3}
    assert [c.name for c in series.channels] == ["DAPI", "FITC"]
    assert [(p.x_um, p.y_um) for p in series.positions] == [(0, 0), (100, 50)]
    assert (series.pixel_size_um, series.z_step_um) == (1.0, 1.0)
    assert series.interval_s == 0.05
    assert series.mda_sequence is not None
    assert series.mda_sequence["channels"][1]["config"] == "FITC"
    assert series.summary["format"] == "summary-dict"


@pytest.mark.parametrize("properties", [SMALL, TRIGGERED], ids=["snapped", "sequenced"])
def test_times_are_ordered_and_on_the_senders_clock(properties):
    sink, report = record(democamera({"mda": PLAN}, properties=properties))
    ended_ns = time.time_ns()
    assert sink.series is not None
    captured = [h.captured_ns for h in sink.headers]
    assert captured == sorted(captured)
    assert sink.series.started_ns < captured[0]
    assert captured[-1] < ended_ns
    starts = [h.actual_s for h in sink.headers]
    assert starts == sorted(starts)
    assert starts[-1] < report.seconds
    # No time point starts before it should, and the second is planned 50 ms later.
    planned = [h.planned_s for h in sink.headers]
    assert planned[12] - planned[0] == pytest.approx(0.05, abs=0.02)
    assert starts[12] + 0.005 >= planned[12]


@pytest.mark.parametrize("pixels", ["8bit", "16bit", "32bitRGB"])
def test_pixel_types(pixels):
    properties = {"Camera": {**SMALL["Camera"], "PixelType": pixels}}
    sink, _ = record(
        democamera({"live": {"frames": 3, "exposure_ms": 1}}, properties=properties)
    )
    assert sink.series is not None
    form = {"8bit": ((48, 64), "|u1"), "16bit": ((48, 64), "<u2")}
    assert (sink.series.shape, sink.series.dtype) == form.get(
        pixels, ((48, 64, 3), "|u1")
    )
    assert all(p.shape == sink.series.shape and p.any() for p in sink.pixels)


def test_live_counts_frames():
    live = {"live": {"frames": 25, "exposure_ms": 1}}
    sink, report = record(democamera(live, properties=SMALL))
    assert [h.index["t"] for h in sink.headers] == list(range(25))
    assert [h.camera_image_number for h in sink.headers] == list(range(25))
    assert (report.frames, report.reason, report.camera_lost) == (25, "completed", 0)
    assert sink.series is not None
    assert sink.series.sizes["t"] == 25
    assert sink.series.mda_sequence is None


def test_live_runs_until_it_is_stopped():
    stop = threading.Event()
    sink, report = record(
        democamera({"live": {"exposure_ms": 1}}, properties=SMALL),
        stop=stop,
        on_frame=lambda h: stop.set() if h.sequence == 9 else None,
    )
    assert sink.series is not None
    assert sink.series.sizes["t"] is None
    assert (report.frames, report.reason) == (10, "canceled")
    assert sink.reasons == ["canceled"]


def test_stop_ends_a_plan_that_waits_for_its_next_time_point():
    stop = threading.Event()
    plan = {"time_plan": {"interval": 600, "loops": 3}}
    sink, report = record(
        democamera({"mda": plan}, properties=SMALL),
        stop=stop,
        on_frame=lambda _: stop.set(),
    )
    assert (report.frames, report.reason) == (1, "canceled")
    assert report.seconds < 60
    assert sink.reasons == ["canceled"]


def test_stop_before_the_start_acquires_nothing():
    stop = threading.Event()
    stop.set()
    plan = {"time_plan": {"interval": 0.2, "loops": 50}}
    sink, report = record(democamera({"mda": plan}, properties=SMALL), stop=stop)
    assert report.reason == "canceled"
    assert report.frames < 50
    assert sink.reasons == ["canceled"]


@pytest.mark.parametrize("properties", [SMALL, TRIGGERED], ids=["snapped", "sequenced"])
def test_a_failing_sink_cancels_the_run_and_is_raised(properties):
    config = democamera({"mda": PLAN}, properties=properties)
    sink = RecordingSink(fail_at=4)
    with open_core(config) as core:
        with pytest.raises(ConnectionError, match="the recorder is gone"):
            acquire(config, sink, core=core, stop=threading.Event())
        assert not core.isSequenceRunning()
        assert not core.mda.is_running()
    assert len(sink.headers) == 4
    assert sink.reasons == ["the recorder is gone"]


def test_an_image_whose_preset_fails_is_not_taken_and_the_others_are():
    """Half of the preset is set: the channel before it has to be set anew, too."""
    channels = [{"config": name, "exposure": 1} for name in ("DAPI", "Half")]
    plan = {"time_plan": {"interval": 0.01, "loops": 2}, "channels": channels}
    config = democamera({"mda": plan}, properties=SMALL)
    sink = RecordingSink()
    taken_with = []
    with open_core(config) as core:
        core.defineConfig("Channel", "Half", "Emission", "Label", "Chroma-HQ700")
        core.defineConfig("Channel", "Half", "Excitation", "Label", "No such filter")
        report = acquire(
            config,
            sink,
            core=core,
            stop=threading.Event(),
            on_frame=lambda _: taken_with.append(core.getProperty("Emission", "Label")),
        )
    assert [header.index["c"] for header in sink.headers] == [0, 0]
    assert [header.event_index for header in sink.headers] == [0, 2]
    assert taken_with[0] == taken_with[1] != "Chroma-HQ700"
    assert (report.planned, report.frames, report.not_acquired) == (4, 2, 2)
    assert report.outcome.exit_code == ExitCode.INCOMPLETE
    assert "Failed to set channel" in sink.reasons[0]


def test_an_image_that_the_stage_does_not_go_to_is_not_taken_and_the_others_are():
    places = [{"x": 0, "y": 0, "z": z_um} for z_um in (1, 1e9, 3)]
    plan = {"stage_positions": places, "channels": [CHANNEL]}
    sink, report = record(democamera({"mda": plan}, properties=SMALL))
    assert [(h.index["p"], round(h.z_um)) for h in sink.headers] == [(0, 1), (2, 3)]
    assert (report.frames, report.not_acquired, report.camera_lost) == (2, 1, 0)
    assert "Failed to set position. Error in device" in report.reason
    assert "out of range" in report.reason


@pytest.mark.parametrize(
    "setup",
    [
        {"properties": [["Camera", "Gian", "2"]]},
        {"channel": {"config": "DPAI", "group": "Channel"}},
        {"z_pos": 1e9},
    ],
    ids=["property", "channel", "z"],
)
def test_a_plan_whose_setup_fails_is_not_exposed(setup):
    sink = RecordingSink()
    plan = {"channels": [CHANNEL], "setup": setup}
    with pytest.raises(MicroscopeError, match=r"Gian|DPAI|out of range"):
        record(democamera({"mda": plan}, properties=SMALL), sink)
    assert (sink.series, sink.reasons) == (None, [])


def test_a_failing_sink_stops_the_live_camera():
    config = democamera({"live": {"exposure_ms": 1}}, properties=SMALL)
    sink = RecordingSink(fail_at=4)
    with open_core(config) as core:
        with pytest.raises(ConnectionError):
            acquire(config, sink, core=core, stop=threading.Event())
        assert not core.isSequenceRunning()
    assert sink.reasons == ["the recorder is gone"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda core: core.setROI(0, 0, 32, 32), "shape changed"),
        (lambda core: core.setProperty("Camera", "Binning", "2"), "shape changed"),
        (lambda core: core.setProperty("Camera", "PixelType", "8bit"), "dtype changed"),
        (lambda core: core.setProperty("Camera", "BitDepth", "10"), "bit_depth chang"),
    ],
    ids=["roi", "binning", "pixel type", "bit depth"],
)
def test_a_change_of_the_camera_ends_the_series_cleanly(change, said):
    camera = {"Camera": {**SMALL["Camera"], "PixelType": "16bit", "BitDepth": 12}}
    plan = {"time_plan": {"interval": 0.01, "loops": 50}}
    config = democamera({"mda": plan}, properties=camera)
    sink = RecordingSink()
    with open_core(config) as core:
        report = acquire(
            config,
            sink,
            core=core,
            stop=threading.Event(),
            on_frame=lambda h: change(core) if h.sequence == 2 else None,
        )
    assert report.frames == 3
    assert said in report.reason
    assert sink.reasons == [report.reason]


def test_an_image_lost_in_a_hardware_sequence_shifts_no_other():
    # Another consumer takes one image out of the core's buffer: it is lost to us.
    config = democamera({"mda": PLAN}, properties=TRIGGERED)
    sink = RecordingSink()
    with open_core(config) as core:

        def steal(header):
            if header.event_index == 3:
                wait_for(lambda: core.getRemainingImageCount() > 0)
                core.popNextImage()

        report = acquire(
            config, sink, core=core, stop=threading.Event(), on_frame=steal
        )
    assert [h.sequence for h in sink.headers] == list(range(23))
    assert [h.event_index for h in sink.headers] == [n for n in range(24) if n != 4]
    places = list(product(range(2), range(2), range(2), range(3)))
    for header in sink.headers:
        assert tuple(header.index[a] for a in "tpcz") == places[header.event_index]
        assert header.camera_image_number == header.index["z"]
    assert (report.frames, report.camera_lost) == (23, 1)


@pytest.mark.parametrize("kind", ["live", "mda"])
def test_a_buffer_that_somebody_clears_puts_no_two_images_at_one_place(kind):
    # The core counts images anew then.
    plan = {"mda": {**PLAN, "z_plan": {"range": 20, "step": 1}}}
    acquisition = plan if kind == "mda" else {"live": {"frames": 30, "exposure_ms": 1}}
    config, sink = democamera(acquisition, properties=TRIGGERED), RecordingSink()
    with open_core(config) as core:

        def clear(header):
            if header.sequence == 5:
                core.clearCircularBuffer()

        report = acquire(
            config, sink, core=core, stop=threading.Event(), on_frame=clear
        )
    assert len(sink.by_index()) == len(sink.headers) == report.frames
    (warning,) = report.warnings
    assert "to come, as when somebody clears Micro-Manager's buffer" in warning
    if kind == "mda":
        # Whose images the rest of that sequence are nobody knows.
        places = [h.event_index for h in sink.headers]
        assert places == [n for n in range(168) if not 5 < n < 21]
        assert report.camera_lost == 15


@pytest.mark.parametrize("properties", [SMALL, TRIGGERED], ids=["live", "sequenced"])
def test_an_objective_that_is_turned_under_a_running_camera_ends_the_series(properties):
    plan = {"mda": {"z_plan": {"range": 20, "step": 1}}}
    live = {"live": {"frames": 30, "exposure_ms": 1}}
    config = democamera(live if properties is SMALL else plan, properties=properties)
    sink = RecordingSink()
    with open_core(config) as core:

        def turn(header):
            if header.sequence == 5:
                core.setProperty("Objective", "Label", "Objective-2")

        report = acquire(config, sink, core=core, stop=threading.Event(), on_frame=turn)
    assert len(sink.headers) == 6
    assert "the core's pixel size changed from 1.0 to" in report.reason
    assert not report.outcome.is_complete


def test_the_last_image_of_a_hardware_sequence_may_come_late(monkeypatch):
    config = democamera({"mda": PLAN}, properties=TRIGGERED)
    sink = RecordingSink()
    with open_core(config) as core:
        let_last_image_come_late(core, monkeypatch)
        report = acquire(config, sink, core=core, stop=threading.Event())
    assert (report.frames, report.camera_lost) == (24, 0)
    assert report.warnings == ()


def test_an_image_lost_in_live_mode_leaves_its_place_empty():
    config = democamera({"live": {"frames": 10, "exposure_ms": 1}}, properties=SMALL)
    sink = RecordingSink()
    with open_core(config) as core:

        def steal(header):
            if header.sequence == 3:
                wait_for(lambda: core.getRemainingImageCount() > 0)
                core.popNextImage()

        report = acquire(
            config, sink, core=core, stop=threading.Event(), on_frame=steal
        )
    assert [h.index["t"] for h in sink.headers] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert report.camera_lost == 1


@pytest.mark.parametrize(
    "acquisition",
    [
        {"live": {"exposure_ms": 1}},
        {"mda": {"time_plan": {"interval": 0, "loops": 500}}},
    ],
    ids=["live", "sequence"],
)
def test_an_overflow_of_the_buffer_ends_the_run_with_its_remedy(acquisition):
    config = democamera(acquisition)
    with open_core(config) as core:
        core.setCircularBufferMemoryFootprint(4)  # 8 frames of 512 x 512
        core.setExposure(1)

        def wait_for_overflow(sequence):
            if sequence == 2:
                wait_for(core.isBufferOverflowed)

        sink = RecordingSink(before_acquire=wait_for_overflow)
        with pytest.raises(MicroscopeError, match=r"overflowed.*sequence_buffer_mb"):
            acquire(config, sink, core=core, stop=threading.Event())
        assert not core.isSequenceRunning()
    assert len(sink.headers) >= 3
    assert "overflowed" in sink.reasons[0]


def test_an_unknown_pixel_size_is_an_error_with_its_remedy():
    config = democamera({"live": {"frames": 2}}, properties=SMALL)
    with open_core(config) as core:
        for name in core.getAvailablePixelSizeConfigs():
            core.deletePixelSizeConfig(name)
        with pytest.raises(ConfigError, match=r"microscope\.pixel_size_um"):
            acquire(config, RecordingSink(), core=core, stop=threading.Event())


def test_a_configured_pixel_size_comes_first():
    config = democamera({"live": {"frames": 1}}, properties=SMALL, pixel_size_um=0.325)
    sink, _ = record(config)
    assert sink.series is not None
    assert sink.series.pixel_size_um == 0.325


def test_optics_of_another_pixel_size_are_refused():
    config = democamera({"live": {"frames": 1}}, properties=SMALL)
    optics = {"numerical_aperture": 0.5, "wavelength_nm": 500, "pixel_size_um": 0.5}
    given = {**config.model_dump(), "channels": [{"name": "default", "optics": optics}]}
    with pytest.raises(ConfigError, match=r"pixel_size_um=0\.5.*1 um"):
        record(given)


def test_a_channel_that_does_not_exist_is_reported():
    plan = {"channels": ["NoSuchPreset"], "time_plan": {"interval": 0.01, "loops": 2}}
    with pytest.raises(ConfigError, match=r"NoSuchPreset.*Cy5, DAPI"):
        record(democamera({"mda": plan}, properties=SMALL))


def test_neither_plan_nor_live_is_refused():
    with pytest.raises(ConfigError, match="neither 'mda'"):
        record(democamera({}, properties=SMALL))


SITE = {"x": 0, "y": 0, "z": 100}
CHANNEL = {"config": "DAPI", "exposure": 1}


@pytest.mark.parametrize("properties", [SMALL, TRIGGERED], ids=["snapped", "sequenced"])
def test_every_slice_is_taken_where_the_plan_says(properties):
    fitc = {"config": "FITC", "exposure": 1, "z_offset": 7.5}
    below = {"z_plan": {"above": 3, "below": 1, "step": 1}}
    other = {"x": 10, "y": 0, "z": 200}
    plans = [
        (
            [SITE, other],
            [CHANNEL],
            {"range": 4, "step": 2},
            [98, 100, 102, 198, 200, 202],
        ),
        ([SITE], [CHANNEL, fitc], {"range": 2, "step": 2}, [99, 101, 106.5, 108.5]),
        # One plane with an offset, as the refusal of z_offset alone advises.
        ([SITE], [CHANNEL, fitc], {"relative": [0]}, [100, 107.5]),
        (
            [SITE, {**other, "sequence": below}],
            [CHANNEL],
            {"range": 2, "step": 1},
            [99, 100, 101, 199, 200, 201, 202, 203],
        ),
        ([SITE], [CHANNEL], {"top": 10, "bottom": 6, "step": 2}, [6, 8, 10]),
        ([SITE], [CHANNEL], {"range": 2, "step": 1, "go_up": False}, [101, 100, 99]),
        ([SITE], [CHANNEL], {"relative": [-5, 0, 1, 10]}, [95, 100, 101, 110]),
        ([SITE], [CHANNEL], {"range": 0, "step": 0}, [100]),
        # A position without z is taken where the stage stands.
        ([SITE, {"x": 0, "y": 0}, {**SITE, "z": 90}], [CHANNEL], None, [100, 100, 90]),
    ]
    with open_core(democamera({}, properties=properties)) as core:
        for positions, channels, stack, heights_um in plans:
            plan = {"stage_positions": positions, "channels": channels, "z_plan": stack}
            sink = RecordingSink()
            config = democamera({"mda": plan}, properties=properties)
            report = acquire(config, sink, core=core, stop=threading.Event())
            assert report.outcome.is_complete, (plan, report)
            stood = [header.z_um for header in sink.headers]
            assert stood == pytest.approx(heights_um, abs=0.01), plan


def test_left_out_images_are_not_planned():
    plan = {
        "axis_order": "tpcz",
        "time_plan": {"interval": 0.01, "loops": 7},
        "stage_positions": [SITE],
        "channels": [
            CHANNEL,
            {"config": "FITC", "exposure": 1, "acquire_every": 3},
            {"config": "Cy5", "exposure": 1, "do_stack": False},
        ],
        "z_plan": {"range": 4, "step": 2},
    }
    sink, report = record(democamera({"mda": plan}, properties=SMALL))
    wanted = set()
    for t in range(7):
        wanted |= {(t, 0, 0, z) for z in range(3)} | {(t, 0, 2, 1)}
        wanted |= {(t, 0, 1, z) for z in range(3) if t % 3 == 0}
    assert set(sink.by_index()) == wanted
    assert sink.series is not None
    assert sink.series.planned == report.planned == report.frames == 37
    assert report.outcome.is_complete
    for header in sink.headers:
        assert header.z_um == pytest.approx(98 + 2 * header.index["z"], abs=0.01)
