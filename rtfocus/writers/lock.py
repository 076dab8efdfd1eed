"""Lock: one process at a time writes a run folder, and everybody can see which.

The operating system holds the lock, on Windows, Linux, macOS and on network disks
that can lock, and lets it go with the process, also after ``kill -9``. A frozen process
keeps it. Beside the lock lies who holds it. Some disks forget locks when they
reconnect, so a writer looks at that file again before it changes anything it has not
looked at for a second: whoever was replaced touches nothing.
"""

import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import msgspec
from filelock import FileLock, Timeout

from rtfocus.errors import BusyError, WriterError
from rtfocus.writers.header import HOLDER_NAME, LOCK_NAME, write_json

PATIENCE_S = 5.0
"""How long a lock is waited for: a recorder that was replaced is closing."""
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who writes a run folder."""

    doing: str
    """``recording``, ``repairing`` ..."""
    host: str
    process: int
    since_ns: int
    """Unix time."""
    token: str
    """Of this one lock."""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_ns / 1e9))
        return f"process {self.process} on {self.host}, {self.doing} since {since}"


class RunLock:
    """The right to change a run folder; held from its making to `release`.

    Parameters
    ----------
    folder
        Must exist.
    doing
        What the holder does with the folder, for whoever is refused.
    patience_s
        How long to wait for another holder; None: `PATIENCE_S`.

    Raises
    ------
    BusyError
        If another process holds it; names that process.
    WriterError
        If the folder cannot be locked.
    """

    def __init__(
        self, folder: Path, doing: str, *, patience_s: float | None = None
    ) -> None:
        self._folder = folder
        self._lock = FileLock(folder / LOCK_NAME, thread_local=False)
        try:
            wait_s = PATIENCE_S if patience_s is None else patience_s
            self._lock.acquire(timeout=wait_s, poll_interval=0.05)
        except Timeout as error:
            raise BusyError(_busy(folder)) from error
        except (OSError, NotImplementedError) as error:
            raise WriterError(_not_lockable(folder, error)) from error
        self._holder = Holder(
            doing=doing,
            host=platform.node() or "this machine",
            process=os.getpid(),
            since_ns=time.time_ns(),
            token=uuid4().hex,
        )
        self._looked_s = time.time()
        try:
            write_json(folder / HOLDER_NAME, asdict(self._holder))
        except BaseException:
            self._lock.release()
            raise

    def assert_held(self, *, now: bool = False) -> None:
        """Raise if another process has taken the folder over.

        Looks at the disk once a second at most, unless `now` is given.

        Raises
        ------
        BusyError
            Then nothing in the folder may be touched any more.
        """
        # The wall clock goes on while a machine sleeps, the monotonic one may not.
        if not now and abs(time.time() - self._looked_s) < _LOOK_AGAIN_S:
            return
        found = _read_holder(self._folder)
        if found is None or found.token != self._holder.token:
            by = "is gone" if found is None else f"was taken over by {found}"
            msg = (
                f"'{self._folder}' {by}: this process leaves it as it is; what is "
                "durable is in it"
            )
            raise BusyError(msg)
        self._looked_s = time.time()

    def release(self) -> None:
        """Let others write; called twice does nothing."""
        if not self._lock.is_locked:
            return
        found = _read_holder(self._folder)
        if found is not None and found.token == self._holder.token:
            # Nobody is hindered by it: the lock decides.
            try:
                (self._folder / HOLDER_NAME).unlink(missing_ok=True)
            except OSError:
                pass
        self._lock.release()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.release()


def holder_of(folder: Path) -> Holder | None:
    """Return who writes the folder now; None: nobody, as far as can be told.

    Changes nothing: a folder that was never locked, or may only be read, stays as it
    is.
    """
    lock = folder / LOCK_NAME
    if not lock.is_file() or lock.is_symlink():
        return None
    try:
        with FileLock(lock, timeout=0):
            return None
    except Timeout:
        return _read_holder(folder) or Holder("writing", "a machine", 0, 0, "")
    except (OSError, NotImplementedError):
        return None


def _read_holder(folder: Path) -> Holder | None:
    try:
        data = (folder / HOLDER_NAME).read_bytes()
        return msgspec.json.decode(data, type=Holder)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None


def _busy(folder: Path) -> str:
    holder = _read_holder(folder)
    return (
        f"'{folder}' is being written by {holder or 'another process'}; let it finish, "
        "or end that process, also if it hangs, and start again"
    )


def _not_lockable(folder: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"'{folder}' cannot be locked against other writers: {reason}; a run needs a "
        "folder that may be written on a disk that locks files"
    )
