"""Scheduler: the units of a batch on the workers of dask.distributed.

Futures alone, no dask arrays: a task is a unit by its name, and what comes back is
small: pixels are written where they are made. So many are under way that every worker
has its next; a worker that lacks an engine gets no more, and one that dies costs the
unit it had.
"""

import contextlib
import logging
import math
import time
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from rtfocus.batch.plan import Failure
from rtfocus.batch.work import failure_of
from rtfocus.errors import (
    ConfigError,
    IncompleteError,
    RtfocusError,
    number_of,
    one_line,
)
from rtfocus.machine import usable_threads
from rtfocus.workers import undisturbed

_CONNECT_S = 20.0
WORKERS_S = 300.0
"""How long a batch without any worker waits for one."""
_ASK_S = 2.0
"""Between two questions who is there."""
_DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
_AHEAD = 2
"""Units under way for each worker: the next is there when one is done."""
_GONE = (OSError, TimeoutError)


def goes_on(left: int) -> str:
    """Say how many images of a batch are left, and how to go on."""
    return f"{number_of(left, 'image')} not done; the same command goes on from there"


class Keyed(Protocol):
    """A unit of any kind of work."""

    @property
    def key(self) -> str:
        """Name that no other unit of the call has."""
        ...


U = TypeVar("U", bound=Keyed)
R = TypeVar("R")


