"""Launch: what a run would be refused for, how its two sides meet, one as a child.

The preflight asks those who decide in a run too, before the first exposure: the
microscope's core, the plan, the engines' cards and weights, the device, the disk.
Nothing is exposed, moved or left on the disk.

`rtfocus run` starts the microscope side as a child process. The child is asked to
stop by closing its standard input: that works on every system, and a parent that
dies stops its child too.
"""

import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal, Self

import yaml

from rtfocus.channel import Channel
from rtfocus.config import Config
from rtfocus.engines.card import verified_file
from rtfocus.engines.registry import FoundEngine, check_fit, check_region
from rtfocus.errors import (
    ConfigError,
    ExitCode,
    InputError,
    MicroscopeError,
    OutputError,
    RtfocusError,
    StoppedError,
)
from rtfocus.files import nearest_existing, try_writing
from rtfocus.frame import SeriesStart
from rtfocus.images.metadata import run_at
from rtfocus.machine import check_space, free_bytes
from rtfocus.processing.channel_plan import (
    find_classifier,
    plan_channel,
    restored_as_it_is,
)
from rtfocus.transport.dialogue import user_name
from rtfocus.transport.sockets import is_local
from rtfocus.writers.folder import planned_bytes, run_folder
from rtfocus.writers.header import RunHeader, series_in_words

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
    user = user_name() or "nobody known"
    if not is_local(transport.control):
        pairing = f"run {config.run.name}"
    elif config.file is None:
        pairing = f"run {config.run.name} of {user}"
    else:
        pairing = f"config {config.file} of {user}"
    return config.changed("transport", pairing=pairing)


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
    return config.changed("transport", frames=frames, control=control, pairing=pairing)


