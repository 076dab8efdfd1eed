"""What the processor reads and writes down of autofocus, whatever a frame says."""

import json
from collections import Counter
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from loop_kit import needs_shipped_engine
from msgspec.msgpack import Ext
from transport_kit import make_estimate, make_header, make_series

from rtfocus.autofocus.estimator import FocusReader, look_at
from rtfocus.channel import Channel
from rtfocus.config import parse_config
from rtfocus.errors import ConfigError, WriterError
from rtfocus.focusing import EstimateInbox
from rtfocus.frame import (
    PROTOCOL_VERSION,
    DefocusMap,
    FrameHeader,
    Role,
    SlotPool,
    TileGrid,
)
from rtfocus.monitor import FOCUS_LOG, FocusLog
from rtfocus.report.facts import left_out_by_hold

HELD = {
    "kind": "hold",
    "time_ns": 1,
    "p": 2,
    "step_um": 0.5,
    "error_um": 0.6,
    "drift_um": 1.0,
    "reason": "drift",
}


def slot_with(meta):
    slot = SlotPool(1, 16).acquire(timeout_s=0)
    slot.prepare(
        FrameHeader(
            version=PROTOCOL_VERSION,
            series_uid="u",
            sequence=0,
            shape=(2, 2),
            dtype="|u1",
            captured_ns=0,
            exposure_ms=1.0,
            index={"t": 0},
            frame_meta=meta,
        )
    )
    return slot


def logged(entries):
    return slot_with({"extra": {"rtfocus": {"focus_log": entries}}})


def test_a_move_is_written_and_told(tmp_path):
    assert FocusLog(tmp_path).take(logged([HELD])) == (
        "held at position 2: +0.50 um (drift)"
    )
    assert json.loads((tmp_path / FOCUS_LOG).read_text("utf-8")) == HELD


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"extra": 1},
        {"extra": {"rtfocus": None}},
        {"extra": {"rtfocus": {"focus_log": "text"}}},
        {"extra": {"rtfocus": {"focus_log": [1, None]}}},
        {"extra": {"rtfocus": {"focus_log": [{"a": Ext(5, b"no JSON")}, {(1, 2): 3}]}}},
    ],
)
def test_metadata_of_another_form_hold_no_entries(tmp_path, meta):
    assert FocusLog(tmp_path).take(slot_with(meta)) is None
    assert not (tmp_path / FOCUS_LOG).exists()


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"kind": "hold"},
        HELD | {"step_um": "far"},
        {"kind": "verdict"},
        {"kind": []},
    ],
)
def test_an_entry_without_its_keys_is_kept_and_not_told(tmp_path, entry):
    assert FocusLog(tmp_path).take(logged([entry])) is None
    assert json.loads((tmp_path / FOCUS_LOG).read_text("utf-8")) == entry


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(WriterError, match="cannot be written"):
        FocusLog(tmp_path / "missing").take(logged([HELD]))


SIDE_PX = 144


def reader(mode: str, held=None, channels=("default",), **autofocus) -> FocusReader:
    needs_shipped_engine()
    optics = {"numerical_aperture": 0.36, "wavelength_nm": 451, "pixel_size_um": 0.65}
    config = {
        "autofocus": {"mode": mode, **autofocus},
        "channels": [{"name": name, "optics": optics} for name in channels],
        "processing": {"classifier": "delpnet"},
    }
    series = make_series(
        shape=(SIDE_PX, SIDE_PX), bit_depth=16, channels=[*map(Channel, channels)]
    )
    return FocusReader(
        parse_config(config), series, Counter() if held is None else held
    )


def frame(role=Role.RECORD, level=500, **header):
    slot = SlotPool(1, 2 * SIDE_PX**2).acquire(timeout_s=0)
    header = make_header(3, shape=(SIDE_PX, SIDE_PX), z_um=2.0, role=role, **header)
    light = np.random.default_rng(1).poisson(level, header.shape)
    slot.prepare(header)[:] = np.minimum(light, 65535)
    return slot


def seen(slot):
    return slot.frame(), slot.pixels


def all_in_focus():
    grid = TileGrid(2, 2, tile_px=96, stride_px=48.0, origin_px=47.5, signed=True)
    tiles = np.zeros((2, 2), np.float32)
    return DefocusMap(grid, tiles, tiles + 1, tiles.astype(np.int16), tiles + 1)


def test_a_region_is_refused_if_and_only_if_no_tile_has_its_centre_in_it():
    centres = 36 + 48 * np.arange(10)  # of DelpNet's tiles
    for start in range(0, 150, 7):
        for side in (1, 11, 30, 47, 48):
            region = [start, 30, side, 60]
            if np.any((centres >= start) & (centres < start + side)):
                reader("hold", region=region)
                continue
            with pytest.raises(ConfigError, match=r"between the tiles.* 48 px wide"):
                reader("hold", region=region)
            with pytest.raises(ConfigError, match=r"between the tiles"):
                reader("hold", region=[30, start, 60, side])


