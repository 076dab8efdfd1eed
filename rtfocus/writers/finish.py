"""Finish: what turns a recorded run folder into a finished one.

Closing a run, repairing a cut-off one and completing one are the same steps: lengths,
totals, the journal as columns in ``frames.zarr``, what a viewer shows black and white,
and the report. It is written last: its presence means that all the others are done.
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import InputError, WriterError, writing
from rtfocus.files import refuse_links, remove, replace
from rtfocus.frame import AXES, FrameResult
from rtfocus.writers.arrays import RunImages
from rtfocus.writers.commit import Tally, report_of
from rtfocus.writers.folder import RunLock
from rtfocus.writers.header import (
    CONFIDENCE,
    DEFOCUS,
    EXPECTED_ERROR,
    JOURNAL_NAME,
    RAW,
    REPORT_NAME,
    RESTORED,
    ImageSpec,
    RunHeader,
    is_finished,
    read_header,
    write_json,
)
from rtfocus.writers.journal import (
    Line,
    is_unrestored,
    journal_lines,
    read_journal,
    result_part,
    write_journal,
)
from rtfocus.writers.layout import Windows, write_group
from rtfocus.writers.places import FrameSample, Index, Plan, complete, thinned
from rtfocus.writers.recovery import set_aside

FRAMES_NAME = "frames.zarr"
COUNTED = ("totals", "missing", "time_points", "planned_frames")
"""Parts of a report that follow from the journal."""
Restore = Callable[[NDArray[Any], str], FrameResult]
"""Raw pixels and the channel's name to a result with a restored frame."""
_BLOCK = 8192
"""Rows read, converted and written at once: memory stays flat in long runs."""
_UNKNOWN = -1
_MOST_NAMED = 5
_WORDS: dict[str, Callable[[Line], str]] = {
    "status": lambda line: line["status"],
    "reason": lambda line: line.get("reason") or line.get("place") or "",
    "skipped": lambda line: line.get("skipped") or "",
    "flags": lambda line: " ".join(line.get("flags") or ()),
    "engines": lambda line: " ".join(sorted((line.get("engines") or {}).values())),
}
_PERCENTILES = (0.1, 99.9)
_MAP_PERCENTILES = (2.0, 98.0)
"""Of defocus: single tiles are far off, and would be all that is seen."""


def finish_run(
    folder: Path,
    header: RunHeader,
    images: RunImages,
    tally: Tally,
    report: dict[str, Any],
    *,
    unnamed_too: bool = False,
) -> None:
    """Trim t, write totals, missing places, journal columns and the report.

    Parameters
    ----------
    folder, header, images
        The run.
    tally
        What its journal adds up to.
    report
        What ``report.json`` says besides.
    unnamed_too
        Whether shards before the end that no line names are set aside, as those beyond
        it are: left by a killed process. After a failed write they stay for a repair.

    Raises
    ------
    WriterError
        If any of it cannot be written; the folder can be repaired.
    """
    # Many readers refuse an image without a time point. What no line names was never
    # acknowledged, but is somebody's.
    left = set(images.trim(max(tally.extent, 1)))
    if unnamed_too:
        left.update(_unnamed(images, tally))
    if (aside := set_aside(folder, sorted(left))) is not None:
        report = report | {"set_aside": str(aside.relative_to(folder).as_posix())}
    totals = tally.totals()
    missing = defaultdict(list)
    for line in tally.missing:
        if line["index"] is not None:
            told = {key: line[key] for key in ("sequence", "index", "reason")}
            missing[complete(line["index"])["p"]].append(told)
    images.describe_collections()
    write_columns(folder, tally.lines)
    windows = contrast(images, tally.sample)
    for position in range(images.positions):
        found = {"finished": True, "missing": missing[position], "totals": totals}
        images.describe(position, found, windows)
    write_json(
        folder / REPORT_NAME,
        {
            "name": header.series.name,
            "series_uid": header.series.series_uid,
            "started_ns": header.series.started_ns,
            "planned_frames": tally.plan.images,
            "time_points": tally.extent,
            "totals": totals,
            "missing": tally.missing,
            **report,
        },
        fsync=header.store.fsync,
    )


