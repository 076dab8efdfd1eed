"""Check and repair: whether a run folder is whole, as a third-party reader sees it.

Validates every OME-Zarr with yaozarrs, reads every frame the journal calls
written with zarr-python, not with the library that wrote it, and verifies the
loss identity. Changes nothing unless it is asked to repair, and then deletes no frame.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import yaozarrs
import zarr
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem

from rtfocus.errors import WriterError, writing
from rtfocus.files import refuse_links
from rtfocus.images.metadata import COMPANION
from rtfocus.metrics import Accounting, Outcome
from rtfocus.writers.arrays import RunImages, list_shards, shard_name
from rtfocus.writers.commit import Tally, report_of
from rtfocus.writers.finish import COUNTED, FRAMES_NAME, finish_run
from rtfocus.writers.folder import LockHolder, RunLock, holder_of
from rtfocus.writers.header import (
    INNER,
    JOURNAL_NAME,
    REPORT_NAME,
    ImageSpec,
    RunHeader,
    image_specs,
    is_finished,
    read_header,
)
from rtfocus.writers.journal import WRITTEN, Line, journal_lines, scan_journal
from rtfocus.writers.layout import (
    companion_fault,
    group_documents,
    image_groups,
    store_path,
)
from rtfocus.writers.places import Plan, TakenPlaces, complete
from rtfocus.writers.recovery import ASIDE_NAME, mend_journal, read_rejected, set_aside

_MOST_PROBLEMS = 20
"""Problems of one kind listed one by one."""


@dataclass
class CheckReport:
    """What a check found; ``str()`` is for people."""

    folder: Path
    finished: bool = False
    repaired: list[str] = field(default_factory=list)
    """What a repair did."""
    problems: list[str] = field(default_factory=list)
    """Everything that is wrong; empty: the run can be trusted."""
    aside: Path | None = None
    """Where a repair or the end of the run moved what no journal line names."""
    holder: LockHolder | None = None
    """Who is writing the run now; nothing is said of its end then."""
    frames: int = 0
    """Frames that the journal calls written; all were read back."""
    missing: list[Line] = field(default_factory=list)
    """Places without a frame, or lost frames without a place."""
    accounting: dict[str, Any] = field(default_factory=dict)
    """The loss identity of the report."""
    outcome: Outcome | None = None
    """How much of the plan there is; None: the run is unfinished or damaged."""

    @property
    def verdict(self) -> str:
        """Return ``ok``, ``NOT OK``, who is writing, or how much of a plan is there."""
        if self.problems:
            return "NOT OK"
        if self.holder is not None:
            return f"is being written by {self.holder}"
        if self.outcome is None or self.outcome.is_complete:
            return "ok"
        return str(self.outcome)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.verdict}"]
        lines += [f"  repaired: {step}" for step in self.repaired]
        if self.aside is not None:
            lines.append(f"  set aside: what no journal line names, in '{self.aside}'")
        lines.append(f"  frames written and read back: {self.frames}")
        if self.missing:
            lines.append(f"  missing: {len(self.missing)}")
            lines += [
                f"    sequence {line['sequence']} at {line['index']}: {line['reason']}"
                for line in self.missing[:_MOST_PROBLEMS]
            ]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def check_run(
    folder: Path,
    *,
    repair: bool = False,
    on_progress: Callable[[float], None] = lambda _: None,
) -> CheckReport:
    """Check a run folder, after finishing it where `repair` asks for it.

    Every frame is read and decompressed: this takes about as long as reading the
    files. `on_progress` gets the share of the journal that is checked, 0 to 1.

    Raises
    ------
    BusyError
        If it is to be repaired while it is being written.
    NoRunError, WriterError
        If `folder` is no run folder; if it is damaged, or cannot be repaired.
    """
    header = read_header(folder)
    report = CheckReport(folder)
    if repair:
        report.repaired = repair_run(folder, header)
    report.holder = holder_of(folder)
    if (folder / ASIDE_NAME).exists():
        report.aside = folder / ASIDE_NAME
    report.finished = is_finished(folder)
    if not report.finished and report.holder is None:
        report.problems.append(
            f"the run was cut off; finish it with: rtfocus check {folder} --repair"
        )
    tally = _check_journal(folder, header, report, on_progress)
    _check_stores(folder, header, report)
    if report.finished:
        _check_report(folder, tally, report)
    return report


def _check_journal(
    folder: Path,
    header: RunHeader,
    report: CheckReport,
    on_progress: Callable[[float], None],
) -> Tally:
    """Read the journal, and back every frame that it calls written."""
    path = folder / JOURNAL_NAME
    tally = Tally(Plan(header.series))
    occupied = TakenPlaces(tally.plan)
    # In this order: of a run being written only frames that are there by now are read.
    stop = path.stat().st_size if path.exists() else None
    readers = _open_images(folder, header, report)
    if stop is None:
        _tell(report, f"journal '{path}' is lost; use --repair")
        return tally
    for record in scan_journal(path, tally.plan, stop):
        on_progress(record.start / max(stop, 1))
        if record.is_torn and not record.is_damaged:
            if report.holder is None:
                _tell(report, f"the last line of '{path}' is torn; use --repair")
            continue
        if record.fault is not None:
            _tell(
                report,
                f"line {record.number} of '{path}' is damaged ({record.fault}); "
                "use --repair",
            )
        if record.line is not None:
            _check_line(record.line, tally, occupied, readers, report)
    report.frames = tally.terms[WRITTEN, None]
    report.missing = tally.missing
    if report.finished:
        _check_strays(readers, occupied, max(tally.extent, 1), report)
    return tally


def _check_line(
    line: Line,
    tally: Tally,
    occupied: TakenPlaces,
    readers: dict[str, "_ImageReader"],
    report: CheckReport,
) -> None:
    """Check one line, and the frame that it names."""
    expected = tally.next_sequence
    if line["sequence"] is not None and line["sequence"] != expected:
        sequence = line["sequence"]
        _tell(report, f"the journal jumps from sequence {expected} to {sequence}")
    tally.add(line)
    if line["status"] != WRITTEN:
        return
    index = complete(line["index"])
    if index in occupied:
        _tell(report, f"two frames at {index}")
    occupied.take(index)
    for name in line["stored"]:
        fault = readers[name].fault(index) if name in readers else "no such image"
        if fault is not None:
            _tell(report, f"frame {line['sequence']} in {name}: {fault}")


def _check_strays(
    readers: dict[str, "_ImageReader"],
    occupied: TakenPlaces,
    extent: int,
    report: CheckReport,
) -> None:
    """Tell what a finished run has that no journal line names: time points, shards."""
    for name, reader in readers.items():
        if reader.frames != extent:
            _tell(
                report,
                f"{name} has {reader.frames} time points, not {extent}; use --repair",
            )
    strays = sum(reader.count_strays(occupied) for reader in readers.values())
    if strays:
        _tell(report, f"the journal names no frame of {strays} shards; use --repair")


class _ImageReader:
    """Reads frames of one image back with zarr-python."""

    def __init__(self, spec: ImageSpec, groups: list[Path], plan: Plan) -> None:
        self._spec = spec
        self._plan = plan
        self._folders = [group / "0" for group in groups]
        self._arrays = [zarr.open_array(path, mode="r") for path in self._folders]
        for array in self._arrays:
            if array.ndim != 5 or array.dtype.name != spec.dtype:
                msg = f"array is {array.dtype.name} with {array.ndim} axes"
                raise ValueError(msg)
        self.frames = max(array.shape[0] for array in self._arrays)

    def count_strays(self, occupied: TakenPlaces) -> int:
        """Return how many shards hold no frame that is `occupied`."""
        strays = 0
        for position, (folder, array) in enumerate(
            zip(self._folders, self._arrays, strict=True)
        ):
            frames = (array.shards or array.chunks)[0]
            for shard in list_shards(folder, frames):
                inside = list(filter(self._plan.contains, shard.places(position)))
                strays += bool(inside) and not any(one in occupied for one in inside)
        return strays

    def fault(self, index: dict[str, int]) -> str | None:
        """Return why a frame cannot be read; None: it can."""
        array = self._arrays[index["p"]]
        if index["t"] >= array.shape[0]:
            return f"t={index['t']} is beyond the array's {array.shape[0]}"
        shard = self._shard_file(array, index)
        # zarr reads one without a byte as zeros, as one that is not there.
        if not shard.is_file() or not shard.stat().st_size:
            return f"its file '{shard}' is {'empty' if shard.is_file() else 'absent'}"
        first = index["c"] * self._spec.planes
        planes = slice(first, first + self._spec.planes)
        try:
            array[index["t"], planes, index["z"]]
        except Exception as error:  # whatever a codec raises is the finding
            return f"cannot be decoded: {type(error).__name__}: {error}"
        return None

    def _shard_file(self, array: "zarr.Array[Any]", index: dict[str, int]) -> Path:
        shards = array.shards or array.chunks
        name = shard_name(index["t"] // shards[0], index["c"], index["z"], 0, 0)
        return self._folders[index["p"]] / name


def _open_images(
    folder: Path, header: RunHeader, report: CheckReport
) -> dict[str, _ImageReader]:
    readers = {}
    for spec in image_specs(header):
        try:
            groups = image_groups(folder, header, spec)
            readers[spec.name] = _ImageReader(spec, groups, Plan(header.series))
        except Exception as error:  # whatever zarr makes of a damaged store
            report.problems.append(f"{spec.name} does not open in zarr: {_said(error)}")
    return readers


def _check_stores(folder: Path, header: RunHeader, report: CheckReport) -> None:
    """Validate each OME-Zarr, and each map inside one."""
    for spec in image_specs(header):
        if (broken := companion_fault(folder, header, spec)) is not None:
            name = store_path(folder, spec.name) / COMPANION
            report.problems.append(f"'{name}' is damaged ({broken}); use --repair")
        roots = (
            image_groups(folder, header, spec)
            if spec.name in INNER
            else [store_path(folder, spec.name)]
        )
        for root in roots:
            try:
                yaozarrs.validate_zarr_store(_PlainFiles.url(root))
            except Exception as error:  # whatever the validator says is the finding
                report.problems.append(f"'{root}' is no valid OME-Zarr: {_said(error)}")


class _PlainFiles(LocalFileSystem):  # type: ignore[misc] # fsspec has no type hints
    """Local files whose names mean nothing else: no ``*``, ``[``, ``~`` or ``::``."""

    protocol = "rtfocus-plain"

    @classmethod
    def url(cls, path: Path) -> str:
        """Return a URL of `path` without a character that means something."""
        plain = os.fsencode(path.absolute().as_posix())
        return f"{cls.protocol}://{quote(plain)}"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        head = f"{cls.protocol}://"
        if not path.startswith(head):
            return path
        return os.fsdecode(unquote_to_bytes(path.removeprefix(head)))

    def expand_path(self, path: str | list[str], *_: object, **__: object) -> list[str]:
        """Return the paths as they are."""
        return [path] if isinstance(path, str) else path


register_implementation(_PlainFiles.protocol, _PlainFiles)


def _said(error: Exception) -> str:
    """Return what a library says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_report(folder: Path) -> dict[str, Any] | None:
    """Return ``report.json`` of a finished run; None: there is none to be used."""
    with suppress(WriterError):
        return report_of(folder)
    return None


def _check_report(folder: Path, tally: Tally, report: CheckReport) -> None:
    """Compare the report with the journal, and verify the loss identity."""
    path = folder / REPORT_NAME
    stored = _read_report(folder)
    if stored is None:
        report.problems.append(f"'{path}' is damaged; use --repair")
        return
    if not (columns := folder / FRAMES_NAME / "zarr.json").is_file():
        report.problems.append(f"'{columns.parent}' is gone; use --repair")
    accounting = stored["accounting"]
    places = (*accounting["dropped"].values(), *accounting["in_error"].values())
    known = accounting["written"] + accounting["focus"] + sum(places)
    report.accounting = accounting
    report.outcome = Outcome.of_report(stored)
    if accounting["acquired"] != known:
        report.problems.append(
            f"{accounting['acquired']} frames acquired but {known} accounted for"
        )
    if accounting["written"] != tally.terms[WRITTEN, None]:
        report.problems.append(
            f"report says {accounting['written']} frames written, the journal "
            f"{tally.terms[WRITTEN, None]}"
        )


def _tell(report: CheckReport, problem: str) -> None:
    """Add a problem, up to a number at which the rest is more of the same."""
    if len(report.problems) < _MOST_PROBLEMS:
        report.problems.append(problem)


def repair_run(folder: Path, header: RunHeader) -> list[str]:
    """Finish a cut-off run, and mend the journal of any; what is durable stays.

    Frames whose line is lost are journalled anew, what is not whole is set aside. A
    run that is finished and whole is left alone.

    Returns
    -------
    list of str
        What was done, for people; empty: nothing.

    Raises
    ------
    BusyError
        If the run is being written.
    WriterError
        If the folder leads elsewhere by links or cannot be written.
    """
    # Of a folder from anywhere nothing may lead out of it.
    refuse_links(folder)
    group_documents(folder, header, image_specs(header))
    with RunLock(folder, "repairing"):
        return _repair(folder, header)


def _repair(folder: Path, header: RunHeader) -> list[str]:
    report = _read_report(folder)
    steps = _set_aside_report(folder, report)
    steps += _remove_leftovers(folder)
    images = RunImages(folder, header, create=True)
    before = images.frames
    sequences = None if report is None else report["accounting"]["acquired"]
    steps += mend_journal(folder, header, images, sequences=sequences)
    tally = Tally(Plan(header.series))
    for line in journal_lines(folder / JOURNAL_NAME, tally.plan):
        tally.add(line)
    is_whole = report is not None and (folder / FRAMES_NAME / "zarr.json").is_file()
    if is_whole and not steps and before == max(tally.extent, 1):
        # Looking for frames behind the last one made the arrays longer.
        images.trim(before)
        return []
    # A report knows of more than was noted on the way.
    refused = {} if report is None else report["accounting"]["rejected_messages"]
    accounting = Accounting(rejected=Counter(refused or read_rejected(folder)))
    tally.restore(accounting)
    # A frame found again may have no sequence.
    sent = max(tally.next_sequence, sum(tally.terms.values()))
    stored: dict[str, Any] = {"reason": "interrupted"}
    camera_lost = 0
    if report is not None:
        counted = (*COUNTED, "set_aside")
        stored = {key: value for key, value in report.items() if key not in counted}
        camera_lost = report["accounting"]["camera_lost"]
    accounting.end(sent, planned=tally.plan.images, camera_lost=camera_lost)
    stored |= {"accounting": accounting.summary(), "repaired": steps}
    finish_run(folder, header, images, tally, stored)
    if images.frames != before:
        steps.append(f"set t from {before} to {images.frames}")
    steps.append(f"wrote totals, journal columns and report of {tally.lines} lines")
    return steps


def _set_aside_report(folder: Path, report: dict[str, Any] | None) -> list[str]:
    """Move a report that says nothing out of the way of a new one."""
    path = folder / REPORT_NAME
    if report is not None or not path.exists():
        return []
    return [f"moved the damaged report to '{set_aside(folder, [path])}'"]


def _remove_leftovers(folder: Path) -> list[str]:
    """Remove files that were never given their final name."""
    left = [
        path
        for path in (*folder.rglob("*.__lock"), *folder.rglob(".*.part"))
        if ASIDE_NAME not in path.relative_to(folder).parts
    ]
    for path in filter(Path.is_file, left):
        with writing(path, WriterError):
            path.unlink()
    return [f"removed {len(left)} unfinished files"] if left else []
