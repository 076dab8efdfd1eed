"""Workers: bounded queues, endings and failures."""

import threading
from types import SimpleNamespace

import pytest

from rtfocus.errors import WorkerError
from rtfocus.workers import (
    AbortedError,
    BoundedQueue,
    Newest,
    Pipeline,
    Wait,
    Worker,
)


def test_everything_passes_in_order_through_small_queues() -> None:
    first: BoundedQueue[int] = BoundedQueue("first", 2)
    second: BoundedQueue[int] = BoundedQueue("second", 1)
    got: list[int] = []
    Pipeline(
        [
            Worker("count", range(500), lambda n: n + 1, [first]),
            Worker("double", first, lambda n: 2 * n, [second]),
            Worker("keep", second, got.append),
        ]
    ).run()
    assert got == [2 * (n + 1) for n in range(500)]


@pytest.mark.parametrize("failing", ["count", "double", "keep"])
def test_a_failure_anywhere_surfaces_with_its_name_and_wakes_all(failing: str) -> None:
    first: BoundedQueue[int] = BoundedQueue("first", 1)
    second: BoundedQueue[int] = BoundedQueue("second", 1)
    aborted: list[bool] = []

    def step(name: str):
        def work(n: int) -> int:
            if name == failing and n == 3:
                message = "disk gone"
                raise OSError(message)
            return n

        return work

    with pytest.raises(WorkerError, match=f"worker '{failing}' failed: disk gone") as e:
        Pipeline(
            [
                Worker("count", range(10**6), step("count"), [first]),
                Worker("double", first, step("double"), [second]),
                Worker("keep", second, step("keep")),
            ],
            on_abort=lambda: aborted.append(True),
        ).run()
    assert isinstance(e.value.__cause__, OSError)
    assert aborted == [True]


@pytest.mark.parametrize("age", [None, abs])
def test_the_newest_is_kept_and_the_rest_is_counted(age) -> None:
    newest: Newest[int] = Newest(age)
    assert newest.take() is None
    for n in range(10):
        newest.put(n)
    assert (newest.take(), newest.take()) == (9, None)
    assert newest.dropped == 9
    for n in (5, 7, 6):
        newest.put(n)
    assert newest.take() == (6 if age is None else 7)
    assert newest.dropped == 11


def test_a_blocked_producer_is_woken_by_abort() -> None:
    queue: BoundedQueue[int] = BoundedQueue("full", 1)
    queue.put(1)
    seen: list[BaseException] = []

    def produce() -> None:
        try:
            queue.put(2)
        except AbortedError as error:
            seen.append(error)

    thread = threading.Thread(target=produce)
    thread.start()
    queue.abort()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert len(seen) == 1


def test_a_wait_counts_what_it_lived_through_not_what_it_slept(monkeypatch) -> None:
    clock = SimpleNamespace(s=100.0)
    monkeypatch.setattr(
        "rtfocus.workers.time", SimpleNamespace(monotonic=lambda: clock.s)
    )
    wait = Wait()
    for _ in range(20):
        clock.s += 0.25
        waited_s = wait.look()
    assert waited_s == 5.0
    clock.s += 3600  # the lid was closed
    assert wait.look() == 5.0 + Wait.MOST_S
    wait.restart()
    clock.s += 0.25
    assert wait.look() == 0.25
