"""Header: what is known about a run before frame 0, kept as ``series.json``.

It is what a restarted processor or a repair needs to go on with a cut-off run. A
folder may come from anywhere: what it says is checked before it is used.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rtfocus.config.sections import StoreConfig
from rtfocus.errors import OutputError, WriterError
from rtfocus.files import replace
from rtfocus.frame import SeriesStart, TileGrid

HEADER_NAME = "series.json"
REPORT_NAME = "report.json"
JOURNAL_NAME = "frames.ndjson"
FORMAT = 1

LOCK_NAME = "writer.lock"
HOLDER_NAME = "writer.json"
LOCK_NAMES = frozenset({LOCK_NAME, HOLDER_NAME, f".{HOLDER_NAME}.part"})
"""Who writes the folder: see `rtfocus.writers.lock`."""

MOST_PIXELS = 1 << 33
"""Of a frame; beyond every camera, and below what overflows anywhere."""
MOST_PLACES = 1 << 40
"""Along t, p, c and z together."""


@dataclass(frozen=True, slots=True)
class RunHeader:
    """Everything that decides what the run folder looks like."""

    series: SeriesStart
    store: StoreConfig
    grid: TileGrid | None
    """None: no defocus maps."""
    restored: bool
    """Whether a restored image is written."""
    provenance: dict[str, Any]
    """Config and whatever else says where the run came from."""

    @property
    def planes(self) -> int:
        """Planes per frame: 3 for RGB, each a channel of its own in the store."""
        return 1 if len(self.series.shape) == 2 else int(self.series.shape[2])

    def size(self, axis: str) -> int | None:
        """Return the planned length of an axis; None: unbounded time."""
        return self.series.sizes.get(axis, 1)

    def write(self, folder: Path) -> None:
        """Write the header; it appears whole or not at all."""
        content = {
            "format": FORMAT,
            "series": msgspec.to_builtins(self.series),
            "store": self.store.model_dump(mode="json"),
            "grid": None if self.grid is None else asdict(self.grid),
            "restored": self.restored,
            "provenance": self.provenance,
        }
        write_json(folder / HEADER_NAME, content, fsync=self.store.fsync)


def read_header(folder: Path) -> RunHeader:
    """Read the header of a run folder.

    Raises
    ------
    WriterError
        If there is none, or one that this version cannot read.
    """
    path = folder / HEADER_NAME
    try:
        content = msgspec.json.decode(path.read_bytes())
        if content["format"] != FORMAT:
            msg = (
                f"'{path}' has format {content['format']}, this rtfocus reads "
                f"{FORMAT}; use the version that wrote it"
            )
            raise WriterError(msg)
        header = RunHeader(
            series=msgspec.convert(content["series"], SeriesStart),
            store=StoreConfig.model_validate(content["store"]),
            grid=msgspec.convert(content["grid"], TileGrid | None),
            restored=bool(content["restored"]),
            provenance=dict(content["provenance"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else _short(error)
        msg = f"'{folder}' is no run folder: '{HEADER_NAME}' cannot be read ({reason})"
        raise WriterError(msg) from error
    if (fault := _fault(header)) is not None:
        msg = f"'{path}' is damaged: {fault}; the images can be read by other programs"
        raise WriterError(msg)
    return header


def sizes_fault(header: RunHeader) -> str | None:
    """Return how the planned sizes disagree with the lists; None: they do not."""
    series = header.series
    listed = {"p": len(series.positions), "c": len(series.channels)}
    for axis, number in listed.items():
        if header.size(axis) != number:
            return (
                f"series '{series.name}' plans {header.size(axis)} along {axis} but "
                f"lists {number}; SeriesStart.sizes must agree with its lists"
            )
    return None


def _fault(header: RunHeader) -> str | None:
    """Return what no run of rtfocus has; None: nothing."""
    series, grid = header.series, header.grid
    shape, sizes = series.shape, series.sizes
    lengths = [1 if size is None else size for size in sizes.values()]
    tiles = (1, 1) if grid is None else (grid.rows, grid.columns)
    faults = {
        f"shape={shape} is no frame": len(shape) not in (2, 3)
        or shape[2:] not in ((), (3,))
        or not _fits(shape, MOST_PIXELS),
        f"dtype={series.dtype!r} is no pixel type": not _is_pixel_type(series.dtype),
        f"sizes={sizes} are no plan": not set(sizes) <= set("tpcz")
        or None in [size for axis, size in sizes.items() if axis != "t"]
        or not _fits(lengths, MOST_PLACES),
        "it lists no channel or no position": not series.channels
        or not series.positions,
        f"pixel_size_um={series.pixel_size_um} is no length": not (
            0 < series.pixel_size_um < float("inf")
        ),
        f"its maps have {tiles} tiles": not _fits(tiles, MOST_PIXELS),
    }
    found = [fault for fault, is_fault in faults.items() if is_fault]
    return found[0] if found else sizes_fault(header)


def _fits(lengths: Sequence[int], most: int) -> bool:
    return all(length >= 1 for length in lengths) and prod(lengths) <= most


def _is_pixel_type(dtype: str) -> bool:
    try:
        return np.dtype(dtype).kind in "uif"
    except (TypeError, ValueError):
        return False


def _short(error: Exception) -> str:
    """Return the first line of what a library says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_finished(folder: Path) -> bool:
    """Tell whether the run was closed: the report is the last file written."""
    return (folder / REPORT_NAME).is_file()


def is_bare(folder: Path) -> bool:
    """Tell whether a folder holds at most what a run makes before its header."""
    journal = folder / JOURNAL_NAME
    before_header = {JOURNAL_NAME, f".{HEADER_NAME}.part", *LOCK_NAMES}
    return {path.name for path in folder.iterdir()} <= before_header and (
        not journal.exists() or journal.stat().st_size == 0
    )


def is_document(path: Path) -> bool:
    """Tell whether a file is a JSON object, not lost, torn or full of zeros."""
    try:
        msgspec.json.decode(path.read_bytes(), type=dict)
    except (OSError, msgspec.MsgspecError, ValueError):
        return False
    return True


def write_json(path: Path, content: dict[str, Any], *, fsync: bool = False) -> None:
    """Replace a JSON file atomically; NaN becomes null."""
    data = msgspec.json.format(msgspec.json.encode(content), indent=1)
    write_file(path, data, fsync=fsync)


def write_file(path: Path, data: bytes, *, fsync: bool = False) -> None:
    """Replace a small file of the run folder atomically.

    Raises
    ------
    WriterError
        If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        msg = f"cannot write '{path}': {error.strerror}; free space, then repair"
        raise WriterError(msg) from error
    except OutputError as error:
        raise WriterError(str(error)) from error
