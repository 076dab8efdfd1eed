"""Header: what is known about a run before frame 0, kept as ``series.json``.

It is what a restarted processor or a repair needs to go on with a cut-off run.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from rtfocus.config.processor import StoreConfig
from rtfocus.errors import WriterError
from rtfocus.frame import SeriesStart, TileGrid

HEADER_NAME = "series.json"
REPORT_NAME = "report.json"
JOURNAL_NAME = "frames.ndjson"
FORMAT = 1


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
        grid = content["grid"]
        return RunHeader(
            series=msgspec.convert(content["series"], SeriesStart),
            store=StoreConfig.model_validate(content["store"]),
            grid=None if grid is None else TileGrid(**grid),
            restored=content["restored"],
            provenance=content["provenance"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"'{folder}' is no run folder: '{HEADER_NAME}' cannot be read ({error})"
        raise WriterError(msg) from error


def is_finished(folder: Path) -> bool:
    """Tell whether the run was closed: the report is the last file written."""
    return (folder / REPORT_NAME).is_file()


def is_bare(folder: Path) -> bool:
    """Tell whether a folder holds at most what a run makes before its header."""
    journal = folder / JOURNAL_NAME
    before_header = {JOURNAL_NAME, f".{HEADER_NAME}.part"}
    return {path.name for path in folder.iterdir()} <= before_header and (
        not journal.exists() or journal.stat().st_size == 0
    )


def write_json(path: Path, content: dict[str, Any], *, fsync: bool = False) -> None:
    """Replace a JSON file atomically; NaN becomes null."""
    temporary = path.with_name(f".{path.name}.part")
    data = msgspec.json.format(msgspec.json.encode(content), indent=1)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        msg = f"cannot write '{path}': {error.strerror}; free space or close readers"
        raise WriterError(msg) from error
