"""Journal: one JSON line per frame; a frame whose line is there is durable.

Times are Unix nanoseconds: ``captured_ns`` by the sender's clock, ``received_ns``
and ``durable_ns`` by the processor's. A kill can tear the last line, which then
never counted; any other broken line is damage, as a power cut leaves it.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from rtfocus.errors import BusyError, WriterError, writing
from rtfocus.files import replace
from rtfocus.frame import FrameHeader, FrameResult
from rtfocus.writers.places import Missing, Plan, complete

WRITTEN = "written"
FOCUS = "focus"
MISSING = "missing"
IN_ERROR = "in_error"

_BLOCK_BYTES = 1 << 16
"""Read at once when the journal's last line is looked for from its end."""

BLANK = b"\0\r\n "
"""Bytes around a line that say nothing; zeros come from a power cut."""
_LONGEST_LINE = 1 << 20
"""Bytes; no line of a run is that long, a block of zeros may be."""

_LONGEST_NAME = 4096
"""Characters of a file's path; longer ones no system has."""

Line = dict[str, Any]


def frame_line(
    header: FrameHeader,
    status: str,
    received_ns: int,
    result: FrameResult | None,
    *,
    stored: tuple[str, ...] = (),
    place: str | None = None,
    error: str | None,
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
    line |= _source(header.frame_meta)
    return line if result is None else line | result_part(result)


def missing_line(missing: Missing) -> Line:
    """Return the line of a place without a frame."""
    return {
        "sequence": missing.sequence,
        "status": MISSING,
        "index": missing.index,
        "reason": missing.reason,
    }


def _source(meta: dict[str, Any]) -> Line:
    """Return the file that a replayed frame comes from, and where in it."""
    file, plane = meta.get("file"), meta.get("plane")
    if not isinstance(file, str) or not isinstance(plane, dict):
        return {}
    # Of a peer's, what it is: a line that could not be read again would be damage.
    at = {axis: plane[axis] for axis in "tcz" if isinstance(plane.get(axis), int)}
    return {"file": file[:_LONGEST_NAME], "plane": at}


def result_part(result: FrameResult) -> Line:
    """Return what a line says of a result."""
    estimate, error = result.estimate, result.expected_error
    # NaN, which is no less than 0, in tiles of which none is stated.
    known = error[error >= 0] if error is not None else None
    root = float((known**2).mean()) ** 0.5 if known is not None and len(known) else None
    return {
        "estimate": estimate
        and {
            "level": estimate.level,
            "defocus_um": estimate.defocus_um,
            "confidence": estimate.confidence,
            "signed": estimate.signed,
            "foreground": estimate.foreground,
        },
        "expected_error_counts": root,
        "engines": result.engines,
        "flags": result.flags,
        "skipped": result.skipped,
        "stage_ms": result.stage_ms,
    }


_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Integer = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Stage = Annotated[str, msgspec.Meta(pattern=r"^\w{1,64}$")]


class _EstimateShape(msgspec.Struct):
    level: Annotated[int, msgspec.Meta(ge=-(1 << 15), lt=1 << 15)] | None = None
    defocus_um: float | None = None
    confidence: float | None = None
    foreground: float | None = None


class _LineShape(msgspec.Struct):
    """What is read of a line, wherever it comes from; more may stand in it."""

    sequence: _Count | None
    status: Literal["written", "focus", "missing", "in_error"]
    index: dict[str, _Count] | None = None
    event_index: _Count | None = None
    stored: list[str] = []
    reason: str | None = None
    place: str | None = None
    skipped: str | None = None
    flags: list[str] | None = None
    engines: dict[str, str] | None = None
    estimate: _EstimateShape | None = None
    expected_error_counts: float | None = None
    stage_ms: dict[_Stage, float | None] | None = None
    captured_ns: _Integer | None = None
    received_ns: _Integer | None = None
    durable_ns: _Integer | None = None
    camera_image_number: _Integer | None = None
    exposure_ms: float | None = None
    z_um: float | None = None
    z_offset_um: float | None = None
    planned_s: float | None = None
    actual_s: float | None = None


class JournalFile:
    """The journal opened for appending; a torn last line is cut off first.

    `stores` are the OME-Zarrs that hold the pixels of its lines.
    """

    def __init__(self, path: Path, stores: Iterable[Path], *, fsync: bool) -> None:
        self._path = path
        self._documents = [store / "zarr.json" for store in stores]
        self._fsync = fsync
        try:
            path.touch()
            self._end = intact_bytes(path)
            # Unbuffered: what `append` returned from has left this process.
            self._file = path.open("r+b", buffering=0)
            self._drop_partial_line()
        except OSError as error:
            raise self._failure(error) from error

    def append(self, lines: list[Line]) -> None:
        """Write lines; they are there as a whole or the run has failed.

        Raises
        ------
        BusyError
            If the file is not as this writer left it; it is not touched then.
        WriterError
            If it cannot be written.
        """
        data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
        end = self._end + len(data)
        try:
            self._assert_alone()
            while data:
                written = self._file.write(data)
                data = data[written:]
            if self._fsync:
                os.fsync(self._file.fileno())
            self._end = end
        except OSError as error:
            failure = self._failure(error)
            try:
                self._drop_partial_line()
            except OSError as second:
                failure.add_note(f"what was written of it stays: {second.strerror}")
            raise failure from error

    def close(self) -> None:
        """Close the file; called twice does nothing."""
        self._file.close()

    def _assert_alone(self) -> None:
        """Refuse to write behind what another process has written, removed or moved.

        The pixels are at this path by now: where the journal has left it, they are
        not with it.
        """
        status = os.fstat(self._file.fileno())
        if status.st_size != self._end or status.st_nlink == 0:
            change = "was removed" if status.st_nlink == 0 else "was changed"
            msg = (
                f"journal '{self._path}' {change} by another process while this one "
                "records; it is left as it is"
            )
            raise BusyError(msg)
        if not self._path.exists():
            raise BusyError(self._moved())
        for document in self._documents:
            # Not the folder: the next pixels make it again.
            if not document.exists():
                store = document.parent
                msg = (
                    f"'{store}' was removed or moved while it was recorded; put it "
                    f"back, then run: rtfocus check {self._path.parent} --repair; "
                    f"what is in '{store}' now was never acknowledged"
                )
                raise BusyError(msg)

    def _moved(self) -> str:
        """Say that the run folder has another name, and which, where that is known."""
        folder, now = self._path.parent, "NEW_FOLDER"
        with suppress(OSError):  # Linux alone tells
            now = str(Path(os.readlink(f"/proc/self/fd/{self._file.fileno()}")).parent)
        return (
            f"run folder '{folder}' was moved while it was recorded; what is durable "
            f"went with it, finish it there: rtfocus check {now} --repair; "
            f"what is in '{folder}' now was never acknowledged"
        )

    def _drop_partial_line(self) -> None:
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
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def read_journal(path: Path) -> Iterator[Line]:
    """Yield the lines in order as they are; a torn last line is left out.

    Nothing is asked of them, as `journal_lines` does, but that they are JSON.

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
                try:
                    line: Line = msgspec.json.decode(text, type=dict)
                except (msgspec.DecodeError, RecursionError) as error:
                    raise _damaged(path, number, error) from error
                yield line
    except OSError as error:
        raise _unreadable(path, error) from error


def write_journal(path: Path, lines: Iterable[bytes]) -> None:
    """Write a journal anew, whole or not at all; lines come without their ends.

    Raises
    ------
    WriterError
        If it cannot be written; the old one is there then.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path, WriterError):
        with part.open("wb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        replace(part, path)


@dataclass(frozen=True, slots=True)
class Record:
    """One piece of a journal as it is on the disk, line or not."""

    number: int
    """Counted from 1."""
    start: int
    """Bytes before it."""
    text: bytes
    line: Line | None
    """None: it is no line of this run."""
    fault: str | None
    """What is wrong with it; a line can be sound in a piece that is not."""

    @property
    def is_torn(self) -> bool:
        """Tell whether it has no end: the last piece, cut off by a kill."""
        return not self.text.endswith(b"\n")

    @property
    def is_damaged(self) -> bool:
        """Tell whether it is broken in a way that no kill does."""
        return self.fault is not None and (not self.is_torn or b"\0" in self.text)


def scan_journal(path: Path, plan: Plan, stop: int | None = None) -> Iterator[Record]:
    """Yield everything that is in a journal, sound or not; nothing is skipped.

    Parameters
    ----------
    path
        The journal.
    plan
        Of the run: a frame elsewhere is none of it.
    stop
        Bytes to read; None: all.

    Raises
    ------
    WriterError
        If the journal cannot be read.
    """
    start = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(
                iter(lambda: file.readline(_LONGEST_LINE), b""), start=1
            ):
                if stop is not None and start >= stop:
                    return
                line, fault = _parse(text, plan)
                yield Record(number, start, text, line, fault)
                start += len(text)
    except OSError as error:
        raise _unreadable(path, error) from error


def journal_lines(path: Path, plan: Plan) -> Iterator[Line]:
    """Yield the lines of a sound journal in order; a torn last line is left out.

    Raises
    ------
    WriterError
        If the journal cannot be read, or a line is not of this run.
    """
    for record in scan_journal(path, plan):
        if record.is_damaged:
            raise _damaged(path, record.number, record.fault)
        if record.line is not None and not record.is_torn:
            yield record.line


def _parse(text: bytes, plan: Plan) -> tuple[Line | None, str | None]:
    """Return the line in a piece of the journal, and what is wrong with the piece."""
    content = text.strip(BLANK)
    if not content:
        return None, f"{len(text)} bytes without content"
    try:
        line: Line = msgspec.json.decode(content, type=dict)
        shape = msgspec.convert(line, _LineShape)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return None, str(error)
    if shape.index is not None and not plan.contains(complete(shape.index)):
        return None, f"the plan has no place {shape.index}"
    if shape.status == WRITTEN and shape.index is None:
        return None, "a written frame without its index"
    line = _DEFAULTS | line
    if not text.endswith(b"\n"):
        return line, "its end is missing"
    return line, f"{len(text)} bytes with zeros" if b"\0" in text else None


_DEFAULTS: Line = {"index": None, "event_index": None, "stored": [], "reason": ""}
"""What a line leaves out where it has no meaning."""


def is_unrestored(line: Line) -> bool:
    """Tell whether a line is of a stored frame that has no restored image."""
    return line["status"] == WRITTEN and "restored" not in line["stored"]


def _damaged(path: Path, number: int, fault: object) -> WriterError:
    return WriterError(
        f"journal '{path}' is damaged in line {number}: {fault}; run: rtfocus check "
        f"{path.parent} --repair"
    )


def _unreadable(path: Path, error: OSError) -> WriterError:
    remedy = "allow reading it, or move away what stands there"
    if isinstance(error, FileNotFoundError):
        remedy = f"run: rtfocus check {path.parent} --repair"
    return WriterError(f"journal '{path}' cannot be read: {error.strerror}; {remedy}")
