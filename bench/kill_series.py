"""Kill series: one series whose processor is killed again and again.

A publisher in this process sends frames that name themselves; ``rtfocus process``
records them in a process of its own, is killed (SIGKILL, on Windows
TerminateProcess) at a random moment, and is started anew on the same series. After
each kill a copy of the run folder is examined, while the next processor goes on
with the original.
"""

import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import yaml

from bench import kill_check
from bench.kill_processor import PATIENCE_S, BrokenOffError, Processor, wait_until
from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config import Config
from rtfocus.config.sections import TransportConfig
from rtfocus.errors import ExitCode
from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, Position, SeriesStart
from rtfocus.transport.publisher import FramePublisher
from rtfocus.writers.check import check_run

OPTICS = OpticalSystem(numerical_aperture=0.5, wavelength_nm=451.0, pixel_size_um=0.65)
MOST_FRAMES = 60
"""A processor is killed after at most this many frames."""
MOST_DELAY_S = 0.03
"""And up to this much later, at no particular point of its work."""


@dataclass(frozen=True)
class Mode:
    """How the processor of a series is configured."""

    name: str
    store: dict[str, Any]
    processing: dict[str, Any]
    shared_memory: Literal["auto", "off"] = "auto"
    """Pixels go through shared memory, or by TCP."""

    @property
    def way(self) -> str:
        """How frames must have come, as the report says it."""
        return "shared memory" if self.shared_memory == "auto" else "TCP"


@dataclass
class KillCounts:
    """What became of one series, or of several."""

    kills: Counter[str] = field(default_factory=Counter)
    """By moment: ``start``, ``frames`` or ``finish``."""
    frames: int = 0
    """Sent, each counted once."""
    resent: int = 0
    reported: int = 0
    """Frames reported durable at the kills, summed: each was compared."""
    faults: list[str] = field(default_factory=list)

    def add(self, other: "KillCounts") -> None:
        """Add those of another series."""
        self.kills += other.kills
        self.frames += other.frames
        self.resent += other.resent
        self.reported += other.reported
        self.faults += other.faults