def _unnamed(images: RunImages, tally: Tally) -> list[Path]:
    """Return the shards that hold none of the places which journal lines name."""
    files = []
    for _, position, shard in images.shards():
        planned = list(filter(tally.plan.contains, shard.places(position)))
        if planned and not any(place in tally.named for place in planned):
            files.append(shard.path)
    return files


def count_unrestored(folder: Path) -> int:
    """Return how many stored frames of a run have no restored image."""
    plan = Plan(read_header(folder).series)
    return sum(map(is_unrestored, journal_lines(folder / JOURNAL_NAME, plan)))


def places_without_frame(folder: Path, time_points: int) -> tuple[int, list[str]]:
    """Count the planes of a run's raw images that no frame came to; name the first."""
    plan = Plan(read_header(folder).series)
    there = {
        plan.flat(complete(line["index"]))
        for line in journal_lines(folder / JOURNAL_NAME, plan)
        if RAW in line["stored"]
    }
    shape = (time_points, *(plan.sizes[axis] or 1 for axis in AXES[1:]))
    lost = (number for number in range(prod(shape)) if number not in there)
    first = [np.unravel_index(number, shape) for number in islice(lost, _MOST_NAMED)]
    named = [" ".join(map("{}={}".format, AXES, place)) for place in first]
    return prod(shape) - len(there), named


def complete_restoration(
    folder: Path, restore: Restore, *, on_frame: Callable[[], None] = lambda: None
) -> int:
    """Restore the frames of a finished run that were skipped; return their number.

    The journal is replaced as a whole once all pixels are committed, so that a
    kill on the way leaves the run as it was.

    Raises
    ------
    InputError
        If the run is unfinished.
    WriterError
        If it keeps no raw frames or cannot be written.
    """
    header = read_header(folder)
    refuse_links(folder)
    with RunLock(folder, "completing"):
        return _complete(folder, header, restore, on_frame)


def _complete(
    folder: Path, header: RunHeader, restore: Restore, on_frame: Callable[[], None]
) -> int:
    if not is_finished(folder):
        msg = f"'{folder}' is not finished; first: rtfocus check {folder} --repair"
        raise InputError(msg)
    plan = Plan(header.series)
    images = RunImages(folder, header, create=False)
    if not {RAW, RESTORED} <= set(images.names):
        msg = f"'{folder}' holds {images.names}; completing needs raw and restored"
        raise WriterError(msg)
    # By place: frames that a repair found again may have no sequence.
    done: dict[int, Line] = {}
    for line in journal_lines(folder / JOURNAL_NAME, plan):
        if not is_unrestored(line):
            continue
        index = complete(line["index"])
        channel = header.series.channels[index["c"]].name
        done[plan.flat(index)] = _restore_frame(line, channel, folder, images, restore)
        on_frame()
    lines = [
        line | done[plan.flat(complete(line["index"]))] if is_unrestored(line) else line
        for line in journal_lines(folder / JOURNAL_NAME, plan)
    ]
    write_journal(folder / JOURNAL_NAME, map(msgspec.json.encode, lines))
    tally = Tally(plan)
    for line in lines:
        tally.add(line)
    finish_run(folder, header, images, tally, _old_report(folder, len(done)))
    return len(done)


