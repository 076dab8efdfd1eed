"""Batch bench: what many processes bring, what they cost, and whether kills show.

Fields are noise on stripes, restored by Wiener and written as TIFFs. Clusters of 1, 2
and 4 workers take turns over the same fields, with one thread each and engines loaded
before. *Overhead* is the time of a unit beyond reading, restoring and writing, marks
and tasks included, as a share; measured in one process, and with one worker.

- ``--memory``: resident memory of a process over so many small units.
- ``--kill``: so many kills (worker, scheduler or command) at random in batches that
  are called again until they are done, compared byte for byte with undisturbed ones.

Run: python -m bench.batch [--fields 24] [--side 2048] [--memory 1000] [--kill 50]
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tifffile
from distributed import Client, LocalCluster

from bench import machine
from rtfocus import files
from rtfocus.batch.ends import Batch
from rtfocus.batch.plan import ENDING, BatchJob, BatchPlan, Failure, Unit
from rtfocus.batch.scheduler import run_on
from rtfocus.batch.work import doing, run_here
from rtfocus.config import Config
from rtfocus.image_set import ImageSet, restoring_with
from rtfocus.images.metadata import OutputImage
from rtfocus.images.optics import stated_optics
from rtfocus.images.outputs import ImageOutput, OutputGuard
from rtfocus.images.reading import find_images

OPTICS = "NA=0.75,wavelength=520,pixel=0.325"
WORKERS = (1, 2, 4)
FIELDS_OF_A_KILLED_BATCH = 30
MOST_CALLS = 30
KILLED_FORMS = ("killed.ome.zarr", "killed", "killed.json")


def make_fields(folder: Path, number: int, side: int) -> Path:
    """Write fields that differ."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    stripes = 200 + 400 * (np.add.outer(np.arange(side), np.arange(side)) % 32 > 16)
    for index in range(number):
        tifffile.imwrite(folder / f"f{index}.tif", rng.poisson(stripes).astype("<u2"))
    return folder


def job_of(source: Path, output: Path) -> BatchJob:
    """Return what the command would ask for."""
    settings = restoring_with(Config(), "wiener", whole=True)
    return BatchJob(
        command="restore",
        source=str(source),
        given=str(source),
        output=str(output),
        settings=settings.model_dump(mode="json"),
        optics=stated_optics(OPTICS),
        optics_origin=OPTICS,
    )


def told(unit: Unit, failure: Failure | None) -> None:
    """Stop at the first unit that fails."""
    if failure is not None:
        sys.exit(f"{unit.path}: {failure.reason}")


def planned(source: Path, output: Path) -> tuple[Batch, BatchPlan]:
    """Begin a batch."""
    for left in (output, output.with_name(output.name + ".rtfocus-batch")):
        shutil.rmtree(left, ignore_errors=True)
    batch = Batch(job_of(source, output))
    return batch, batch.plan()[0]


def plain_s(source: Path, output: Path) -> float:
    """Return the time of the same work without units."""
    shutil.rmtree(output, ignore_errors=True)
    found = find_images(source)
    job = job_of(source, output)
    with Batch(job).images as images:
        place = ImageOutput(output, found.series, OutputGuard())
        _warm(images)
        begun_s = time.perf_counter()
        place.write(
            [
                OutputImage(
                    like=series,
                    dtype=images.restored_dtype(number),
                    planes=images.restored(number),
                )
                for number, series in enumerate(found.series)
            ]
        )
        return time.perf_counter() - begun_s


def _warm(images: ImageSet) -> None:
    next(images.restored(0))


def here_s(source: Path, output: Path) -> float:
    """Return the time per field in this process, of all but the first."""
    _, plan = planned(source, output)
    ends: list[float] = []

    def ended(unit: Unit, failure: Failure | None) -> None:
        told(unit, failure)
        ends.append(time.perf_counter())

    run_here(plan, plan.units, ended)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def cluster_s(address: str, workers: int, source: Path, output: Path) -> float:
    """Return the time per field on a cluster whose workers have their engines."""
    _, plan = planned(source, output)
    first, rest = plan.units[: 2 * workers], plan.units[2 * workers :]
    run_on(address, doing(plan), first, told)
    begun_s = time.perf_counter()
    run_on(address, doing(plan), rest, told)
    return (time.perf_counter() - begun_s) / len(rest)


