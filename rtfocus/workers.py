"""Workers: threads joined by bounded queues; a failing one fails the run.

End of stream travels by closing queues. ``abort`` wakes everybody and discards.
"""

import random
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar

from rtfocus.errors import WorkerError

T = TypeVar("T")


class Closing(ABC):
    """A context manager that is closed when its block ends."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AbortedError(Exception):
    """The run is being discarded; never reaches the user."""


class Wait:
    """The duration of a wait, without the time in which this process stood still.

    A process that was frozen, or whose machine slept, finds the clock far ahead, and
    what it waits for had no turn either, or waits to be read. So no time between two
    looks counts more than a look takes on a busy machine.
    """

    MOST_S = 1.0
    """Counted at most from one look to the next."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new wait: what was waited for came."""
        self._waited_s, self._looked_s = 0.0, time.monotonic()

    def look(self) -> float:
        """Return how long the wait has lasted; called about every tenth second."""
        now_s = time.monotonic()
        self._waited_s += min(now_s - self._looked_s, self.MOST_S)
        self._looked_s = now_s
        return self._waited_s


class TimeShare:
    """Gives work that may be left out a share of its thread's time and no more.

    Work comes in bursts: time that was not used is saved for them. Where it does not
    suffice chance decides, for what comes in turns (the planes of a stack, positions)
    would always be left out at the same places.

    Parameters
    ----------
    share
        Processor time of the work over all time that passes, 0 to 1.
    most_s
        Seconds of work that are saved at most, and at the beginning.
    """

    def __init__(self, share: float, most_s: float) -> None:
        self._share, self._most_s = share, most_s
        self._saved_s, self._asked_s = most_s, time.perf_counter()
        self._random = random.Random(0)

    def allows(self) -> bool:
        """Tell whether to do it now: always while half of what may be saved is left."""
        now_s = time.perf_counter()
        earned_s = self._share * (now_s - self._asked_s)
        self._saved_s = min(self._saved_s + earned_s, self._most_s)
        self._asked_s = now_s
        return self._random.random() * self._most_s < 2 * self._saved_s

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the processor time of the block: on a busy machine it takes longer."""
        begun_s = time.thread_time()
        yield
        self._saved_s -= time.thread_time() - begun_s


class BoundedQueue(Generic[T]):
    """Hand-off between two workers: at most `capacity` items, closable.

    When it is full the producer waits, so that nothing is lost.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = self._aborted = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Append an item, waiting for room; AbortedError after `abort`."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._items) < self.capacity or self._aborted
            )
            if self._aborted:
                raise AbortedError(self.name)
            self._items.append(item)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Yield items until the queue is closed and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._items or self._closed or self._aborted
                )
                if self._aborted:
                    raise AbortedError(self.name)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item

    def close(self) -> None:
        """Say that nothing more will come; what is queued is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Discard what is queued and wake all waiters with AbortedError."""
        with self._changed:
            self._aborted = True
            self._items.clear()
            self._changed.notify_all()


