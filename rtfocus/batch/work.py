"""Work: doing the units of a batch, wherever they are done.

A process keeps what it has opened, above all the engines with their weights, from one
unit to the next.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from rtfocus import __version__, files
from rtfocus.batch.findings import StatedErrors, find_in
from rtfocus.batch.plan import (
    BatchJob,
    BatchPlan,
    Failure,
    Fault,
    Ledger,
    Unit,
    content_of,
    digest_of_making,
    facts_of,
)
from rtfocus.config import parse_config
from rtfocus.errors import EngineError, InputError, OutputError, RtfocusError, writing
from rtfocus.image_set import ImageSet
from rtfocus.images.metadata import OutputImage
from rtfocus.images.ome_xml import write_tiff
from rtfocus.images.optics import StatedOptics
from rtfocus.images.outputs import OutputGuard
from rtfocus.images.reading import companions, find_images, stretch_histogram
from rtfocus.images.series import ImageSeries
from rtfocus.images.zarr_writing import fill_apart, put_in_place

_MOST_SOURCES = 8
"""Files whose list of images a process keeps."""


def run_unit(
    output: str, plan_key: str, unit: Unit, threads: int | None = None
) -> Failure | None:
    """Do a unit unless it is done, and mark it.

    Parameters
    ----------
    output
        Of the batch: beside it lies the plan.
    plan_key, unit
        The plan that it is to be, and its unit.
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
            opened = _opened(ledger, plan_key, unit, threads)
        except RtfocusError as error:
            return failure_of(error)
        if ledger.is_done(unit):
            return None
        try:
            ledger.start(unit)
            notes = opened.do(unit, ledger)
            ledger.done(unit, notes)
        except (RtfocusError, OSError, MemoryError) as error:
            failure = failure_of(error)
            # Another batch may stand there by now: it has its own marks.
            if ledger.holds(plan_key):
                with suppress(OutputError):  # as the disk, perhaps, is full
                    ledger.failed(unit, failure)
            return failure
        return None


def doing(plan: BatchPlan) -> Callable[[Unit, int | None], Failure | None]:
    """Return what does a unit of a plan in any process that sees its folder."""
    return partial(run_unit, plan.job.output, plan.key)


def run_here(
    plan: BatchPlan,
    units: Iterable[Unit],
    on_unit: Callable[[Unit, Failure | None], None],
) -> None:
    """Do units one after the other in this process."""
    try:
        for unit in units:
            on_unit(unit, run_unit(plan.job.output, plan.key, unit))
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

    def __init__(self, plan: BatchPlan, threads: int | None) -> None:
        self.key = plan.key
        self.units = {unit.key: unit for unit in plan.units}
        self._plan = plan
        self._images = image_set_of(plan.job, (), threads)
        self._sources: OrderedDict[str, list[ImageSeries]] = OrderedDict()

    def do(self, unit: Unit, ledger: Ledger) -> list[str]:
        """Do a unit and return the notes on it."""
        job, images = self._plan.job, self._images
        series = self._series(unit)
        images.turn_to((series,))
        if digest_of_making(made := images.made(0)) != unit.made:
            here = ", ".join(f"{what} {how}" for what, how in made.items())
            msg = f"engines or optics are not those of the plan; here: {here}"
            raise EngineError(msg)
        at_work = _UnitAtWork(self._plan, unit, series, ledger)
        if job.command == "classify":
            tiles = job.table != job.output
            findings = find_in(images, 0, images.classified(0), with_tiles=tiles)
            at_work.keep(ledger.findings(unit), findings)
            return images.doubts()
        image = images.outline(0, stretch=job.stretch)
        stated = StatedErrors()
        planes = images.restored(0, stated.note)
        if job.stretch:
            planes = map(stretch_histogram, planes)
        image = replace(image, planes=planes)
        if self._plan.form == "zarr":
            at_work.write_group(image, stated)
        else:
            at_work.write_file(image, stated)
        return images.doubts()

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
        if not Path(unit.path).exists():
            msg = f"'{unit.path}' is not there any more; put it back, then go on"
            raise InputError(msg)
        for place in (unit.path, self._plan.job.source):
            with suppress(InputError):
                if (series := self._find_image(place, unit)) is not None:
                    if content_of(series) != unit.content:
                        break
                    return series
        raise _changed(unit)

    def _find_image(self, place: str, unit: Unit) -> ImageSeries | None:
        """Return the image of a unit among those of a place; None: it is not there."""
        same = [one for one in self._list(place) if str(one.path) == unit.path]
        image = same[unit.number] if unit.number < len(same) else None
        return image if image is not None and facts_of(image) == unit.facts else None

    def _list(self, place: str) -> list[ImageSeries]:
        if place not in self._sources:
            if len(self._sources) >= _MOST_SOURCES:
                self._sources.popitem(last=False)
            self._sources[place] = find_images(Path(place)).series
        self._sources.move_to_end(place)
        return self._sources[place]


