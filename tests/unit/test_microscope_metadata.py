"""Metadata, complaints and reports: small, bounded, and true."""

import json
import logging
from datetime import datetime

import pytest
import useq

from rtfocus.microscope.delivery import (
    LOGGER,
    READOUT_MS,
    AcquisitionReport,
    Observations,
    age_ns,
    frame_json,
    image_number,
)
from rtfocus.microscope.series import Complaints, summary_json

NOW_NS = 1_795_235_976_500_000_000


def stamp(ns):
    return datetime.fromtimestamp(ns / 1e9).isoformat(sep=" ", timespec="microseconds")


def test_the_cores_time_stamp_is_local_time():
    taken = NOW_NS - 30_000_000
    found = age_ns({"TimeReceivedByCore": stamp(taken)}, NOW_NS)
    assert found == pytest.approx(30_000_000, abs=2000)


def test_a_readout_that_the_camera_tells_is_taken_off():
    tags = {"TimeReceivedByCore": stamp(NOW_NS), READOUT_MS: "12.5"}
    assert age_ns(tags, NOW_NS) == pytest.approx(12_500_000, abs=2000)


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"TimeReceivedByCore": "yesterday"},
        {"TimeReceivedByCore": stamp(NOW_NS - 3600_000_000_000)},
        {"TimeReceivedByCore": stamp(NOW_NS + 5_000_000_000)},
        {"TimeReceivedByCore": stamp(NOW_NS), READOUT_MS: "long"},
    ],
    ids=["absent", "no time", "an hour off", "in the future", "no duration"],
)
def test_a_time_stamp_that_cannot_be_is_not_taken(tags):
    assert age_ns(tags, NOW_NS) is None


def test_image_numbers_are_numbers():
    assert image_number({"ImageNumber": "17"}) == 17
    assert image_number({}) is None


def test_frame_metadata_stays_small_and_json():
    meta = {
        "format": "frame-dict",
        "version": "1.0",
        "mda_event": useq.MDAEvent(exposure=3),
        "property_values": [
            {"dev": "Camera", "prop": f"P{n}", "val": "x" * 1000} for n in range(200)
        ],
        "camera_metadata": {f"Tag{n}": "y" * 1000 for n in range(200)},
        "exposure_ms": 3.0,
    }
    found = frame_json(meta)
    assert "mda_event" not in found
    assert found["exposure_ms"] == 3.0
    assert len(found["property_values"]) == len(found["camera_metadata"]) == 24
    assert len(json.dumps(found)) < 8000


def test_the_summary_leaves_the_plan_to_its_own_field():
    sequence = useq.MDASequence(channels=["DAPI"])
    summary = {"format": "summary-dict", "mda_sequence": sequence}
    assert summary_json(summary) == {"format": "summary-dict"}
    assert summary_json(None) == {}


@pytest.mark.parametrize("alone", [True, False])
def test_a_cancellation_repeats_the_plan_only_in_the_log_of_a_script(caplog, alone):
    logger = logging.getLogger(LOGGER)
    with Complaints().heard(alone=alone):
        logger.warning("MDA Canceled: %s", useq.MDASequence(channels=["DAPI"]))
        logger.warning("stage stuck")
    logger.warning("MDA Canceled: after the run")
    told = [record.getMessage()[:12] for record in caplog.records]
    before = [] if alone else ["MDA Canceled"]
    assert told == [*before, "stage stuck", "MDA Canceled"]


def test_complaints_are_counted_and_bounded(capfd):
    complaints = Complaints()
    logger = logging.getLogger(LOGGER)
    level = logger.level
    with complaints.heard():
        logger.warning("MDA Canceled: whatever")
        logger.info("not worth a word")
        for number in range(100):
            logger.warning("stage %s is stuck", number)
            logger.warning("Failed to set channel. no preset")
    texts = complaints.texts
    assert texts[0] == "stage 0 is stuck"
    assert texts[1] == "Failed to set channel. no preset (100 times)"
    assert texts[-1] == "further warnings (81 times)"
    assert len(texts) == 21
    assert capfd.readouterr().err == ""
    assert logger.level == level
    assert complaints not in logger.handlers


def test_a_report_reads_as_text():
    seen = Observations()
    seen.note_buffer(3, 97)
    seen.note_buffer(1, 99)
    seen.note_start(1.0, 1.25)
    seen.note_start(2.0, 1.9)
    report = AcquisitionReport(
        series_uid="u",
        frames=90,
        planned=100,
        camera_lost=10,
        not_acquired=0,
        reason="completed",
        seconds=9.0,
        lateness=seen.lateness(),
        most_waiting=seen.most_waiting,
        least_free=seen.least_free,
        warnings=("stage stuck",),
    )
    text = str(report)
    first = text.splitlines()[0]
    assert "completed" not in first
    assert "90 of 100" in first
    assert "10 lost by the camera" in first
    assert "in 9.0 s (10.0 frames/s)" in first
    assert "max 250 ms" in text
    assert "at most 3 images waiting, room for at least 97" in text
    assert "warning: stage stuck" in text


def test_without_planned_times_nothing_is_late():
    assert Observations().lateness() is None
