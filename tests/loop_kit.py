"""Loop kit: the whole loop in one process, or through the command line."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaozarrs
import zarr
from numpy.typing import NDArray

from rtfocus import app
from rtfocus.cli import main
from rtfocus.config import Config, load_config, parse_config
from rtfocus.errors import ExitCode
from rtfocus.files import resource_folder
from rtfocus.frame import SeriesStart, Slot
from rtfocus.microscope.acquisition import acquire
from rtfocus.transport.publisher import FramePublisher
from rtfocus.writers.check import check_run

DEADLINE_S = 60.0
IMAGES = ("raw", "restored", "defocus")
OPTICS = {
    "numerical_aperture": 0.36,
    "wavelength_nm": 451,
    "pixel_size_um": 0.65,
    "aberrations": {"spherical_waves": -0.2},
}
LOCAL = (
    "transport.frames=tcp://127.0.0.1:*",
    "transport.control=tcp://127.0.0.1:*",
    "transport.preview.endpoint=null",
    "store.min_free_mb=1",
)
"""Overrides of every test: no fixed port, and a nearly full disk will do."""


@dataclass
class TeeSink:
    """Passes a series on and keeps a copy of every frame, by (t, p, c, z)."""

    publisher: FramePublisher
    sent: dict[tuple[int, ...], NDArray[Any]] = field(default_factory=dict)

    def start(self, series: SeriesStart) -> None:
        self.publisher.start(series)

    def acquire(self) -> Slot:
        return self.publisher.acquire()

    def publish(self, slot: Slot) -> None:
        index = slot.frame().index
        self.sent[tuple(index[axis] for axis in "tpcz")] = slot.pixels.copy()
        self.publisher.publish(slot)

    def end(self, reason: str, **missed: Any) -> None:
        self.publisher.end(reason, **missed)


@dataclass(frozen=True)
class Run:
    """A finished run, and what its camera gave."""

    folder: Path
    sent: dict[tuple[int, ...], NDArray[Any]]

    @property
    def report(self) -> dict[str, Any]:
        return read_report(self.folder)

    @property
    def journal(self) -> list[dict[str, Any]]:
        return read_journal(self.folder)

    def stored(self, name: str, *place: int) -> NDArray[Any]:
        return stored(self.folder, name, *place)


def stored(
    folder: Path, name: str, t: int, p: int = 0, c: int = 0, z: int = 0
) -> NDArray[Any]:
    """Read a frame with zarr-python."""
    root = folder / f"{name}.ome.zarr"
    image = root / str(p) if (root / str(p) / "0").is_dir() else root
    array = zarr.open_array(image / "0", mode="r")
    return np.asarray(array[t, c, z])


def read_report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return found


def read_journal(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "frames.ndjson").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_whole(folder: Path, frames: int | None = None) -> None:
    """Valid stores, every frame readable and accounted for, none of them lost."""
    checked = check_run(folder)
    assert checked.problems == [], str(checked)
    for name in IMAGES:
        if (folder / f"{name}.ome.zarr").is_dir():
            yaozarrs.validate_zarr_store(str(folder / f"{name}.ome.zarr"))
    terms = read_report(folder)["accounting"]
    assert terms["unaccounted"] == 0
    assert (terms["dropped"], terms["in_error"]) == ({}, {})
    assert terms["acquired"] == terms["written"] + terms["focus"]
    assert terms["written"] == checked.frames
    assert checked.frames > 0
    assert frames in (None, checked.frames)


def shipped(name: str, folder: Path, *overrides: str) -> Config:
    """Return a config that comes with rtfocus, reduced, its run in `folder`."""
    return load_config(
        resource_folder("configs") / f"{name}.yaml",
        [f"run.folder={folder}", *LOCAL, *overrides],
    )


def small(folder: Path, engines: Path | None, **sections: dict[str, Any]) -> Config:
    """Return a small virtual microscope; with the engine ``sharpness`` of `engines`."""
    processing: dict[str, Any] = {"classifier": None, "restoration": {"method": "none"}}
    if engines is not None:
        processing = {"classifier": "sharpness", "engine_folders": [str(engines)]}
    data: dict[str, Any] = {
        "run": {"name": "small", "folder": str(folder)},
        "microscope": {
            "source": "virtual",
            "height_px": 192,
            "width_px": 256,
            "surface": {"tilt_x_um": 8.0},
        },
        "acquisition": {"live": {"frames": 8, "exposure_ms": 1}},
        "channels": [{"name": "default", "optics": OPTICS}],
        "processing": processing,
        "transport": {"preview": {"endpoint": None}},
        "store": {"min_free_mb": 1},
    }
    for name, section in sections.items():
        data[name] = section if "source" in section else data.get(name, {}) | section
    return parse_config(data)


def run_loop(config: Config, *, stop: threading.Event | None = None) -> Run:
    """Run both sides over real sockets in this process, keeping what was sent."""
    stop = stop or threading.Event()
    failures: list[BaseException] = []
    folders: list[Path | None] = []
    transport = config.transport.model_copy(
        update={"frames": "tcp://127.0.0.1:*", "control": "tcp://127.0.0.1:*"}
    )
    gone = threading.Event()
    with FramePublisher(transport) as publisher:
        frames, control = publisher.endpoints
        facing = transport.model_copy(update={"frames": frames, "control": control})
        settings = config.model_copy(update={"transport": facing})
        sink = TeeSink(publisher)

        def process() -> None:
            try:
                folders.append(app.process(settings, stop=gone))
            except BaseException as error:
                failures.append(error)
                stop.set()
                publisher.stop()

        processor = threading.Thread(target=process, name="processor side")
        processor.start()
        try:
            acquire(settings, sink, stop=stop)
        except BaseException:
            gone.set()
            raise
        finally:
            processor.join(DEADLINE_S)
            if failures:
                raise failures[0]
        assert not processor.is_alive(), "the processor side hangs"
    (folder,) = folders
    assert folder is not None
    return Run(folder, sink.sent)


ERROR_CODES = frozenset(ExitCode) - {
    ExitCode.DONE,
    ExitCode.USAGE,
    ExitCode.FAULT,
    ExitCode.INTERRUPTED,
}


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


def command(*arguments: str | Path) -> Said:
    """Run ``rtfocus`` in this process, from its entry point on."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rtfocus", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            with pytest.raises(SystemExit) as end:
                main()
            texts = []
            for stream in streams:
                stream.flush()
                stream.seek(0)
                texts.append(stream.read())
    code = end.value.code
    return Said(code if isinstance(code, int) else 0, *texts)


