"""Feed: the batches of a training run, and its checkpoints, in the order of its steps.

A batch depends on the recipe and its number alone, so that the same weights come out
with any number of workers. Workers start as new interpreters, as they must on Windows,
and hear of the end when their pipe closes.

A checkpoint is written so that a kill cannot spoil it. First weights come from one, or
from an engine whose checkpoint is long gone: ``start_from: engines/delpnet`` refines
the shipped network.
"""

import copy
import multiprocessing
import os
import pickle
import signal
import sys
import textwrap
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self, TypeVar

import onnx
import torch
from torch import Tensor

from rtfocus.engines.card import read_card, verified_file
from rtfocus.errors import ConfigError, EngineError, RtfocusError
from rtfocus.files import resource_folder
from rtfocus.training.onnx_forms import float_weights
from rtfocus.training.recipe import RecipeBase, validate_recipe
from rtfocus.training.task import Arrays, Task, make_task

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as Connection
else:
    from multiprocessing.connection import Connection

T = TypeVar("T", bound=Task[Any])

_AHEAD = 4
"""Batches that each worker is asked for before they are needed: one in which a scene
is made anew takes as long as some of the others together."""


class BatchFeed:
    """Makes the batches of a training run; a context manager.

    Parameters
    ----------
    task
        Makes them where there are no workers.
    workers
        Processes that make them ahead; 0: they are made when they are asked for.
    """

    def __init__(self, task: Task[Any], workers: int = 0) -> None:
        self.waited_s = 0.0
        """Seconds spent waiting for batches, or making them."""
        self._task = task
        self._asked: list[deque[tuple[int, int]]] = [deque() for _ in range(workers)]
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        spawn = multiprocessing.get_context("spawn")
        for number in range(workers):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_work, args=(task.recipe, theirs), name=f"batches {number}"
            )
            process.daemon = True
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Return one batch.

        Parameters
        ----------
        step, draw
            See `Task.batch`.

        Raises
        ------
        RtfocusError
            If a batch cannot be made, or a worker has ended.
        """
        started = time.perf_counter()
        try:
            if not self._pipes:
                return self._task.batch(step, draw)
            self._ask(step, draw)
            return self._receive(step, draw)
        finally:
            self.waited_s += time.perf_counter() - started

    def ask_ahead(self, step: int, last: int) -> None:
        """Let the workers make the batches that follow that of `step`, up to `last`.

        Best called when the step leaves a core free: a batch that is made beside the
        parts of a step takes its time from one of them, and the others wait for it.
        One that is not taken yet does not keep a worker from making the next.

        Raises
        ------
        RtfocusError
            If a worker has ended.
        """
        ahead = _AHEAD * len(self._pipes)
        for later in range(step + 1, min(step + ahead, last) + 1):
            self._ask(later, 0)

    def close(self) -> None:
        """End the workers; called twice does nothing."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            # It writes nothing, and may be starting, or amid a batch that is not taken.
            process.terminate()
            process.join()
        self._pipes, self._processes = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, step: int, draw: int) -> None:
        owner = step % len(self._pipes)
        if (step, draw) not in self._asked[owner]:
            self._asked[owner].append((step, draw))
            try:
                self._pipes[owner].send((step, draw))
            except OSError as error:
                raise self._ended(owner) from error

    def _receive(self, step: int, draw: int) -> Arrays:
        """Take the answers of the owner up to the wanted one; others are not needed."""
        owner = step % len(self._pipes)
        while True:
            try:
                answer: Arrays | Exception = self._pipes[owner].recv()
            except (EOFError, OSError) as error:
                raise self._ended(owner) from error
            if isinstance(answer, Exception):
                raise answer
            if self._asked[owner].popleft() == (step, draw):
                return answer

    def _ended(self, owner: int) -> RtfocusError:
        self._processes[owner].join()
        return RtfocusError(
            f"worker {owner} that makes batches ended with exit code "
            f"{self._processes[owner].exitcode}; its message stands above, and fewer "
            "--workers need less memory"
        )


def _work(recipe: RecipeBase, pipe: Connection) -> None:
    """Make batches in a process of its own."""
    # Ctrl+C reaches every process of a terminal; the trainer closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    answer_requests(make_task(recipe), pipe)


def answer_requests(task: Task[Any], pipe: Connection) -> None:
    """Make the batches that are asked for until the pipe closes.

    A pipe holds less than a batch: sending one lasts until the trainer takes it, and
    the next is made meanwhile.

    Parameters
    ----------
    task
        Makes them.
    pipe
        Brings (step, draw), takes batches, or the error that kept one from being made.
    """
    with ThreadPoolExecutor(1, "sending batches") as sender:
        while True:
            try:
                step, draw = pipe.recv()
            except (EOFError, ConnectionResetError):
                return
            try:
                answer: Arrays | Exception = task.batch(step, draw)
            except RtfocusError as error:
                answer = error
            # Packed here, so that only a closed pipe can keep it from being sent.
            sender.submit(pipe.send_bytes, pickle.dumps(answer))


NEWEST = "last.pt"
_FORMAT = 2


