"""A plan that somebody else's script runs on a plain core, followed frame by frame."""

import contextlib
import socket
import threading

import numpy as np
import pytest
import useq
from microscope_kit import RecordingSink, let_last_image_come_late, wait_for
from mm_test_adapters import device_adapter_path
from msgspec.structs import replace
from pymmcore_plus import CMMCorePlus
from pymmcore_plus.mda import MDAEngine
from transport_kit import until
from view_kit import Looking

import rtfocus
from rtfocus.app import serve
from rtfocus.autofocus.actions import FocusActions
from rtfocus.config import parse_config
from rtfocus.errors import ConfigError, IncompleteError, MicroscopeError, RtfocusError
from rtfocus.focusing import EstimateInbox
from rtfocus.launch import on_free_ports
from rtfocus.microscope.mda import FollowedAcquisition
from rtfocus.microscope.plan import lay_out
from rtfocus.transport.viewer import PreviewViewer

OPTICS = {"numerical_aperture": 0.3, "wavelength_nm": 460, "pixel_size_um": 1.0}
FREE = {
    "frames": "tcp://127.0.0.1:*",
    "control": "tcp://127.0.0.1:*",
    "preview": {"endpoint": None},
}
PLANS = {
    "time": {"time_plan": {"interval": 0, "loops": 4}},
    "channels": {
        "axis_order": "tpcz",
        "channels": ["DAPI", {"config": "FITC", "exposure": 3}],
        "time_plan": {"interval": 0, "loops": 2},
    },
    "hardware z": {"z_plan": {"range": 4, "step": 1}, "channels": ["DAPI"]},
    "grid": {"grid_plan": {"rows": 2, "columns": 2, "fov_width": 9, "fov_height": 9}},
    "positions": {
        "stage_positions": [
            {"x": 0, "y": 0, "z": 3, "name": "left"},
            {"x": 9, "y": 0, "sequence": {"z_plan": {"range": 2, "step": 1}}},
        ],
        "channels": ["DAPI", "FITC"],
    },
}


@pytest.fixture
def core():
    folder = str(device_adapter_path())
    core = CMMCorePlus(mm_path=folder)
    core.loadSystemConfiguration(f"{folder}/MMConfig_demo.cfg")
    core.setROI(0, 0, 64, 48)
    core.setProperty("Z", "UseSequences", "Yes")
    yield core
    core.unloadAllDevices()
    super(CMMCorePlus, core).registerCallback(None)  # see `bare_core`


def follow(core, sequence, sink):
    """Run a plan on the core's own engine; return how the followed series ended."""
    followed = FollowedAcquisition(parse_config({}), core, sequence, sink)
    seen = []
    events = core.mda.events
    slots = (
        (events.sequenceStarted, lambda _, summary: followed.begin(summary)),
        (events.frameReady, followed.take),
        (events.frameReady, lambda pixels, *_: seen.append(pixels.copy())),
    )
    for signal, slot in slots:
        signal.connect(slot)
    try:
        core.mda.run(sequence)
    finally:
        for signal, slot in slots:
            signal.disconnect(slot)
    return followed, seen


@pytest.mark.parametrize("name", PLANS)
def test_every_frame_comes_to_the_place_it_is_planned_for(name, core):
    sequence = useq.MDASequence(**PLANS[name])
    sink = RecordingSink()
    followed, seen = follow(core, sequence, sink)
    report = followed.finish()
    plan = lay_out(sequence)
    assert (report.frames, report.reason) == (len(plan), "completed")
    assert sink.reasons == ["completed"]
    assert sink.series.planned == len(plan)
    assert sink.series.sizes == plan.sizes
    assert [h.index for h in sink.headers] == [
        plan.index(number) for number in range(len(plan))
    ]
    assert [h.event_index for h in sink.headers] == list(range(len(plan)))
    for sent, taken in zip(sink.pixels, seen, strict=True):
        assert np.array_equal(sent, taken)
    wanted = [e.z_pos for e in sequence if e.z_pos is not None]
    if wanted:
        assert [h.z_um for h in sink.headers][-len(wanted) :] == pytest.approx(wanted)


