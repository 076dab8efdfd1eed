"""Work: doing the units of a batch, wherever, and putting the output in its place.

A process keeps what it has opened, above all the engines with their weights, from one
unit to the next.
"""

import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rtfocus import __version__, files
from rtfocus.batch.plan import (
    Failure,
    Fault,
    Form,
    Job,
    Ledger,
    Plan,
    Unit,
    facts_of,
    new_plan,
)
from rtfocus.config import parse_config
from rtfocus.errors import (
    ConfigError,
    EngineError,
    InputError,
    OutputError,
    RtfocusError,
)
from rtfocus.images.optics import StatedOptics, stated_optics
from rtfocus.images.outputs import OutputGuard, companions
from rtfocus.images.pictures import stretch_histogram
from rtfocus.images.reading import FoundImages, find_images
from rtfocus.images.series import ImageSeries
from rtfocus.images.writing import ImageOutput, OutputImage, write_tiff
from rtfocus.images.zarr_writing import fill_image, places_in_zarr, prepare_zarr
from rtfocus.processing.image_set import ImageSet

_MOST_SOURCES = 8
"""Files whose list of images a process keeps."""


class Batch:
    """A job with its images, as whoever plans it and ends it sees it.

    Parameters
    ----------
    job
        What is asked for.
    overwrite
        Earlier results, and another batch that did not end, may be replaced.

    Raises
    ------
    RtfocusError
        As without a scheduler: nothing is written by then.
    """

    def __init__(self, job: Job, *, overwrite: bool = False) -> None:
        self.job = job
        self.found = find_images(Path(job.source))
        self.images = _image_set(job, self.found.series)
        self.ledger = Ledger(Path(job.output))
        self._overwrite = overwrite
        inputs = [*companions(self.found.series), Path(job.source)]
        if Path(job.source).is_dir() and not _is_one(self.found, job):
            inputs.pop()  # merely searched
        self._guard = OutputGuard(inputs, overwrite=overwrite)

    def notes(self) -> list[str]:
        """Say, a line each, what is left out, filled in or assumed."""
        return notes_of(self.found, self.images)

    def plan(self) -> tuple[Plan, int]:
        """Return the plan, begun now or by an earlier call, and how many are done.

        Raises
        ------
        OutputError
            If something stands in the way, or another batch.
        """
        begun = self.ledger.plan()
        # What an earlier call has written may be there already.
        guard = self._guard if begun is None else self._guard.fresh(overwrite=True)
        form, targets = self._targets(guard)
        images = [
            (series, target, self._made(number))
            for number, (series, target) in enumerate(
                zip(self.found.series, targets, strict=True)
            )
        ]
        broken = tuple((str(one.path), one.reason) for one in self.found.broken)
        plan = new_plan(form, self.job, images, broken)
        if begun is not None and begun.key == plan.key:
            self.ledger.extend(plan)
            return plan, len(plan.units) - len(self.ledger.left(plan.units))
        if begun is not None and not self._overwrite:
            msg = (
                f"'{self.ledger.folder}' holds a batch that did not end, with other "
                "settings, weights or images: end it as it was begun, or begin anew "
                "with --overwrite"
            )
            raise OutputError(msg)
        if begun is not None:
            self._targets(self._guard.fresh(overwrite=True))
        prepare = self._prepare if form == "zarr" else None
        self.ledger.begin(plan, prepare)
        return plan, 0

    def finish(self, plan: Plan) -> list[tuple[Unit, Failure]]:
        """Put the output in its place, if all that can be done is done.

        Returns
        -------
        list
            Units that failed. Of those that cannot be read the output does without;
            where there are others, what was done waits for another call.
        """
        failures = self.ledger.failures(plan)
        failed = {unit.key for unit, _ in failures}
        missing = [u for u in self.ledger.left(plan.units) if u.key not in failed]
        if missing or any(failure.fault != "input" for _, failure in failures):
            return failures
        if plan.form == "zarr":
            self._deliver(plan, failed)
        elif plan.form == "rows":
            self._collect(plan, failed)
        # A folder can be completed later, file by file.
        if not (failures or plan.broken) or plan.form in ("zarr", "rows"):
            self.ledger.remove()
        return failures

    def _made(self, number: int) -> dict[str, str]:
        if self.job.command == "classify":
            return {"command": "classify"}
        return {"command": "restore", **self.images.made(number)}

    def _targets(self, guard: OutputGuard) -> tuple[Form, list[str]]:
        """Return the form of the output, and of every image its place in it."""
        output, series = Path(self.job.output), self.found.series
        guard.claim_folder(self.ledger.folder)
        if self.job.command == "classify":
            guard.claim_json(output)
            return "rows", [""] * len(series)
        place = ImageOutput(output, series, guard, Path(self.job.source))
        if place.is_folder:
            below = [target.relative_to(output) for target in place.targets]
            return "folder", [str(path) for path in below]
        if place.ending == ".zarr":
            return "zarr", places_in_zarr(self._outlines())
        if len(series) > 1:
            msg = (
                f"'{output}' would hold {len(series)} images, and only one process can "
                "write a file; give a folder or an .ome.zarr as --output"
            )
            raise ConfigError(msg)
        return "file", [""]

    def _outlines(self, left_out: frozenset[int] = frozenset()) -> list[OutputImage]:
        """Return the images without their planes, as an OME-Zarr is laid out."""
        return [
            _outline(self.job, self.images, number, series)
            for number, series in enumerate(self.found.series)
            if number not in left_out
        ]

    def _prepare(self, path: Path) -> None:
        try:
            prepare_zarr(path, self._outlines())
        except OSError as error:
            msg = f"'{path}' cannot be written: {error.strerror or error}"
            raise OutputError(msg) from error

    def _deliver(self, plan: Plan, failed: set[str]) -> None:
        store = self.ledger.store
        if failed:
            store = self._without(plan, failed)
        self._guard.fresh(overwrite=self._overwrite).claim(self.ledger.output)
        files.replace(store, self.ledger.output)

    def _without(self, plan: Plan, failed: set[str]) -> Path:
        """Return a store of the images that were done, their pixels moved there."""
        numbers = [n for n, unit in enumerate(plan.units) if unit.key in failed]
        if len(numbers) == len(plan.units):
            msg = f"no image of '{self.job.source}' can be read"
            raise InputError(msg)
        rest = self.ledger.store.with_name("rest.ome.zarr")
        files.remove(rest)
        places = prepare_zarr(rest, self._outlines(frozenset(numbers)))
        done = [unit for unit in plan.units if unit.key not in failed]
        for unit, place in zip(done, places, strict=True):
            chunks = self.ledger.store / unit.target / "0" / "c"
            if chunks.exists():
                files.replace(chunks, rest / place / "0" / "c")
        return rest

    def _collect(self, plan: Plan, failed: set[str]) -> None:
        """Write what was found in all images as one JSON."""
        rows: list[Any] = []
        for unit in plan.units:
            if unit.key not in failed:
                rows += map(self._as_given, _rows_in(self.ledger.rows(unit)))
        broken = [reason for _, reason in plan.broken]
        broken += [f.reason for _, f in self.ledger.failures(plan)]
        engine = self.job.settings["processing"]["classifier"]
        content: dict[str, Any] = {"engine": engine, "images": rows}
        if broken:
            content["broken"] = broken
        self._guard.write_json(self.ledger.output, content)

    def _as_given(self, row: dict[str, Any]) -> dict[str, Any]:
        below = Path(row["path"]).relative_to(self.job.source)
        return {**row, "path": str(Path(self.job.given) / below)}


