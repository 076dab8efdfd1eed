"""Work: doing the units of a batch, wherever they are done.

A process keeps what it has opened, above all the engines with their weights, from one
unit to the next.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus import __version__, files
from rtfocus.batch.plan import (
    BatchJob,
    BatchPlan,
    Failure,
    Fault,
    Ledger,
    StatedErrors,
    Unit,
    content_of,
    digest_of_making,
    facts_of,
)
from rtfocus.config import parse_config
from rtfocus.errors import EngineError, InputError, OutputError, RtfocusError, writing
from rtfocus.frame import BACKGROUND, DefocusMap, FrameResult
from rtfocus.image_set import ImageSet
from rtfocus.images.metadata import OutputImage
from rtfocus.images.ome_xml import write_tiff
from rtfocus.images.optics import StatedOptics
from rtfocus.images.outputs import OutputGuard
from rtfocus.images.reading import companions, find_images, stretch_histogram
from rtfocus.images.series import ContrastWindow, ImageSeries, StagePosition
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
        """Do a unit and return what is to be said of it."""
        job, images = self._plan.job, self._images
        series = self._series(unit)
        images.turn_to((series,))
        if digest_of_making(made := images.made(0)) != unit.made:
            here = ", ".join(f"{what} {how}" for what, how in made.items())
            msg = f"engines or optics are not those of the plan; here: {here}"
            raise EngineError(msg)
        at_work = _UnitAtWork(self._plan, unit, series, ledger)
        if job.command == "classify":
            rows = [
                plane_row(images, 0, index, result, with_tiles=job.table != job.output)
                for index, result in images.classified(0)
            ]
            at_work.keep(ledger.rows(unit), rows)
            return []
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
        if not Path(unit.path).exists():
            msg = f"'{unit.path}' is not there any more; put it back, then go on"
            raise InputError(msg)
        for place in (unit.path, self._plan.job.source):
            with suppress(InputError):
                if (series := self._listed(place, unit)) is not None:
                    if content_of(series) != unit.content:
                        break
                    return series
        raise _changed(unit)

    def _listed(self, place: str, unit: Unit) -> ImageSeries | None:
        """Return the image of a unit among those of a place; None: it is not there."""
        same = [one for one in self._list(place) if str(one.path) == unit.path]
        found = same[unit.number] if unit.number < len(same) else None
        return found if found is not None and facts_of(found) == unit.facts else None

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

        This process was given up then, and nobody told it. Nor does an image come
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


def plane_row(
    images: ImageSet,
    number: int,
    index: dict[str, int],
    result: FrameResult,
    *,
    with_tiles: bool,
) -> dict[str, Any]:
    """Return what was found in a plane as plain values; unknown is None."""
    series, estimate = images.series[number], result.estimate
    told = ("level", "defocus_um", "signed", "confidence")
    names, step = series.channel_names, series.z_step_um
    of_stack = None if step is None else round(index["z"] * step, 9)
    return {
        **image_row(series),
        "channel": names[index["c"]] if names else None,
        "index": index,
        # Files tell of the stage at the first plane alone.
        "z_um": series.stage and (None if any(index.values()) else series.stage.z_um),
        "z_offset_um": of_stack if index["z"] else 0.0,
        "shape": list(series.shape),
        "estimate": estimate and {name: getattr(estimate, name) for name in told},
        "foreground": estimate and estimate.foreground,
        **_shares(result.defocus),
        "classifier": result.engines.get("classifier"),
        **({"tiles": tile_rows(result)} if with_tiles else {}),
        "optics": images.optics(number, index["c"]).describe(),
    }


def image_row(series: ImageSeries) -> dict[str, str | int | None]:
    """Return which image it is as plain values; unknown is None."""
    plate = well = field = None
    if (place := series.place) is not None:
        plate, field = place.plate, place.field
        well = place.rows[place.row] + place.columns[place.column]
    return {
        "path": str(series.path),
        "name": series.name,
        "plate": plate,
        "well": well,
        "field": field,
        "position": series.position,
    }


def _shares(found: DefocusMap | None) -> dict[str, float | None]:
    """Return the share of tiles with specimen out of focus, and how far off they are.

    The deviation is the median of what the tiles state.
    """
    shares: dict[str, float | None] = {"out_of_focus": None, "uncertainty_um": None}
    if found is not None and (there := found.level != BACKGROUND).any():
        shares["out_of_focus"] = float(np.mean(found.level[there] != 0))
        if found.stated_um is not None:
            shares["uncertainty_um"] = float(np.median(found.stated_um[there]))
    return shares


def error_map(
    stated: StatedErrors, image: ImageSeries, made: Mapping[str, str]
) -> OutputImage:
    """Return errors that are stated as an image, placed where the tiles lie."""
    grid = stated.grid
    if grid is None or not stated.is_of(image):
        return OutputImage(image, image.dtype, map(_not_restored, [image]))
    found = [
        np.frombuffer(plane, np.dtype("<f4")).reshape(grid.rows, grid.columns)
        for plane in stated.planes
    ]
    shown = ContrastWindow(0.0, float(np.nan_to_num(found).max()) or 1.0)
    size_y, size_x = image.pixel_size_y_um or 0.0, image.pixel_size_x_um or 0.0
    stage, origin = image.stage or StagePosition(), grid.origin_px
    like = replace(
        image,
        name=f"{image.name} expected error",
        shape=(grid.rows, grid.columns),
        pixel_size_y_um=round(grid.stride_px * size_y, 9) or None,
        pixel_size_x_um=round(grid.stride_px * size_x, 9) or None,
        stage=stage.moved(origin * size_y, origin * size_x),
        channels=tuple(replace(one, window=shown) for one in image.channels),
    )
    told = {
        "command": "restore --expected-error",
        "values": "root mean square over a tile, in counts",
        "tiles": f"of {grid.tile_px} px, every {grid.stride_px:g} px, the first "
        f"around {grid.origin_px:g} px from the middle of the first pixel",
        **made,
    }
    return OutputImage(like, np.dtype("<f4"), iter(found), told)


def _not_restored(image: ImageSeries) -> NDArray[np.float32]:
    msg = f"'{image.path}' was not restored"
    raise InputError(msg)


def tile_rows(result: FrameResult) -> list[dict[str, float | int | str | None]]:
    """List the tiles of a result as plain values, row by row.

    ``y`` and ``x`` are the upper left corner of the tile in frame pixels, cut at
    the frame's edge; ``level`` and ``defocus_um`` are None for background.
    """
    return [] if result.defocus is None else list(_tile_rows(result.defocus))


def _tile_rows(found: DefocusMap) -> Iterator[dict[str, float | int | str | None]]:
    grid = found.grid
    first = grid.origin_px - (grid.tile_px - 1) / 2
    for row, column in np.ndindex(found.level.shape):
        level = int(found.level[row, column])
        empty = level == BACKGROUND
        yield {
            "y": max(0, round(first + row * grid.stride_px)),
            "x": max(0, round(first + column * grid.stride_px)),
            "level": None if empty else level,
            "label": "bg" if empty else str(level),
            "probability": float(found.confidence[row, column]),
            "defocus_um": None if empty else float(found.defocus_um[row, column]),
            "uncertainty_um": None
            if empty or found.stated_um is None
            else float(found.stated_um[row, column]),
        }