class KilledSeries:
    """One series whose processor is killed again and again.

    Parameters
    ----------
    folder
        Empty; gets the config, the run folder and copies of it.
    mode
        How the processor is configured.
    rng
        Chooses the moments.
    """

    def __init__(self, folder: Path, mode: Mode, rng: random.Random) -> None:
        self.counts = KillCounts()
        self._folder = folder
        self._rng = rng
        self._allowed: int | None = 0
        """Frames to publish; None: end the series. Else an examination that takes
        long would make the next one take longer."""
        self._changed = threading.Condition()
        self._series = _series(f"{mode.name}-{rng.getrandbits(64):x}")
        transport = TransportConfig(
            frames="tcp://127.0.0.1:*",
            control="tcp://127.0.0.1:*",
            slots=16,
            # A killed processor is known to be lost after six of these.
            heartbeat_s=0.05,
            connect_timeout_s=PATIENCE_S,
            shared_memory=mode.shared_memory,
        )
        self._way = mode.way
        self._publisher = FramePublisher(transport)
        self._config = self._write_config(mode, transport)

    def run(self, kills: int, *, at_finish: bool, with_command: bool) -> KillCounts:
        """Kill `kills` processors; the next one ends the series.

        Parameters
        ----------
        kills
            At the start and between frames.
        at_finish
            Kill the last one too, while it finishes the run folder.
        with_command
            Repair the last copy with the command line instead.
        """
        with self._publisher, ThreadPoolExecutor(1) as pool:
            published = pool.submit(self._publish)
            try:
                self._run(published, kills, at_finish, with_command)
            except BrokenOffError as error:
                self.counts.faults.append(f"processor {error}")
            finally:
                self._allow(None)
                self._publisher.stop()
        status = self._publisher.status()
        self.counts.frames, self.counts.resent = status.sent, status.resent
        return self.counts

    def run_frozen(self) -> KillCounts:
        """Freeze the processor, start another, let the first go on; a third ends it.

        The second must be refused by the folder, the first must leave it as it is.
        """
        with self._publisher, ThreadPoolExecutor(1) as pool:
            published = pool.submit(self._publish)
            try:
                self._run_frozen(published)
            except BrokenOffError as error:
                self.counts.faults.append(f"processor {error}")
            finally:
                self._allow(None)
                self._publisher.stop()
        self.counts.frames = self._publisher.status().sent
        return self.counts

    def _run_frozen(self, published: "Future[int]") -> None:
        running = [Processor(self._config)]
        try:
            self._wait_for_frames(running[0])
            running[0].freeze()
            wait_until(lambda: not self._publisher.status().recorder_alive, "loss")
            running.append(Processor(self._config))
            running[1].finish(ExitCode.BUSY)
            running[0].thaw()
            running[0].finish(ExitCode.BUSY)
            running.append(Processor(self._config))
            self._wait_for_frames(running[2])
            self._allow(None)
            running[2].wait_until(published.done, "the end of the series")
            running[2].finish()
            faults = kill_check.faults_at_end(self._one_folder(), published.result())
            self._note("end", faults)
        finally:
            for processor in running:
                processor.kill()

    def _run(
        self,
        published: "Future[int]",
        kills: int,
        at_finish: bool,
        with_command: bool,
    ) -> None:
        processor = Processor(self._config)
        try:
            for number in range(kills):
                self._wait_for_moment(processor)
                copy, durable = self._kill(processor, number)
                # It starts while the copy is examined: importing takes seconds.
                processor = Processor(self._config)
                by_command = with_command and number == kills - 1
                self._examine(copy, durable, by_command)
            self._wait_for_frames(processor)
            self._allow(None)
            processor.wait_until(published.done, "the end of the series")
            sent = published.result()
            if at_finish:
                processor.wait(self._rng.uniform(0, 3 * MOST_DELAY_S))
                self.counts.kills["finish"] += 1
                self._examine(*self._kill(processor, kills), by_command=False)
                check_run(self._one_folder(), repair=True)
            else:
                processor.finish()
                faults = kill_check.faults_of_way(self._one_folder(), self._way)
                self._note("end", faults)
            self._note("end", kill_check.faults_at_end(self._one_folder(), sent))
        finally:
            processor.kill()

    def _wait_for_moment(self, processor: Processor) -> None:
        """Wait until the processor is to be killed: anywhere in its work."""
        moment = self._rng.choice(["start", "frames", "frames", "frames"])
        self.counts.kills[moment] += 1
        if moment == "frames":
            self._wait_for_frames(processor)
        else:
            status = self._publisher.status
            processor.wait_until(lambda: status().recorder_alive, "hello")
        processor.let_run(self._rng.uniform(0, MOST_DELAY_S))

    def _wait_for_frames(self, processor: Processor) -> None:
        """Wait for a random number of frames to be durable, with more under way."""
        status = self._publisher.status
        durable = status().durable_upto
        self._allow(durable + 2 * MOST_FRAMES)
        target = durable + self._rng.randint(1, MOST_FRAMES)
        processor.wait_until(lambda: status().durable_upto >= target, "frames")

    def _kill(self, processor: Processor, number: int) -> tuple[Path | None, int]:
        """Kill; return a copy of the run folder, and what was reported durable."""
        processor.kill()
        durable = self._publisher.status().durable_upto
        self.counts.reported += durable
        folder, copy = self._run_folder(), None
        if folder is not None:
            copy = self._folder / "copies" / f"{number}.rtfocus"
            shutil.copytree(folder, copy)
        # The next one must not be taken for this one.
        wait_until(lambda: not self._publisher.status().recorder_alive, "loss")
        return copy, durable

    def _examine(self, copy: Path | None, durable: int, by_command: bool) -> None:
        """Note what is wrong with a copy, and remove it unless something is."""
        if copy is None:
            if durable:
                self._note("kill", [f"{durable} frames durable, no run folder"])
            return
        check = (
            kill_check.faults_after_repair_command
            if by_command
            else kill_check.faults_after_kill
        )
        faults = check(copy, durable)
        self._note(f"kill {copy.stem}, {durable} durable", faults)
        if not faults:
            shutil.rmtree(copy)

    def _note(self, where: str, faults: list[str]) -> None:
        name = self._series.name
        self.counts.faults += [f"{name}, {where}: {fault}" for fault in faults]

    def _run_folder(self) -> Path | None:
        """Return the run folder; None: killed before it was made."""
        found = sorted((self._folder / "runs").glob("*.rtfocus"))
        if len(found) > 1:
            names = [path.name for path in found]
            raise BrokenOffError(f"made several folders for one series: {names}")
        return found[0] if found else None

    def _one_folder(self) -> Path:
        folder = self._run_folder()
        if folder is None:
            raise BrokenOffError("made no run folder")
        return folder

    def _publish(self) -> int:
        """Publish frames until it is enough; return how many."""
        self._publisher.start(self._series)
        for sequence in count():
            if not self._may_publish(sequence):
                break
            slot = self._publisher.acquire()
            pixels = slot.prepare(_header(self._series, sequence))
            pixels[...] = kill_check.pixels_of(sequence, sequence + 1)[0]
            self._publisher.publish(slot)
        self._publisher.end("completed")
        return sequence

    def _allow(self, frames: int | None) -> None:
        with self._changed:
            self._allowed = frames
            self._changed.notify_all()

    def _may_publish(self, sequence: int) -> bool:
        """Wait until this frame is allowed; False: the series ends before it."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._allowed is None or sequence < self._allowed
            )
            return self._allowed is not None

    def _write_config(self, mode: Mode, transport: TransportConfig) -> Path:
        frames, control = self._publisher.endpoints
        facing = transport.model_dump(mode="json")
        facing |= {"frames": frames, "control": control, "preview": {"endpoint": None}}
        config = Config.model_validate(
            {
                "run": {"name": "killed", "folder": str(self._folder / "runs")},
                "transport": facing,
                "store": {"min_free_mb": 0, **mode.store},
                "processing": {"threads": 1, **mode.processing},
            }
        )
        path = self._folder / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")), "utf-8")
        return path


def _series(uid: str) -> SeriesStart:
    return SeriesStart(
        version=PROTOCOL_VERSION,
        series_uid=uid,
        name=uid,
        started_ns=time.time_ns(),
        shape=(kill_check.SIDE, kill_check.SIDE),
        dtype="<u2",
        sizes={"t": None},
        channels=[Channel("default", OPTICS)],
        positions=[Position("p0")],
        pixel_size_um=OPTICS.pixel_size_um,
    )


def _header(series: SeriesStart, sequence: int) -> FrameHeader:
    return FrameHeader(
        version=PROTOCOL_VERSION,
        series_uid=series.series_uid,
        sequence=sequence,
        shape=series.shape,
        dtype=series.dtype,
        captured_ns=time.time_ns(),
        exposure_ms=1.0,
        index={"t": sequence},
    )