def test_a_failing_recorder_cancels_the_plan_and_is_raised_at_the_end(core):
    sequence = useq.MDASequence(time_plan={"interval": 0.01, "loops": 50})
    sink = RecordingSink(fail_at=3)
    followed, seen = follow(core, sequence, sink)
    with pytest.raises(ConnectionError, match="the recorder is gone"):
        followed.finish()
    assert len(sink.headers) == 3
    assert len(seen) < 50
    assert sink.reasons == ["the recorder is gone"]


def test_a_plan_that_was_canceled_says_what_is_missing(core):
    sequence = useq.MDASequence(time_plan={"interval": 0.01, "loops": 50})
    sink = RecordingSink(before_acquire=lambda n: n == 5 and core.mda.cancel())
    followed, _ = follow(core, sequence, sink)
    report = followed.finish()
    assert report.reason == "canceled"
    assert report.planned == 50
    assert report.not_acquired == 50 - report.frames > 0


def test_events_that_are_not_known_beforehand_are_refused(core):
    events = iter([useq.MDAEvent(exposure=1)])
    followed, _ = follow(core, events, sink := RecordingSink())
    with pytest.raises(ConfigError, match=r"give core\.mda\.run a useq\.MDASequence"):
        followed.finish()
    assert sink.headers == []


def test_a_change_of_the_camera_breaks_the_series_off(core):
    sequence = useq.MDASequence(time_plan={"interval": 0.01, "loops": 20})

    def narrow(number):
        if number == 4:
            core.setROI(0, 0, 32, 32)

    followed, _ = follow(core, sequence, sink := RecordingSink(before_acquire=narrow))
    report = followed.finish()
    assert "changed from" in report.reason
    assert report.frames == len(sink.headers) < 20


def test_a_change_of_the_objective_breaks_the_series_off(core):
    sequence = useq.MDASequence(time_plan={"interval": 0.01, "loops": 20})

    def magnify(number):
        if number == 4:
            core.setConfig("Objective", "20X")

    followed, _ = follow(core, sequence, sink := RecordingSink(before_acquire=magnify))
    report = followed.finish()
    assert report.reason == "the core's pixel size changed from 1.0 to 0.5 um"
    assert report.frames == len(sink.headers) < 20


def test_what_micro_manager_complains_of_is_in_the_report(core, caplog):
    core.setProperty("Z", "UseSequences", "No")
    sequence = useq.MDASequence(z_plan={"range": 4, "step": 1}, channels=["DAPI"])

    def unplug(number):
        if number == 2:
            core.unloadDevice("Z")

    followed, _ = follow(core, sequence, RecordingSink(before_acquire=unplug))
    (said,) = followed.finish().warnings
    assert said == "No Z stage device found. Cannot set Z position. (2 times)"
    assert caplog.text.count("No Z stage device found") == 2  # the log as before


def test_holding_focus_without_a_stage_is_told(core):
    config = parse_config(
        {
            "transport": FREE,
            "channels": [{"optics": OPTICS}],
            "autofocus": {"mode": "hold", "low_um": -9, "high_um": 9},
        }
    )
    core.setFocusDevice("")
    plan = useq.MDASequence(channels=["DAPI"])
    with rtfocus.stream(core, config, processor="configured"):
        with pytest.raises(MicroscopeError, match="has no focus stage; choose one"):
            core.mda.run(plan)


def test_presets_with_another_geometry_are_refused_before_the_first_exposure(core):
    core.defineConfig("Channel", "Small", "Camera", "Binning", "2")
    core.defineConfig("Channel", "DAPI", "Camera", "Binning", "1")
    sequence = useq.MDASequence(channels=["DAPI", "Small"])
    followed, _ = follow(core, sequence, sink := RecordingSink())
    with pytest.raises(RtfocusError, match="does not give the same"):
        followed.finish()
    assert sink.headers == []


