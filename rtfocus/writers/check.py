"""Check: whether a run folder is whole, as a third-party reader sees it.

Validates every OME-Zarr with yaozarrs, reads every frame the journal calls
written with zarr-python, not with the library that wrote it, and verifies the
loss identity.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaozarrs
import zarr

from rtfocus.outcome import Outcome
from rtfocus.writers.arrays import shard_name
from rtfocus.writers.header import (
    JOURNAL_NAME,
    REPORT_NAME,
    RunHeader,
    is_finished,
    read_header,
)
from rtfocus.writers.journal import WRITTEN, Line, read_journal, torn_bytes
from rtfocus.writers.layout import image_groups, store_path
from rtfocus.writers.plan import Plan, complete
from rtfocus.writers.repair import repair_run
from rtfocus.writers.specs import CONFIDENCE, ImageSpec, image_specs
from rtfocus.writers.tally import TakenPlaces, Tally

_MOST_PROBLEMS = 20
"""Problems of one kind told one by one."""


@dataclass
class CheckReport:
    """What a check found; ``str()`` is for people."""

    folder: Path
    finished: bool = False
    repaired: list[str] = field(default_factory=list)
    """What a repair did."""
    problems: list[str] = field(default_factory=list)
    """Everything that is wrong; empty: the run can be trusted."""
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
        """Return ``ok``, ``NOT OK``, or how much of the plan there is if not all."""
        if self.problems:
            return "NOT OK"
        if self.outcome is None or self.outcome.is_complete:
            return "ok"
        return str(self.outcome)

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.verdict}"]
        lines += [f"  repaired: {step}" for step in self.repaired]
        lines.append(f"  frames written and read back: {self.frames}")
        if self.missing:
            lines.append(f"  missing: {len(self.missing)}")
            lines += [
                f"    sequence {line['sequence']} at {line['index']}: {line['reason']}"
                for line in self.missing[:_MOST_PROBLEMS]
            ]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def check_run(folder: Path, *, repair: bool = False) -> CheckReport:
    """Check a run folder, after finishing it where `repair` asks for it.

    Every frame is read and decompressed: this takes about as long as reading the
    files.

    Raises
    ------
    WriterError
        If `folder` is no run folder or its journal is damaged.
    """
    header = read_header(folder)
    report = CheckReport(folder)
    if repair:
        report.repaired = repair_run(folder, header)
    report.finished = is_finished(folder)
    if not report.finished:
        report.problems.append(
            "the run was cut off, or is still being written; when its processor is "
            f"gone, finish it with: rtfocus check {folder} --repair"
        )
    tally = _check_journal(folder, header, report)
    _check_stores(folder, header, report)
    if report.finished:
        _check_report(folder, tally, report)
    return report


def _check_journal(folder: Path, header: RunHeader, report: CheckReport) -> Tally:
    """Read the journal, and back every frame that it calls written."""
    path = folder / JOURNAL_NAME
    tally = Tally(Plan(header.series))
    taken = TakenPlaces(tally.plan)
    readers = _open_images(folder, header, report)
    if torn_bytes(path):
        report.problems.append(f"the last line of '{path}' is torn; use --repair")
    for line in read_journal(path):
        expected = tally.next_sequence
        if line["sequence"] is not None and line["sequence"] != expected:
            _tell(report, f"journal jumps from sequence {expected} to {line}")
        tally.add(line)
        if line["status"] != WRITTEN:
            continue
        index = complete(line["index"])
        if index in taken:
            _tell(report, f"two frames at {index}")
        taken.take(index)
        for name in line["stored"]:
            fault = readers[name].fault(index) if name in readers else "no such image"
            if fault is not None:
                _tell(report, f"frame {line['sequence']} in {name}: {fault}")
    report.frames = tally.terms[WRITTEN, None]
    report.missing = tally.missing
    return tally


class _ImageReader:
    """Reads frames of one image back with zarr-python."""

    def __init__(self, spec: ImageSpec, groups: list[Path]) -> None:
        self._spec = spec
        self._folders = [group / "0" for group in groups]
        self._arrays = [zarr.open_array(path, mode="r") for path in self._folders]

    def fault(self, index: dict[str, int]) -> str | None:
        """Return why a frame cannot be read; None: it can."""
        array = self._arrays[index["p"]]
        if index["t"] >= array.shape[0]:
            return f"t={index['t']} is beyond the array's {array.shape[0]}"
        shard = self._shard_file(array, index)
        if not shard.is_file():
            return f"its file '{shard}' is absent"
        first = index["c"] * self._spec.planes
        planes = slice(first, first + self._spec.planes)
        try:
            array[index["t"], planes, index["z"]]
        except Exception as error:  # whatever a codec raises is the finding
            return f"cannot be decoded: {type(error).__name__}: {error}"
        return None

    def _shard_file(self, array: zarr.Array[Any], index: dict[str, int]) -> Path:
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
            readers[spec.name] = _ImageReader(spec, groups)
        except (OSError, ValueError, KeyError) as error:
            report.problems.append(f"{spec.name} does not open in zarr: {error}")
    return readers


def _check_stores(folder: Path, header: RunHeader, report: CheckReport) -> None:
    """Validate each OME-Zarr, and each confidence image inside one."""
    for spec in image_specs(header):
        roots = (
            image_groups(folder, header, spec)
            if spec.name == CONFIDENCE
            else [store_path(folder, spec.name)]
        )
        for root in roots:
            try:
                yaozarrs.validate_zarr_store(str(root))
            except Exception as error:  # whatever the validator says is the finding
                report.problems.append(f"'{root}' is no valid OME-Zarr: {error}")


def _check_report(folder: Path, tally: Tally, report: CheckReport) -> None:
    """Compare the report with the journal, and verify the loss identity."""
    path = folder / REPORT_NAME
    try:
        found = msgspec.json.decode(path.read_bytes())
        accounting = found["accounting"]
        lost = sum(accounting["dropped"].values()) + sum(
            accounting["in_error"].values()
        )
        known = accounting["written"] + accounting["focus"] + lost
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        report.problems.append(
            f"'{path}' is damaged: {error!r}; delete it, then use --repair"
        )
        return
    report.accounting = accounting
    report.outcome = Outcome.of_report(found)
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