@dataclass(frozen=True)
class _UnitAtWork:
    """A unit that is being done: brings its results to their places, whole."""

    plan: BatchPlan
    unit: Unit
    series: ImageSeries
    ledger: Ledger

    def write_group(self, image: OutputImage, stated: StatedErrors) -> None:
        """Write an image into its group of the batch's OME-Zarr."""
        group = self.ledger.store / self.unit.target
        with writing(group, OutputError), self.ledger.part(self.unit) as part:
            fill_apart(part, group, image)
            files.sync(part)
            self._keep_errors(stated)
            self._insist()
            put_in_place(part, group)

    def write_file(self, image: OutputImage, stated: StatedErrors) -> None:
        """Write an image as a TIFF of its own."""
        guard = OutputGuard(companions([self.series]), overwrite=True)
        target = self.ledger.output / self.unit.target
        target = guard.claim(target, named=not self.unit.target)
        with guard.whole(target) as part:
            write_tiff(part, [image])
            files.sync(part)
            self._keep_errors(stated)
            self._insist()
        files.sync_names(*_folders(target, self.ledger.output))

    def keep(self, place: Path, found: object) -> None:
        """Keep what was found for the end of the batch."""
        with files.whole(place, overwrite=True) as part:
            part.write_bytes(msgspec.json.encode(found))
            self._insist()
            files.sync(part)
        files.sync_names(place.parent)

    def _keep_errors(self, stated: StatedErrors) -> None:
        if self.plan.job.expected_error is not None:
            self.keep(self.ledger.errors(self.unit), stated)

    def _insist(self) -> None:
        """Refuse to put pixels into a batch that began anew, or is at its end.

        This process was given up then, and does not know it. Nor does an image come
        there that changed while it was read.
        """
        if content_of(self.series) != self.unit.content:
            raise _changed(self.unit)
        if not self.ledger.holds(self.plan.key):
            msg = (
                f"the batch of '{self.ledger.output}' ended or began anew while this "
                "process worked for the one before; nothing of it was written"
            )
            raise OutputError(msg)


class _ChangedError(InputError):
    """An image is not the one that was planned."""


def _changed(unit: Unit) -> _ChangedError:
    return _ChangedError(
        f"'{unit.path}' has changed since the batch was planned; the same command "
        "does it again"
    )


def _folders(target: Path, output: Path) -> list[Path]:
    """Return the folders from that of a file up to that of the output."""
    around = [target.parent, *target.parent.parents]
    return around[: around.index(output.parent) + 1]


_kept: _Opened | None = None
_ONE_AT_A_TIME = threading.Lock()
"""A process does one unit at a time, however many threads a worker has."""


def _opened(ledger: Ledger, plan_key: str, unit: Unit, threads: int | None) -> _Opened:
    """Return what this process needs for a unit, kept from the one before."""
    global _kept
    # A later call of the same batch may have found more images.
    if _kept is None or _kept.key != plan_key or unit.key not in _kept.units:
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
    return _kept


def image_set_of(
    job: BatchJob, series: Iterable[ImageSeries], threads: int | None = None
) -> ImageSet:
    """Return images with what a job says of them; `threads` as in `run_unit`."""
    stated = None
    if job.optics is not None:
        stated = StatedOptics(job.optics, job.optics_origin)
    settings = parse_config(job.settings)
    if settings.processing.threads is None and threads is not None:
        settings = settings.with_processing(threads=threads)
    return ImageSet(
        settings,
        tuple(series),
        stated=stated,
        free_choice=job.free_choice,
        states_error=job.expected_error is not None,
    )


def failure_of(error: BaseException) -> Failure:
    """Say why a unit failed of an error."""
    return Failure(_fault_of(error), str(error) or repr(error))


def _fault_of(error: BaseException) -> Fault:
    if isinstance(error, _ChangedError):
        return "changed"
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, EngineError):
        return "engine"
    return "output" if isinstance(error, (OutputError, OSError)) else "other"
