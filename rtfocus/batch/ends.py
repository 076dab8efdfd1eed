"""Ends: how a batch begins, and how its output comes to its place."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus import __version__, files
from rtfocus.batch.findings import Findings, StatedErrors, texts_of
from rtfocus.batch.plan import (
    BatchJob,
    BatchPlan,
    Failure,
    Form,
    Ledger,
    Unit,
    digest,
    read_state,
    text_of,
    units_of,
)
from rtfocus.batch.work import image_set_of
from rtfocus.errors import ConfigError, InputError, OutputError, writing
from rtfocus.frame import FrameResult
from rtfocus.image_set import ImageSet
from rtfocus.images.metadata import OutputImage
from rtfocus.images.outputs import ImageOutput, OutputGuard, TextKind
from rtfocus.images.reading import BrokenImage, FoundImages, companions, find_images
from rtfocus.images.series import ContrastWindow, ImageSeries, StagePosition
from rtfocus.images.zarr_writing import places_in_zarr, prepare_zarr


class Begun(NamedTuple):
    """How a call found its batch."""

    plan: BatchPlan
    done: int
    """Units that an earlier call did."""
    changed: tuple[Unit, ...] = ()
    """Units whose pixels are others than an earlier call had."""


class Batch:
    """A job with its images, as the process that plans and ends it sees it.

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

    def __init__(self, job: BatchJob, *, overwrite: bool = False) -> None:
        self.job = job
        self.found = find_images(Path(job.source))
        self.images = image_set_of(job, self.found.series)
        self.ledger = Ledger(Path(job.output))
        self.findings = Findings()
        self._overwrite = overwrite
        inputs = [*companions(self.found.series), Path(job.source)]
        if Path(job.source).is_dir() and not _is_one(self.found, job):
            inputs.pop()  # merely searched
        self._guard = OutputGuard(inputs, overwrite=overwrite)

    def plan(self) -> Begun:
        """Return the plan, begun now or by an earlier call.

        Raises
        ------
        OutputError
            If something stands in the way, or another batch.
        """
        begun = self._existing_plan()
        # What an earlier call has written may be there already.
        guard = self._guard if begun is None else self._guard.fresh(overwrite=True)
        form, targets = self._targets(guard)
        images = [
            (series, target, self.images.made(number))
            for number, (series, target) in enumerate(
                zip(self.found.series, targets, strict=True)
            )
        ]
        broken = tuple((text_of(one.path), one.reason) for one in self.found.broken)
        plan = new_plan(form, self.job, images, broken)
        if begun is not None and begun.key == plan.key:
            changed = self.ledger.extend(begun, plan)
            left = self.ledger.left(plan.units)
            return Begun(plan, len(plan.units) - len(left), changed)
        if begun is not None and not self._overwrite:
            msg = (
                f"'{self.ledger.folder}' holds a batch that did not end, with other "
                "settings, weights or images: end it as it was begun, or begin anew "
                "with --overwrite"
            )
            raise OutputError(msg)
        prepare = self._prepare if form == "zarr" else None
        self.ledger.begin(plan, prepare)
        return Begun(plan, 0)

    def changed(self, plan: BatchPlan) -> list[Unit]:
        """Return the units whose images are not those any more that were planned."""
        now = {
            (unit.path, unit.number): unit
            for unit in units_of((series, "", {}) for series in self.found.series)
        }
        return [
            unit
            for unit in plan.units
            if (image := now.get((unit.path, unit.number))) is not None
            and (image.content, image.facts) != (unit.content, unit.facts)
        ]

    def finish(self, plan: BatchPlan) -> list[tuple[Unit, Failure]]:
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
        self._collect_errors(plan, failed)
        # A folder can be completed later, file by file.
        if not (failures or plan.broken) or plan.form in ("zarr", "rows"):
            self.ledger.remove()
        return failures

    def _existing_plan(self) -> BatchPlan | None:
        try:
            return self.ledger.plan()
        except OutputError:
            if self._overwrite:
                return None
            raise

    def _targets(self, guard: OutputGuard) -> tuple[Form, list[str]]:
        """Return the form of the output, and of every image its place in it."""
        output, series = Path(self.job.output), self.found.series
        guard.claim_folder(self.ledger.folder)
        if self.job.command == "classify":
            for target, kind in self._texts():
                guard.claim_text(target, kind)
            return "rows", [""] * len(series)
        place = ImageOutput(output, series, guard, Path(self.job.source))
        self._maps(guard)
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
            self.images.outline(number, stretch=self.job.stretch)
            for number in range(len(self.found.series))
            if number not in left_out
        ]

    def _prepare(self, path: Path) -> None:
        with writing(path, OutputError):
            prepare_zarr(path, self._outlines())

    def _deliver(self, plan: BatchPlan, failed: set[str]) -> None:
        store = self.ledger.store
        if not store.exists():
            return  # a call that was killed afterwards has put it in its place
        if failed:
            store = self._without(plan, failed)
        self._guard.fresh(overwrite=self._overwrite).claim(self.ledger.output)
        if failed:
            files.sync_everything()
        files.replace(store, self.ledger.output)
        files.sync_names(self.ledger.output.parent)

    def _without(self, plan: BatchPlan, failed: set[str]) -> Path:
        """Return a store of the images that were done.

        Their pixels stay where they are until it has its place, so that whoever is
        killed in between takes nothing away.
        """
        numbers = [n for n, unit in enumerate(plan.units) if unit.key in failed]
        if len(numbers) == len(plan.units):
            msg = f"no image of '{self.job.source}' can be read"
            raise InputError(msg)
        rest = self.ledger.store.with_name("rest.ome.zarr")
        files.remove(rest)
        done = [unit for unit in plan.units if unit.key not in failed]
        with writing(rest, OutputError):
            places = prepare_zarr(rest, self._outlines(frozenset(numbers)))
            for unit, place in zip(done, places, strict=True):
                chunks = self.ledger.store / unit.target / "0" / "c"
                if chunks.exists():
                    target = rest / place / "0" / "c"
                    shutil.copytree(chunks, target, copy_function=_link)
        return rest

    def _collect(self, plan: BatchPlan, failed: set[str]) -> None:
        """Write what was found in all images as JSON, as a table, or both."""
        for unit in plan.units:
            if unit.key not in failed:
                findings = read_state(self.ledger.findings(unit), Findings)
                for row in (*findings.planes, *findings.stacks):
                    row["path"] = self._as_given(row["path"])
                self.findings.add(findings)
        if not self.findings.planes:
            return  # nothing could be read: the caller says so
        numbers = self._numbers()
        lost = [BrokenImage(Path(path), reason) for path, reason in plan.broken]
        for unit, failure in self.ledger.failures(plan):
            # It may be there no more.
            number = numbers.get((unit.path, unit.number))
            image = None if number is None else self.found.series[number]
            lost.append(BrokenImage(Path(unit.path), failure.reason, image))
        broken = [
            replace(one, path=Path(given), reason=one.reason.replace(path, given))
            for one in lost
            if (given := self._as_given(path := str(one.path)))
        ]
        engine = self.job.settings["processing"]["classifier"]
        root = Path(self.job.given)
        for target, kind in self._texts():
            text = self.findings.text(kind, engine=engine, broken=broken, root=root)
            # A call that was killed afterwards has written just this.
            if not (target.is_file() and target.read_bytes() == text.encode()):
                self._guard.write_text(target, text)
                files.sync(target)
                files.sync_names(target.parent)

    def _texts(self) -> list[tuple[Path, TextKind]]:
        output, table = self.job.output, self.job.table
        return texts_of(
            None if output == table else Path(output),
            None if table is None else Path(table),
        )

    def _maps(self, guard: OutputGuard) -> "ErrorMaps":
        """Return what writes the errors that are stated; its place is claimed."""
        output = self.job.expected_error
        place = None if output is None else Path(output)
        return ErrorMaps(place, self.found.series, guard, Path(self.job.source))

    def _collect_errors(self, plan: BatchPlan, failed: set[str]) -> None:
        """Write the errors stated of all images, if asked for."""
        if self.job.expected_error is None:
            return
        # An earlier call may have written those of fewer images.
        maps = self._maps(self._guard.fresh(overwrite=True))
        numbers = self._numbers()
        for unit in plan.units:
            number = numbers.get((unit.path, unit.number))
            if number is not None and unit.key not in failed:
                maps.take(number, read_state(self.ledger.errors(unit), StatedErrors))
        maps.write(self.images)

    def _numbers(self) -> dict[tuple[str, int], int]:
        """Return the numbers of the images by what a unit knows of its own."""
        images = units_of((series, "", {}) for series in self.found.series)
        return {(one.path, one.number): n for n, one in enumerate(images)}

    def _as_given(self, path: str) -> str:
        return str(Path(self.job.given) / Path(path).relative_to(self.job.source))


