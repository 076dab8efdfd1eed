"""Trainer: from a recipe to weights; deterministic, resumable, watched.

Every random choice depends on (seed, step) alone, so a run that was killed and
resumed ends with the same weights as one that was not. What its steps saw grows as
a CSV file.
"""

import copy
import csv
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from rtfocus.errors import ConfigError
from rtfocus.training.feed import (
    NEWEST,
    BatchFeed,
    load_checkpoint,
    save_checkpoint,
    start_from,
)
from rtfocus.training.layers import chance_from
from rtfocus.training.recipe import OptimiserRecipe, RecipeBase
from rtfocus.training.task import Arrays, Task, Tensors, make_task
from rtfocus.workers import Closing

CURVE_NAME = "curve.csv"


def add_to_curve(
    path: Path,
    step: int,
    seconds: float,
    rate: float,
    recent: Sequence[Mapping[str, float]],
) -> str:
    """Append the means of the newest steps to the file; return them as text.

    Parameters
    ----------
    path
        CSV file; made with its header where it is missing.
    step, seconds, rate
        Steps and time so far, learning rate of the newest step.
    recent
        What the steps since the last line measured, by name; at least one.
    """
    means = {
        name: sum(step[name] for step in recent) / len(recent) for name in recent[0]
    }
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(("step", "seconds", "rate", *means))
        numbers = [f"{value:.5f}" for value in means.values()]
        writer.writerow((step, f"{seconds:.1f}", f"{rate:.3g}", *numbers))
    return " ".join(f"{name} {value:.4f}" for name, value in means.items())


Gradients = list[Tensor | None]