def _rows_in(path: Path) -> list[dict[str, Any]]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
    except (OSError, msgspec.MsgspecError) as error:
        msg = f"'{path}' of a unit that is done cannot be read: {error}"
        raise OutputError(msg) from error


def run_unit(
    output: str, plan_key: str, unit_key: str, threads: int | None = None
) -> Failure | None:
    """Do a unit unless it is done, and mark it.

    Parameters
    ----------
    output
        Of the batch: beside it lies the plan.
    plan_key, unit_key
        Of the plan that it is to be, and of the unit.
    threads
        Of the engines, where the config leaves them open; None: as without a batch.

    Returns
    -------
    Failure or None
        Why it is not done; the mark says so too.
    """
    ledger = Ledger(Path(output))
    with _ONE_AT_A_TIME:
        try:
            opened, unit = _opened(ledger, plan_key, unit_key, threads)
        except RtfocusError as error:
            return Failure(_fault_of(error), str(error))
        if ledger.is_done(unit):
            return None
        try:
            ledger.start(unit)
            notes = opened.do(unit, ledger)
            ledger.done(unit, notes)
        except (RtfocusError, OSError, MemoryError) as error:
            failure = Failure(_fault_of(error), str(error) or repr(error))
            with suppress(OutputError):  # as the disk, perhaps, is full
                ledger.failed(unit, failure)
            return failure
        return None


def run_here(
    plan: Plan, units: Iterable[Unit], on_unit: Callable[[Unit, Failure | None], None]
) -> None:
    """Do units one after the other in this process."""
    try:
        for unit in units:
            on_unit(unit, run_unit(plan.job.output, plan.key, unit.key))
    finally:
        close_opened()


def close_opened() -> None:
    """Free the engines that this process keeps for units to come."""
    global _kept
    if _kept is not None:
        _kept.close()
    _kept = None


