"""What the processor reads and writes down of autofocus, whatever a frame says."""

import json

import msgspec
import numpy as np
import pytest
from loop_kit import needs_shipped_engine
from transport_kit import make_estimate, make_header, make_series

from rtfocus.config import parse_config
from rtfocus.errors import WriterError
from rtfocus.focusing import EstimateInbox
from rtfocus.frame import (
    PROTOCOL_VERSION,
    DefocusMap,
    FrameHeader,
    Role,
    SlotPool,
    TileGrid,
)
from rtfocus.monitor import FOCUS_LOG, FocusLog, SeriesReader

HELD = {"kind": "hold", "p": 2, "step_um": 0.5, "reason": "drift"}


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
    ],
)
def test_metadata_of_another_form_hold_no_entries(tmp_path, meta):
    assert FocusLog(tmp_path).take(slot_with(meta)) is None
    assert not (tmp_path / FOCUS_LOG).exists()


@pytest.mark.parametrize(
    "entry", [{}, {"kind": "hold"}, HELD | {"step_um": "far"}, {"kind": "verdict"}]
)
def test_an_entry_without_its_keys_is_kept_and_not_told(tmp_path, entry):
    assert FocusLog(tmp_path).take(logged([entry])) is None
    assert json.loads((tmp_path / FOCUS_LOG).read_text("utf-8")) == entry


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(WriterError, match="cannot be written"):
        FocusLog(tmp_path / "missing").take(logged([HELD]))


SIDE_PX = 144


def reader(mode: str) -> SeriesReader:
    needs_shipped_engine()
    optics = {"numerical_aperture": 0.36, "wavelength_nm": 451, "pixel_size_um": 0.65}
    config = {
        "autofocus": {"mode": mode},
        "channels": [{"name": "default", "optics": optics}],
        "processing": {"classifier": "delpnet"},
    }
    return SeriesReader(
        parse_config(config), make_series(shape=(SIDE_PX, SIDE_PX), bit_depth=16)
    )


def frame(role=Role.RECORD, level=500):
    slot = SlotPool(1, 2 * SIDE_PX**2).acquire(timeout_s=0)
    header = make_header(3, shape=(SIDE_PX, SIDE_PX), z_um=2.0, role=role)
    light = np.random.default_rng(1).poisson(level, header.shape)
    slot.prepare(header)[:] = np.minimum(light, 65535)
    return slot


def all_in_focus():
    grid = TileGrid(2, 2, tile_px=96, stride_px=48.0, origin_px=47.5, signed=True)
    tiles = np.zeros((2, 2), np.float32)
    return DefocusMap(grid, tiles, tiles + 1, tiles.astype(np.int16), tiles + 1)


def test_hold_is_told_of_a_frame_before_its_classifier_is_done():
    held, slot = reader("hold"), frame()
    early = held.look(slot)
    assert (early.sequence, early.z_um, early.index) == (3, 2.0, {"t": 3})
    assert early.focus.early
    assert early.focus.defocus_um is None
    assert early.focus.refusal is None
    whole = held.read(slot, make_estimate(3), all_in_focus()).focus
    assert not whole.early
    assert whole.defocus_um is not None
    assert whole.spectrum == early.focus.spectrum
    assert any(whole.spectrum)
    saturated = held.look(frame(level=1e6)).focus
    assert saturated.refusal == "saturated"
    # Where nothing is held, and of a search's images, the classifier alone tells.
    assert reader("off").look(slot) is None
    assert held.look(frame(Role.FOCUS)) is None


def test_a_look_of_a_frame_that_failed_is_not_taken_for_the_next_one():
    held, slot = reader("hold"), frame()
    held.look(slot)
    slot.prepare(make_header(4, shape=(SIDE_PX, SIDE_PX), role=Role.FOCUS))[:] = 700
    assert held.look(slot) is None
    reading = held.read(slot, make_estimate(4), all_in_focus()).focus
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
    return held.look(slot), held.read(slot, make_estimate(3), all_in_focus())