class Newest(Generic[T]):
    """Hand-off of what counts only while it is new: focus and preview.

    Putting never waits; taking may.

    Parameters
    ----------
    age
        Sorts items that may arrive out of order, the newest last; None: whatever
        comes is the newest.
    """

    def __init__(self, age: Callable[[T], int] | None = None) -> None:
        self._age = age
        self._changed = threading.Condition()
        self._item: T | None = None
        self._closed = False
        self.dropped = 0
        """Items that gave way to newer ones."""

    def put(self, item: T) -> None:
        """Replace an item that was not taken; any thread."""
        with self._changed:
            held, age = self._item, self._age
            self.dropped += held is not None
            if held is None or age is None or age(item) >= age(held):
                self._item = item
            self._changed.notify()

    def take(self) -> T | None:
        """Return the newest item, once; None: there is none."""
        with self._changed:
            item, self._item = self._item, None
        return item

    def wait(self) -> T | None:
        """Wait for an item and take it; None: closed, and there is none left."""
        with self._changed:
            self._changed.wait_for(lambda: self._item is not None or self._closed)
            return self.take()

    def close(self) -> None:
        """Wake those who wait, for good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Worker:
    """A thread that applies one step to every item of a source.

    Parameters
    ----------
    name
        Appears in thread lists, metrics and error messages.
    source
        A queue or any iterable; exhausted = this worker is done.
    step
        Called with each item; a result other than None goes to all `outputs`.
    outputs
        Queues fed, and closed at the end, by this worker alone.
    """

    def __init__(
        self,
        name: str,
        source: Iterable[Any],
        step: Callable[[Any], Any],
        outputs: Sequence[BoundedQueue[Any]] = (),
    ) -> None:
        self.name = name
        self.error: BaseException | None = None
        self._source, self._step, self._outputs = source, step, outputs

    def run(self) -> None:
        """Work until the source ends."""
        for item in self._source:
            if (result := self._step(item)) is not None:
                for queue in self._outputs:
                    queue.put(result)

    def queues(self) -> Iterator[BoundedQueue[Any]]:
        """All queues this worker touches."""
        if isinstance(self._source, BoundedQueue):
            yield self._source
        yield from self._outputs

    def close_outputs(self) -> None:
        """Tell the next workers that nothing more will come."""
        for queue in self._outputs:
            queue.close()


class Pipeline:
    """Workers that start, end and fail together.

    Parameters
    ----------
    workers
        In the order of the flow.
    on_abort
        Called once when a worker fails, from that worker's thread, to wake
        sources that do not wait on a queue (sockets, slot pools).
    """

    def __init__(
        self, workers: Sequence[Worker], on_abort: Callable[[], None] = lambda: None
    ) -> None:
        self._workers, self._on_abort = workers, on_abort
        self._lock = threading.Lock()
        self._failed: Worker | None = None

    def run(self) -> None:
        """Run all workers to their end.

        Raises
        ------
        WorkerError
            If a worker failed; names the first one and keeps its exception.
        """
        threads = [
            threading.Thread(target=self._guard, args=(worker,), name=worker.name)
            for worker in self._workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            # In steps, because on Windows a join cannot be interrupted by Ctrl-C.
            while thread.is_alive():
                thread.join(timeout=0.25)
        if self._failed is not None:
            error = self._failed.error
            msg = f"worker '{self._failed.name}' failed: {error}"
            raise WorkerError(msg) from error

    def abort(self) -> None:
        """Discard everything in flight and wake every worker."""
        for worker in self._workers:
            for queue in worker.queues():
                queue.abort()
        self._on_abort()

    def _guard(self, worker: Worker) -> None:
        """Run one worker; its failure is kept and ends all the others."""
        try:
            worker.run()
        except AbortedError:
            return
        except BaseException as error:  # re-raised by run(), in the caller's thread
            worker.error = error
            with self._lock:
                if first := self._failed is None:
                    self._failed = worker
            if first:
                self.abort()
        finally:
            worker.close_outputs()


def in_steps(wait: Callable[[float], object]) -> None:
    """Wait in short steps, for on Windows Ctrl-C interrupts no wait."""
    while not wait(0.25):
        pass


@contextmanager
def acting_when(
    condition: Callable[[], bool], act: Callable[[], None], *, again: bool = False
) -> Iterator[None]:
    """Call `act` once `condition` holds while the block runs, or `again` and again.

    From a thread, because a signal handler may interrupt a holder of the lock.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            if condition():
                act()
                if not again:
                    return

    watcher = threading.Thread(target=watch, name="watch")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put off requests to end (Ctrl-C and others) until the block has ended.

    For what stumbles when it is left half started. Processes that it starts never
    hear of Ctrl-C, which reaches all of a terminal. Windows has no such masks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    numbers = [getattr(signal, name) for name in _ENDINGS if hasattr(signal, name)]
    heeded = {n: old for n in numbers if callable(old := signal.getsignal(n))}
    for number in heeded:
        signal.signal(number, lambda number, _: heard.append(number))
    try:
        with _masked_interrupt():
            yield
    finally:
        for number, old in heeded.items():
            signal.signal(number, old)
    if heard:
        signal.raise_signal(heard[0])


_ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


@contextmanager
def _masked_interrupt() -> Iterator[None]:
    """Mask Ctrl-C in this thread, and in the threads and processes it starts."""
    if sys.platform == "win32":
        yield
    else:
        # Here, because no live run needs it.
        from multiprocessing import resource_tracker

        # Its first start, amid the block, would end the mask.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