def save_checkpoint(path: Path, recipe: RecipeBase, state: dict[str, Any]) -> None:
    """Write recipe and state; the old file stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {"format": _FORMAT, "recipe": recipe.model_dump(mode="json"), **state}, partial
    )
    os.replace(partial, path)


def load_checkpoint(path: Path) -> tuple[RecipeBase, dict[str, Any]]:
    """Read a checkpoint; tensors land on the CPU.

    Raises
    ------
    ConfigError
        If the file is missing, damaged, of another format, or holds a recipe with keys
        or values that this version does not know.
    """
    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        msg = f"no checkpoint at '{path}'; make one with: rtfocus train RECIPE"
        raise ConfigError(msg) from error
    except Exception as error:  # torch raises whatever the unpickler met
        raise ConfigError(_no_checkpoint(path)) from error
    if not isinstance(state, dict) or "format" not in state:
        raise ConfigError(_no_checkpoint(path))
    if state["format"] != _FORMAT:
        msg = (
            f"checkpoint '{path}' has format {state['format']}, this version reads "
            f"{_FORMAT}; train again"
        )
        raise ConfigError(msg)
    place = f"checkpoint '{path}', of another version of rtfocus (train again)"
    return validate_recipe(state.pop("recipe", None), place), state


def _no_checkpoint(path: Path) -> str:
    # What torch says of such files advises to run whatever they hold.
    return (
        f"'{path}' is damaged, or no checkpoint of rtfocus train; give one, e.g. "
        "checkpoints/NAME/last.pt, or train again"
    )


def start_from(task: Task[Any], source: Path, *, any_size: bool = False) -> None:
    """Give the network of a task its first weights.

    Parameters
    ----------
    task
        Its network takes the weights.
    source
        Checkpoint file, or engine folder; ``engines/NAME`` also finds a shipped one.
    any_size
        The network takes the size of the weights, too, where it comes in several.

    Raises
    ------
    ConfigError
        If there is nothing at `source`, or weights of another network.
    """
    folder = engine_folder(source)
    if folder is None:
        weights, take = _average_in(source, load_checkpoint(source)[1]), task.take_state
    else:
        weights, take = read_weights(folder), task.take_exported
    try:
        if any_size:
            task.take_size(weights)
        take(weights)
    except (KeyError, RuntimeError) as error:
        msg = (
            f"'{source}' holds no weights of network '{task.recipe.network}' as the "
            f"recipe has it: {_first_reason(error)}; give one that was trained for it"
        )
        raise ConfigError(msg) from error


def _first_reason(error: Exception) -> str:
    """Return the first of torch's reasons, of which there is one for every layer."""
    first, *reasons = str(error).splitlines()
    return textwrap.shorten(reasons[-1] if reasons else first, 160, placeholder=" ...")


def copy_of(task: T, source: Path | None) -> T:
    """Return a copy of a task with weights and size of `source`, see `start_from`.

    Raises
    ------
    ConfigError
        As `start_from`, and if nothing is named.
    """
    if source is None:
        msg = f"'{task.recipe.name}' learns from weights: name them in start_from"
        raise ConfigError(msg)
    other = copy.deepcopy(task)
    start_from(other, source, any_size=True)
    device = next(task.network.parameters()).device
    other.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return other


def engine_folder(source: Path) -> Path | None:
    """Return the engine folder that `source` names; None: it is a file."""
    if source.is_dir():
        return source
    if not source.exists() and len(source.parts) == 2 and source.parts[0] == "engines":
        shipped = resource_folder("engines") / source.name
        return shipped if shipped.is_dir() else None
    return None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the float32 weights of an engine by name.

    Raises
    ------
    ConfigError
        If card or weights are missing or do not belong together.
    """
    try:
        path = verified_file(folder, read_card(folder))
    except EngineError as error:
        msg = f"training cannot start from '{folder}': {error}"
        raise ConfigError(msg) from error
    return float_weights(onnx.load(str(path)).graph)


def mean_state(
    others: Sequence[Path], checkpoint: Path
) -> tuple[RecipeBase, dict[str, Any]]:
    """Return a checkpoint with the mean of its and all others' averaged weights.

    Weights of runs and of the run that they started from lie in one valley: between
    them a network keeps most of what each is good at (model soups, Wortsman et al.
    2022). One of `others` may be the engine that a run started from.

    Raises
    ------
    ConfigError
        If a checkpoint cannot be read or one is of another network.
    """
    recipe, state = load_checkpoint(checkpoint)
    own = _average_in(checkpoint, state)
    averages = [own]
    for other in others:
        average = _average_of(other, recipe)
        if {key: value.shape for key, value in average.items()} != {
            key: value.shape for key, value in own.items()
        }:
            msg = (
                f"'{other}' and '{checkpoint}' hold different networks; "
                "give those of one recipe"
            )
            raise ConfigError(msg)
        averages.append(average)
    mean = {
        # Whole numbers, such as the batches that BatchNorm has seen, have no mean.
        name: torch.stack([one[name] for one in averages]).mean(dim=0)
        if value.is_floating_point()
        else value
        for name, value in own.items()
    }
    return recipe, {**state, "average": mean}


def _average_in(path: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    average = state.get("average")
    if not isinstance(average, dict):
        raise ConfigError(_no_checkpoint(path))
    return average


def _average_of(source: Path, recipe: RecipeBase) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, or of an engine of a recipe's network."""
    if engine_folder(source) is None:
        return _average_in(source, load_checkpoint(source)[1])
    task = make_task(recipe)
    start_from(task, source)
    return task.network.state_dict()