def start_child(
    command: list[str], output: int | None = None, errors: IO[bytes] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a command as a process that ends with its standard input."""
    return subprocess.Popen(
        [sys.executable, "-m", "rtfocus", *command, "--stop-on-end-of-input"],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=errors,
        # Out of the reach of Ctrl-C, which would kill it while it starts.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def end_child(process: "subprocess.Popen[bytes]", within_s: float) -> None:
    """Ask a child to end, and kill it if it has not in time."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class SideProcess:
    """A side as a child process; leaving it stops the child and waits for its end.

    Parameters
    ----------
    command
        ``acquire``: one series; ``process``: one series after the other.

    Raises
    ------
    OutputError
        If nothing can be written where the run is to be; nothing is started then.
    """

    def __init__(self, config: Config, command: Literal["acquire", "process"]) -> None:
        takes_files(config.run.folder)
        self._side = "microscope" if command == "acquire" else "processor"
        # Nothing that a driver left running keeps open there is worth a failed run.
        self._folder = tempfile.TemporaryDirectory(
            prefix="rtfocus-", ignore_cleanup_errors=True
        )
        path = Path(self._folder.name) / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")), "utf-8")
        self._errors = Path(self._folder.name) / "errors.txt"
        self.said = ""
        """What the side said on standard error, once it has ended."""
        with self._errors.open("wb") as errors:
            self._process = start_child(
                [command, str(path), "--quiet"], subprocess.DEVNULL, errors
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

        A series with fewer frames than planned is no error: the processor side has all
        that came, and says what is missing.
        """
        return self._process.poll() not in (None, ExitCode.DONE, ExitCode.INCOMPLETE)

    def failure(self) -> RtfocusError | None:
        """Return what the side said when it failed; None if it did not.

        A plan or recording that cannot be used keeps its exit code.
        """
        if not self.failed():
            return None
        if not self.said and self._errors.is_file():
            self.said = self._errors.read_text("utf-8", errors="replace").strip()
        text = self.said or f"exit code {self._process.returncode}"
        last = text.splitlines()[-1]
        msg = f"{self._side} side failed: {last.removeprefix('error: ')}"
        return _KINDS.get(self._process.returncode, MicroscopeError)(msg)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end_child(self._process, within_s=30)
        self.said = self._errors.read_text("utf-8", errors="replace").strip()
        self._folder.cleanup()


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    topic: str
    said: str
    """What was found; where it fails, nothing."""
    error: RtfocusError | None = None
    """Why a run would end here; None: it would not."""


def preflight(config: Config) -> Iterator[Check]:
    """Check plan, channels, optics, engines, device, autofocus and disk.

    Yields
    ------
    Check
        One after the other; a fault in one does not keep the others from being looked
        at.
    """
    # Loaded here: a processor side has no use for it.
    from rtfocus.microscope.acquisition import foresee

    series: SeriesStart | None = None
    try:
        series = foresee(config)
    except RtfocusError as error:
        yield Check("plan", "", error)
    else:
        images = "until it is stopped" if series.planned is None else series.planned
        yield Check("plan", f"{images} images of {series_in_words(series)}")
    yield from _channels(config, series)
    yield _check("device", partial(_device, config))
    if config.autofocus.search != "rtfocus":
        yield _check("autofocus", partial(_search, config.autofocus.search))
    if config.autofocus.calibration is not None:
        yield _check("autofocus", partial(_calibration, config.autofocus.calibration))
    yield _check("disk", partial(_disk, config, series))


def _check(topic: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(topic, ask())
    except RtfocusError as error:
        return Check(topic, "", error)


def _channels(config: Config, series: SeriesStart | None) -> Iterator[Check]:
    if series is None:
        # Which channels come is not known: those of the config are looked at.
        for settings in config.channels:
            ask = partial(_engine_of, config, settings.name)
            yield _check(f"channel {settings.name}", ask)
        return
    for channel in series.channels:
        yield _check(
            f"channel {channel.name}", partial(_work_of, config, series, channel)
        )


def _engine_of(config: Config, channel: str) -> str:
    settings = config.channel(channel)
    name, engines = config.engines_of(channel)
    if settings.optics is None or name is None:
        as_it_is = restored_as_it_is(engines, config.processing)
        if as_it_is is None:
            return "recorded, not restored"
        _verify(as_it_is.engine)
        return f"restored by {as_it_is.name}, defocus not estimated"
    classifier = find_classifier(name, config.processing.engine_folders)
    check_fit(classifier.card, settings.optics, ignore=config.processing.ignore_optics)
    check_region(classifier.card, config.autofocus.region)
    _verify(classifier)
    return f"{name} fits its optics"


def _work_of(config: Config, series: SeriesStart, channel: Channel) -> str:
    """Say what happens to a channel's frames; the weights are compared."""
    plan = plan_channel(config, series, channel)
    if plan.classifier is not None:
        _verify(plan.classifier.found)
        check_region(plan.classifier.card, config.autofocus.region)
        text = f"defocus by {plan.classifier.found.name}"
    elif plan.restoration is not None:
        text = "defocus not estimated"
    else:
        return f"recorded, not restored: {plan.skipped}"
    if plan.restoration is None:
        return f"{text}, not restored: {plan.skipped}"
    if plan.restoration.found is not None:
        _verify(plan.restoration.found)
    return f"{text}, restored by {plan.restoration.name}"


def _verify(engine: FoundEngine) -> None:
    if "fp32" in engine.card.files:
        verified_file(engine.folder, engine.card, "fp32")


def _device(config: Config) -> str:
    from rtfocus.processing.processor import open_processor

    processor = open_processor(config)
    try:
        return ", or ".join(processor.devices)
    finally:
        processor.close()


def _search(name: str) -> str:
    from rtfocus.autofocus.execution import find_brought

    return f"search '{name}' of {find_brought(name).value}"


def _calibration(path: Path) -> str:
    from rtfocus.autofocus.policy import load_calibration

    calibration = load_calibration(path)
    if calibration.trusted:
        return "calibrated"
    return f"checked: {'; '.join(calibration.problems)}"


def _disk(config: Config, series: SeriesStart | None) -> str:
    if series is None:
        parent, planned = config.run.folder, None
        text = str(parent)
    else:
        folder = run_folder(config.run, config.store, series)
        parent, text = folder.parent, str(folder)
        header = RunHeader(series, config.store, None, config.store.restored, {})
        planned = planned_bytes(header)
    existing = takes_files(parent)
    check_space(existing, planned or 0, int(config.store.min_free_mb * 1e6))
    free = f"{free_bytes(existing) / 1e9:.0f} GB free"
    size = "" if planned is None else f", {planned / 1e9:.2g} GB before compression"
    return f"{text}: {free}{size}"


def takes_files(run_folder: Path) -> Path:
    """Return the existing part of a run.folder; refuse one that takes no files."""
    folder = nearest_existing(run_folder)
    around = folder.absolute()
    for run in filter(run_at, (around, *around.parents)):
        msg = (
            f"run.folder: '{run_folder}' lies in a run, '{run}'; choose another, such "
            f"as '{run.parent}'"
        )
        raise OutputError(msg)
    try:
        try_writing(folder)
    except OSError as error:
        msg = (
            f"run.folder: nothing can be written in '{folder}' ({error.strerror}); "
            "choose another run.folder"
        )
        raise OutputError(msg) from error
    return folder
