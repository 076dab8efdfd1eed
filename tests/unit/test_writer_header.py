"""Header and lines of a run: what is written is read again, what no run has is told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config.sections import StoreConfig
from rtfocus.errors import WriterError
from rtfocus.frame import (
    FrameHeader,
    FrameResult,
    Position,
    SeriesStart,
    TileGrid,
)
from rtfocus.writers.header import RunHeader, read_header
from rtfocus.writers.journal import frame_line, journal_lines, result_part, scan_journal
from rtfocus.writers.places import Plan

SERIES = SeriesStart(
    version=1,
    series_uid="u",
    name="n",
    started_ns=5,
    shape=(300, 200),
    dtype="<u2",
    sizes={"t": None, "p": 2, "c": 1, "z": 3},
    channels=[Channel("a", OpticalSystem(0.5, 500.0, 0.25))],
    positions=[Position("p"), Position("q")],
    pixel_size_um=0.25,
    bit_depth=12,
)
GRID = TileGrid(6, 4, 96, 48.0, 47.5, signed=True)
RUN = RunHeader(SERIES, StoreConfig(), GRID, True, {"config": {"a": 1}}, True, True)


def changed(**of_series: Any) -> RunHeader:
    return replace(RUN, series=msgspec.structs.replace(SERIES, **of_series))


@pytest.mark.parametrize(
    "run",
    [
        RUN,
        replace(RUN, grid=None, restored=False, expects_error=False),
        replace(RUN, states_deviation=False, provenance={}),
        changed(shape=(1, 1, 3), dtype="|u1"),
        changed(shape=(1 << 16, 1 << 17), dtype="<f4"),
        changed(sizes={"p": 2, "t": 1 << 39}),
    ],
)
def test_a_header_is_read_as_it_was_written(run: RunHeader, tmp_path: Path) -> None:
    run.write(tmp_path)
    assert read_header(tmp_path) == run


shapes = ((9,), (0, 9), (9, -9), (9, 9, 1), (9, 9, 4), (1 << 16, (1 << 17) + 1))
lengths = ({"z": None}, {"t": 0}, {"z": -1}, {"y": 1}, {"t": 1 << 40})
FAULTS = {
    "is no frame": [changed(shape=shape) for shape in shapes],
    "is no pixel type": [changed(dtype=d) for d in ("?", "<c8", "S3", "O", "x")],
    "are no plan": [changed(sizes={"p": 2, **sizes}) for sizes in lengths],
    "no channel or no position": [changed(channels=[]), changed(positions=[])],
    "is no length": [changed(pixel_size_um=um) for um in (0.0, -1.0)],
    "its maps have": [
        replace(RUN, grid=replace(GRID, **wrong))
        for wrong in ({"rows": 0}, {"columns": 1 << 33}, {"stride_px": 0.0})
    ],
    "its config is none": [replace(RUN, provenance={"config": [1]})],
    "plans 3 along p but lists 2": [changed(sizes={"p": 3})],
    "plans 2 along c but lists 1": [changed(sizes={"p": 2, "c": 2})],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_run_has_is_damage(fault: str, tmp_path: Path) -> None:
    for run in FAULTS[fault]:
        run.write(tmp_path)
        with pytest.raises(WriterError, match=f"is damaged: .*{fault}"):
            read_header(tmp_path)


PLAN = Plan(SERIES)
FRAME = FrameHeader(1, "u", 7, (300, 200), "<u2", 0, 1.0, {"t": 4, "p": 1})
SOUND = msgspec.json.encode(
    frame_line(FRAME, "written", 9, None, stored=("raw",), error=None)
)
pieces = st.one_of(
    st.just(SOUND + b"\n"),
    st.just(b"\0" * 9 + SOUND + b"\n"),
    st.just(SOUND.replace(b'"p":1', b'"p":2') + b"\n"),
    st.binary(max_size=40).map(lambda data: data.replace(b"\n", b"") + b"\n"),
)


@given(found=st.lists(pieces, max_size=6), cut=st.integers(0, 12))
def test_all_that_lies_in_a_journal_is_told_and_sound_lines_alone_count(
    found: list[bytes], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "frames.ndjson"
    torn = SOUND[:cut]
    path.write_bytes(b"".join(found) + torn)
    records = list(scan_journal(path, PLAN))
    assert [record.text for record in records] == [*found, *[torn] * bool(torn)]
    starts = np.cumsum([0, *map(len, found)])
    assert [record.start for record in records] == starts[: len(records)].tolist()
    assert [record.number for record in records] == [n + 1 for n in range(len(records))]
    for record in records:
        assert (record.line is not None) == (SOUND in record.text)
        is_sound = record.text == SOUND + b"\n"
        assert record.is_damaged == (not is_sound and record.text != torn)
        assert (record.fault is None) == is_sound
    if any(record.is_damaged for record in records):
        with pytest.raises(WriterError, match=r"is damaged in line \d+: .*--repair"):
            list(journal_lines(path, PLAN))
    else:
        lines = list(journal_lines(path, PLAN))
        assert [line["index"] for line in lines] == [FRAME.index] * len(found)


def test_a_line_says_of_the_error_what_the_tiles_say_that_know_it() -> None:
    error = np.array([[3.0, np.nan], [0.0, 5.0]], np.float32)
    part = result_part(FrameResult(None, None, None, error))
    assert part["expected_error_counts"] == pytest.approx((34 / 3) ** 0.5)
    part = result_part(FrameResult(None, None, None, np.full_like(error, np.nan)))
    assert part["expected_error_counts"] is None
