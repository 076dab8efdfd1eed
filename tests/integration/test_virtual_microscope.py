"""Virtual microscope: real devices in a real core, driven like any other."""

import math
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from microscope_kit import OPTICS, RecordingSink, record, virtual, wait_for
from pymmcore_plus import FocusDirection
from pymmcore_plus.experimental.unicore import SimpleCameraDevice

from rtfocus.channel import OpticalSystem
from rtfocus.config.loading import parse_config
from rtfocus.config.sections import VirtualMicroscopeConfig
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.machine import RUN_CLOCK
from rtfocus.microscope.acquisition import acquire
from rtfocus.microscope.core import bare_core, open_core
from rtfocus.microscope.engine import RecordingEngine
from rtfocus.microscope.virtual_devices import (
    Sensor,
    VirtualZStage,
    load_virtual_microscope,
)
from rtfocus.microscope.virtual_specimen import VirtualSpecimen

PLAN = {
    "axis_order": "tpcz",
    "time_plan": {"interval": 0.01, "loops": 2},
    "stage_positions": [{"x": 0, "y": 0, "z": 1}, {"x": 26, "y": 0, "z": 3}],
    "channels": [{"config": "DAPI", "exposure": 1}],
    "z_plan": {"range": 4.0, "step": 2.0},
}


def test_frames_show_the_specimen_from_where_the_stages_stand():
    surface = {"z_um": 2.0, "tilt_x_um": 3.0}
    config = virtual({"mda": PLAN}, surface=surface, photons=30000)
    sink, report = record(config)
    assert (report.frames, report.camera_lost, report.warnings) == (12, 0, ())
    microscope = config.microscope
    assert isinstance(microscope, VirtualMicroscopeConfig)
    specimen = VirtualSpecimen(microscope, OpticalSystem(**optics()))
    for header, pixels in zip(sink.headers, sink.pixels, strict=True):
        p, z = header.index["p"], header.index["z"]
        z_um = (1, 3)[p] + (-2, 0, 2)[z]
        assert header.z_um == z_um
        light = specimen.image(z_um, x_um=(0, 26)[p])
        wanted = Sensor(microscope).expose(light, 1.0)
        np.testing.assert_array_equal(pixels, wanted)
    assert sink.series is not None
    assert (sink.series.bit_depth, sink.series.pixel_size_um) == (12, 0.65)


def optics():
    from rtfocus.channel import Aberrations

    return {**OPTICS, "aberrations": Aberrations(**OPTICS["aberrations"])}


def test_any_script_can_load_it_into_its_core():
    config = VirtualMicroscopeConfig(height_px=64, width_px=80, noise="none")
    with bare_core() as core:
        channels = [("DAPI", OpticalSystem(**optics()))]
        specimens = load_virtual_microscope(core, config, channels)
        assert core.getPixelSizeUm() == 0.65
        # Up is towards the specimen, so it makes a positive defocus smaller.
        assert core.getFocusDirection("Z") == FocusDirection.TowardSample
        core.setXYPosition(13.0, 0.0)
        core.setPosition(4.0)
        core.setROI(10, 5, 32, 24)
        core.snapImage()
        image = core.getImage()
        light = specimens["DAPI"].image(4.0, x_um=13.0)[5:29, 10:42]
        np.testing.assert_array_equal(image, Sensor(config).expose(light, 10.0))
        core.setOrigin()
        assert core.getPosition() == 0.0
        core.snapImage()
        np.testing.assert_array_equal(core.getImage(), image)


def test_relative_stacks_lie_around_where_the_stage_stands():
    plan = {"channels": ["DAPI"], "z_plan": {"range": 2, "step": 1}}
    config = virtual({"mda": plan})
    with open_core(config) as core:
        core.setPosition(40.0)
        sink = RecordingSink()
        acquire(config, sink, core=core, stop=threading.Event())
    assert [h.z_um for h in sink.headers] == [39, 40, 41]
    assert [h.z_offset_um for h in sink.headers] == [-1, 0, 1]


def test_channels_show_different_structures():
    settings = virtual({}).model_dump()
    settings["channels"] = [{"name": n, "optics": OPTICS} for n in ("DAPI", "FITC")]
    settings["acquisition"] = {"mda": {"channels": ["FITC", "DAPI"]}}
    sink, _ = record(parse_config(settings))
    assert sink.series is not None
    assert [c.name for c in sink.series.channels] == ["FITC", "DAPI"]
    first, second = (p.astype(int).ravel() for p in sink.pixels)
    assert np.corrcoef(first, second)[0, 1] < 0.7