def bench(
    folder: Path, fields: int, side: int, rounds: int, workers: tuple[int, ...]
) -> dict[str, Any]:
    """Compare numbers of workers in turns."""
    source = make_fields(folder / "in", fields, side)
    output = folder / "out"
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        clusters = {
            number: stack.enter_context(
                LocalCluster(
                    n_workers=number,
                    threads_per_worker=1,
                    memory_limit=None,
                    dashboard_address="127.0.0.1:0",
                    silence_logs=50,
                )
            )
            for number in workers
        }
        with Client(clusters[1].scheduler_address) as client:
            task_ms = 1e3 * _seconds_per_task(client)
        for _ in range(rounds):
            found.setdefault("plain", []).append(plain_s(source, output) / fields)
            found.setdefault("here", []).append(here_s(source, output))
            for number, cluster in clusters.items():
                taken_s = cluster_s(cluster.scheduler_address, number, source, output)
                found.setdefault(f"workers {number}", []).append(taken_s)
    return summary(found, workers, side, task_ms)


def _seconds_per_task(client: Client) -> float:
    """Return what the scheduler needs for a task that does nothing."""
    client.gather(client.map(abs, range(100)))
    begun_s = time.perf_counter()
    client.gather(client.map(abs, range(1000, 2000)))
    return (time.perf_counter() - begun_s) / 1000


def summary(
    found: dict[str, list[float]], workers: tuple[int, ...], side: int, task_ms: float
) -> dict[str, Any]:
    """Return medians, and ratios of neighbouring turns."""

    def ratio(name: str, to: str) -> float:
        pairs = zip(found[name], found[to], strict=True)
        return statistics.median(a / b for a, b in pairs)

    field_s = statistics.median(found["workers 1"])
    megabytes = 2 * side * side * 2 / 1e6
    return {
        "side_px": side,
        "s_per_field": {n: statistics.median(t) for n, t in found.items()},
        "speed_of_workers": {
            str(n): 1 / ratio(f"workers {n}", "workers 1") for n in workers
        },
        "overhead_of_units": ratio("here", "plain") - 1,
        "with_100_workers": {
            "fields_per_s": 100 / field_s,
            "megabytes_per_s_of_disk": 100 * megabytes / field_s,
            "share_of_scheduler": 100 * task_ms / 1e3 / field_s,
            "task_ms": task_ms,
        },
    }


def memory(folder: Path, units: int) -> dict[str, Any]:
    """Return the resident memory of this process while it does so many units."""
    source = make_fields(folder / "small", units, 96)
    _, plan = planned(source, folder / "smallout")
    process, sizes = psutil.Process(), []

    def ended(unit: Unit, failure: Failure | None) -> None:
        told(unit, failure)
        sizes.append(process.memory_info().rss / 1e6)

    run_here(plan, plan.units, ended)
    marks = [int(len(sizes) * share) - 1 for share in (0.1, 0.5, 1)]
    return {"units": units, "mb_after_10_50_100_percent": [sizes[n] for n in marks]}