def _restore_frame(
    line: Line, channel: str, folder: Path, images: RunImages, restore: Restore
) -> Line:
    """Restore and store the frame of a line; return what the line then says of it."""
    index = complete(line["index"])
    result = restore(images.read(RAW, index), channel)
    if result.restored is None:
        msg = f"frame {line['sequence']} was not restored: {result.skipped}"
        raise WriterError(msg)
    parts = {RESTORED: result.restored, EXPECTED_ERROR: result.expected_error}
    stored = {n: p for n, p in parts.items() if n in images.names and p is not None}
    try:
        for name, pixels in stored.items():
            images.write(name, index, [pixels]).result()
    except (OSError, ValueError) as error:
        msg = f"frame {line['sequence']} cannot be written to '{folder}': {error}"
        raise WriterError(msg) from error
    return {
        "stored": [*line["stored"], *stored],
        "expected_error_counts": result_part(result)["expected_error_counts"],
        "skipped": None,
        "engines": result.engines,
        "completed": True,
    }


def _old_report(folder: Path, restored: int) -> dict[str, Any]:
    """Return the report as it was, less what is counted anew."""
    report = report_of(folder)
    own = {key: value for key, value in report.items() if key not in COUNTED}
    return own | {"restored": own.get("restored", 0) + restored}


_COLUMNS = {
    "sequence": "int64",
    "event_index": "int64",
    "t": "int64",
    "p": "int32",
    "c": "int32",
    "z": "int32",
    "captured_ns": "int64",
    "received_ns": "int64",
    "durable_ns": "int64",
    "exposure_ms": "float64",
    "z_um": "float64",
    "z_offset_um": "float64",
    "planned_s": "float64",
    "actual_s": "float64",
    "camera_image_number": "int64",
    "level": "int16",
    "defocus_um": "float32",
    "signed": "int8",
    "confidence": "float32",
    "foreground": "float32",
    "expected_error_counts": "float32",
}
"""Name to dtype; -1 or NaN: unknown."""
_ESTIMATED = ("level", "defocus_um", "signed", "confidence", "foreground")


def _read(name: str, block: list[Line]) -> list[Any]:
    """Return a column of lines: by the block, a call per value would cost more."""
    if name in AXES:
        places = (line.get("index") for line in block)
        return [None if place is None else place.get(name, 0) for place in places]
    if name in _ESTIMATED:
        return [(line.get("estimate") or {}).get(name) for line in block]
    return [line.get(name) for line in block]


def write_columns(folder: Path, rows: int) -> Path:
    """Write the journal's columns; an older ``frames.zarr`` is replaced.

    Parameters
    ----------
    folder
        The run folder; its journal has `rows` lines.

    Raises
    ------
    WriterError
        If the journal cannot be read or the arrays cannot be written.
    """
    group = folder / FRAMES_NAME
    part = folder / f".{FRAMES_NAME}.part"
    with writing(group, WriterError):
        remove(part)
        write_group(part, {}, fsync=False)
        columns = _Columns(part, rows)
        lines = read_journal(folder / JOURNAL_NAME)
        blocks = iter(lambda: list(islice(lines, _BLOCK)), [])
        for number, block in enumerate(blocks):
            columns.write(number, block)
        columns.close()
        replace(part, group)
    return group


