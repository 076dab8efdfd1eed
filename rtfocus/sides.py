"""Sides: the microscope side as a child process of the processor side.

`rtfocus run` uses it. The child is told to stop by closing its standard input:
that works on every system, and a parent that dies stops its child too.
"""

import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import yaml

from rtfocus.config import Config
from rtfocus.errors import (
    ConfigError,
    ExitCode,
    InputError,
    MicroscopeError,
    RtfocusError,
)

_KINDS: dict[int, type[RtfocusError]] = {
    kind.exit_code: kind for kind in (ConfigError, InputError)
}
"""Errors that the microscope side tells by its exit code."""


def on_free_ports(config: Config) -> Config:
    """Return `config` with all its endpoints on free ports of this machine.

    So that two runs on one machine do not meet.
    """
    # All sockets are open at once, so that the ports differ.
    sockets = [socket.socket() for _ in range(3)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        frames, control, preview = (
            f"tcp://127.0.0.1:{s.getsockname()[1]}" for s in sockets
        )
    finally:
        for one in sockets:
            one.close()
    shown = config.transport.preview
    if shown.endpoint is not None:
        shown = shown.model_copy(update={"endpoint": preview})
    transport = config.transport.model_copy(
        update={"frames": frames, "control": control, "preview": shown}
    )
    return config.model_copy(update={"transport": transport})


class MicroscopeProcess:
    """`rtfocus acquire` in a process of its own.

    Use as a context manager: leaving it stops the child and waits for its end.
    """

    def __init__(self, config: Config) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rtfocus-")
        path = Path(self._folder.name) / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")), "utf-8")
        self._errors = Path(self._folder.name) / "errors.txt"
        self._said = ""
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "rtfocus", "acquire", str(path)),
                    *("--quiet", "--stop-on-end-of-input"),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                # Out of the reach of Ctrl-C, which would kill it while it starts.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )

    def stop(self) -> None:
        """Ask the microscope side to end the series; returns at once."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def failed(self) -> bool:
        """Tell whether the process ended with an error.

        A series with fewer frames than planned is none: the processor side has all
        that came, and says what is missing.
        """
        return self._process.poll() not in (None, ExitCode.DONE, ExitCode.INCOMPLETE)

    def failure(self) -> RtfocusError | None:
        """Return what the microscope side said when it failed; None if it did not.

        A plan or recording that cannot be used keeps its exit code.
        """
        if not self.failed():
            return None
        said = self._said or f"exit code {self._process.returncode}"
        last = said.splitlines()[-1]
        msg = f"microscope side failed: {last.removeprefix('error: ')}"
        return _KINDS.get(self._process.returncode, MicroscopeError)(msg)

    def __enter__(self) -> "MicroscopeProcess":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.stop()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said = self._errors.read_text("utf-8", errors="replace").strip()
        self._folder.cleanup()