def process_of(*arguments: str | Path, cwd: Path) -> Said:
    """Run ``rtfocus`` as a process of its own; every warning is an error."""
    done = subprocess.run(
        _line(arguments),
        cwd=cwd,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=2 * DEADLINE_S,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr)


def succeeded(said: Said) -> str:
    """Return what was printed by a command that did what it should."""
    assert said.code == 0, said.out + said.err
    assert "Warning" not in said.err, said.err
    return said.out


def failed(said: Said, code: ExitCode | None = None) -> str:
    """Return the one error line of a command that a user's error ended.

    With `code`, or any of those that the errors carry.
    """
    codes = ERROR_CODES if code is None else {code}
    assert said.code in codes, said.out + said.err
    assert "Traceback" not in said.err, said.err
    errors = [x for x in said.err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert said.err.strip().splitlines()[-1] == errors[0], said.err
    return errors[0]


@contextmanager
def started(*arguments: str | Path, cwd: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start a command at the head of a process group; nothing of it may be left."""
    process = subprocess.Popen(
        _line(arguments),
        cwd=cwd,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        left = psutil.Process(process.pid) if process.poll() is None else None
        if left is not None:
            for child in left.children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


def interrupt_group(process: "subprocess.Popen[str]") -> None:
    """Do what Ctrl-C in a terminal does: interrupt the whole process group."""
    if sys.platform == "win32":
        pytest.skip("no process group to interrupt")
    os.killpg(process.pid, signal.SIGINT)


def sets(*overrides: str) -> list[str]:
    """Return the options that make these overrides, and the usual ones."""
    return [part for o in (*LOCAL, *overrides) for part in ("--set", o)]


def write_config(path: Path, config: Config) -> Path:
    """Write a config as YAML; JSON is YAML."""
    path.write_text(config.model_dump_json(), "utf-8")
    return path


def wait_for(
    condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S
) -> None:
    """Return once `condition` holds; fail when it does not in time."""
    ticks = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        ticks.wait(0.02)


def lines_written(folder: Path) -> int:
    """Count the frames a journal holds so far."""
    journal = folder / "frames.ndjson"
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def needs_shipped_engine() -> None:
    """Skip where the engine ``delpnet`` is not there."""
    if not (resource_folder("engines") / "delpnet" / "engine.yaml").is_file():
        pytest.skip("engine 'delpnet' is not shipped with this checkout")


def _line(arguments: tuple[str | Path, ...]) -> list[str]:
    return [sys.executable, "-m", "rtfocus", *map(str, arguments)]


def _environment() -> dict[str, str]:
    # The child runs in another folder, but the package under test.
    root = str(Path(app.__file__).resolve().parents[1])
    before = os.environ.get("PYTHONPATH")
    paths = root if before is None else os.pathsep.join([root, before])
    # In the environment, warnings are errors in the microscope side's process too.
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "PYTHONWARNINGS": "error",
        "COLUMNS": "200",
    }