def test_a_processor_that_cannot_start_says_why(core, tmp_path):
    config = parse_config(
        {
            "run": {"folder": str(tmp_path)},
            "channels": [{"optics": OPTICS}],
            "processing": {"classifier": "nowhere", "restoration": {"method": "none"}},
            # The one processor there is declines: no other is waited for.
            "transport": {"preview": {"endpoint": None}, "connect_timeout_s": 600},
        }
    )
    sequence = useq.MDASequence(time_plan={"interval": 0, "loops": 3})
    with (
        pytest.raises(RtfocusError, match="engine 'nowhere' not found"),
        rtfocus.stream(core, config) as live,
    ):
        core.mda.run(sequence)
    assert live.reports == []
    assert live.runs == []


@pytest.fixture
def recorder(tmp_path):
    """Config of a processor that runs meanwhile, and what ends it."""
    config = on_free_ports(
        parse_config(
            {
                "run": {"folder": str(tmp_path)},
                "processing": {"classifier": None, "restoration": {"method": "none"}},
                "transport": {"preview": {"endpoint": None}},
                "store": {"min_free_mb": 1},
            }
        )
    )
    over = threading.Event()
    serving = threading.Thread(target=serve, args=[config], kwargs={"stop": over})

    def end():
        over.set()
        serving.join()

    serving.start()
    yield config, end
    end()


def test_handlers_of_the_script_that_fail_cost_no_frame_and_no_end(core, recorder):
    config, end = recorder

    def fail(*_):
        raise KeyError

    # Connected earlier: psygnal calls none of the others after one that fails.
    core.mda.events.frameReady.connect(fail)
    core.mda.events.sequenceFinished.connect(fail)
    with rtfocus.stream(core, config, processor="configured") as live:
        core.mda.run(useq.MDASequence(time_plan={"interval": 0, "loops": 3}))
    end()
    assert live.reports[0].frames == live.runs[0].outcome.present == 3


@pytest.mark.parametrize("is_lost", [False, True], ids=["late", "lost"])
def test_the_images_of_a_hardware_sequence_come_to_a_stream_or_are_counted(
    is_lost, core, recorder, monkeypatch
):
    config, end = recorder
    came = []

    def steal(*_):
        came.append(True)
        if is_lost and len(came) == 1:
            wait_for(lambda: core.getRemainingImageCount() > 0)
            core.popNextImage()

    core.mda.events.frameReady.connect(steal)
    with contextlib.ExitStack() as opened:
        if is_lost:
            opened.enter_context(pytest.raises(IncompleteError, match="fewer images"))
        live = opened.enter_context(
            rtfocus.stream(core, config, processor="configured")
        )
        if not is_lost:
            let_last_image_come_late(core, monkeypatch)
        core.mda.run(useq.MDASequence(**PLANS["hardware z"]))
    end()
    (report,) = live.reports
    assert (report.frames, report.camera_lost) == (5 - is_lost, is_lost)
    frames = live.runs[0].frames
    written = frames["z"][frames["status"] == "written"]
    assert list(written) == ([0, 2, 3, 4] if is_lost else [0, 1, 2, 3, 4])


@pytest.mark.parametrize("moves", [True, False], ids=["triggered z", "standing z"])
def test_frames_of_a_hardware_sequence_say_where_the_stage_was_corrected_to(
    moves, core, recorder
):
    config, end = recorder
    config = config.changed("autofocus", channel_offsets_um={"DAPI": 1.5})
    plan = {"channels": ["DAPI"], "stage_positions": [{"x": 0, "y": 0, "z": 3}]}
    plan |= PLANS["hardware z"] if moves else PLANS["time"]
    with rtfocus.stream(core, config, processor="configured") as live:
        core.mda.run(useq.MDASequence(**plan))
    end()
    planned = [1, 2, 3, 4, 5] if moves else [3, 3, 3, 3]
    frames = live.runs[0].frames
    assert frames["z_um"] == pytest.approx(np.array(planned) + 1.5, abs=0.01)


