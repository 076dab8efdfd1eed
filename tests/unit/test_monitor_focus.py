"""What the processor writes down of autofocus, whatever a frame says."""

import json

import pytest

from rtfocus.errors import WriterError
from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, SlotPool
from rtfocus.monitor import FOCUS_LOG, FocusLog

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
