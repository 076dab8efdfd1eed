"""Workers: bounded queues, endings and failures."""

import multiprocessing
import signal
import threading
from types import SimpleNamespace

import pytest

from rtfocus.errors import WorkerError
from rtfocus.workers import (
    AbortedError,
    BoundedQueue,
    Newest,
    Pipeline,
    TimeShare,
    Wait,
    Worker,
    undisturbed,
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


def done(monkeypatch, every_s: float, takes_s: float, turns: int) -> list[int]:
    """Ask at regular times for a fifth of them; return the turns that were allowed."""
    clock = SimpleNamespace(s=100.0)
    times = SimpleNamespace(perf_counter=lambda: clock.s, thread_time=lambda: clock.s)
    monkeypatch.setattr("rtfocus.workers.time", times)
    share = TimeShare(0.2, most_s=0.5)
    allowed = []
    for turn in range(turns):
        clock.s = max(clock.s, 100.0 + turn * every_s)
        if share.allows():
            allowed.append(turn)
            with share.spending():
                clock.s += takes_s
    return allowed


def test_work_that_fits_into_its_share_is_always_done(monkeypatch) -> None:
    assert done(monkeypatch, 0.05, 0.01, 2000) == list(range(2000))


def test_a_burst_is_done_whole_of_what_was_saved(monkeypatch) -> None:
    assert done(monkeypatch, 0.0, 0.01, 25) == list(range(25))


@pytest.mark.parametrize("takes_s", [0.01, 0.05, 2.0])
def test_work_beyond_its_share_is_left_out(monkeypatch, takes_s: float) -> None:
    allowed = done(monkeypatch, 0.01, takes_s, 20_000)
    within_s = 0.2 * 20_000 * 0.01
    assert len(allowed) * takes_s == pytest.approx(within_s, rel=0.05, abs=takes_s)


def test_what_comes_in_turns_is_left_out_evenly(monkeypatch) -> None:
    allowed = done(monkeypatch, 0.01, 0.006, 24_000)
    by_place = [sum(turn % 24 == place for turn in allowed) for place in range(24)]
    assert 0.75 < min(by_place) / max(by_place)


def test_a_request_to_end_is_heard_once_what_must_not_be_left_half_is_done() -> None:
    done = []

    def work() -> None:
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            done.append("the block")
        done.append("what comes after")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the block"]
    assert signal.getsignal(signal.SIGINT) is before


def _hears_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="POSIX has masks")
def test_a_process_started_undisturbed_is_deaf_to_ctrl_c_at_once() -> None:
    started = multiprocessing.get_context("spawn").Process(target=_hears_ctrl_c)
    with undisturbed():
        started.start()
    started.join(60)
    assert started.exitcode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