class _Opened:
    """What a process needs for the units of a plan."""

    def __init__(self, plan: Plan, threads: int | None) -> None:
        self.key = plan.key
        self.units = {unit.key: unit for unit in plan.units}
        self._plan = plan
        self._images = _image_set(plan.job, (), threads)
        self._sources: OrderedDict[str, list[ImageSeries]] = OrderedDict()

    def do(self, unit: Unit, ledger: Ledger) -> list[str]:
        """Do a unit and return what is to be said of it."""
        job, images = self._plan.job, self._images
        series = self._series(unit)
        images.turn_to((series,))
        if job.command == "classify":
            rows = [
                images.row(0, index, result) for index, result in images.classified(0)
            ]
            with files.whole(ledger.rows(unit), overwrite=True) as part:
                part.write_bytes(msgspec.json.encode(rows))
            return []
        image = _outline(job, images, 0, series)
        planes = images.restored(0, lambda: None)
        if job.stretch:
            planes = map(stretch_histogram, planes)
        image = replace(image, planes=planes)
        if self._plan.form == "zarr":
            with ledger.part(unit) as part:
                _fill_apart(part, ledger.store / unit.target, image)
            return images.cut()
        guard = OutputGuard(companions([series]), overwrite=True)
        target = guard.claim(ledger.output / unit.target, named=not unit.target)
        with guard.whole(target) as part:
            write_tiff(part, [image])
        return images.cut()

    def close(self) -> None:
        """Free the engines."""
        self._images.close()

    def _series(self, unit: Unit) -> ImageSeries:
        """Open the image of a unit: from its own file, else as it was found.

        Raises
        ------
        InputError
            If it is not there any more, or another one.
        """
        for place in (unit.path, self._plan.job.source):
            with suppress(InputError):
                listed = [
                    one for one in self._list(place) if str(one.path) == unit.path
                ]
                if unit.number < len(listed):
                    series = listed[unit.number]
                    if facts_of(series) == unit.facts:
                        return series
        msg = (
            f"'{unit.path}' is not what it was when the batch began; begin it anew "
            "with --overwrite"
        )
        raise InputError(msg)

    def _list(self, place: str) -> list[ImageSeries]:
        if place not in self._sources:
            if len(self._sources) >= _MOST_SOURCES:
                self._sources.popitem(last=False)
            self._sources[place] = find_images(Path(place)).series
        self._sources.move_to_end(place)
        return self._sources[place]


_kept: _Opened | None = None
_ONE_AT_A_TIME = threading.Lock()
"""A process does one unit at a time, however many threads a worker has."""


def _opened(
    ledger: Ledger, plan_key: str, unit_key: str, threads: int | None
) -> tuple[_Opened, Unit]:
    """Return what this process needs for a unit, kept from the one before."""
    global _kept
    # A later call of the same batch may have found more images.
    if _kept is None or _kept.key != plan_key or unit_key not in _kept.units:
        close_opened()
        plan = ledger.plan()
        if plan is None or plan.key != plan_key:
            msg = f"'{ledger.folder}' does not hold the plan; is it on a shared drive?"
            raise OutputError(msg)
        if plan.made_by != __version__:
            msg = (
                f"rtfocus {__version__} cannot do a part of a batch of rtfocus "
                f"{plan.made_by}; install that one here"
            )
            raise EngineError(msg)
        _kept = _Opened(plan, threads)
    return _kept, _kept.units[unit_key]


def notes_of(found: FoundImages, images: ImageSet) -> list[str]:
    """Say, a line each, what is left out, filled in or assumed, before the work."""
    notes = [note for series in found.series for note in series.notes]
    if found.skipped:
        number = len(found.skipped)
        notes.append(f"{number} earlier results of rtfocus are no inputs")
    return list(dict.fromkeys([*notes, *images.assumptions()]))


def _image_set(
    job: Job, series: Iterable[ImageSeries], threads: int | None = None
) -> ImageSet:
    stated = None
    if job.optics is not None:
        stated = StatedOptics(stated_optics(job.optics), job.optics)
    settings = parse_config(job.settings)
    processing = settings.processing
    if processing.threads is None and threads is not None:
        processing = processing.model_copy(update={"threads": threads})
        settings = settings.model_copy(update={"processing": processing})
    return ImageSet(settings, tuple(series), stated=stated, free_choice=job.free_choice)


def _outline(
    job: Job, images: ImageSet, number: int, series: ImageSeries
) -> OutputImage:
    """Return an image of the output without its planes."""
    return OutputImage(
        like=series,
        dtype=np.dtype("u1") if job.stretch else images.restored_dtype(number),
        planes=iter(()),
        made={"command": "restore", **images.made(number)},
        keeps_counts=not job.stretch,
    )


def _fill_apart(part: Path, group: Path, image: OutputImage) -> None:
    """Write the pixels of an image elsewhere, then move them into their arrays whole.

    Whoever is killed in between leaves neither half a chunk nor a stray file there.
    """
    arrays = [path for path in group.iterdir() if (path / "zarr.json").is_file()]
    for array in arrays:
        (part / array.name).mkdir(parents=True)
        shutil.copyfile(array / "zarr.json", part / array.name / "zarr.json")
    fill_image(part, "", image)
    for array in arrays:
        files.remove(array / "c")
        if (part / array.name / "c").exists():  # zeros alone need no chunks
            files.replace(part / array.name / "c", array / "c")


def _fault_of(error: BaseException) -> Fault:
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, EngineError):
        return "engine"
    return "output" if isinstance(error, (OutputError, OSError)) else "other"


def _is_one(found: FoundImages, job: Job) -> bool:
    """Tell whether the input is one thing, such as a Zarr, not a folder of files."""
    source = Path(job.source)
    return any(
        os.path.abspath(path) == os.path.abspath(source)
        for series in found.series
        for path in (series.path, *series.files)
    )
