"""Disk: whether the run fits, and when the disk will be full."""

import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from rtfocus.errors import WriterError

_SAMPLE_S = 0.25
_WINDOW = 40
"""Ten seconds of samples: the rate of a run, not of one frame."""


def free_bytes(folder: Path) -> int:
    """Return what is free for this user on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def check_space(folder: Path, planned: int | None, min_free: int) -> None:
    """Refuse a run that does not fit.

    Parameters
    ----------
    folder
        An existing folder on the disk in question.
    planned
        Bytes of all planned pixels before compression; None: unbounded.
    min_free
        Bytes that must be left.

    Raises
    ------
    WriterError
        Names what is planned, what is free and the remedy.
    """
    free = free_bytes(folder)
    if free < (planned or 0) + min_free:
        needed = "an unbounded run" if planned is None else f"{_mb(planned)} planned"
        msg = (
            f"disk of '{folder}' has {_mb(free)} free, too little for {needed} and "
            f"store.min_free_mb={min_free / 1e6:.0f}; free space, choose another "
            "run.folder, record less or lower store.min_free_mb"
        )
        raise WriterError(msg)


class DiskWatch:
    """Watches the free space while a run goes on; asks the system 4 times a second."""

    def __init__(
        self,
        folder: Path,
        min_free: int,
        *,
        free: Callable[[Path], int] = free_bytes,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._min_free = min_free
        self._free = free
        self._clock_s = clock_s
        self._samples: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self.sample()

    def sample(self) -> int:
        """Return the free bytes, measured now or a moment ago."""
        now = self._clock_s()
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((now, self._free(self._folder)))
        return self._samples[-1][1]

    def check(self) -> None:
        """Raise WriterError when less than the minimum is left."""
        free = self.sample()
        if free < self._min_free:
            msg = (
                f"disk of '{self._folder}' has only {_mb(free)} free, less than "
                f"store.min_free_mb={self._min_free / 1e6:.0f}: the run ends here; "
                "free space before the next one"
            )
            raise WriterError(msg)

    def time_to_full_s(self) -> float | None:
        """Return seconds until the minimum is reached at the current rate.

        None while the disk does not fill.
        """
        if len(self._samples) < 2:
            return None
        (began, free_then), (now, free_now) = self._samples[0], self._samples[-1]
        used = free_then - free_now
        if used <= 0:
            return None
        return max(free_now - self._min_free, 0) * (now - began) / used


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