class UnitAnswer(NamedTuple):
    """What became of a unit on a worker."""

    worker: str
    result: Any
    """What was found, or the `Failure`."""


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
    do: Callable[[U, int | None], R | Failure],
    units: Iterable[U],
    on_unit: Callable[[U, R | Failure], None],
    *,
    resources: Mapping[str, float] | None = None,
    wait_s: float = WORKERS_S,
    on_note: Callable[[str], None] = lambda _: None,
    rest: Callable[[int], str] = goes_on,
) -> None:
    """Do units on the workers of a scheduler.

    Parameters
    ----------
    scheduler
        Address, or ``local[:N]``.
    do
        Called on a worker with a unit and the number of threads it may take; a function
        of a module, or a `functools.partial` of one. An error of rtfocus or of the disk
        fails the unit; one of an engine gives it to another worker first.
    units
        Those to do.
    on_unit
        Called with every unit and what came of it, or why it failed.
    resources
        What every unit needs of a worker, such as ``{"GPU": 1}``.
    wait_s
        How long to wait where there is no worker, or none any more.
    on_note
        Called with a line when there is none, or one with another rtfocus.
    rest
        Says how many units are left, where a call could not go on.

    Raises
    ------
    ConfigError
        If dask.distributed is not installed, or there is no scheduler or worker.
    IncompleteError
        If the scheduler, or the last worker, is gone.
    """
    number = workers_of(scheduler)
    threads = None if number is None else max(1, usable_threads() // number)
    with _client(scheduler, number) as client:
        workers = _Workers(client, scheduler, dict(resources or {}), wait_s, on_note)
        _Run(client, do, threads, workers, on_unit, rest).run(deque(units))


class _Run(Generic[U, R]):
    """The futures of one call."""

    def __init__(
        self,
        client: Any,  # noqa: ANN401 distributed is not always installed
        do: Callable[[U, int | None], R | Failure],
        threads: int | None,
        workers: "_Workers",
        on_unit: Callable[[U, R | Failure], None],
        rest: Callable[[int], str],
    ) -> None:
        self._client, self._do, self._threads = client, do, threads
        self._workers, self._on_unit, self._rest = workers, on_unit, rest
        self._bad: dict[str, Failure] = {}
        """Workers that lack what the batch needs, and what that is."""
        self._running: dict[Any, _Sent[U]] = {}
        self._ended: SimpleQueue[Any] = SimpleQueue()

    def run(self, waiting: deque[U]) -> None:
        """Do all units."""
        try:
            while waiting or self._running:
                if self._workers.look():
                    self._take_back(waiting)
                while waiting and len(self._running) < _AHEAD * len(self._able()):
                    self._submit(waiting.popleft())
                self._await(waiting)
        except (*_GONE, _cancelled()) as error:
            msg = f"the scheduler is gone, {self._time_left(waiting)}"
            raise IncompleteError(msg) from error
        except _NoWorkerError as error:
            if self._workers.were_there:
                msg = f"{error}; {self._time_left(waiting)}"
                raise IncompleteError(msg) from error
            raise ConfigError(str(error)) from error

    def _time_left(self, waiting: deque[U]) -> str:
        return self._rest(len(waiting) + len(self._running))

    def _await(self, waiting: deque[U]) -> None:
        """Take a unit that came back, or none for a while."""
        try:
            future = self._ended.get(timeout=_ASK_S)
        except Empty:
            return
        sent = self._running.pop(future, None)
        if sent is not None and not self._take(future, sent.unit):
            waiting.appendleft(sent.unit)
        future.release()

    def _take_back(self, waiting: deque[U]) -> None:
        """Take back what waits for workers that are gone: dask gives it to no other."""
        there = set(self._workers.suited)
        for future, sent in [*self._running.items()]:
            if there and not there & sent.to:
                del self._running[future]
                future.cancel()
                waiting.appendleft(sent.unit)

    def _submit(self, unit: U) -> None:
        able = self._able()
        future = self._client.submit(
            _on_worker,
            self._do,
            unit,
            self._threads,
            key=f"rtfocus-{unit.key}-{time.perf_counter_ns()}",
            pure=False,
            # Never on one that joins later and was not asked what it is.
            workers=able,
            resources=self._workers.resources or None,
        )
        self._running[future] = _Sent(unit, frozenset(able))
        future.add_done_callback(self._ended.put)

    def _take(self, future: Any, unit: U) -> bool:  # noqa: ANN401
        """Tell of a unit that came back; False: another worker is to do it."""
        if future.status == "error":
            error = future.exception()
            self._on_unit(unit, Failure("other", _of_dead(error)))
            return True
        answer: UnitAnswer = future.result()
        result = answer.result
        if isinstance(result, Failure) and result.fault == "engine":
            suited = self._workers.suited
            self._bad[answer.worker] = result
            if self._able() != suited or answer.worker not in suited:
                return False
        self._on_unit(unit, result)
        return True

    def _able(self) -> list[str]:
        """Return the workers that get units: all, where none has what is needed."""
        suited = self._workers.suited
        return [worker for worker in suited if worker not in self._bad] or suited


class _Sent(NamedTuple, Generic[U]):
    """A unit under way."""

    unit: U
    to: frozenset[str]
    """Workers that may do it."""


class _NoWorkerError(Exception):
    """No worker has been there for so long."""


class _Workers:
    """Who is there to do units, asked every now and then.

    Parameters
    ----------
    client
        Of the scheduler.
    scheduler
        As the user gave it.
    resources
        What every unit needs of a worker.
    wait_s
        How long a batch without any worker waits for one.
    on_note
        Called with a line when there is none, or another one than wanted.
    """

    def __init__(
        self,
        client: Any,  # noqa: ANN401
        scheduler: str,
        resources: dict[str, float],
        wait_s: float,
        on_note: Callable[[str], None],
    ) -> None:
        self._client, self._scheduler = client, scheduler
        self.resources, self._wait_s, self._on_note = resources, wait_s, on_note
        self.suited: list[str] = []
        """Addresses of those that get units."""
        self.were_there = False
        self._others: dict[str, str] = {}
        """Workers that have another rtfocus, or none, and which."""
        self._known: set[str] = set()
        self._asked_s = -math.inf
        self._absent_since_s: float | None = None

    def look(self) -> bool:
        """Ask who is there, if it was long ago; tell whether that has changed.

        Raises
        ------
        _NoWorkerError
            If no worker has been there for too long.
        """
        now_s = time.monotonic()
        if now_s < self._asked_s + _ASK_S:
            return False
        before, self.suited = self.suited, self._find()
        self._asked_s = now_s
        if self.suited:
            if self._absent_since_s is not None:
                self._on_note("a worker is there; going on")
            self.were_there, self._absent_since_s = True, None
        elif self._absent_since_s is None:
            self._absent_since_s = now_s
            lack, remedy = self._lack()
            self._on_note(f"{lack}; waiting up to {self._wait_s:g} s; {remedy}")
        since_s = self._absent_since_s
        if since_s is not None and now_s - since_s >= self._wait_s:
            lack, remedy = self._lack()
            msg = f"{lack} for {self._wait_s:g} s; {remedy}"
            raise _NoWorkerError(msg)
        return self.suited != before

    def _find(self) -> list[str]:
        """Return the workers that offer what a unit needs; others would never begin."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        self._meet(workers.keys() - self._known)
        return sorted(
            address
            for address, worker in workers.items()
            if address in self._known - self._others.keys()
            # One whose memory is full begins nothing.
            and worker.get("status", "running") == "running"
            and all(
                worker["resources"].get(name, 0) >= number
                for name, number in self.resources.items()
            )
        )

    def _meet(self, new: set[str]) -> None:
        """Ask workers which rtfocus they have: another one's results would differ."""
        if not new:
            return
        versions = self._client.get_versions(packages=["rtfocus"])
        here = versions["client"]["packages"]
        for address in sorted(new & versions["workers"].keys()):
            self._known.add(address)
            there = versions["workers"][address]["packages"]
            if there["rtfocus"] != here["rtfocus"]:
                version = f"rtfocus {there['rtfocus'] or 'not installed'}"
                self._others[address] = version
                self._on_note(
                    f"worker {address} gets nothing: {version}, here "
                    f"{here['rtfocus']}; install the same there"
                )
            elif _minor(there["python"]) != _minor(here["python"]):
                self._on_note(
                    f"worker {address} has Python {_minor(there['python'])}, here "
                    f"{_minor(here['python'])}: pixels are the same, the bytes of "
                    "compressed files may differ"
                )

    def _lack(self) -> tuple[str, str]:
        """Say what worker is not there, and what to do."""
        resources = ",".join(f"{n}={x:g}" for n, x in self.resources.items())
        if self._scheduler.startswith("local"):
            return "no worker process is left", "is there enough memory?"
        start = f"start one: dask worker {self._scheduler} --nthreads 1"
        if resources:
            start += f' --resources "{resources}", or leave --resources away'
            return f"no worker offers {resources}", start
        if self._others:
            return "no worker has this rtfocus", start
        return "no worker takes images", start


def _minor(python: str) -> str:
    """Return ``3.12`` of ``3.12.1.final.0``."""
    return ".".join(python.split(".")[:2])


def _on_worker(
    do: Callable[[Any, int | None], Any], unit: Keyed, threads: int | None
) -> UnitAnswer:
    from distributed import get_worker

    worker = get_worker()
    # Of eight workers on a node with eight cores none is to take them all.
    try:
        result = do(unit, threads or worker.state.nthreads)
    except (RtfocusError, OSError, MemoryError) as error:
        result = failure_of(error)
    return UnitAnswer(worker.address, result)


def _of_dead(error: BaseException) -> str:
    """Say why a task raised, which a unit does not: its worker is gone, or rtfocus's.

    Dask reports a worker that dies of every unit after three more tries.
    """
    if type(error).__name__ == "KilledWorker":
        return "every worker that began it died: too little memory? see their logs"
    return f"{type(error).__name__}: {error}"


def _cancelled() -> type[BaseException]:
    from distributed import CancelledError

    cancelled: type[BaseException] = CancelledError
    return cancelled


def _no_scheduler(scheduler: str, error: BaseException) -> str:
    reason = one_line(error).rstrip(".")
    msg = f"no scheduler of dask answers at '{scheduler}' ({reason}); "
    if scheduler.startswith("tls"):
        return msg + "are certificates in DASK_DISTRIBUTED__COMM__TLS__…?"
    return msg + "is it running there?"


@contextmanager
def _client(scheduler: str, number: int | None) -> Iterator[Any]:
    """Connect, or start workers of one's own, while the block runs."""
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        msg = '--scheduler needs dask.distributed: pip install "rtfocus[batch]"'
        raise ConfigError(msg) from error
    # Each has a level and an output of its own.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if number is not None:
            with undisturbed():
                cluster = LocalCluster(
                    n_workers=number,
                    threads_per_worker=1,
                    # Frames are counted in slots, not in what dask holds.
                    memory_limit=None,
                    dashboard_address="127.0.0.1:0",
                    silence_logs=logging.CRITICAL,
                    # Ctrl-C reaches all of a terminal; this process ends them.
                    preload=_DEAF,
                )
                address = stack.enter_context(cluster)
        try:
            client = stack.enter_context(Client(address, timeout=_CONNECT_S))
        # What is no scheduler, or has no certificate, makes dask stumble anywhere.
        except (Exception, CancelledError) as error:
            raise ConfigError(_no_scheduler(scheduler, error)) from error
        yield client