class EngineOfSomebody(MDAEngine):
    """Answers nothing of rtfocus."""


@pytest.mark.parametrize("kind", [MDAEngine, EngineOfSomebody])
def test_who_looks_at_a_stream_is_heard(kind, core, tmp_path, caplog):
    ports = on_free_ports(parse_config({})).transport
    config = parse_config(
        {
            "run": {"folder": str(tmp_path)},
            "processing": {"classifier": None, "restoration": {"method": "none"}},
            "transport": {
                "preview": {"endpoint": ports.frames, "control": ports.control}
            },
            "store": {"min_free_mb": 1},
        }
    )
    plan = useq.MDASequence(
        time_plan={"interval": 0.05, "loops": 4000},
        stage_positions=[{"x": 0, "y": 0, "z": 0}],
        channels=["DAPI"],
    )
    heard = []

    def keep(_, __, meta):
        notes = meta.get("extra", {}).get("rtfocus", {})
        heard.extend(line.get("what") for line in notes.get("focus_log", []))

    core.mda.set_engine(kind(core))
    core.mda.events.frameReady.connect(keep)
    with rtfocus.stream(core, config) as live, PreviewViewer(ports.frames) as viewer:
        running = core.run_mda(plan)
        look = Looking(viewer, ports.control)
        look.until(lambda: look.newest > 1, "the run")
        assert look.ask("autofocus").done
        refused = "'autofocus' was asked for; this core's EngineOfSomebody does none"
        until(lambda: "autofocus" in heard or refused in caplog.text, "an answer")
        assert look.ask("stop").done
        running.join()
    assert [report.reason for report in live.reports] == ["canceled"]
    assert ("autofocus" in heard) == (kind is MDAEngine)


def test_every_plan_of_a_stream_is_searched_by_its_own_images(core, tmp_path):
    config = parse_config(
        {
            "run": {"folder": str(tmp_path)},
            "channels": [{"name": "DAPI", "optics": OPTICS}],
            "processing": {"restoration": {"method": "none"}},
            "store": {"restored": False, "min_free_mb": 1},
        }
    )
    core.setROI(0, 0, 256, 256)
    plain = useq.MDASequence(channels=["DAPI"], stage_positions=[(0, 0, 0)])
    focus = {"axes": ["p"], "autofocus_device_name": "rtfocus"}
    verdicts = []

    def keep(_, __, meta):
        notes = meta.get("extra", {}).get("rtfocus", {})
        verdicts.append(notes.get("autofocus", {}))

    core.mda.events.frameReady.connect(keep)
    with rtfocus.stream(core, config) as live:
        for plan in (plain, *[plain.replace(autofocus_plan=focus)] * 2):
            core.mda.run(plan)
    none, *searched = verdicts
    assert none == {}
    for verdict, report in zip(searched, live.reports[1:], strict=True):
        # The DemoCamera's sine waves are the same at every z.
        assert "does not answer" in verdict["reason"] or "noise" in verdict["reason"]
        assert verdict["images"] >= 3
        assert (report.frames, report.reason) == (1, "completed")