class KilledCluster:
    """A scheduler and two workers, processes of which any may be killed.

    Parameters
    ----------
    folder
        Free for its files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.address = ""
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    def revive(self) -> None:
        """Start what is not there; workers do not outlive their scheduler."""
        if self.scheduler is None or self.scheduler.poll() is not None:
            self.close()
            said = self._folder / "scheduler.json"
            said.unlink(missing_ok=True)
            self.scheduler = _dask("scheduler", "--port", "0", "--scheduler-file", said)
            while not said.exists():
                time.sleep(0.05)
            self.address = json.loads(said.read_text())["address"]
        self.workers = [one for one in self.workers if one.poll() is None]
        while len(self.workers) < 2:
            alone = ("--no-nanny", "--nthreads", "1")
            self.workers.append(_dask("worker", self.address, *alone))

    def close(self) -> None:
        """End all processes."""
        for process in (*self.workers, *filter(None, [self.scheduler])):
            process.kill()
            process.wait()
        self.workers = []


def _dask(kind: str, *arguments: str | Path) -> "subprocess.Popen[bytes]":
    line = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard"]
    line += map(str, arguments)
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kills(folder: Path, number: int) -> dict[str, Any]:
    """Kill batches at random, call them again, compare; forms of output in turns."""
    source = make_fields(folder / "fields", FIELDS_OF_A_KILLED_BATCH, 256)
    rng = random.Random(1)
    wanted: dict[str, dict[str, bytes]] = {}
    killed: Counter[str] = Counter()
    batches = 0
    cluster = KilledCluster(folder)
    try:
        while killed.total() < number or len(wanted) < len(KILLED_FORMS):
            name = KILLED_FORMS[batches % len(KILLED_FORMS)]
            output = folder / name
            files.remove(output)
            undisturbed = name not in wanted
            for _ in range(MOST_CALLS):
                victim = _run_and_kill(cluster, source, output, rng, undisturbed)
                killed.update(filter(None, [victim]))
                if not output.with_name(output.name + ENDING).exists():
                    break
            else:
                sys.exit(f"{name} is not done after {MOST_CALLS} calls")
            batches += 1
            found = _content(output)
            wanted.setdefault(name, found)
            differ = {
                one
                for one in {*found, *wanted[name]}
                if found.get(one) != wanted[name].get(one)
            }
            if differ:
                sys.exit(f"batch {batches}, {name}, differs: {sorted(differ)}")
            print(
                f"{time.strftime('%H:%M:%S')} {batches} batches, {dict(killed)}",
                flush=True,
            )
    finally:
        cluster.close()
    return {"batches": batches, "kills": dict(killed), "identical": True}


def _content(output: Path) -> dict[str, bytes]:
    paths = [output] if output.is_file() else output.rglob("*")
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in paths
        if path.is_file()
    }


def _run_and_kill(
    cluster: KilledCluster, source: Path, output: Path, rng: random.Random, spare: bool
) -> str | None:
    """Run the command and kill something, unless it is spared; None: nothing was."""
    cluster.revive()
    what = (
        ["classify", str(source), "--json", str(output)]
        if output.suffix == ".json"
        else ["restore", str(source), "-o", str(output), "--engine", "wiener"]
    )
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "rtfocus", *what, "--optics", OPTICS),
            *("--scheduler", cluster.address),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    done = output.with_name(output.name + ENDING) / "done"
    before = len(os.listdir(done)) if done.is_dir() else 0
    at = min(before + rng.randint(1, 12), FIELDS_OF_A_KILLED_BATCH)
    late_s = rng.uniform(0, 0.1)
    victim = None
    while process.poll() is None:
        time.sleep(0.01)
        reached = done.is_dir() and len(os.listdir(done)) >= at
        if reached and victim is None and not spare:
            victim = rng.choice(("worker", "scheduler", "command"))
            scheduler = cluster.scheduler
            assert scheduler is not None
            target = {
                "worker": rng.choice(cluster.workers),
                "scheduler": scheduler,
                "command": process,
            }[victim]
            time.sleep(late_s)
            target.kill()
            target.wait()
    return victim


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fields", type=int, default=24)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=1000)
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    workers = (1,) if given.smoke else WORKERS
    if given.smoke:
        given.fields, given.side, given.rounds, given.memory = 4, 128, 1, 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures: dict[str, Any] = {}
        if given.kill:
            figures["kill"] = kills(folder, given.kill)
        else:
            figures = bench(folder, given.fields, given.side, given.rounds, workers)
            figures["memory"] = memory(folder, given.memory)
    print(json.dumps(figures, indent=1))
    machine.write("batch_kills" if given.kill else "batch", figures, given.out)


if __name__ == "__main__":
    main()
