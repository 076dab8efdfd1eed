"""Columns: the journal as 1-D Zarr arrays, one per quantity, in ``frames.zarr``.

Row i is line i of the journal. Words (status, engines ...) are kept as codes into
the array's attribute ``words``, because Zarr v3 has no settled string type.
"""

import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from rtfocus.errors import WriterError
from rtfocus.writers.header import JOURNAL_NAME
from rtfocus.writers.journal import Line, read_journal
from rtfocus.writers.layout import update_attributes, write_group

FRAMES_NAME = "frames.zarr"
_BLOCK = 8192
"""Rows read, converted and written at once: memory stays flat in long runs."""

_UNKNOWN = -1


def _integer(key: str) -> Callable[[Line], Any]:
    return lambda line: _or(line.get(key), _UNKNOWN)


def _number(key: str) -> Callable[[Line], Any]:
    return lambda line: _or(line.get(key), np.nan)


def _axis(axis: str) -> Callable[[Line], Any]:
    def read(line: Line) -> int:
        index = line.get("index")
        return _UNKNOWN if index is None else int(index.get(axis, 0))

    return read


def _estimate(key: str, absent: float) -> Callable[[Line], Any]:
    return lambda line: _or((line.get("estimate") or {}).get(key), absent)


_COLUMNS: dict[str, tuple[str, Callable[[Line], Any]]] = {
    "sequence": ("int64", _integer("sequence")),
    "event_index": ("int64", _integer("event_index")),
    "t": ("int64", _axis("t")),
    "p": ("int32", _axis("p")),
    "c": ("int32", _axis("c")),
    "z": ("int32", _axis("z")),
    "captured_ns": ("int64", _integer("captured_ns")),
    "received_ns": ("int64", _integer("received_ns")),
    "durable_ns": ("int64", _integer("durable_ns")),
    "exposure_ms": ("float64", _number("exposure_ms")),
    "z_um": ("float64", _number("z_um")),
    "z_offset_um": ("float64", _number("z_offset_um")),
    "planned_s": ("float64", _number("planned_s")),
    "actual_s": ("float64", _number("actual_s")),
    "camera_image_number": ("int64", _integer("camera_image_number")),
    "level": ("int16", _estimate("level", _UNKNOWN)),
    "defocus_um": ("float32", _estimate("defocus_um", np.nan)),
    "confidence": ("float32", _estimate("confidence", np.nan)),
    "foreground": ("float32", _estimate("foreground", np.nan)),
}
"""Name to dtype and how a line gives the value; -1 or NaN: unknown."""

_WORDS: dict[str, Callable[[Line], str]] = {
    "status": lambda line: line["status"],
    "reason": lambda line: line.get("reason") or line.get("place") or "",
    "skipped": lambda line: line.get("skipped") or "",
    "flags": lambda line: " ".join(line.get("flags") or ()),
    "engines": lambda line: " ".join(sorted((line.get("engines") or {}).values())),
}


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
    try:
        if group.exists():
            shutil.rmtree(group)
        write_group(group, {}, fsync=False)
        _Columns(group, rows).write(read_journal(folder / JOURNAL_NAME))
    except (OSError, ValueError, RuntimeError) as error:
        msg = f"cannot write '{group}': {error}"
        raise WriterError(msg) from error
    return group


class _Columns:
    """The open arrays, filled block by block."""

    def __init__(self, group: Path, rows: int) -> None:
        self._group = group
        self._rows = rows
        self._arrays: dict[str, Any] = {}
        self._codes: dict[str, dict[str, int]] = {name: {} for name in _WORDS}
        for name, (dtype, _) in _COLUMNS.items():
            self._arrays[name] = self._create(name, dtype)
        for name in _WORDS:
            self._arrays[name] = self._create(name, "int32")

    def write(self, lines: Iterator[Line]) -> None:
        """Write all lines, then what the codes mean."""
        start = 0
        while block := list(islice(lines, _BLOCK)):
            self._write_block(start, block)
            start += len(block)
        for name, codes in self._codes.items():
            update_attributes(self._group / name, {"words": list(codes)})

    def _write_block(self, start: int, block: list[Line]) -> None:
        rows = slice(start, start + len(block))
        values = {
            name: np.array([read(line) for line in block], dtype=dtype)
            for name, (dtype, read) in _COLUMNS.items()
        }
        for name, word in _WORDS.items():
            codes = self._codes[name]
            found = [codes.setdefault(word(line), len(codes)) for line in block]
            values[name] = np.array(found, dtype="int32")
        values |= self._stage_times(block)
        futures = [
            self._arrays[name][rows].write(column) for name, column in values.items()
        ]
        for future in futures:
            future.result()

    def _stage_times(self, block: list[Line]) -> dict[str, Any]:
        """Return a column per stage met so far; an array is made at first sight."""
        stages = {stage for line in block for stage in line.get("stage_ms") or ()}
        columns = {}
        for stage in sorted(stages):
            name = f"{stage}_ms"
            if name not in self._arrays:
                self._arrays[name] = self._create(name, "float32")
            values = [(line.get("stage_ms") or {}).get(stage, np.nan) for line in block]
            columns[name] = np.array(values, dtype="float32")
        return columns

    def _create(self, name: str, dtype: str) -> ts.TensorStore:
        floating = np.dtype(dtype).kind == "f"
        chunk = [min(_BLOCK, max(self._rows, 1))]
        return ts.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(self._group / name)},
                "metadata": {
                    "shape": [self._rows],
                    "data_type": dtype,
                    "fill_value": "NaN" if floating else _UNKNOWN,
                    "dimension_names": ["frame"],
                    "chunk_grid": {
                        "name": "regular",
                        "configuration": {"chunk_shape": chunk},
                    },
                    "codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "zstd", "configuration": {"level": 1}},
                    ],
                },
            },
            create=True,
        ).result()


def _or(value: float | None, absent: float) -> float:
    return absent if value is None else value