class ErrorMaps:
    """The error expected to be left in restored images, a pixel per tile.

    Kept until all images are restored: a thousandth of their pixels. Arguments are as
    of `ImageOutput`; without an output nobody asked for it.
    """

    def __init__(
        self,
        output: Path | None,
        series: Sequence[ImageSeries],
        guard: OutputGuard,
        root: Path,
    ) -> None:
        self._place: ImageOutput | None = None
        if output is not None:
            self._place = ImageOutput(output, series, guard, root)
        self._found: dict[int, StatedErrors] = {}

    def note(self, number: int, result: FrameResult) -> None:
        """Take in the next plane of an image."""
        if self._place is not None:
            self._found.setdefault(number, StatedErrors()).note(result)

    def take(self, number: int, stated: StatedErrors) -> None:
        """Take in all planes of an image."""
        self._found[number] = stated

    def write(self, images: ImageSet) -> None:
        """Write those of images that were restored, once all are."""
        if (place := self._place) is None:
            return
        # In a folder every image has a target, which stays empty of a broken one.
        outputs = [
            error_map(stated, image, images.made(number))
            for number, image in enumerate(images.series)
            if (stated := self._found.get(number, StatedErrors())).is_of(image)
            or place.is_folder
        ]
        if outputs:
            place.write(outputs)


