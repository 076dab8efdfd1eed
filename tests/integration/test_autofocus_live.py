"""Autofocus on real cores: useq plans as they are, corrections in z and metadata."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import useq
from loop_kit import LOCAL, OPTICS, read_journal, read_report
from microscope_kit import clock_of_images, let_last_image_come_late, wait_for
from msgspec.structs import replace
from pymmcore_plus.mda import MDAEngine

from rtfocus import app
from rtfocus.config import Config, load_config, parse_config
from rtfocus.errors import ConfigError, TransportError
from rtfocus.files import resource_folder
from rtfocus.focusing import EstimateInbox, Focusing, LocalReader, focus
from rtfocus.holding import LiveHold, estimate_of
from rtfocus.launch import on_free_ports
from rtfocus.machine import RUN_CLOCK
from rtfocus.microscope import virtual_devices
from rtfocus.microscope.core import open_core
from rtfocus.microscope.delivery import age_ns

UNIT_UM = 0.451 / 0.36**2


def settings(**changes: Any) -> Config:
    data = {
        "microscope": {
            "source": "virtual",
            "height_px": 256,
            "width_px": 256,
            "specimen": {"kind": "nuclei", "seed": 3},
            "surface": {"z_um": 4.0},
            "bit_depth": 12,
        },
        "camera": {"offset_counts": 100},
        "channels": [{"name": "DAPI", "optics": OPTICS}],
        "processing": {"classifier": "delpnet", "threads": 1, "device": "cpu"},
    }
    return parse_config({**data, **changes})


PLAN = {
    "axis_order": "tpgcz",
    "stage_positions": [{"x": 0, "y": 0, "z": 0}],
    "channels": [{"config": "DAPI", "exposure": 5}],
    "autofocus_plan": {"axes": ["p"], "autofocus_device_name": "rtfocus"},
}


@contextmanager
def acquired(config: Config) -> Iterator[tuple[Any, Any, list[dict[str, Any]]]]:
    """A core that answers ``rtfocus``, and the metadata of the frames it takes."""
    frames: list[dict[str, Any]] = []
    with open_core(config) as core:
        before = core.mda.engine
        engine = focus(core, config)

        def keep(_: Any, __: useq.MDAEvent, meta: dict[str, Any]) -> None:
            frames.append(meta)

        core.mda.events.frameReady.connect(keep)
        try:
            yield core, engine, frames
        finally:
            core.mda.events.frameReady.disconnect(keep)
            engine.close()
            core.mda.set_engine(before or MDAEngine(core))


def test_a_stock_plan_from_json_focuses_and_stacks_follow() -> None:
    plan = useq.MDASequence.model_validate_json(
        useq.MDASequence(**PLAN, z_plan={"range": 4, "step": 2}).model_dump_json()
    )
    with acquired(settings()) as (core, engine, frames):
        core.mda.run(plan)
        lines = engine.focuser.journal.lines
    heights = [meta["position"]["z"] for meta in frames]
    middle = heights[1]
    assert middle == pytest.approx(4.0, abs=0.5 * UNIT_UM)
    assert heights == pytest.approx([middle - 2, middle, middle + 2])
    note = frames[0]["extra"]["rtfocus"]
    assert note["autofocus"]["focused"]
    assert note["correction_um"] == pytest.approx(middle)
    assert lines == []
    kinds = [line["kind"] for line in note["focus_log"]]
    assert kinds[-1] == "verdict"
    assert kinds.count("look") == note["autofocus"]["images"]
    json.dumps(note)


def test_grid_tiles_have_corrections_of_their_own() -> None:
    # The plate rises by 6 um from one tile to the next.
    microscope = settings().microscope.model_dump()
    microscope["surface"] = {"z_um": 2.0, "tilt_x_um": 4.0}
    plan = useq.MDASequence(
        **{**PLAN, "autofocus_plan": {**PLAN["autofocus_plan"], "axes": ["p", "g"]}},
        grid_plan={"rows": 1, "columns": 2, "fov_width": 166, "fov_height": 166},
    )
    with acquired(settings(microscope=microscope)) as (core, _, frames):
        core.mda.run(plan)
    left, right = (meta["extra"]["rtfocus"]["correction_um"] for meta in frames)
    assert right - left == pytest.approx(4.0, abs=0.6 * UNIT_UM)


def test_the_custom_action_is_answered_too() -> None:
    events = [
        useq.MDAEvent(action=useq.CustomAction(name="rtfocus_autofocus"), z_pos=0.0),
        useq.MDAEvent(z_pos=0.0, exposure=5),
    ]
    with acquired(settings()) as (core, _, frames):
        core.mda.run(iter(events))
    (meta,) = frames
    assert meta["position"]["z"] == pytest.approx(4.0, abs=0.5 * UNIT_UM)


def demo(**autofocus: Any) -> Config:
    return settings(
        microscope={
            "source": "democamera",
            "properties": {
                "Camera": {"PixelType": "16bit"},
                "Z": {"UseSequences": "Yes"},
            },
        },
        autofocus=autofocus,
    )


def test_the_real_core_refuses_what_shows_no_focus_and_goes_on() -> None:
    pytest.importorskip("mm_test_adapters")
    with acquired(demo(most_images=3)) as (core, _, frames):
        core.mda.run(useq.MDASequence(**PLAN))
        assert core.getZPosition() == pytest.approx(0.0, abs=30)
    note = frames[0]["extra"]["rtfocus"]
    assert not note["autofocus"]["focused"]
    assert note["autofocus"]["reason"]


def test_an_unfocused_position_is_skipped_where_that_is_wanted() -> None:
    pytest.importorskip("mm_test_adapters")
    with acquired(demo(on_failure="skip", most_images=2)) as (core, engine, frames):
        core.mda.run(useq.MDASequence(**PLAN))
        assert frames == []
        assert engine.focuser.journal.drain()[-1]["kind"] == "verdict"


SEQUENCED = {
    "stage_positions": [{"x": 0, "y": 0, "z": 10}],
    "channels": [{"config": "DAPI", "exposure": 5}],
    "z_plan": {"range": 4, "step": 2},
}


def test_hardware_sequenced_z_gets_the_correction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mm_test_adapters")
    with acquired(demo(channel_offsets_um={"DAPI": 1.5})) as (core, engine, frames):
        loaded: list[Any] = []
        load = core.loadStageSequence

        def note(stage: str, heights: Any) -> None:
            loaded.append(list(heights))
            load(stage, heights)

        core.loadStageSequence = note
        let_last_image_come_late(core, monkeypatch)
        engine.use_hardware_sequencing = True
        core.mda.run(useq.MDASequence(**SEQUENCED))
    assert loaded == [[9.5, 11.5, 13.5]]
    assert [meta["mda_event"].index["z"] for meta in frames] == [0, 1, 2]
    assert [meta["camera_metadata"]["ImageNumber"] for meta in frames] == [*"012"]
    assert all(meta["hardware_triggered"] for meta in frames)


def test_an_image_lost_in_a_hardware_sequence_is_told_and_shifts_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("mm_test_adapters")
    with acquired(demo()) as (core, engine, frames):

        def steal(*_: Any) -> None:
            if len(frames) == 1:
                wait_for(lambda: core.getRemainingImageCount() > 0)
                core.popNextImage()

        core.mda.events.frameReady.connect(steal)
        engine.use_hardware_sequencing = True
        core.mda.run(useq.MDASequence(**SEQUENCED))
        core.mda.events.frameReady.disconnect(steal)
    assert [meta["mda_event"].index["z"] for meta in frames] == [0, 2]
    assert "camera 'Camera' lost 1 image of a hardware sequence" in caplog.text


def test_limits_that_the_stage_is_outside_of_are_said(tmp_path: Path) -> None:
    config = settings(autofocus={"low_um": 50.0, "high_um": 80.0})
    with (
        acquired(config) as (_, engine, __),
        pytest.raises(ConfigError, match=r"outside of autofocus\.low_um 50"),
    ):
        engine.focuser.focus()


def test_a_processor_that_does_not_answer_is_a_clear_failure() -> None:
    with pytest.raises(TransportError, match="no estimate of focus image 7"):
        EstimateInbox().wait(7, timeout_s=0.01)


def test_a_run_whose_only_position_is_skipped_says_why_and_keeps_the_log(
    tmp_path: Path,
) -> None:
    config = settings(
        run={"folder": str(tmp_path), "name": "skipped"},
        acquisition={"mda": PLAN},
        autofocus={"on_failure": "skip", "most_images": 2, "max_retries": 1},
        store={"restored": False},
    )
    folder = app.run(config, stop=threading.Event(), abandon=threading.Event())
    assert folder is not None
    report = read_report(folder)
    assert report["accounting"]["not_acquired"] == 1
    assert report["accounting"]["focus"] == 2
    assert "not focused, not found in 2 images" in report["reason"]
    lines = (folder / "focus.ndjson").read_text("utf-8").splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["look", "look", "verdict"]


def test_the_loop_holds_focus_against_a_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_of_images(monkeypatch)  # 0.2 um an image
    config = load_config(
        resource_folder("configs") / "demo.yaml",
        (
            *LOCAL,
            f"run.folder={tmp_path}",
            "microscope.height_px=256",
            "microscope.width_px=256",
            "microscope.frames_per_s=4",
            "microscope.specimen.kind=nuclei",
            # Far from where the stage stands: the limits lie around the plan's z.
            # A flat drawing is sharper in focus than optics allow, within 0.5 um of z.
            "microscope.surface={z_um: 83.0, tilt_y_um: 2.0, drift_um_per_min: 48.0}",
            "autofocus={mode: hold}",
            "processing.classifier=delpnet",
            "processing.restoration.method=none",
            "store.restored=false",
            "acquisition.mda={axis_order: tpcz, time_plan: {interval: 0.5, loops: 24}, "
            "stage_positions: [{x: 0, y: 0, z: 80}], "
            "channels: [{config: DAPI, exposure: 10.0}]}",
        ),
    )
    config, over = on_free_ports(config), threading.Event()
    with ThreadPoolExecutor(1) as side:
        processing = side.submit(app.process, config, stop=over)
        try:
            app.acquire(config, stop=threading.Event())
        except BaseException:
            over.set()
            raise
        folder = processing.result()
    assert folder is not None
    lines = [
        json.loads(line)
        for line in (folder / "focus.ndjson").read_text("utf-8").splitlines()
    ]
    kinds = {line["kind"] for line in lines}
    assert {"look", "verdict", "hold"} <= kinds
    verdict = next(line for line in lines if line["kind"] == "verdict")
    assert verdict["focused"], verdict["reason"]
    planned = [line for line in read_journal(folder) if line.get("role") != "focus"]
    assert len(planned) == 24
    terms = read_report(folder)["accounting"]
    assert terms["written"] == 24
    assert terms["focus"] >= 3
    assert terms["unaccounted"] == 0
    risen_um = 0.2 * 23
    moved_um = planned[-1]["z_um"] - planned[0]["z_um"]
    assert moved_um == pytest.approx(risen_um, abs=0.4 * UNIT_UM)
    assert moved_um > 0.4 * risen_um


def test_tiles_beside_the_one_that_a_plan_focuses_are_held_in_focus(
    tmp_path: Path,
) -> None:
    config = settings(
        run={"name": "tiles", "folder": str(tmp_path)},
        acquisition={
            "mda": {
                **PLAN,
                # Planned as if the plate rose by 6 um: a guess for the next tile is far
                # from its focus, and from where the tile before is corrected to.
                "stage_positions": [
                    {"x": 0, "y": 0, "z": 7},
                    {"x": 300, "y": 0, "z": 1},
                ],
                "grid_plan": {"rows": 1, "columns": 2},
            }
        },
        autofocus={"mode": "hold"},
        store={"restored": False},
        processing={
            **{"classifier": "delpnet", "threads": 1, "device": "cpu"},
            "restoration": {"method": "none"},
        },
        transport={"preview": {"endpoint": None}},
    )
    folder = app.run(config, stop=threading.Event(), abandon=threading.Event())
    assert folder is not None
    planned = [line for line in read_journal(folder) if line.get("role") != "focus"]
    assert [line["index"]["p"] for line in planned] == [0, 1, 2, 3]
    for line in planned:
        assert line["z_um"] == pytest.approx(4.0, abs=0.5 * UNIT_UM)


def test_a_live_run_holds_focus_while_frames_go_on(tmp_path: Path) -> None:
    config = settings(
        run={"folder": str(tmp_path), "name": "live"},
        acquisition={"live": {"frames": 28, "exposure_ms": 10}},
        autofocus={"mode": "hold"},
        store={"restored": False},
    )
    microscope = config.microscope.model_dump()
    # Drifts once focus is found, however long a busy machine takes to find it.
    drift = {"drift_um_per_min": 36.0, "drift_from_s": 4.0}
    microscope["surface"] = {"z_um": 4.0, **drift}
    microscope["frames_per_s"] = 4.0
    microscope["height_px"] = microscope["width_px"] = 1024
    config = Config.model_validate({**config.model_dump(), "microscope": microscope})
    folder = app.run(config, stop=threading.Event(), abandon=threading.Event())
    assert folder is not None
    lines = [
        json.loads(line)
        for line in (folder / "focus.ndjson").read_text("utf-8").splitlines()
    ]
    moves = [line for line in lines if line["kind"] == "hold" and line["step_um"]]
    assert moves
    assert all(line["age_ms"] > 0 for line in moves)
    frames = [line for line in read_journal(folder) if line.get("role") != "focus"]
    assert [frame["index"]["t"] for frame in frames] == list(range(28))
    known = [frame for frame in frames if frame["z_um"] is not None]
    assert known[-1]["z_um"] > known[0]["z_um"]
    # Since the first exposure, which was one of the search's.
    begun_ns = min(line["captured_ns"] for line in read_journal(folder))
    away_um = [
        4.0
        + 0.6 * max((frame["captured_ns"] - begun_ns) / 1e9 - 4.0, 0.0)
        - frame["z_um"]
        for frame in known
    ]
    assert np.mean(np.abs(away_um)) < 0.5 * UNIT_UM
    terms = read_report(folder)["accounting"]
    assert (terms["written"], terms["unaccounted"]) == (28, 0)
    assert terms["focus"] == sum(line["kind"] == "look" for line in lines)


class Processor:
    """Reads what it is sent and answers at once."""

    def __init__(self, config: Config, focusing: Focusing) -> None:
        self.reader, self._inbox = LocalReader(config), focusing.inbox
        self.number = 0

    def send(
        self,
        pixels: Any,
        channel: str,
        z_um: float | None,
        captured_ns: int | None = None,
    ) -> int:
        captured_ns = captured_ns or RUN_CLOCK.now_ns()
        self.number += 1
        reading = self.reader.read(pixels, channel, 0.0)
        found = estimate_of(reading, self.number, z_um)
        self._inbox.take(replace(found, captured_ns=captured_ns))
        return self.number


def newest_image(core: Any, hold: LiveHold) -> tuple[Any, float | None, int]:
    """Wait for an image; returns it, where and when it was exposed."""
    wait_for(lambda: core.getRemainingImageCount() > 0)
    while core.getRemainingImageCount() > 1:
        core.popNextImage()
    pixels, tags = core.popNextImageAndMD()
    age = age_ns(tags, time.time_ns())
    if age is None:  # the knock, a leap of the camera's clock, came amid its exposure
        return newest_image(core, hold)
    captured_ns = RUN_CLOCK.now_ns() - age
    return pixels, hold.z_um(captured_ns, 5), captured_ns


@contextmanager
def held_camera(
    surface: dict[str, float], told: list[str], end_um: float
) -> Iterator[tuple[Focusing, Callable[[], int]]]:
    """Hold a running camera in focus; then the stage stands within reach of `end_um`.

    Yields what is asked for and told, and what sends the next image on and returns its
    number.
    """
    config = settings(autofocus={"mode": "hold"})
    microscope = config.microscope.model_dump()
    microscope |= {"surface": {"z_um": 4.0, **surface}, "frames_per_s": 10.0}
    config = Config.model_validate({**config.model_dump(), "microscope": microscope})
    focusing = Focusing(config, told.append)
    processor = Processor(config, focusing)
    with open_core(config) as core, closing(processor.reader):
        core.setExposure(5)
        hold = LiveHold(focusing, core)
        hold.start(processor.send)
        core.startContinuousSequenceAcquisition()

        def send_next() -> int:
            pixels, z_um, captured_ns = newest_image(core, hold)
            processor.send(pixels, "DAPI", z_um, captured_ns)
            hold.notes()
            return processor.number

        try:
            yield focusing, send_next
        finally:
            core.stopSequenceAcquisition()
            hold.stop()
        assert core.getZPosition() == pytest.approx(end_um, abs=0.6 * UNIT_UM)


def times_focused(told: list[str]) -> int:
    return sum("focused, z" in line for line in told)


@pytest.mark.parametrize(("stops", "end_um"), [(False, 22.0), (True, 4.0)])
def test_a_running_camera_finds_again_what_it_lost(
    monkeypatch: pytest.MonkeyPatch,
    stops: bool,
    end_um: float,
) -> None:
    """Or stops amid the search: then the stage goes back to where it held."""
    knocked_s = [0.0]
    clock = SimpleNamespace(
        perf_counter=lambda: time.perf_counter() + knocked_s[0], sleep=time.sleep
    )
    monkeypatch.setattr(virtual_devices, "time", clock)
    told: list[str] = []
    # Drifts by a knock alone, by 18 um: no image of the search looks like that.
    surface = {"drift_um_per_min": 0.06, "drift_from_s": 1000.0}
    with held_camera(surface, told, end_um) as (_, send_next):
        while times_focused(told) < 2:
            number = send_next()
            assert number < 300, told
            if number == 20:
                knocked_s[0] = 19_000.0
            if stops and any("searched again" in line for line in told):
                break
    assert any("lost and searched again (1 of 5)" in line for line in told), told
    assert ("autofocus failed: the camera stopped" in told) == stops


def test_a_running_camera_is_searched_when_somebody_asks() -> None:
    told: list[str] = []
    with held_camera({"drift_um_per_min": 0.0}, told, 4.0) as (focusing, send_next):
        focusing.requests.append("autofocus")
        while times_focused(told) < 2:
            assert send_next() < 100, "\n".join(told)
    assert "focus is searched as asked for" in told


def test_a_live_run_whose_focus_is_not_found_says_that_it_is_not_held(
    tmp_path: Path,
) -> None:
    config = settings(
        run={"folder": str(tmp_path), "name": "unheld"},
        acquisition={"live": {"frames": 3, "exposure_ms": 5}},
        autofocus={"mode": "hold", "most_images": 2},
        store={"restored": False},
    )
    folder = app.run(config, stop=threading.Event(), abandon=threading.Event())
    assert folder is not None
    (warning,) = read_report(folder)["warnings"]
    assert "not found in 2 images; so it is not held" in warning