class _Columns:
    """The arrays, written chunk by chunk.

    Their files are written directly: one plain chunk per block is simpler than any
    library makes it, and opening 25 arrays would take longer than the whole rest of
    closing a run.
    """

    def __init__(self, group: Path, rows: int) -> None:
        self._group = group
        self._rows = rows
        self._chunk = min(_BLOCK, max(rows, 1))
        self._dtypes: dict[str, str] = {}
        self._codes: dict[str, dict[str, int]] = {name: {} for name in _WORDS}

    def write(self, number: int, block: list[Line]) -> None:
        """Write chunk `number` of every column."""
        for name, dtype in _COLUMNS.items():
            self._write_chunk(name, dtype, number, _read(name, block))
        for name, word in _WORDS.items():
            codes = self._codes[name]
            numbers = [codes.setdefault(word(line), len(codes)) for line in block]
            self._write_chunk(name, "int32", number, numbers)
        times = [line.get("stage_ms") or {} for line in block]
        for stage in sorted({stage for of_frame in times for stage in of_frame}):
            values = [of_frame.get(stage) for of_frame in times]
            self._write_chunk(f"{stage}_ms", "float32", number, values)

    def close(self) -> None:
        """Write the arrays' metadata, and what the codes mean."""
        for name, dtype in (dict.fromkeys(self._codes, "int32") | _COLUMNS).items():
            self._folder(name, dtype)
        for name, dtype in self._dtypes.items():
            document = self._metadata(name, dtype)
            (self._group / name / "zarr.json").write_bytes(document)

    def _folder(self, name: str, dtype: str) -> Path:
        if name not in self._dtypes:
            (self._group / name).mkdir(exist_ok=True)
            self._dtypes[name] = dtype
        return self._group / name

    def _write_chunk(
        self, name: str, dtype: str, number: int, values: list[Any]
    ) -> None:
        little, fill = np.dtype(dtype).newbyteorder("<"), _fill(dtype)
        column = np.full(self._chunk, fill, dtype=little)
        column[: len(values)] = [fill if value is None else value for value in values]
        (self._folder(name, dtype) / f"c.{number}").write_bytes(column.tobytes())

    def _metadata(self, name: str, dtype: str) -> bytes:
        fill = _fill(dtype)
        words = self._codes.get(name)
        return msgspec.json.encode(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": [self._rows],
                "data_type": dtype,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [self._chunk]},
                },
                "chunk_key_encoding": {
                    "name": "default",
                    "configuration": {"separator": "."},
                },
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                "fill_value": "NaN" if np.isnan(fill) else fill,
                "dimension_names": ["frame"],
                "attributes": {} if words is None else {"words": list(words)},
            }
        )


def _fill(dtype: str) -> float:
    return np.nan if np.dtype(dtype).kind == "f" else _UNKNOWN


def contrast(images: RunImages, sample: FrameSample) -> dict[str, Windows]:
    """Return the windows of all images, by name; one per index of axis c.

    None stands where there is nothing to see: the planned one holds there.
    """
    channels = images.channels
    windows: dict[str, Windows] = {}
    for spec in images.specs:
        if spec.name == CONFIDENCE:
            continue
        windows[spec.name] = [
            window
            for channel in range(channels)
            for window in [_window(images, spec, sample, channel)] * spec.planes
        ]
    return windows


def _window(
    images: RunImages, spec: ImageSpec, sample: FrameSample, channel: int
) -> tuple[float, float] | None:
    values = [
        _values(images, spec.name, place) if known is None else known
        for place, known in sample.frames(spec.name, channel)
    ]
    finite = np.concatenate(values) if values else np.empty(0)
    if finite.size == 0:
        return None
    if spec.name == DEFOCUS:
        low, high = percentiles(finite, _MAP_PERCENTILES)
        # Where both signs occur grey is focus.
        reach = max(abs(low), abs(high))
        low, high = (-reach, reach) if low < 0 else (0.0, high)
    else:
        low, high = percentiles(finite, _PERCENTILES)
    if np.dtype(spec.dtype).kind != "f":
        low, high = np.floor(low), max(np.ceil(high), np.floor(low) + 1)
    return (float(low), float(high)) if high > low else None


def percentiles(values: NDArray[Any], percents: tuple[float, float]) -> NDArray[Any]:
    """Return what `numpy.percentile` does, in a tenth of its time: values sort fast."""
    places = np.multiply(percents, (values.size - 1) / 100)
    whole = places.astype(int)
    low, high = np.sort(values)[[whole, np.ceil(places).astype(int)]].astype(float)
    result: NDArray[Any] = low + (high - low) * (places - whole)
    return result


def _values(images: RunImages, name: str, place: Index) -> NDArray[np.generic]:
    try:
        return thinned(images.read(name, place))
    except WriterError:
        # `check` finds a damaged frame, which does not keep a run from its end.
        return np.empty(0)