def error_map(
    stated: StatedErrors, image: ImageSeries, made: Mapping[str, str]
) -> OutputImage:
    """Return errors that are stated as an image, placed where the tiles lie."""
    grid = stated.grid
    if grid is None or not stated.is_of(image):
        return OutputImage(image, image.dtype, map(_not_restored, [image]))
    maps = [
        np.frombuffer(plane, np.dtype("<f4")).reshape(grid.rows, grid.columns)
        for plane in stated.planes
    ]
    window = ContrastWindow(0.0, float(np.nan_to_num(maps).max()) or 1.0)
    size_y, size_x = image.pixel_size_y_um or 0.0, image.pixel_size_x_um or 0.0
    stage, origin = image.stage or StagePosition(), grid.origin_px
    like = replace(
        image,
        name=f"{image.name} expected error",
        shape=(grid.rows, grid.columns),
        pixel_size_y_um=round(grid.stride_px * size_y, 9) or None,
        pixel_size_x_um=round(grid.stride_px * size_x, 9) or None,
        stage=stage.moved(origin * size_y, origin * size_x),
        channels=tuple(replace(one, window=window) for one in image.channels),
    )
    facts = {
        "command": "restore --expected-error",
        "values": "root mean square over a tile, in counts",
        "tiles": f"of {grid.tile_px} px, every {grid.stride_px:g} px, the first "
        f"around {grid.origin_px:g} px from the middle of the first pixel",
        **made,
    }
    return OutputImage(like, np.dtype("<f4"), iter(maps), facts)


def _not_restored(image: ImageSeries) -> NDArray[np.float32]:
    msg = f"'{image.path}' was not restored"
    raise InputError(msg)


def new_plan(
    form: Form,
    job: BatchJob,
    images: list[tuple[ImageSeries, str, dict[str, str]]],
    broken: tuple[tuple[str, str], ...],
) -> BatchPlan:
    """Make a plan.

    Parameters
    ----------
    form, job
        Of the output; what is asked for.
    images
        All of them, with their targets, and how each is made: engines with the hashes
        of their weights, optics.
    broken
        Others that cannot be opened, and why.
    """
    units = units_of(images)
    asked = msgspec.to_builtins(msgspec.structs.replace(job, given=""))
    shared = [__version__, form, asked]
    # Files may come and go, each for itself; the images of one Zarr are set.
    made = (
        [how for *_, how in images]
        if form == "zarr"
        else sorted({repr(sorted(how.items())) for *_, how in images})
    )
    own = [unit.image + unit.facts for unit in units] if form == "zarr" else []
    return BatchPlan(
        key=digest(repr([shared, made, own])),
        made_by=__version__,
        form=form,
        job=job,
        units=units,
        broken=broken,
    )


def _link(source: str, target: str) -> None:
    """Give a file a second name; a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _is_one(images: FoundImages, job: BatchJob) -> bool:
    """Tell whether the input is one thing, such as a Zarr, not a folder of files."""
    source = Path(job.source)
    return any(
        os.path.abspath(path) == os.path.abspath(source)
        for series in images.series
        for path in (series.path, *series.files)
    )