def test_hold_is_told_of_a_frame_before_its_classifier_is_done():
    held, slot = reader("hold"), frame()
    early = held.look(*seen(slot))
    assert (early.sequence, early.z_um, early.index) == (3, 2.0, {"t": 3})
    assert early.focus.early
    assert early.focus.defocus_um is None
    assert early.focus.refusal is None
    whole = held.read(*seen(slot), make_estimate(3), all_in_focus()).focus
    assert not whole.early
    assert whole.defocus_um is not None
    assert whole.spectrum == early.focus.spectrum
    assert any(whole.spectrum)
    saturated = held.look(*seen(frame(level=1e6))).focus
    assert saturated.refusal == "saturated"
    # Where nothing is held, and of a search's images, the classifier alone tells.
    assert reader("off").look(*seen(slot)) is None
    assert held.look(*seen(frame(Role.FOCUS))) is None


def test_frames_that_come_too_fast_are_left_out_told_and_counted(monkeypatch):
    clock, held = SimpleNamespace(s=0.0), Counter()
    monkeypatch.setattr("rtfocus.workers.time.perf_counter", lambda: clock.s)
    monkeypatch.setattr("rtfocus.workers.time.thread_time", lambda: clock.s)

    def slow_look(*given):
        clock.s += 0.1
        return look_at(*given)

    monkeypatch.setattr("rtfocus.autofocus.estimator.look_at", slow_look)
    fast, slot, inbox, heard = reader("hold", held), frame(), EstimateInbox(), []
    inbox.also = heard.append
    for sequence in range(100):
        slot.prepare(make_header(sequence, shape=(SIDE_PX, SIDE_PX)))
        early = fast.look(*seen(slot))
        whole = fast.read(*seen(slot), make_estimate(sequence), all_in_focus())
        for estimate in (early, whole):
            if estimate is not None:
                inbox.take(estimate)
        assert (early is None) == (whole.focus.refusal == "left_out")
        clock.s += 0.1
    assert sum(held.values()) == 100
    assert 15 < held["looked_at"] < 45
    # Hold hears of those looked at alone, whoever waits for an estimate of all.
    assert [one.focus.early for one in heard] == [True] * held["looked_at"]
    assert inbox.wait(99, timeout_s=0).sequence == 99
    told = left_out_by_hold({"held": dict(held)})
    assert told.startswith(f"hold looked at {held['looked_at']} of 100 frames")
    assert left_out_by_hold({"held": {"looked_at": 3}}) is None


def test_frames_of_the_focus_channel_alone_are_looked_at():
    held = Counter()
    two = reader("hold", held, channels=("dna", "actin"), focus_channel="actin")
    dna, actin = (frame(index={"t": 0, "c": c}) for c in (0, 1))
    assert two.look(*seen(dna)) is None
    assert two.read(*seen(dna), make_estimate(3), all_in_focus()).focus is None
    assert two.look(*seen(actin)).focus.early
    assert held == {"looked_at": 1}
    # The plan's first channel where none is named, as the microscope side has it.
    first = reader("hold", channels=("dna", "actin"))
    assert first.look(*seen(dna)).focus.early
    assert first.look(*seen(actin)) is None
    probe = frame(Role.FOCUS, index={"t": 0, "c": 1})
    assert first.read(*seen(probe), make_estimate(3), all_in_focus()).focus is not None


def test_a_look_of_a_frame_that_failed_is_not_taken_for_the_next_one():
    held, slot = reader("hold"), frame()
    held.look(*seen(slot))
    slot.prepare(make_header(4, shape=(SIDE_PX, SIDE_PX), role=Role.FOCUS))[:] = 700
    assert held.look(*seen(slot)) is None
    reading = held.read(*seen(slot), make_estimate(4), all_in_focus()).focus
    assert not any(reading.spectrum)


def test_hold_hears_of_every_frame_once_and_searches_of_whole_estimates():
    inbox, heard = EstimateInbox(), []
    inbox.also = heard.append
    early, whole = (
        msgspec.structs.replace(reading, sequence=0) for reading in readings()
    )

    def numbered(estimate, sequence, uid="series-1"):
        return msgspec.structs.replace(estimate, sequence=sequence, series_uid=uid)

    for estimate in (
        early,
        numbered(early, 1),
        whole,
        numbered(whole, 1),
        numbered(whole, 2),
        numbered(whole, 0, "series-2"),
    ):
        inbox.take(estimate)
    assert [(one.series_uid, one.sequence, one.focus.early) for one in heard] == [
        ("series-1", 0, True),
        ("series-1", 1, True),
        ("series-1", 2, False),
        ("series-2", 0, False),
    ]
    inbox.take(numbered(early, 5))
    inbox.take(numbered(whole, 4))
    assert inbox.wait(4, timeout_s=0).focus == whole.focus


def readings():
    held, slot = reader("hold"), frame()
    return held.look(*seen(slot)), held.read(
        *seen(slot), make_estimate(3), all_in_focus()
    )
