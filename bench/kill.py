"""Kill bench: the processor killed again and again while it records.

A publisher in this process sends numbered frames to `rtfocus process`, which is
killed (SIGKILL, on Windows TerminateProcess) at random moments and started again.
After every kill the run folder, as the kill left it, must open in zarr-python, pass
the yaozarrs validator and hold every frame that the publisher was told is durable,
bit by bit; a repaired copy of it must pass `rtfocus check`. At the end of a series
the folder must hold every frame, with nothing unaccounted for.

Run: python bench/kill.py [--kills 100] [--per-series 5]
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import yaozarrs
import zarr
from numpy.typing import NDArray

from rtfocus.channel import Channel
from rtfocus.config.processor import TransportConfig
from rtfocus.frame import FrameHeader, Position, SeriesStart
from rtfocus.transport.publisher import FramePublisher
from rtfocus.writers.check import check_run

sys.path.insert(0, str(Path(__file__).parent))
import machine

SIZE_PX = 256
DEADLINE_S = 120.0
"""No wait in this bench takes longer: beyond it, something hangs."""


def numbered(sequence: int) -> NDArray[np.uint16]:
    """Return pixels that no other sequence has."""
    values = np.arange(SIZE_PX * SIZE_PX, dtype=np.int64) * 31 + (sequence + 1) * 97
    pixels: NDArray[np.uint16] = (values % 65536).astype(np.uint16)
    return pixels.reshape(SIZE_PX, SIZE_PX)


class Sender:
    """Publishes numbered frames from a thread until it is told to end."""

    def __init__(self, publisher: FramePublisher, uid: str) -> None:
        self._publisher = publisher
        self._uid = uid
        self._end = threading.Event()
        self._error: BaseException | None = None
        self.sent = 0
        self._thread = threading.Thread(target=self._run, name="send", daemon=True)
        self._thread.start()

    def wait_durable(self, number: int) -> None:
        """Wait until `number` frames are durable."""
        deadline_s = time.monotonic() + DEADLINE_S
        while self._publisher.status().durable_upto < number:
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{self._publisher.status()} after {DEADLINE_S} s")
            time.sleep(0.001)

    def end(self) -> None:
        """End the series; returns when every frame is durable."""
        self._end.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._publisher.start(series(self._uid))
            while not self._end.is_set():
                slot = self._publisher.acquire()
                slot.prepare(header(self._uid, self.sent))[...] = numbered(self.sent)
                self._publisher.publish(slot)
                self.sent += 1
            self._publisher.end("completed")
        except BaseException as error:  # raised by wait_durable and end
            self._error = error


def series(uid: str) -> SeriesStart:
    """Return a live series without end."""
    return SeriesStart(
        version=1,
        series_uid=uid,
        name=uid,
        started_ns=time.time_ns(),
        shape=(SIZE_PX, SIZE_PX),
        dtype="<u2",
        sizes={"t": None},
        channels=[Channel("default")],
        positions=[Position("p0")],
        pixel_size_um=0.65,
    )


def header(uid: str, sequence: int) -> FrameHeader:
    """Return one frame's header."""
    return FrameHeader(
        version=1,
        series_uid=uid,
        sequence=sequence,
        shape=(SIZE_PX, SIZE_PX),
        dtype="<u2",
        captured_ns=time.time_ns(),
        exposure_ms=1.0,
        index={"t": sequence},
    )


def start_processor(config: Path) -> subprocess.Popen[bytes]:
    """Start `rtfocus process` for one series."""
    command = [sys.executable, "-m", "rtfocus", "process", str(config)]
    return subprocess.Popen([*command, "--once", "--quiet"], stdout=subprocess.DEVNULL)


def check_as_left(folder: Path, durable: int) -> None:
    """Check what a kill left, with readers that know nothing of rtfocus."""
    store = folder / "raw.ome.zarr"
    yaozarrs.validate_zarr_store(str(store))
    array = zarr.open_array(store / "0", mode="r")
    for t in range(durable):
        if not np.array_equal(array[t, 0, 0], numbered(t)):
            raise SystemExit(f"frame {t} of {durable} durable ones is wrong in {store}")


def check_repaired(folder: Path, durable: int) -> None:
    """Repair a copy; the original goes on being recorded."""
    with tempfile.TemporaryDirectory(prefix="rtfocus-kill-") as place:
        copy = shutil.copytree(folder, Path(place) / folder.name)
        report = check_run(copy, repair=True)
        if report.problems or report.frames < durable:
            raise SystemExit(f"not repaired, {durable} frames were durable:\n{report}")
        check_as_left(copy, durable)


def kill_series(
    place: Path, kills: int, rng: random.Random, store: dict[str, Any]
) -> int:
    """Record one series through `kills` kills; returns its frames."""
    uid = f"kill-{rng.getrandbits(48):012x}"
    transport = {"frames": "tcp://127.0.0.1:*", "control": "tcp://127.0.0.1:*"}
    transport_config = TransportConfig(**transport, connect_timeout_s=DEADLINE_S)
    with FramePublisher(transport_config) as publisher:
        frames, control = publisher.endpoints
        config = place / f"{uid}.yaml"
        settings = {
            "run": {"name": uid, "folder": str(place)},
            "processing": {"classifier": None},
            "transport": {
                "frames": frames,
                "control": control,
                "preview": {"endpoint": None},
                "connect_timeout_s": DEADLINE_S,
            },
            "store": {"restored": False, "min_free_mb": 50, **store},
        }
        config.write_text(yaml.safe_dump(settings), "utf-8")
        folder = place / f"{uid}.rtfocus"
        process = start_processor(config)
        try:
            sender = Sender(publisher, uid)
            durable = 0
            for _ in range(kills):
                sender.wait_durable(durable + rng.randint(1, 60))
                process.kill()
                process.wait()
                durable = publisher.status().durable_upto
                check_as_left(folder, durable)
                check_repaired(folder, durable)
                process = start_processor(config)
            sender.wait_durable(durable + 20)
            sender.end()
            if process.wait(timeout=DEADLINE_S) != 0:
                raise SystemExit(f"the last processor failed: {process.returncode}")
        finally:
            process.kill()
            process.wait()
    check_as_left(folder, sender.sent)
    report = check_run(folder)
    if report.problems or report.frames != sender.sent or report.missing:
        raise SystemExit(f"{sender.sent} frames were sent:\n{report}")
    return sender.sent


def main() -> None:
    """Kill, check, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-series", type=int, default=5)
    parser.add_argument("--shard-frames", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one kill")
    given = parser.parse_args()
    if given.smoke:
        given.kills = given.per_series = 1
    rng = random.Random(given.seed)
    done = frames = 0
    began_s = time.monotonic()
    while done < given.kills:
        kills = min(given.per_series, given.kills - done)
        with tempfile.TemporaryDirectory(prefix="rtfocus-kill-") as place:
            store = {"shard_frames": given.shard_frames}
            frames += kill_series(Path(place), kills, rng, store)
        done += kills
        print(f"{done} kills, {frames} frames recorded, none durable and lost")
    seconds = time.monotonic() - began_s
    settings = {key: str(value) for key, value in vars(given).items()}
    results = {"kills": done, "frames": frames, "lost": 0, "seconds": seconds}
    print(machine.write("kill", {"settings": settings, "results": results}, given.out))


if __name__ == "__main__":
    main()