def test_an_image_is_dated_by_its_exposure_however_long_it_is_drawn(monkeypatch):
    config = virtual({"live": {"frames": 1, "exposure_ms": 1}})
    assert isinstance(config.microscope, VirtualMicroscopeConfig)
    left_ns = []
    with bare_core() as core:
        channels = [("DAPI", OpticalSystem(**optics()))]
        specimen = load_virtual_microscope(core, config.microscope, channels)["DAPI"]
        drawn = specimen.image

        def image_as_the_stage_leaves(*args, **place):
            # Exposed and over, as the world has it, when the stage moves.
            over_ns = RUN_CLOCK.now_ns() + 50_000_000
            wait_for(lambda: RUN_CLOCK.now_ns() > over_ns)
            left_ns.append(RUN_CLOCK.now_ns())
            core.setPosition(9.0)
            return drawn(*args, **place)

        monkeypatch.setattr(specimen, "image", image_as_the_stage_leaves)
        core.setPosition(4.0)
        sink = RecordingSink()
        acquire(config, sink, core=core, stop=threading.Event())
    (header,) = sink.headers
    assert header.frame_meta["camera_metadata"]["Z-um"] == "4.0000"
    # `LiveHold` finds by this date where the stage stood.
    assert header.captured_ns < left_ns[0]


def test_frames_repeat_with_the_seed():
    live = {"live": {"frames": 3, "exposure_ms": 1}}
    first, again, other = (
        record(virtual(live, noise="poisson", seed=seed))[0].pixels
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.array(first) != np.array(other)).any()
    assert (first[0] != first[1]).any()


def test_colour_frames():
    sink, _ = record(virtual({"live": {"frames": 2, "exposure_ms": 1}}, rgb=True))
    assert sink.series is not None
    assert sink.series.shape == (96, 128, 3)
    assert sink.pixels[0].shape == (96, 128, 3)


def test_the_frame_rate_has_its_limit():
    live = {"live": {"frames": 11, "exposure_ms": 1}}
    _, report = record(virtual(live, frames_per_s=50))
    assert report.seconds >= 10 / 50


def test_it_waits_for_a_slow_sink_instead_of_overflowing():
    # The buffer holds 42 frames; the sink lets eight of them wait now and then.
    config = virtual({"live": {"frames": 120, "exposure_ms": 0.1}})
    with open_core(config) as core:
        core.setCircularBufferMemoryFootprint(1)
        core.setExposure(0.1)

        def dawdle(sequence):
            if sequence % 10 != 5:
                return
            # At the end of the buffer no third frame comes before it is empty.
            with suppress(AssertionError):
                wait_for(
                    lambda: (
                        core.getRemainingImageCount() >= 3
                        or not core.isSequenceRunning()
                        or core.getBufferFreeCapacity() < 40
                    ),
                    timeout_s=1.0,
                )

        sink = RecordingSink(before_acquire=dawdle)
        report = acquire(config, sink, core=core, stop=threading.Event())
    assert (report.frames, report.camera_lost) == (120, 0)
    assert report.most_waiting is not None
    assert 0 < report.most_waiting <= 8
    assert [h.camera_image_number for h in sink.headers] == list(range(120))


def test_stop_while_it_waits_ends_at_once():
    stop = threading.Event()
    config = virtual({"live": {"exposure_ms": 0.1}})
    with open_core(config) as core:

        def dawdle(sequence):
            if sequence == 3:
                wait_for(lambda: core.getRemainingImageCount() >= 7)
                stop.set()

        sink = RecordingSink(before_acquire=dawdle)
        report = acquire(config, sink, core=core, stop=stop)
        assert not core.isSequenceRunning()
    assert (report.frames, report.reason) == (4, "canceled")


@pytest.mark.parametrize("take", ["popNextImage", "popNextImageAndMD"])
def test_a_camera_without_room_is_told_of_it_and_does_not_look_for_it(
    take, monkeypatch
):
    monkeypatch.setattr("rtfocus.microscope.virtual_devices._LONGEST_WAIT_S", 60)
    with open_core(virtual({"live": {"exposure_ms": 0.1}})) as core:
        core.setExposure(0.1)
        others = set(threading.enumerate())
        core.startSequenceAcquisition(1000, 0.0, True)
        (camera,) = set(threading.enumerate()) - others
        for _ in range(5):
            wait_for(lambda: core.getRemainingImageCount() == 8)
            getattr(core, take)()
        wait_for(lambda: core.getRemainingImageCount() == 8)
        core.stopSequenceAcquisition()
        assert not camera.is_alive()


