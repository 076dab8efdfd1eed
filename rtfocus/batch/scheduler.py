"""Scheduler: the units of a batch on the workers of dask.distributed.

Futures alone, no dask arrays: a task is the name of a unit, and what it makes never
travels. So many are under way that every worker has its next; a worker that lacks an
engine gets no more, and one that dies costs the unit it had.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from rtfocus.batch.plan import Failure, Plan, Unit
from rtfocus.batch.work import run_unit
from rtfocus.errors import ConfigError, IncompleteError
from rtfocus.machine import usable_threads

_CONNECT_S = 20.0
_WORKERS_S = 60.0
"""How long workers are waited for."""
_LOOK_S = 0.5
_ASK_S = 2.0
_AHEAD = 2
"""Units under way for each worker: the next is there when one is done."""
_GONE = (OSError, TimeoutError)

OnUnit = Callable[[Unit, Failure | None], None]


class Answer(NamedTuple):
    """What became of a unit on a worker."""

    worker: str
    failure: Failure | None


def workers_of(text: str) -> int | None:
    """Read ``local`` or ``local:N``: so many processes here; None: an address.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    if text == "local":
        return usable_threads()
    if text.startswith("local:"):
        number = text.removeprefix("local:")
        if number.isdecimal() and int(number) > 0:
            return int(number)
        msg = f"--scheduler '{text}': give local:N with N processes, such as local:4"
        raise ConfigError(msg)
    if "://" not in text and ":" not in text:
        msg = f"--scheduler '{text}' is no address: tcp://HOST:8786, or local[:N]"
        raise ConfigError(msg)
    return None


def run_on(
    scheduler: str,
    plan: Plan,
    units: Iterable[Unit],
    on_unit: OnUnit,
    *,
    resources: Mapping[str, float] | None = None,
) -> None:
    """Do units on the workers of a scheduler.

    Parameters
    ----------
    scheduler
        Address, or ``local[:N]``.
    plan, units
        Those to do, of this plan; all processes see the folder it lies in.
    on_unit
        Called with every unit that is done, or not: why.
    resources
        What every unit needs of a worker, such as ``{"GPU": 1}``.

    Raises
    ------
    ConfigError
        If dask.distributed is not installed, or there is no scheduler or worker.
    IncompleteError
        If the scheduler is gone; the next call goes on from there.
    """
    number = workers_of(scheduler)
    threads = None if number is None else max(1, usable_threads() // number)
    with _client(scheduler, number) as client:
        _Run(client, plan, threads, dict(resources or {}), on_unit).do(deque(units))


class _Run:
    """The futures of one call."""

    def __init__(
        self,
        client: Any,  # noqa: ANN401 distributed is not always installed
        plan: Plan,
        threads: int | None,
        resources: dict[str, float],
        on_unit: OnUnit,
    ) -> None:
        self._client, self._plan, self._threads = client, plan, threads
        self._resources, self._on_unit = resources, on_unit
        self._workers: list[str] = []
        self._bad: dict[str, Failure] = {}
        """Workers that lack what the batch needs, and what that is."""
        self._next_ask_s = 0.0

    def do(self, waiting: deque[Unit]) -> None:
        """Do all units."""
        from distributed import as_completed

        running: dict[Any, Unit] = {}
        came = as_completed(loop=self._client.loop)
        try:
            while waiting or running:
                self._look_for_workers()
                while waiting and len(running) < _AHEAD * len(self._able()):
                    future = self._submit(unit := waiting.popleft())
                    running[future] = unit
                    came.add(future)
                future = next(came)
                unit = running.pop(future)
                if not self._take(future, unit):
                    waiting.appendleft(unit)
                future.release()
        except (*_GONE, _cancelled()) as error:
            left = len(waiting) + len(running)
            msg = (
                f"the scheduler is gone, {left} images are not done; the same command "
                "goes on from there"
            )
            raise IncompleteError(msg) from error

    def _submit(self, unit: Unit) -> Any:  # noqa: ANN401
        able = self._able()
        return self._client.submit(
            _on_worker,
            self._plan.job.output,
            self._plan.key,
            unit.key,
            self._threads,
            key=f"rtfocus-{unit.key}-{time.monotonic_ns()}",
            pure=False,
            workers=able if self._bad else None,
            resources=self._resources or None,
        )

    def _take(self, future: Any, unit: Unit) -> bool:  # noqa: ANN401
        """Tell of a unit that came back; False: another worker is to do it."""
        if future.status == "error":
            error = future.exception()
            self._on_unit(unit, Failure("other", _of_dead(error)))
            return True
        answer: Answer = future.result()
        failure = answer.failure
        if failure is not None and failure.fault == "engine":
            self._bad[answer.worker] = failure
            if self._able() != self._workers or answer.worker not in self._workers:
                return False
        self._on_unit(unit, failure)
        return True

    def _able(self) -> list[str]:
        """Return the workers that get units: all, where none has what is needed."""
        able = [worker for worker in self._workers if worker not in self._bad]
        return able or self._workers

    def _look_for_workers(self) -> None:
        if time.monotonic() < self._next_ask_s:
            return
        until_s = time.monotonic() + _WORKERS_S
        while not (suited := self._suited()):
            if time.monotonic() > until_s:
                raise ConfigError(self._no_worker())
            time.sleep(_LOOK_S)
        self._workers = suited
        self._next_ask_s = time.monotonic() + _ASK_S

    def _suited(self) -> list[str]:
        """Return the workers that offer what a unit needs; others would never begin."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        return sorted(
            address
            for address, worker in workers.items()
            if all(
                worker["resources"].get(name, 0) >= number
                for name, number in self._resources.items()
            )
        )

    def _no_worker(self) -> str:
        wanted = ",".join(f"{n}={x:g}" for n, x in self._resources.items())
        if not wanted:
            return f"the scheduler has had no worker for {_WORKERS_S:g} s; start one"
        return (
            f"no worker has offered {wanted} for {_WORKERS_S:g} s; start one with "
            f'--resources "{wanted}", or leave --resources away'
        )


def _on_worker(
    output: str, plan_key: str, unit_key: str, threads: int | None
) -> Answer:
    from distributed import get_worker

    failure = run_unit(output, plan_key, unit_key, threads)
    return Answer(get_worker().address, failure)


def _of_dead(error: BaseException) -> str:
    """Say why a task raised, which a unit does not: its worker is gone, or rtfocus's.

    A worker that dies of every unit is told by dask after three more tries.
    """
    if type(error).__name__ == "KilledWorker":
        return "every worker that began it died: too little memory? see their logs"
    return f"{type(error).__name__}: {error}"


def _cancelled() -> type[BaseException]:
    from distributed import CancelledError

    cancelled: type[BaseException] = CancelledError
    return cancelled


@contextmanager
def _client(scheduler: str, number: int | None) -> Iterator[Any]:
    """Connect, or start workers of one's own, while the block runs."""
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        msg = "--scheduler needs dask.distributed: pip install 'rtfocus[batch]'"
        raise ConfigError(msg) from error
    # Each has a level and an output of its own.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if number is not None:
            address = stack.enter_context(
                LocalCluster(
                    n_workers=number,
                    threads_per_worker=1,
                    # Frames are counted in slots, not in what dask holds.
                    memory_limit=None,
                    dashboard_address="127.0.0.1:0",
                    silence_logs=logging.CRITICAL,
                )
            )
        try:
            client = stack.enter_context(Client(address, timeout=_CONNECT_S))
        except (OSError, TimeoutError, ValueError) as error:
            msg = f"no scheduler answers at '{scheduler}' ({error}); is it running?"
            raise ConfigError(msg) from error
        yield client
