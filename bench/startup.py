"""Start-up bench: how long until a command answers, and a processor takes frames.

Commands are started in turns with a bare ``python -c pass``, so that load from
outside hits all of them; the ratio to it says what rtfocus adds. Bytecode is kept, as
where rtfocus is installed. The processor is
``rtfocus process`` with the demo's engines (DelpNet on OpenVINO, Wiener) and a
publisher in this process that has 512 x 512 frames for it:

- *listening*: until its first word arrives at the microscope side,
- *ready*: until it has compiled its network, made its run folder and takes frames.

Run: python -m bench.startup [--rounds 9] [--cores 2]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from bench import machine
from rtfocus.channel import Channel
from rtfocus.config import Config, load_config
from rtfocus.frame import Position, SeriesStart
from rtfocus.launch import on_free_ports
from rtfocus.transport.publisher import FramePublisher

COMMANDS = {
    "python": ("-c", "pass"),
    "import rtfocus": ("-c", "import rtfocus"),
    "rtfocus --version": ("-m", "rtfocus", "--version"),
    "rtfocus --help": ("-m", "rtfocus", "--help"),
    "rtfocus configs": ("-m", "rtfocus", "configs"),
    "rtfocus check --help": ("-m", "rtfocus", "check", "--help"),
    "rtfocus process --help": ("-m", "rtfocus", "process", "--help"),
}
SIDE_PX = 512


def with_bytecode(folder: Path) -> dict[str, str]:
    """Return the environment of a user, whose Python compiles a module once.

    Where ``PYTHONDONTWRITEBYTECODE`` is set it would compile all of them each time.
    """
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(folder)}


def command_s(arguments: tuple[str, ...], environment: dict[str, str]) -> float:
    """Return how long a command of this Python takes."""
    start_s = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start_s


def processor_s(folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Start a processor; return how long until it listens, and takes frames."""
    config = on_free_ports(
        load_config("demo", [f"run.folder={folder}", "transport.preview.endpoint=null"])
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), "utf-8")
    heard: list[float] = []
    with FramePublisher(config.transport) as publisher:

        def listen() -> None:
            while not publisher.status().recorder_alive:
                time.sleep(0.002)
            heard.append(time.perf_counter())

        listener = threading.Thread(target=listen)
        listener.start()
        start_s = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "rtfocus", "process", str(path), "--once", "-q"],
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        publisher.start(series_start(config))
        ready_s = time.perf_counter()
        listener.join()
        publisher.end("completed")
        process.wait(timeout=60)
    return {"listening": heard[0] - start_s, "ready": ready_s - start_s}


def series_start(config: Config) -> SeriesStart:
    """Return a series of square 16-bit frames in the config's first channel."""
    channel = config.channels[0]
    return SeriesStart(
        version=1,
        series_uid=os.urandom(8).hex(),
        name="startup",
        started_ns=time.time_ns(),
        shape=(SIDE_PX, SIDE_PX),
        dtype="<u2",
        sizes={"t": None},
        channels=[Channel(channel.name, channel.optics)],
        positions=[Position("p0")],
        pixel_size_um=0.65,
    )


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {
        "median_s": round(statistics.median(seconds), 4),
        "least_s": round(min(seconds), 4),
        "most_s": round(max(seconds), 4),
    }


def measure(rounds: int) -> dict[str, Any]:
    """Start everything in turns, `rounds` times after one to warm the disk."""
    commands: dict[str, list[float]] = {name: [] for name in COMMANDS}
    processor: dict[str, list[float]] = {"listening": [], "ready": []}
    with tempfile.TemporaryDirectory() as bytecode:
        environment = with_bytecode(Path(bytecode))
        for number in range(rounds + 1):
            for name, arguments in COMMANDS.items():
                took_s = command_s(arguments, environment)
                if number:
                    commands[name].append(took_s)
            with tempfile.TemporaryDirectory() as folder:
                for name, took_s in processor_s(Path(folder), environment).items():
                    if number:
                        processor[name].append(took_s)
    bare_s = statistics.median(commands["python"])
    return {
        "commands": {
            name: {
                **summary(seconds),
                "ratio_to_python": round(statistics.median(seconds) / bare_s, 2),
            }
            for name, seconds in commands.items()
        },
        "processor": {name: summary(s) for name, s in processor.items()},
    }


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cores", type=int, help="use only so many (Linux)")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.cores is not None:
        allowed = sorted(os.sched_getaffinity(0))[: options.cores]
        os.sched_setaffinity(0, allowed)
    found = measure(1 if options.smoke else options.rounds)
    for kind, rows in found.items():
        for name, row in rows.items():
            figures = "  ".join(f"{key} {value:g}" for key, value in row.items())
            print(f"{kind:10} {name:24} {figures}")
    payload = {
        "question": "rtfocus --help 0.3 s, --version 0.2 s, processor ready 1.5 s",
        "rounds": options.rounds,
        **found,
    }
    print(machine.write("startup", payload, options.out))


if __name__ == "__main__":
    main()