class CountingCamera(SimpleCameraDevice):
    """Writes into its pixels how many frames it has exposed."""

    def __init__(self):
        super().__init__()
        self.exposed = 0

    def sensor_shape(self):
        return (8, 8)

    def dtype(self):
        return np.uint16

    def get_exposure(self):
        return 1.0

    def set_exposure(self, exposure):
        pass

    def snap(self, buffer):
        buffer[...] = self.exposed
        self.exposed += 1
        return {}


def test_a_lost_image_of_a_python_camera_shifts_no_other():
    plan = {"time_plan": {"interval": 0, "loops": 12}, "channels": ["DAPI"]}
    config = virtual({"mda": plan})
    with open_core(config) as core:
        core.loadPyDevice("Counter", CountingCamera())
        core.initializeDevice("Counter")
        core.setCameraDevice("Counter")

        def steal(header):
            if header.event_index in (2, 7):
                wait_for(lambda: core.getRemainingImageCount() > 0)
                core.popNextImage()

        sink = RecordingSink()
        report = acquire(
            config, sink, core=core, stop=threading.Event(), on_frame=steal
        )
    assert [h.event_index for h in sink.headers] == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert [h.index["t"] for h in sink.headers] == [int(p[0, 0]) for p in sink.pixels]
    assert (report.frames, report.camera_lost) == (10, 2)


class BrokenCamera(CountingCamera):
    """Fails at its fourth frame."""

    def snap(self, buffer):
        if self.exposed == 3:
            msg = "cable pulled"
            raise OSError(msg)
        return super().snap(buffer)


def test_exposures_that_fail_are_counted_and_told():
    plan = {"time_plan": {"interval": 0.01, "loops": 6}}
    config = virtual({"mda": plan})
    with open_core(config) as core:
        core.loadPyDevice("Counter", BrokenCamera())
        core.initializeDevice("Counter")
        core.setCameraDevice("Counter")
        sink = RecordingSink()
        report = acquire(config, sink, core=core, stop=threading.Event())
    assert [h.event_index for h in sink.headers] == [0, 1, 2]
    assert report.camera_lost == 3
    assert any("cable pulled" in text for text in report.warnings)


class SilentStage(VirtualZStage):
    """Goes where it is sent and does not always say where it is."""

    is_silent = False
    says_nan = False
    is_slow = False

    def set_position_um(self, val):
        if self.is_slow:
            msg = "no answer from COM3 in 5 s"
            raise TimeoutError(msg)
        super().set_position_um(val)

    def get_position_um(self):
        if self.says_nan:
            return math.nan
        if self.is_silent:
            msg = "no answer from COM3"
            raise RuntimeError(msg)
        return super().get_position_um()


@pytest.mark.parametrize(
    "acquisition",
    [
        {"mda": {"z_plan": {"absolute": [1, 2, 3, 4]}}},
        {"live": {"frames": 4, "exposure_ms": 120}},
    ],
    ids=["plan", "live"],
)
@pytest.mark.parametrize("fault", ["is_silent", "says_nan"])
def test_images_have_no_z_that_their_stage_did_not_tell(acquisition, fault):
    config, stage = virtual(acquisition), SilentStage()
    # The z of the first image is read by then.
    sink = RecordingSink(before_acquire=lambda _: setattr(stage, fault, True))
    with open_core(config) as core:
        core.loadPyDevice("Silent", stage)
        core.initializeDevice("Silent")
        core.setFocusDevice("Silent")
        report = acquire(config, sink, core=core, stop=threading.Event())
    first, *others = [header.z_um for header in sink.headers]
    assert first is not None
    assert others == [None, None, None]
    assert any("'Silent' does not say where it stands" in w for w in report.warnings)


@pytest.mark.parametrize(
    ("fault", "said"), [("is_silent", "does not answer"), ("says_nan", "at nan um")]
)
def test_a_stage_that_does_not_tell_its_z_at_the_start_is_named(fault, said):
    config, stage = virtual({"mda": {"z_plan": {"range": 2, "step": 1}}}), SilentStage()
    with open_core(config) as core:
        core.loadPyDevice("Silent", stage)
        core.initializeDevice("Silent")
        core.setFocusDevice("Silent")
        setattr(stage, fault, True)
        with pytest.raises(MicroscopeError, match=f"z-stage 'Silent' .*{said}"):
            acquire(config, RecordingSink(), core=core, stop=threading.Event())


