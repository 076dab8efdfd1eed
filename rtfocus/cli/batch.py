"""Batch options: commands by many processes, or as a job array."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout
from msgspec import to_builtins
from msgspec.structs import replace

from rtfocus.batch.ends import Batch, Begun
from rtfocus.batch.plan import BatchJob, BatchPlan, Failure, Ledger, Unit, text_of
from rtfocus.batch.scheduler import WORKERS_S, R, U, goes_on, run_on, workers_of
from rtfocus.batch.work import doing, run_here
from rtfocus.cli.display import counting, told_of
from rtfocus.errors import (
    BusyError,
    ConfigError,
    IncompleteError,
    InputError,
    WriterError,
    number_of,
    writing,
)
from rtfocus.files import recover
from rtfocus.image_set import ImageSet
from rtfocus.images.metadata import run_at
from rtfocus.images.outputs import STANDARD_OUTPUT
from rtfocus.images.reading import FoundImages
from rtfocus.writers.finish import places_without_frame

SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS|local[:N]",
        rich_help_panel="Many processes",
        help="Address of a dask scheduler, or N processes on this computer.",
    ),
]
ResourcesOption = Annotated[
    str | None,
    typer.Option(
        "--resources",
        metavar="NAME=N",
        rich_help_panel="Many processes",
        help="What a worker must have been started with, such as GPU=1.",
    ),
]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait-workers",
        metavar="SECONDS",
        min=0,
        rich_help_panel="Many processes",
        help="How long to wait while there is no worker.",
    ),
]
InitOption = Annotated[
    bool,
    typer.Option(
        "--init",
        rich_help_panel="Many processes",
        help="Job arrays: plan only, and say how many images there are.",
    ),
]
UnitOption = Annotated[
    str | None,
    typer.Option(
        "--unit",
        metavar="K/N",
        rich_help_panel="Many processes",
        help="Job arrays: do part K, from 1, of N parts of the plan.",
    ),
]
FinishOption = Annotated[
    bool,
    typer.Option(
        "--finish",
        rich_help_panel="Many processes",
        help="Job arrays: put the output in its place and name what failed.",
    ),
]


@dataclass(frozen=True)
class Many:
    """What the options say of many processes."""

    scheduler: str | None = None
    resources: str | None = None
    wait_s: float = WORKERS_S
    init: bool = False
    unit: str | None = None
    finish: bool = False

    @property
    def is_asked_for(self) -> bool:
        """Tell whether there are to be any."""
        return self != Many()


def files_of_many(
    json_file: Path | None, table: Path | None
) -> tuple[Path, str | None]:
    """Return the output of a batch of ``classify``, and its table."""
    given = [path for path in (json_file, table) if path is not None]
    if not given or any(str(path) in STANDARD_OUTPUT for path in given):
        msg = (
            "many processes need a file for what they find: --json FILE, --csv FILE "
            "or both"
        )
        raise ConfigError(msg)
    if len({os.path.abspath(path) for path in given}) < len(given):
        msg = f"two results would both be '{table}'; choose different names"
        raise ConfigError(msg)
    return given[0], None if table is None else os.path.abspath(table)


def refuse_with_many(option: str, given: object) -> None:
    """Refuse what only one process can do."""
    if given is not None:
        msg = f"{option} is for one process; leave it out, or the options of many"
        raise ConfigError(msg)


def run_batch(job: BatchJob, many: Many, *, overwrite: bool) -> None:
    """Do what the options ask for: all of a batch, or a step of it.

    Raises
    ------
    RtfocusError
        Says what is not done, after all else was.
    """
    _refuse_without_scheduler(many)
    steps = (many.scheduler, many.init, many.unit, many.finish)
    if sum(map(bool, steps)) != 1:
        msg = "give one of --scheduler, --init, --unit and --finish"
        raise ConfigError(msg)
    resources = _resources(many.resources)
    for path in filter(None, (job.source, job.output, job.table, job.expected_error)):
        text_of(Path(path))  # refuses what a plan cannot hold
    ledger = Ledger(Path(job.output))
    if many.unit is not None:
        _do_part(ledger, many.unit, job)
        return
    with _alone(ledger):
        batch = Batch(job, overwrite=overwrite)
        if many.finish:
            plan = _plan_of_init(ledger, job)
            _refuse_changed(batch.changed(plan))
            _finish(batch, plan, "do their parts again: --unit K/N")
            return
        for line in notes_of(batch.found, batch.images):
            typer.echo(line, err=True)
        begun = batch.plan()
        plan, done = begun.plan, begun.done
        _say_begun(ledger, begun)
        if many.init:
            return
        with (
            _saying_what_is_left(ledger, plan.units),
            counting("images", len(plan.units), done) as show,
        ):
            run_on(
                many.scheduler or "local",
                doing(plan),
                ledger.left(plan.units),
                lambda unit, failure: show(_say(unit, failure)),
                resources=resources,
                wait_s=many.wait_s,
                on_note=_note,
            )
        _finish(batch, plan, "the same command goes on from there")


def do_on_workers(
    many: Many,
    do: Callable[[U, int | None], R | Failure],
    units: Sequence[U],
    on_unit: Callable[[U, R | Failure], str | None],
    *,
    what: str,
    rest: Callable[[int], str],
) -> None:
    """Do units of any kind on the workers that the options name, and show how many.

    Parameters
    ----------
    many
        With a scheduler.
    do, units, rest
        As of `run_on`.
    on_unit
        Called with every unit and what came of it; returns a line to show, or None.
    what
        Names units in the plural.

    Raises
    ------
    RtfocusError
        As `run_on`, and if the options do not go together.
    """
    _refuse_without_scheduler(many)
    resources = _resources(many.resources)
    with counting(what, len(units), 0) as show:
        run_on(
            many.scheduler or "local",
            do,
            units,
            lambda unit, result: show(on_unit(unit, result)),
            resources=resources,
            wait_s=many.wait_s,
            on_note=_note,
            rest=rest,
        )


def _refuse_without_scheduler(many: Many) -> None:
    if many.scheduler is None and (many.resources or many.wait_s != WORKERS_S):
        msg = "--resources and --wait-workers are for workers; give --scheduler"
        raise ConfigError(msg)
    if many.scheduler is None:
        return
    here = workers_of(many.scheduler)  # refused before anything is begun
    if here is not None and many.resources:
        msg = (
            f"--resources '{many.resources}' is of workers that were started with it; "
            f"those of --scheduler {many.scheduler} have none: leave it out, or give "
            "the address of a scheduler"
        )
        raise ConfigError(msg)


def _do_part(ledger: Ledger, text: str, job: BatchJob) -> None:
    """Do one part of a batch that was planned."""
    plan = _plan_of_init(ledger, job)
    part = plan.part(*part_of(text))
    left = ledger.left(part)
    failed: list[Unit] = []

    def told(unit: Unit, failure: Failure | None) -> str | None:
        if failure is not None:
            failed.append(unit)
        return _say(unit, failure)

    with (
        _saying_what_is_left(ledger, part),
        counting("images", len(part), len(part) - len(left)) as show,
    ):
        run_here(plan, left, lambda unit, failure: show(told(unit, failure)))
    of_part = f"{number_of(len(part), 'image')} of part {text}"
    typer.echo(f"{len(part) - len(failed)} of {of_part} done")
    if failed:
        names = named(unit.path for unit in failed)
        msg = f"{number_of(len(failed), 'image')} of part {text} failed: {names}"
        raise IncompleteError(msg)


def _finish(batch: Batch, plan: BatchPlan, remedy: str) -> None:
    """Put the output in its place; say what is there, and fail if not all is."""
    job, ledger = batch.job, batch.ledger
    notes = ledger.notes(plan)
    missing = ledger.left(plan.units)
    planes = sum(u.planes for u in plan.units) - sum(u.planes for u in missing)
    failures = batch.finish(plan)
    for line in notes:
        typer.echo(line, err=True)
    for _, reason in plan.broken:
        typer.echo(f"broken: {reason}", err=True)
    for unit, failure in failures:
        typer.echo(f"failed: '{unit.path}': {failure.reason}", err=True)
    failed = {unit.key for unit, _ in failures}
    waiting = [unit for unit in missing if unit.key not in failed]
    delivered = not ledger.folder.exists() or plan.form == "folder"
    done = len(plan.units) - len(missing)
    word = "restored" if job.command == "restore" else "classified"
    if delivered and done:
        number = f"{number_of(planes, 'plane')} of {number_of(done, 'image')}"
        places = dict.fromkeys([job.output, job.table or job.output])
        typer.echo(f"{word} {number} to {' and '.join(places)}")
        for line in told_of(batch.findings, each=False):
            typer.echo(line)
        if job.expected_error is not None:
            typer.echo(f"expected error: {job.expected_error}", err=True)
    if waiting:
        msg = (
            f"{len(waiting)} of {number_of(len(plan.units), 'image')} not done: "
            f"{named(u.path for u in waiting)}; {remedy}"
        )
        raise IncompleteError(msg)
    lost = [unit.path for unit, _ in failures] + [path for path, _ in plan.broken]
    if lost:
        again = (
            ""
            if delivered and plan.form != "folder"
            else "; the same command tries them again, and keeps what is done"
        )
        count = number_of(len(lost), "image")
        msg = f"{count} not {word}: {named(lost)}; {done} {word}{again}"
        raise (IncompleteError if done else InputError)(msg)


def notes_of(images_found: FoundImages, images: ImageSet) -> list[str]:
    """Say, a line each, what is left out, filled in or assumed, before the work."""
    notes = [note for series in images_found.series for note in series.notes]
    runs = {one.path.absolute().parent: one.sizes["t"] for one in images_found.series}
    notes += [_without_frame(run, runs[run]) for run in filter(run_at, runs)]
    if images_found.skipped:
        number = len(images_found.skipped)
        notes.append(f"{number} earlier results of rtfocus are no inputs")
    return [note for note in dict.fromkeys([*notes, *images.assumptions()]) if note]


def _without_frame(run: Path, time_points: int) -> str:
    """Say which planes of a run never had a frame; empty: all had one."""
    try:
        count, first = places_without_frame(run, time_points)
    except WriterError as error:
        return f"planes of '{run}' may be without a frame: {error}"
    if not count:
        return ""
    more = f" and {count - len(first)} more" if count > len(first) else ""
    names, number = ", ".join(first) + more, number_of(count, "plane")
    return f"'{run}' has {number} without a frame, nothing but 0: {names}"


def _plan_of_init(ledger: Ledger, job: BatchJob) -> BatchPlan:
    plan = ledger.plan()
    if plan is None:
        msg = f"no batch was begun for '{ledger.output}'; begin it with --init"
        raise ConfigError(msg)
    begun, asked = (to_builtins(replace(one, given="")) for one in (plan.job, job))
    if other := [name for name in asked if begun[name] != asked[name]]:
        msg = (
            f"the batch of '{ledger.output}' was begun with other "
            f"{', '.join(other).replace('_', ' ')}; --unit and --finish take the "
            "options of --init"
        )
        raise ConfigError(msg)
    return plan


def _refuse_changed(changed: list[Unit]) -> None:
    if changed:
        msg = (
            f"{number_of(len(changed), 'image')} changed since the batch was planned: "
            f"{named(unit.path for unit in changed)}; --init and their parts do them "
            "again"
        )
        raise IncompleteError(msg)


def _say_begun(ledger: Ledger, begun: Begun) -> None:
    if begun.changed:
        names = named(unit.path for unit in begun.changed)
        count = number_of(len(begun.changed), "image")
        typer.echo(f"{count} changed since, done anew: {names}")
    number, done = len(begun.plan.units), begun.done
    before = f", {done} of them done before" if done else ""
    typer.echo(f"{number_of(number, 'image')}{before}; state in {ledger.folder}")
    sys.stdout.flush()


def _say(unit: Unit, failure: Failure | None) -> str | None:
    return None if failure is None else f"failed: '{unit.path}': {failure.reason}"


def _note(line: str) -> None:
    # Of this moment: a bar may have taken its place.
    print(line, file=sys.stderr, flush=True)


def named(paths: Iterable[Path | str]) -> str:
    """Return the first three of some names, each once, and how many more there are."""
    names = list(dict.fromkeys(f"'{path}'" for path in paths))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _resources(text: str | None) -> dict[str, float]:
    """Read ``NAME=N``."""
    if text is None:
        return {}
    name, _, number = text.partition("=")
    with suppress(ValueError):
        if name and 0 < float(number) < math.inf:
            return {name: float(number)}
    msg = f"--resources '{text}' is not NAME=N, such as GPU=1"
    raise ConfigError(msg)


def part_of(text: str) -> tuple[int, int]:
    """Read ``K/N``: the K-th, from 1, of N parts.

    Raises
    ------
    ConfigError
        If it is none.
    """
    number, _, of = text.partition("/")
    if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
        return int(number), int(of)
    msg = f"--unit '{text}' is no part: K/N with K from 1 to N, such as 3/40"
    raise ConfigError(msg)


@contextmanager
def _saying_what_is_left(ledger: Ledger, units: tuple[Unit, ...]) -> Iterator[None]:
    """Say after Ctrl-C how to go on; what ended workers left half-done goes."""
    try:
        yield
    except KeyboardInterrupt:
        left = ledger.left(units)
        recover(*(ledger.output / unit.target for unit in left))
        _note(goes_on(len(left)))
        raise


@contextmanager
def _alone(ledger: Ledger) -> Iterator[None]:
    """Refuse a second process that plans or ends the same batch at the same time."""
    lock = FileLock(ledger.folder.with_name(f".{ledger.folder.name}.lock"))
    with writing(ledger.output, ConfigError):
        ledger.folder.parent.mkdir(parents=True, exist_ok=True)
        try:  # within: it is an OSError, too, and would be reported as one
            lock.acquire(timeout=0)
        except Timeout as error:
            msg = f"another process works at the batch of '{ledger.output}'; wait"
            raise BusyError(msg) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows: after its release alone
            Path(lock.lock_file).unlink()
        lock.release()
