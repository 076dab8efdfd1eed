"""Kill check: what must be true of a run folder whose processor was killed.

Frames name themselves: every pixel of frame n is a fixed texture XORed with a code
of n, so that a torn, swapped or missing frame cannot be taken for another one.
"""

import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import yaozarrs
import zarr
from numpy.typing import NDArray

from rtfocus.errors import ExitCode
from rtfocus.runs import open_run
from rtfocus.writers.check import CheckReport, check_run
from rtfocus.writers.header import JOURNAL_NAME, is_bare
from rtfocus.writers.journal import WRITTEN, Line, read_journal

SIDE = 128
"""Frames have SIDE x SIDE pixels."""

_CODE = 40503
"""Odd: n * _CODE differs modulo 2**16 for any two n below 2**16."""
_BLOCK = 64
"""Frames compared at once."""
_TEXTURE = np.random.default_rng(0).integers(0, 1 << 16, (SIDE, SIDE), dtype=np.uint16)
_EXPECTED_WHEN_CUT_OFF = ("was cut off", "is torn")


def pixels_of(first: int, stop: int) -> NDArray[np.uint16]:
    """Return frames `first` to `stop - 1`; axes (frame, y, x)."""
    codes = (np.arange(first, stop) * _CODE & 0xFFFF).astype(np.uint16)
    return _TEXTURE ^ codes[:, None, None]


def faults_after_kill(folder: Path, durable: int) -> list[str]:
    """Return what is wrong with the folder of a killed processor; repairs it.

    Parameters
    ----------
    folder
        A copy: its run is finished by this.
    durable
        The publisher was told that frames before it are durable.
    """
    if is_bare(folder):
        return [f"{durable} frames were durable, nothing there"] if durable else []
    lines = list(read_journal(folder / JOURNAL_NAME))
    faults = _faults_as_left(folder, lines) if lines else []
    if len(lines) < durable:
        faults.append(f"{durable} frames were durable, journal holds {len(lines)}")
    repaired = check_run(folder, repair=True)
    return faults + [
        f"after repair: {fault}"
        for fault in _faults_of_finished(folder, repaired, len(lines))
    ]


def _faults_as_left(folder: Path, lines: list[Line]) -> list[str]:
    """Return what is wrong with a run that was killed with these journal lines."""
    faults = _faults_of_stores(folder) + _faults_of_lines(lines)
    faults += _faults_of_pixels(folder, len(lines))
    return faults + [
        problem
        for problem in check_run(folder).problems
        if not any(said in problem for said in _EXPECTED_WHEN_CUT_OFF)
    ]


def faults_after_repair_command(folder: Path, durable: int) -> list[str]:
    """Repair a copy with ``rtfocus check RUN --repair``; return what is wrong."""
    command = [sys.executable, "-m", "rtfocus", "check", str(folder), "--repair"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    # Cut off: sound, and not all that was to come.
    if done.returncode != ExitCode.INCOMPLETE:
        return [f"repair command failed: {done.stdout}{done.stderr}"]
    # Of frames that nobody was told of, one may be lost between two that are not.
    return _faults_of_finished(folder, check_run(folder), durable)


def faults_at_end(folder: Path, sent: int) -> list[str]:
    """Return what is wrong with the finished folder of a series of `sent` frames."""
    report = check_run(folder)
    faults = _faults_of_finished(folder, report, sent)
    accounting = report.accounting
    if (accounting.get("acquired"), accounting.get("written")) != (sent, sent):
        faults.append(f"{sent} frames sent, the report says {accounting}")
    return faults


def faults_of_way(folder: Path, way: str) -> list[str]:
    """Return what is wrong if the last processor's frames did not come this way."""
    came_by = (open_run(folder).report or {}).get("came_by", {})
    return [] if set(came_by) == {way} else [f"frames came by {came_by}, not {way}"]


def _faults_of_finished(folder: Path, report: CheckReport, frames: int) -> list[str]:
    """Return what is wrong with a finished run that must hold its first frames.

    What was whole behind them when the kill came is kept too; between those frames
    some may be missing.
    """
    faults = list(report.problems)
    if not report.finished:
        return [*faults, "not finished"]
    missing = {line["sequence"] for line in report.missing}
    if report.frames < frames or any(sequence < frames for sequence in missing):
        faults.append(f"{report.frames} frames, missing {report.missing[:3]}")
    held = report.frames + len(missing)
    faults += _faults_of_stores(folder)
    faults += _faults_of_pixels(folder, held, except_for=missing)
    length = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r").shape[0]
    if length != max(held, 1):
        faults.append(f"array has {length} time points for {held} frames")
    left = [*folder.rglob("*.__lock"), *folder.rglob(".*.part")]
    if left:
        faults.append(f"{len(left)} unfinished files left, such as '{left[0]}'")
    return faults


def _faults_of_stores(folder: Path) -> list[str]:
    """Open every OME-Zarr with zarr-python and have yaozarrs validate it."""
    steps: list[Callable[[str], object]] = [
        yaozarrs.validate_zarr_store,
        lambda path: zarr.open_group(path, mode="r"),
    ]
    faults = []
    for store in sorted(folder.glob("*.ome.zarr")):
        for step in steps:
            try:
                step(str(store))
            except Exception as error:  # whatever a reader says is the finding
                faults.append(f"'{store.name}': {type(error).__name__}: {error}")
    return faults if faults or (folder / "raw.ome.zarr").is_dir() else ["no raw store"]


def _faults_of_lines(lines: list[Line]) -> list[str]:
    """Every frame must be journalled once, in order, at its own place."""
    return [
        f"journal line {number} is {line}"
        for number, line in enumerate(lines)
        if line["sequence"] != number
        or line["status"] != WRITTEN
        or line["index"].get("t") != number
    ]


def _faults_of_pixels(
    folder: Path, frames: int, except_for: Collection[int] = ()
) -> list[str]:
    """Compare every pixel of the first `frames` frames, read by zarr-python."""
    raw = zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")
    if raw.shape[0] < frames:
        return [f"{frames} frames in an array of {raw.shape[0]}"]
    faults = []
    for first in range(0, frames, _BLOCK):
        stop = min(first + _BLOCK, frames)
        found = np.asarray(raw[first:stop, 0, 0])
        differ = (found != pixels_of(first, stop)).any(axis=(1, 2))
        wrong = (first + int(n) for n in np.flatnonzero(differ))
        faults += [f"frame {n} is wrong" for n in wrong if n not in except_for]
    return faults
