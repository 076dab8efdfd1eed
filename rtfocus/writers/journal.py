"""Journal: one JSON line per frame; a frame whose line is there is durable.

Times are Unix nanoseconds: ``captured_ns`` by the sender's clock, ``received_ns``
and ``durable_ns`` by the processor's. A kill can tear the last line, which then
never counted; any other broken line is damage.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from rtfocus.errors import WriterError
from rtfocus.frame import FrameHeader, FrameResult
from rtfocus.writers.gaps import Missing

WRITTEN = "written"
FOCUS = "focus"
MISSING = "missing"
IN_ERROR = "in_error"

_BLOCK_BYTES = 1 << 16
"""Read at once when the journal's last line is looked for from its end."""

Line = dict[str, Any]


def frame_line(
    header: FrameHeader,
    status: str,
    received_ns: int,
    result: FrameResult | None,
    *,
    stored: tuple[str, ...] = (),
    place: str | None = None,
    error: str | None = None,
) -> Line:
    """Return the line of a frame that arrived.

    Parameters
    ----------
    header
        As received.
    status
        ``written``, ``focus`` or ``in_error``.
    received_ns
        Unix time of arrival.
    result
        What processing made of it; None: it failed.
    stored
        Names of the images that hold the frame.
    place
        Where an ``in_error`` frame went wrong.
    error
        Why processing failed.
    """
    line: Line = {
        "sequence": header.sequence,
        "status": status,
        "index": header.index,
        "event_index": header.event_index,
        "role": header.role.value,
        "stored": stored,
        "captured_ns": header.captured_ns,
        "received_ns": received_ns,
        "exposure_ms": header.exposure_ms,
        "z_um": header.z_um,
        "z_offset_um": header.z_offset_um,
        "planned_s": header.planned_s,
        "actual_s": header.actual_s,
        "camera_image_number": header.camera_image_number,
    }
    if place is not None:
        line["place"] = place
    if error is not None:
        line["error"] = error
    return line if result is None else line | _result_part(result)


def missing_line(missing: Missing) -> Line:
    """Return the line of a place without a frame."""
    return {
        "sequence": missing.sequence,
        "status": MISSING,
        "index": missing.index,
        "reason": missing.reason,
    }


def _result_part(result: FrameResult) -> Line:
    estimate = result.estimate
    return {
        "estimate": estimate
        and {
            "level": estimate.level,
            "defocus_um": estimate.defocus_um,
            "confidence": estimate.confidence,
            "signed": estimate.signed,
            "foreground": estimate.foreground,
        },
        "engines": result.engines,
        "flags": result.flags,
        "skipped": result.skipped,
        "stage_ms": result.stage_ms,
    }


class JournalFile:
    """The journal opened for appending; a torn last line is cut off first."""

    def __init__(self, path: Path, *, fsync: bool) -> None:
        self._path = path
        self._fsync = fsync
        try:
            path.touch()
            self._end = intact_bytes(path)
            # Unbuffered: what `append` returned from has left this process.
            self._file = path.open("r+b", buffering=0)
            self._cut()
        except OSError as error:
            raise self._failure(error) from error

    def append(self, lines: list[Line]) -> None:
        """Write lines; they are there as a whole or the run has failed."""
        data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        try:
            while data:
                written = self._file.write(data)
                data = data[written:]
            if self._fsync:
                os.fsync(self._file.fileno())
            self._end = self._file.tell()
        except OSError as error:
            self._cut()
            raise self._failure(error) from error

    def close(self) -> None:
        """Close the file; called twice does nothing."""
        self._file.close()

    def _cut(self) -> None:
        """Drop what follows the last whole line."""
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def _failure(self, error: OSError) -> WriterError:
        return WriterError(f"cannot write journal '{self._path}': {error.strerror}")


def intact_bytes(path: Path) -> int:
    """Return the length of the journal without a torn last line.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    end = path.stat().st_size
    with path.open("rb") as file:
        while end > 0:
            start = max(end - _BLOCK_BYTES, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def torn_bytes(path: Path) -> int:
    """Return the length of the journal's torn last line; 0: it is whole.

    Raises
    ------
    WriterError
        If there is no journal.
    """
    try:
        return path.stat().st_size - intact_bytes(path)
    except OSError as error:
        msg = f"journal '{path}' cannot be read: {error.strerror}"
        raise WriterError(msg) from error


def read_journal(path: Path) -> Iterator[Line]:
    """Yield the lines in order; a torn last line is left out.

    Raises
    ------
    WriterError
        If the journal cannot be read or a line inside it is broken.
    """
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if not text.endswith(b"\n"):
                    return
                yield _decode(path, number, text)
    except OSError as error:
        msg = f"journal '{path}' cannot be read: {error.strerror}"
        raise WriterError(msg) from error


def unrestored(path: Path) -> Iterator[Line]:
    """Yield the lines of stored frames that have no restored image."""
    for line in read_journal(path):
        if line["status"] == WRITTEN and "restored" not in line["stored"]:
            yield line


def _decode(path: Path, number: int, text: bytes) -> Line:
    try:
        line: Line = msgspec.json.decode(text, type=dict)
    except msgspec.DecodeError as error:
        msg = f"journal '{path}' is damaged in line {number}: {error}"
        raise WriterError(msg) from error
    return line
