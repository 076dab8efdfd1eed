"""Sides: how the two sides find each other, and the one as the other's child.

`rtfocus run` starts the microscope side as a child process. The child is told to
stop by closing its standard input: that works on every system, and a parent that
dies stops its child too.
"""

import getpass
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

import yaml

from rtfocus.config import Config
from rtfocus.errors import (
    ConfigError,
    ExitCode,
    InputError,
    MicroscopeError,
    RtfocusError,
    StoppedError,
)
from rtfocus.transport.sockets import is_local

_KINDS: dict[int, type[RtfocusError]] = {
    kind.exit_code: kind for kind in (ConfigError, InputError, StoppedError)
}
"""Errors that the microscope side tells by its exit code."""


def paired(config: Config) -> Config:
    """Return `config` with a pairing: its own, or one that tells whose run it is.

    The fixed default ports would pair any two sides of a machine. On one machine
    both sides know the user and the config file; between two machines these
    differ, and the name of the run stands for them.
    """
    transport = config.transport
    if transport.pairing is not None:
        return config
    if not is_local(transport.control):
        pairing = f"run {config.run.name}"
    elif config.file is None:
        pairing = f"run {config.run.name} of {_user()}"
    else:
        pairing = f"config {config.file} of {_user()}"
    return _with_transport(config, pairing=pairing)


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        # A container's user may have no name.
        return "nobody known"


def on_free_ports(config: Config) -> Config:
    """Return `config` with free ports of this machine and a pairing of its own.

    So that two runs on one machine do not meet.
    """
    # Both sockets are open at once, so that the ports differ.
    sockets = [socket.socket() for _ in range(2)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        frames, control = (f"tcp://127.0.0.1:{s.getsockname()[1]}" for s in sockets)
    finally:
        for one in sockets:
            one.close()
    pairing = secrets.token_hex(16)
    return _with_transport(config, frames=frames, control=control, pairing=pairing)


def _with_transport(config: Config, **changes: str) -> Config:
    transport = config.transport.model_copy(update=changes)
    return config.model_copy(update={"transport": transport})


class _SideProcess:
    """A side as a child process; leaving it stops the child and waits for its end."""

    side: str
    """Whose fault it is, in a message."""

    def __init__(self, config: Config, *command: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rtfocus-")
        path = Path(self._folder.name) / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")), "utf-8")
        self._errors = Path(self._folder.name) / "errors.txt"
        self._said = ""
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "rtfocus", *command, str(path)),
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
        """Ask the side to end its series; returns at once."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def ended(self) -> bool:
        """Tell whether the process is gone, for whatever reason."""
        return self._process.poll() is not None

    def failed(self) -> bool:
        """Tell whether the process ended with an error.

        A series with fewer frames than planned is none: the processor side has all
        that came, and says what is missing.
        """
        return self._process.poll() not in (None, ExitCode.DONE, ExitCode.INCOMPLETE)

    def failure(self) -> RtfocusError | None:
        """Return what the side said when it failed; None if it did not.

        A plan or recording that cannot be used keeps its exit code.
        """
        if not self.failed():
            return None
        if not self._said and self._errors.is_file():
            self._said = self._errors.read_text("utf-8", errors="replace").strip()
        said = self._said or f"exit code {self._process.returncode}"
        last = said.splitlines()[-1]
        msg = f"{self.side} failed: {last.removeprefix('error: ')}"
        return _KINDS.get(self._process.returncode, MicroscopeError)(msg)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said = self._errors.read_text("utf-8", errors="replace").strip()
        self._folder.cleanup()


class MicroscopeProcess(_SideProcess):
    """`rtfocus acquire` in a process of its own."""

    side = "microscope side"

    def __init__(self, config: Config) -> None:
        super().__init__(config, "acquire")


class ProcessorProcess(_SideProcess):
    """`rtfocus process` in a process of its own: one series after the other."""

    side = "processor side"

    def __init__(self, config: Config) -> None:
        super().__init__(config, "process")