class StepParts:
    """What the parts of a batch ask for, side by side or one after the other.

    Every part has a network with the weights of all and BatchNorm statistics of its
    own, a source of chance of its own, and one thread: how many are at work at a time
    changes nothing about the sum.

    Parameters
    ----------
    task
        What is trained; the first part is its own network's.
    workers
        Threads; 0 or 1: the parts follow each other.
    """

    def __init__(self, task: Task[Any], workers: int) -> None:
        self._seed = task.recipe.seed
        self._tasks = [task]
        for _ in range(1, task.recipe.parts):
            twin = copy.copy(task)
            twin.network = _twin(task.network)
            self._tasks.append(twin)
        self._threads: ThreadPoolExecutor | None = None
        if workers > 1:
            self._threads = ThreadPoolExecutor(
                min(workers, len(self._tasks)),
                "part of a step",
                # A count that holds for the thread that sets it.
                torch.set_num_threads,
                (task.recipe.threads,),
            )

    def gradients(
        self, step: int, tensors: Tensors
    ) -> tuple[Gradients, dict[str, float]]:
        """Return the mean of the parts' gradients and of what they measured.

        Parameters
        ----------
        step
            Number of the step, which with that of the part decides the chance.
        tensors
            The whole batch; the first axis of each counts the samples.
        """
        samples = len(next(iter(tensors.values())))
        ends = [samples * n // len(self._tasks) for n in range(len(self._tasks) + 1)]
        jobs = [
            (step, number, {k: v[a:b] for k, v in tensors.items()}, (b - a) / samples)
            for number, (a, b) in enumerate(pairwise(ends))
            if a < b
        ]
        work = map if self._threads is None else self._threads.map
        total: Gradients = []
        figures: dict[str, float] = {}
        for gradients, measured in work(self._of_part, jobs):
            if not total:
                total, figures = gradients, measured
                continue
            total = [
                _sum(one, other) for one, other in zip(total, gradients, strict=True)
            ]
            figures = {name: value + measured[name] for name, value in figures.items()}
        return total, figures

    def close(self) -> None:
        """End the threads; called twice does nothing."""
        if self._threads is not None:
            self._threads.shutdown()

    def _of_part(
        self, job: tuple[int, int, Tensors, float]
    ) -> tuple[Gradients, dict[str, float]]:
        step, number, tensors, share = job
        task = self._tasks[number]
        task.network.train()
        with chance_from((self._seed * 1_000_003 + step) * 1_009 + number):
            return task.gradients(tensors, share)


def _twin(network: nn.Module) -> nn.Module:
    """Return the same network, with the same weights, but buffers of its own."""
    same = {id(parameter): parameter for parameter in network.parameters()}
    return copy.deepcopy(network, same)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


_REPORT_STEPS = 25


class Trainer(Closing):
    """One training run.

    Parameters
    ----------
    recipe
        What to train on what.
    device
        ``cpu`` or ``cuda``.
    workers
        Cores to use beside each other: as many parts of a step at a time, and half as
        many processes that make batches ahead, see `BatchFeed`, as a step costs two
        to twenty times its batch; on a GPU, or where a step has no parts, as many
        processes. 0: one thing after the other.
    """

    def __init__(
        self, recipe: RecipeBase, device: str = "cpu", *, workers: int = 0
    ) -> None:
        self.recipe = recipe
        self.step = 0
        self.seconds = 0.0
        self._device = torch.device(device)
        torch.manual_seed(recipe.seed)
        # Before the first sum: how it is split between threads decides the rounding.
        torch.set_num_threads(recipe.threads)
        self.task = make_task(recipe)
        if recipe.start_from is not None:
            start_from(self.task, recipe.start_from)
        for module in self.task.modules().values():
            module.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.task.begin()
        self.average = copy.deepcopy(self.task.network)
        self._optimisers = self.task.make_optimisers()
        self._parts: StepParts | None = None
        if self.task.in_parts and recipe.parts > 1 and self._device.type == "cpu":
            self._parts = StepParts(self.task, workers)
            workers = (workers + 1) // 2
        self.feed = BatchFeed(self.task, workers)

    def close(self) -> None:
        """End the workers; called twice does nothing."""
        self.feed.close()
        if self._parts is not None:
            self._parts.close()

    @property
    def finished(self) -> bool:
        """Whether all steps of the recipe are done."""
        return self.step >= self.recipe.optimiser.last_step

    def train_step(self) -> dict[str, float]:
        """Take one step of the optimiser; returns what it measured."""
        batch = self.feed.batch(self.step)
        # Dropout draws from torch's own source: tie it to the step.
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)
        rate = learning_rate(self.recipe.optimiser, self.step)
        for optimiser in self._optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = rate
        tensors = self._to_tensors(batch)
        if self._parts is None:
            self.feed.ask_ahead(self.step, self._last_of_stretch())
            self.task.network.train()
            measured = self.task.train_step(tensors, self._optimisers)
        else:
            gradients, measured = self._parts.gradients(self.step, tensors)
            self.feed.ask_ahead(self.step, self._last_of_stretch())
            self.task.descend(gradients, self._optimisers)
        self._average_weights()
        self.step += 1
        return measured

    def finish_average(self) -> None:
        """Make the averaged weights ready for use."""
        self.task.finish_average(self.average, self._draws())

    def state(self) -> dict[str, Any]:
        """Return everything that a later run needs to go on."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "modules": {k: m.state_dict() for k, m in self.task.modules().items()},
            "average": self.average.state_dict(),
            "optimisers": {k: o.state_dict() for k, o in self._optimisers.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.step = state["step"]
        self.seconds = state["seconds"]
        for name, module in self.task.modules().items():
            module.load_state_dict(state["modules"][name])
        self.average.load_state_dict(state["average"])
        for name, optimiser in self._optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])

    @torch.no_grad()
    def _average_weights(self) -> None:
        # The average follows closely while there is little to average.
        decay = min(
            self.recipe.optimiser.average_decay, (1 + self.step) / (10 + self.step)
        )
        for mean, new in zip(
            self.average.parameters(), self.task.network.parameters(), strict=True
        ):
            mean.lerp_(new, 1 - decay)

    def _draws(self) -> Iterator[dict[str, Tensor]]:
        for draw in count(1):
            yield self._to_tensors(self.feed.batch(self.step, draw))

    def _last_of_stretch(self) -> int:
        """Return the last step before a checkpoint, whose draws come between."""
        every = self.recipe.checkpoint_steps
        stretch = (self.step // every + 1) * every
        return min(stretch, self.recipe.optimiser.last_step) - 1

    def _to_tensors(self, batch: Arrays) -> dict[str, Tensor]:
        tensors = {}
        for name, array in batch.items():
            tensor = torch.from_numpy(array)
            layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
            if self._device.type == "cuda":
                # Only copies from pinned memory go on beside the computation.
                tensor = tensor.pin_memory()
            tensors[name] = tensor.to(
                self._device, memory_format=layout, non_blocking=True
            )
        return tensors


def learning_rate(recipe: OptimiserRecipe, step: int) -> float:
    """Return the rate of a step: linear rise, then the recipe's decay to zero."""
    if step < recipe.warmup_steps:
        return recipe.rate * (step + 1) / recipe.warmup_steps
    if recipe.decay == "linear":
        return recipe.rate * min(2 * (1 - min(step / recipe.steps, 1.0)), 1.0)
    done = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def train(
    recipe: RecipeBase,
    *,
    resume: bool = True,
    device: str = "auto",
    workers: int = 0,
    show_progress: bool = True,
) -> Path:
    """Run a recipe to its end and return the newest checkpoint.

    Parameters
    ----------
    recipe
        What to train on what.
    resume
        Go on from the newest checkpoint, if there is one of the same recipe.
    device
        ``cpu``, ``cuda`` or ``auto``.
    workers
        Cores to use, see `Trainer`; any number makes the same weights.
    show_progress
        Draw a progress bar with the time left, the time of a step and how much of it
        went by waiting for its batch.

    Raises
    ------
    ConfigError
        If the device is missing or the checkpoint belongs to another recipe.
    """
    chosen = choose_device(device)
    with Trainer(recipe, chosen, workers=workers) as trainer:
        return _run(trainer, resume=resume, show_progress=show_progress)