def test_late_estimates_of_the_plan_before_answer_for_no_image_of_this_one(
    core, tmp_path, monkeypatch
):
    config = parse_config(
        {
            "run": {"folder": str(tmp_path)},
            "channels": [{"name": "DAPI", "optics": OPTICS}],
            "processing": {"restoration": {"method": "none"}},
            "store": {"restored": False, "min_free_mb": 1},
        }
    )
    core.setROI(0, 0, 256, 256)
    focus = {"axes": ["p"], "autofocus_device_name": "rtfocus"}
    plain = useq.MDASequence(channels=["DAPI"], stage_positions=[(0, 0, 0)])
    came, verdicts, begin = [], [], EstimateInbox.begin

    def keep(_, __, meta):
        notes = meta.get("extra", {}).get("rtfocus", {})
        verdicts.append(notes.get("autofocus", {}))

    core.mda.events.frameReady.connect(keep)
    with rtfocus.stream(core, config) as live:
        live.estimateReady.connect(came.append)
        core.mda.run(plain)
        until(lambda: came, "an estimate")

        def begin_and_hear(inbox):
            begin(inbox)
            live._publisher._loop._on_estimate(replace(came[0], sequence=99))

        monkeypatch.setattr(EstimateInbox, "begin", begin_and_hear)
        core.mda.run(plain.replace(autofocus_plan=focus))
    assert verdicts[1]["images"] >= 3, verdicts[1]["reason"]


def test_the_end_of_the_block_waits_for_a_plan_that_has_just_been_begun(core, recorder):
    config, end = recorder
    opened = threading.Event()

    class SlowOutput:
        """Takes a while to open, as a file on a network disk."""

        @property
        def frameReady(self):  # noqa: N802 (pymmcore-plus' name)
            opened.wait(60)
            return lambda *_: None

    live = rtfocus.stream(core, config, processor="configured")
    with live:
        plan = useq.MDASequence(time_plan={"interval": 0, "loops": 3})
        running = core.run_mda(plan, output=[SlowOutput()])
        threading.Timer(0.3, opened.set).start()
    running.join()
    end()
    assert [report.frames for report in live.reports] == [3]


def test_a_series_that_broke_off_is_raised_at_the_end_of_the_block(
    core, recorder, caplog
):
    config, end = recorder
    plan = useq.MDASequence(time_plan={"interval": 0.01, "loops": 20})
    narrowed = {3}

    def narrow(_, event):
        if event.index["t"] in narrowed:
            core.setROI(0, 0, 32, 32)

    core.mda.events.frameReady.connect(narrow)
    live = rtfocus.stream(core, config, processor="configured")
    with pytest.raises(IncompleteError, match=r"of 20 planned.* changed from"), live:
        core.mda.run(plan)
    narrowed.clear()
    core.mda.events.frameReady.connect(lambda *_: core.mda.cancel())
    with live:  # a plan that somebody canceled is no failure
        core.mda.run(plan)
    end()
    assert caplog.text.count("the stream failed: incomplete: ") == 1
    assert live.reports[1].reason == "canceled"
    for run, report in zip(live.runs, live.reports, strict=True):
        assert run.outcome.present == report.frames > 0


