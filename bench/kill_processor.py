"""Kill processor: ``rtfocus process`` in a process of its own, to be killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 60.0
"""No processor takes longer to start or to finish; a wait beyond it is a fault."""
_LOOK_S = 0.002


class BrokenOffError(Exception):
    """A processor did what it must not do; the series cannot go on."""


def wait_until(
    condition: Callable[[], bool],
    what: str,
    pause: Callable[[], object] = lambda: threading.Event().wait(_LOOK_S),
) -> None:
    """Wait for `condition`, pausing between looks at it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise BrokenOffError(f"kept the bench waiting for {what}")
        pause()


class Processor:
    """``rtfocus process`` in a process of its own."""

    def __init__(self, config: Path) -> None:
        self._errors = config.with_name("errors.txt")
        command = [sys.executable, "-m", "rtfocus", "process", str(config)]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, "--once", "--quiet"],
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for `condition` while the processor runs."""
        wait_until(condition, what, self.let_run)

    def let_run(self, time_s: float = _LOOK_S) -> None:
        """Let it run on; it must not end by itself meanwhile."""
        if self.wait(time_s) is not None:
            raise BrokenOffError(f"left too early: {self._said()}")

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the processor's own end; None: it runs on."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def finish(self, expected: int = 0) -> None:
        """Wait for its own end with this exit code."""
        code = self.wait(PATIENCE_S)
        if code != expected:
            raise BrokenOffError(f"ended with {code}: {self._said()}")

    def freeze(self) -> None:
        """Stop all its threads, as a sleep or a hanging disk does; not on Windows."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it at once, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def _said(self) -> str:
        return self._errors.read_text("utf-8", errors="replace").strip()[-2000:]
