"""Training bench: steps per minute of the shipped recipes, with workers and without.

Two trainings of one recipe take turns on the same machine: *one core*, the batch whole
and one thing after the other, and *workers*, its parts side by side while batches are
made ahead. Load from outside hits both; the ratio says what ``--workers`` brings. On a
busy machine there is no second core to gain: so processor time is counted, too, and
*free cores* is the ratio that it allows on as many cores as there are workers, were
they free: shared out evenly, but no sooner than what follows one after the other.

Run: ``python -m bench.training [RECIPE ...] [--data-folder images] [--workers 2]``
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench import machine
from rtfocus.files import resource_folder
from rtfocus.training.recipe import RecipeBase, load_recipe
from rtfocus.training.trainer import Trainer

RECIPES = (
    "train_delpnet",
    "train_rtfocus_2",
    "train_rtfocus_1",
    "train_learned_wiener",
)
# Steps that fill the pool of scenes and the queues.
_WARM_UP = 4
_ENTRIES = 8


def short(path: Path, data_folder: Path | None, folder: Path) -> RecipeBase:
    """Return a recipe that starts from nothing and holds few scenes.

    As many are made per step as otherwise; only the first filling is shorter.
    """
    recipe = load_recipe(path)
    return recipe.model_copy(
        update={
            "start_from": None,
            "checkpoints": folder,
            "data_folder": data_folder,
            "pool": recipe.pool.model_copy(update={"entries": _ENTRIES}),
        }
    )


def turn(trainer: Trainer, steps: int) -> dict[str, float]:
    """Take steps; return seconds of one, and the share that waits for its batch."""
    for _ in range(_WARM_UP):
        trainer.train_step()
    waited, started, spent = trainer.feed.waited_s, time.perf_counter(), _spent_s()
    for _ in range(steps):
        trainer.train_step()
    seconds = time.perf_counter() - started
    serial, own, all_of_it = (
        (after - before) / steps
        for after, before in zip(_spent_s(), spent, strict=True)
    )
    return {
        "step_s": seconds / steps,
        "waiting": (trainer.feed.waited_s - waited) / seconds,
        "cpu_s": all_of_it,
        "cpu_batches_s": all_of_it - own,
        "cpu_serial_s": serial,
    }


def _spent_s() -> tuple[float, float, float]:
    """Return processor time of this thread, of this process, and with its workers."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [one.cpu_times() for one in processes]
    spent = [one.user + one.system for one in times]
    return time.thread_time(), spent[0], sum(spent)


def compare(
    recipe: RecipeBase, workers: int, rounds: int, steps: int
) -> dict[str, Any]:
    """Let both trainings take turns; return medians and the ratio of their paces."""
    ways = {
        "one core": (recipe.model_copy(update={"parts": 1}), 0),
        "workers": (recipe, workers),
    }
    trainers = {name: Trainer(one, workers=n) for name, (one, n) in ways.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    try:
        for trainer in trainers.values():
            # Processes that start take time from both.
            turn(trainer, 1)
        for _ in range(rounds):
            for name, trainer in trainers.items():
                found[name].append(turn(trainer, steps))
    finally:
        for trainer in trainers.values():
            trainer.close()
    pairs = list(zip(found["one core"], found["workers"], strict=True))
    middle = {
        name: {key: statistics.median(t[key] for t in turns) for key in turns[0]}
        for name, turns in found.items()
    }
    one, other = middle["one core"], middle["workers"]
    one["cpu_s"] -= one.pop("cpu_batches_s")  # the other training's processes
    beside = other["cpu_s"] - other["cpu_batches_s"] - other["cpu_serial_s"]
    soonest_s = max(
        other["cpu_s"] / workers,
        other["cpu_serial_s"] + beside / min(workers, recipe.parts),
    )
    return {
        **middle,
        "ratio": statistics.median(a["step_s"] / b["step_s"] for a, b in pairs),
        "free_cores": one["cpu_s"] / soonest_s,
        "load": psutil.getloadavg()[0],
    }


def main() -> None:
    """Compare, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--data-folder", type=Path, default=None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.recipes:
            path = resource_folder("configs") / f"{name}.yaml"
            recipe = short(path, options.data_folder, Path(folder))
            one = compare(recipe, options.workers, options.rounds, options.steps)
            print(
                f"{name}: {60 / one['one core']['step_s']:.0f} steps a minute on one "
                f"core, {60 / one['workers']['step_s']:.0f} with {options.workers} "
                f"workers: {one['ratio']:.2f} times at load {one['load']:.1f}, "
                f"{one['free_cores']:.2f} by processor time",
                flush=True,
            )
            result[name] = one
            # After each: a busy machine may leave no time for the last.
            payload = {"workers": options.workers, "recipes": result}
            machine.write("training", payload, options.out)


if __name__ == "__main__":
    main()