def _run(trainer: Trainer, *, resume: bool, show_progress: bool) -> Path:
    recipe = trainer.recipe
    folder = recipe.checkpoints / recipe.name
    newest = folder / NEWEST
    if resume and newest.is_file():
        _resume(trainer, newest)
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not show_progress,
    )
    steps = recipe.optimiser.last_step
    with progress:
        bar = progress.add_task(recipe.name, total=steps, completed=trainer.step)
        recent: list[dict[str, float]] = []
        pace = _Pace(trainer)
        while not trainer.finished:
            started = time.perf_counter()
            recent.append(trainer.train_step())
            trainer.seconds += time.perf_counter() - started
            if len(recent) == _REPORT_STEPS or trainer.finished:
                rate = learning_rate(recipe.optimiser, trainer.step - 1)
                text = add_to_curve(
                    folder / CURVE_NAME, trainer.step, trainer.seconds, rate, recent
                )
                text = f"{text}, {pace.text()}"
                progress.update(bar, completed=trainer.step, description=text)
                recent = []
            if trainer.step % recipe.checkpoint_steps == 0 or trainer.finished:
                trainer.finish_average()
                save_checkpoint(newest, recipe, trainer.state())
    return newest


class _Pace:
    """How long steps take, and how much of that they wait for their batches."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._mark = (trainer.step, trainer.seconds, trainer.feed.waited_s)

    def text(self) -> str:
        """Return what holds since the last call."""
        trainer = self._trainer
        now = (trainer.step, trainer.seconds, trainer.feed.waited_s)
        steps, seconds, waited = (a - b for a, b in zip(now, self._mark, strict=True))
        self._mark = now
        share = waited / max(seconds, 1e-9)
        return f"{seconds / max(steps, 1):.2f} s a step, {share:.0%} waiting"


def choose_device(name: str) -> str:
    """Resolve ``auto`` and refuse a device that is not there.

    Raises
    ------
    ConfigError
        If `name` is unknown, or CUDA is asked for and missing.
    """
    if name not in ("auto", "cpu", "cuda"):
        msg = f"device '{name}' is unknown; choose auto, cpu or cuda"
        raise ConfigError(msg)
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        msg = "device 'cuda': torch sees no CUDA device here; use --device cpu"
        raise ConfigError(msg)
    return "cuda" if name != "cpu" and has_cuda else "cpu"


def _resume(trainer: Trainer, newest: Path) -> None:
    recipe, state = load_checkpoint(newest)
    if recipe != trainer.recipe:
        msg = (
            f"checkpoint '{newest}' belongs to another recipe; give the recipe another "
            "name, or start over with --no-resume"
        )
        raise ConfigError(msg)
    trainer.load_state(state)
