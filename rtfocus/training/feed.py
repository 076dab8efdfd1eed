"""Feed: batches in the order of their steps, made here or ahead by other processes.

A batch depends on the recipe and its number alone, so that the same weights come out
with any number of workers. Workers start as new interpreters, as they must on Windows,
and hear of the end when their pipe closes.
"""

import multiprocessing
import signal
import time
from collections import deque
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Self

import torch

from rtfocus.errors import RtfocusError
from rtfocus.training.recipe import RecipeBase
from rtfocus.training.task import Arrays, Task, make_task

_AHEAD = 2
"""Batches that each worker is asked for before they are needed."""


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

    def batch(self, step: int, draw: int = 0, *, last: int | None = None) -> Arrays:
        """Return one batch.

        Parameters
        ----------
        step, draw
            See `Task.batch`.
        last
            Where the run goes on: the last step whose batch may be made ahead; None:
            no other one is.

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
            ahead = range(step + 1, step + _AHEAD * len(self._pipes))
            for later in ahead if last is not None else ():
                if later <= (last or 0):
                    self._ask(later, 0)
            return self._receive(step, draw)
        finally:
            self.waited_s += time.perf_counter() - started

    def close(self) -> None:
        """End the workers; called twice does nothing."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
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

    Parameters
    ----------
    task
        Makes them.
    pipe
        Brings (step, draw), takes batches, or the error that kept one from being made.
    """
    try:
        while True:
            step, draw = pipe.recv()
            try:
                answer: Arrays | Exception = task.batch(step, draw)
            except RtfocusError as error:
                answer = error
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