def test_a_stream_whose_port_is_in_use_shows_at_another_and_says_where(core, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        preview = {"preview": {"endpoint": endpoint}}
        rtfocus.stream(core, parse_config({"transport": preview}))
    assert f"{endpoint} is in use; this run shows at tcp://127.0.0.1:" in caplog.text


def waiting(core):
    """A stream that waits for a processor, which nobody starts."""
    config = parse_config({"transport": FREE})
    return rtfocus.stream(core, config, processor="configured")


def test_a_stream_answers_for_the_stock_engine_and_gives_it_back(core):
    stock = MDAEngine(core, use_hardware_sequencing=False, timeout_base=7.0)
    core.mda.set_engine(stock)
    with waiting(core):
        assert isinstance(core.mda.engine, FocusActions)
        assert not core.mda.engine.use_hardware_sequencing
        assert core.mda.engine.timeout_base == 7.0
    assert core.mda.engine is stock


def test_an_engine_of_focus_closed_within_a_stream_does_not_come_back(core):
    stock = MDAEngine(core)
    core.mda.set_engine(stock)
    config = parse_config({"transport": FREE, "autofocus": {"mode": "hold"}})
    focusing = rtfocus.focus(core, "demo")
    with rtfocus.stream(core, config, processor="configured"):
        held = core.mda.engine
        focusing.close()
        assert core.mda.engine is held
        assert held is not focusing
    assert core.mda.engine is stock


def test_an_engine_of_focus_opened_within_a_stream_outlives_it(core):
    stock = MDAEngine(core)
    core.mda.set_engine(stock)
    config = parse_config({"transport": FREE, "autofocus": {"mode": "hold"}})
    with rtfocus.stream(core, config, processor="configured"):
        focusing = rtfocus.focus(core, "demo")
    assert core.mda.engine is focusing
    focusing.close()
    assert core.mda.engine is stock


def test_an_engine_that_does_not_answer_for_focus_is_named_before_the_first_image(core):
    class Theirs(MDAEngine):
        pass

    core.mda.set_engine(Theirs(core))
    plan = useq.MDASequence(
        stage_positions=[(0, 0, 0)],
        autofocus_plan={"axes": ["p"], "autofocus_device_name": "rtfocus"},
    )
    with pytest.raises(ConfigError, match=r"engine of this core \(Theirs\)"):
        with waiting(core):
            core.mda.run(plan)
    core.mda.set_engine(MDAEngine(core))


def test_a_search_beside_a_plan_moves_no_stage_amid_its_images(core):
    z_um, told = core.getZPosition(), []

    def ask():
        try:
            engine.focuser.focus()
        except MicroscopeError as error:
            told.append(str(error))

    def ask_beside(*_):
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join()

    core.mda.events.frameReady.connect(ask_beside)
    with contextlib.closing(rtfocus.focus(core, "demo")) as engine:
        core.mda.run(useq.MDASequence(time_plan={"interval": 0.01, "loops": 2}))
    assert len(told) == 2
    assert told[0].startswith("a plan has the stage; wait for its end")
    assert core.getZPosition() == z_um


def test_what_is_no_core_or_no_processor_is_told():
    with pytest.raises(ConfigError, match="core is of type str; give a pymmcore_plus"):
        rtfocus.stream("core", parse_config({}))
    with pytest.raises(ConfigError, match="processor 'there' is none; choose 'here'"):
        rtfocus.stream(CMMCorePlus(), parse_config({}), processor="there")


def test_a_stream_is_used_once_at_a_time_and_again(core):
    live = waiting(core)
    for _ in range(2):
        with live, pytest.raises(ConfigError, match="this stream is in use"), live:
            pytest.fail("entered")


def test_a_plan_that_runs_already_or_has_no_camera_is_refused_in_one_line(core):
    plan = useq.MDASequence(time_plan={"interval": 0, "loops": 2})

    def enter(*_):
        with pytest.raises(MicroscopeError, match="a plan runs on this core already"):
            with waiting(core):
                pytest.fail("entered")
        core.setCameraDevice("")
        core.mda.cancel()

    core.mda.events.sequenceStarted.connect(enter)
    core.mda.run(plan)
    core.mda.events.sequenceStarted.disconnect(enter)
    with pytest.raises(MicroscopeError, match="the core has no camera; choose one"):
        follow(core, plan, RecordingSink())[0].finish()


def test_a_plan_that_a_stream_would_not_record_is_canceled_and_told(core, caplog):
    live = waiting(core)
    plan = useq.MDASequence(time_plan={"interval": 5, "loops": 2})
    ended = []
    core.mda.events.sequenceCanceled.connect(ended.append)
    core.mda.run(plan, output=[live])
    assert "records nothing outside of its block" in caplog.text
    assert ended == [plan]


def test_what_the_core_raised_in_a_thread_ends_the_block_as_its_error(core):
    plan = useq.MDASequence(channels=["Nowhere"], time_plan={"interval": 0, "loops": 1})

    def run():
        with contextlib.suppress(ValueError):  # the same, where nobody hears it
            core.mda.run(plan)

    theirs = threading.Thread(target=run)
    told = pytest.raises(MicroscopeError, match='"Nowhere" does not exist')
    with told as caught, waiting(core):
        theirs.start()
        theirs.join()
    assert isinstance(caught.value.__cause__, ValueError)