def test_images_that_a_stage_does_not_reach_in_time_are_left_out():
    config = virtual({"mda": {"stage_positions": [{"z": 1}, {"z": 2}, {"z": 3}]}})
    stage = SilentStage()
    with open_core(config) as core:
        core.loadPyDevice("Silent", stage)
        core.initializeDevice("Silent")
        core.setFocusDevice("Silent")
        sink = RecordingSink(before_acquire=lambda _: setattr(stage, "is_slow", True))
        report = acquire(config, sink, core=core, stop=threading.Event())
    assert [header.z_um for header in sink.headers] == [1]
    assert report.not_acquired == 2
    assert report.reason == "Failed to set position. no answer from COM3 in 5 s"


class SlowCamera(CountingCamera):
    """Exposes for longer than `UniMMCore` waits for a camera, until it is let go."""

    def __init__(self):
        super().__init__()
        self.exposed_enough = threading.Event()

    def get_exposure(self):
        return 2100.0

    def snap(self, buffer):
        assert self.exposed_enough.wait(60)
        return super().snap(buffer)


def test_a_camera_that_is_said_to_have_stopped_exposes_no_more():
    with open_core(virtual({})) as core:
        core.loadPyDevice("Slow", camera := SlowCamera())
        core.initializeDevice("Slow")
        core.setCameraDevice("Slow")
        core.startContinuousSequenceAcquisition()
        exposing = core._acquisition_thread
        join = exposing.join

        def let_go(timeout=None):
            # Whoever waits for as long as it exposes sees the end of it.
            if timeout is None or timeout > camera.get_exposure() / 1e3:
                camera.exposed_enough.set()
            join(timeout)

        exposing.join = let_go
        core.stopSequenceAcquisition()
        still_exposes = exposing.is_alive()
        camera.exposed_enough.set()
        assert not still_exposes


def test_optics_are_required():
    with pytest.raises(ConfigError, match=r"microscope\.optics"):
        record({"microscope": {"source": "virtual"}, "acquisition": {"live": {}}})


def test_channels_of_one_camera_have_one_pixel_size():
    settings = virtual({"live": {"frames": 1}}).model_dump()
    settings["channels"] = [
        {"name": "DAPI", "optics": OPTICS},
        {"name": "FITC", "optics": {**OPTICS, "pixel_size_um": 0.7}},
    ]
    with pytest.raises(ConfigError, match="same pixel_size_um"):
        record(parse_config(settings))


SEQUENCE = {"mda": {"time_plan": {"interval": 0, "loops": 8}}}


@pytest.fixture
def impatient(monkeypatch):
    """Let the engine wait for a camera's next image for a second only."""
    whole = RecordingEngine.__init__

    def begin(engine, *arguments, **options):
        whole(engine, *arguments, **options)
        engine.timeout_base = 1.0

    monkeypatch.setattr(RecordingEngine, "__init__", begin)


@pytest.mark.usefixtures("impatient")
def test_a_consumer_that_takes_long_costs_the_camera_nothing():
    pause = threading.Event()
    sink = RecordingSink(before_acquire=lambda n: n == 3 and pause.wait(1.5))
    _, report = record(virtual(SEQUENCE), sink)
    assert all(h.frame_meta["hardware_triggered"] for h in sink.headers)
    assert (report.frames, report.reason) == (8, "completed")


@pytest.mark.usefixtures("impatient")
def test_a_camera_that_falls_silent_is_named_with_what_came():
    sink = RecordingSink()
    with pytest.raises(MicroscopeError, match="no image for 1 s, after 1 of 8"):
        record(virtual(SEQUENCE, frames_per_s=0.1), sink)
    (ended,) = sink.ends
    assert (ended["camera_lost"], ended["not_acquired"]) == (0, 7)
    assert "'Camera' gave no image" in sink.reasons[0]


def test_stop_does_not_wait_for_a_camera_that_waits_for_its_trigger():
    stop = threading.Event()
    started = time.monotonic()
    _, report = record(
        virtual(SEQUENCE, frames_per_s=0.01), stop=stop, on_frame=lambda _: stop.set()
    )
    assert (report.frames, report.reason, report.not_acquired) == (1, "canceled", 7)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("device", [None, "PFS"])
@pytest.mark.parametrize("at_a_position", [False, True])
def test_a_plan_that_asks_for_focus_where_nobody_answers_is_refused(
    device, at_a_position
):
    focus = {"autofocus_plan": {"axes": ["p"], "autofocus_device_name": device}}
    here = {"x": 0, "y": 0, "z": 0, **({"sequence": focus} if at_a_position else {})}
    plan = {"stage_positions": [here], **({} if at_a_position else focus)}
    with pytest.raises(ConfigError, match="autofocus_device_name: rtfocus"):
        record(virtual({"mda": plan}))
