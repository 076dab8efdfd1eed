"""Two machines: the live side over a network that delays, loses, breaks and is slow.

``rtfocus acquire`` and ``rtfocus process`` run in two network namespaces of Linux, each
with its own half of the keys that ``rtfocus keys`` made, as on two computers. Nothing
but the link joins them:

- a veth pair, whose rate ``tc tbf`` limits and which ``ip link set down`` cuts,
- or, to delay and to lose, two TUN devices and a relay of IP packets in this process:
  not every kernel has ``tc netem``. Packets may overtake each other, as with netem.

Per case: frames/s, the accounting of ``report.json``, the verdict of ``rtfocus check``,
frames whose pixels are those of the first case, exit codes. The exit code is 1 if a
case loses a frame, hangs, or ends otherwise than with 0.

Run as root: python -m bench.two_machines [--frames 150] [--only cut] [--out FOLDER]
"""

import argparse
import fcntl
import heapq
import json
import os
import random
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zarr

from bench import machine

SCOPE, PROCESSOR = f"scope{os.getpid()}", f"proc{os.getpid()}"
ADDRESSES = {SCOPE: "10.213.7.1", PROCESSOR: "10.213.7.2"}
LINK = "link0"
MTU = 1500
PATIENCE_S = 240.0
"""A case that takes longer hangs."""
_LOOK_S = 0.02
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
RTFOCUS = (sys.executable, "-m", "rtfocus")


@dataclass(frozen=True)
class Case:
    """What the network does while one series is acquired."""

    name: str
    delay_ms: float = 0.0
    """Each way."""
    jitter_ms: float = 0.0
    loss: float = 0.0
    """Share of the packets, each way."""
    rate_mbit: float | None = None
    cut_s: float = 0.0
    """From a third of the frames on."""
    once: bool = True
    """``process --once``; else as a service, ended by SIGINT after the series."""
    again: bool = False
    """The processor gives up while the link is cut, and is started again."""
    live: bool = False
    """The camera runs freely, instead of a plan that can wait."""

    @property
    def relayed(self) -> bool:
        """Whether the relay carries the packets, not a veth pair."""
        return bool(self.delay_ms or self.loss)


CASES = (
    Case("plain"),
    Case("delay 20 ± 5 ms", delay_ms=20, jitter_ms=5),
    Case("loss 1 %", loss=0.01),
    Case("cut for 5 s", cut_s=5),
    Case("cut for 15 s (service)", cut_s=15, once=False),
    Case("cut for 15 s, once, again", cut_s=15, again=True),
    Case("10 Mbit/s", rate_mbit=10),
    Case("10 Mbit/s, live", rate_mbit=10, live=True),
)


class Relay(threading.Thread):
    """Carries IP packets between two TUN devices, later or not at all."""

    def __init__(self, case: Case, ends: tuple[int, int]) -> None:
        super().__init__(name="relay")
        self.packets = self.lost = 0
        self._case, self._ends = case, ends
        self._chance = random.Random(1)
        self._late: list[tuple[float, int, int, bytes]] = []
        self._done = threading.Event()

    def run(self) -> None:
        """Carry packets until `stop`."""
        with selectors.DefaultSelector() as selector:
            for end, other in (self._ends, self._ends[::-1]):
                selector.register(end, selectors.EVENT_READ, other)
            while not self._done.is_set():
                for key, _ in selector.select(self._patience_s()):
                    self._take(key.fd, key.data)
                self._deliver()

    def stop(self) -> None:
        """End; what is under way is lost."""
        self._done.set()
        self.join()

    def _patience_s(self) -> float:
        due_s = self._late[0][0] - time.monotonic() if self._late else 0.05
        return min(max(due_s, 0.0), 0.05)

    def _take(self, end: int, other: int) -> None:
        packet = os.read(end, MTU + 64)
        self.packets += 1
        if self._chance.random() < self._case.loss:
            self.lost += 1
            return
        jitter_ms = self._chance.uniform(-1, 1) * self._case.jitter_ms
        due_s = time.monotonic() + (self._case.delay_ms + jitter_ms) / 1e3
        heapq.heappush(self._late, (due_s, self.packets, other, packet))

    def _deliver(self) -> None:
        while self._late and self._late[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(self._late)
            with suppress(OSError):  # the device is down: the packet is lost
                os.write(end, packet)


def sh(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def inside(namespace: str, *command: str) -> tuple[str, ...]:
    """Return the command, to be run in a network namespace."""
    return ("ip", "netns", "exec", namespace, *command)


@contextmanager
def network(case: Case) -> Iterator[Relay | None]:
    """Two namespaces and the link between them; all is gone afterwards."""
    with ExitStack() as stack:
        for namespace in ADDRESSES:
            sh("ip", "netns", "add", namespace)
            stack.callback(sh, "ip", "netns", "del", namespace)
        relay = None
        if case.relayed:
            ends = (tun(SCOPE), tun(PROCESSOR))
            for end in ends:
                stack.callback(os.close, end)
            relay = Relay(case, ends)
            relay.start()
            stack.callback(relay.stop)
        else:
            peer = ("peer", "name", LINK, "netns", PROCESSOR)
            sh("ip", "link", "add", LINK, "netns", SCOPE, "type", "veth", *peer)
        for namespace, address in ADDRESSES.items():
            sh(*inside(namespace, "ip", "addr", "add", f"{address}/24", "dev", LINK))
            for device in ("lo", LINK):
                sh(*inside(namespace, "ip", "link", "set", device, "up"))
            if case.rate_mbit is not None:
                limit = f"rate {case.rate_mbit}mbit burst 64kb latency 200ms".split()
                qdisc = ("tc", "qdisc", "add", "dev", LINK, "root", "tbf", *limit)
                sh(*inside(namespace, *qdisc))
        yield relay


def tun(namespace: str) -> int:
    """Make a TUN device in a namespace; return where its packets are read."""
    end = os.open("/dev/net/tun", os.O_RDWR)
    name = f"rtf{namespace}"[:15]
    request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(end, _TUNSETIFF, request)
    sh("ip", "link", "set", name, "netns", namespace)
    sh(*inside(namespace, "ip", "link", "set", name, "name", LINK, "mtu", str(MTU)))
    return end


@dataclass
class Sides:
    """The folders of both computers: config and keys; the run is the processor's."""

    root: Path
    frames: int
    interval_s: float
    live: bool
    run: Path = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.root / "processor" / "two.rtfocus"
        for side in ("scope", "processor"):
            (self.root / side / "keys").mkdir(parents=True)
        made = self.root / "made"
        sh(*RTFOCUS, "keys", str(made))
        for side, names in (
            ("scope", ("server.key_secret", "clients")),
            ("processor", ("client.key_secret", "server.key")),
        ):
            for name in names:
                (made / name).rename(self.root / side / "keys" / name)
            self.config(side).write_text(yaml.safe_dump(self._settings(side)), "utf-8")

    def config(self, side: str) -> Path:
        """Return the config file of a side."""
        return self.root / side / "two.yaml"

    def _settings(self, side: str) -> dict[str, Any]:
        host = "*" if side == "scope" else ADDRESSES[SCOPE]
        plan = {"interval": self.interval_s, "loops": self.frames}
        camera: dict[str, Any] = {
            "source": "virtual",
            "height_px": 256,
            "width_px": 256,
        }
        if self.live:
            camera["frames_per_s"] = 1 / self.interval_s
        optics = {"numerical_aperture": 0.36, "wavelength_nm": 451}
        return {
            "run": {"name": "two", "folder": str(self.root / side)},
            "microscope": camera,
            "acquisition": (
                {"live": {"frames": self.frames}}
                if self.live
                else {"mda": {"time_plan": plan}}
            ),
            "channels": [
                {"name": "default", "optics": optics | {"pixel_size_um": 0.65}}
            ],
            "processing": {"classifier": None, "restoration": {"method": "none"}},
            "transport": {
                "frames": f"tcp://{host}:5571",
                "control": f"tcp://{host}:5572",
                "pairing": "night-shift",
                "curve_keys": str(self.root / side / "keys"),
                # It is one machine after all.
                "shared_memory": "off",
            },
            "store": {"min_free_mb": 1},
        }


def start(
    namespace: str, side: str, sides: Sides, *words: str
) -> subprocess.Popen[str]:
    """Start a side in its namespace; what it says goes into ``errors.txt``."""
    config = sides.config(side)
    command = inside(namespace, *RTFOCUS, *words, str(config), "--quiet")
    with config.with_name("errors.txt").open("a") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, encoding="utf-8"
        )


def cut(sides: Sides, case: Case, acquiring: subprocess.Popen[str]) -> None:
    """Cut the link once a third of the frames is recorded, and mend it."""
    journal = sides.run / "frames.ndjson"
    while not journal.exists() or lines(journal) < sides.frames // 3:
        if acquiring.poll() is not None:
            raise SystemExit(f"{case.name}: the series ended before it was cut")
        time.sleep(_LOOK_S)
    link = inside(SCOPE, "ip", "link", "set", LINK)
    sh(*link, "down")
    time.sleep(case.cut_s)
    if acquiring.poll() is not None:
        raise SystemExit(f"{case.name}: the series ended while the link was cut")
    sh(*link, "up")


def lines(file: Path) -> int:
    """Return the number of lines."""
    return file.read_bytes().count(b"\n")


def ended(process: subprocess.Popen[str], deadline_s: float) -> int | str:
    """Return the exit code; a process that hangs is killed."""
    try:
        return process.wait(max(deadline_s - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "hangs"


def play(case: Case, sides: Sides) -> dict[str, Any]:
    """Run one series over the case's network; return what came of it."""
    begun_s = time.monotonic()
    with network(case) as relay:
        mode = ("process", "--once") if case.once else ("process",)
        processing = start(PROCESSOR, "processor", sides, *mode)
        acquiring = start(SCOPE, "scope", sides, "acquire")
        try:
            if case.cut_s:
                cut(sides, case, acquiring)
            deadline_s = begun_s + PATIENCE_S
            codes: dict[str, int | str] = {}
            if case.again:
                codes["gave up"] = ended(processing, deadline_s)
                processing = start(PROCESSOR, "processor", sides, *mode)
            codes["acquire"] = ended(acquiring, deadline_s)
            if not case.once:
                processing.send_signal(signal.SIGINT)
            codes["process"] = ended(processing, deadline_s)
        finally:
            for process in (acquiring, processing):
                process.kill()
                process.wait()
    taken_s = time.monotonic() - begun_s
    packets = {} if relay is None else {"packets": relay.packets, "lost": relay.lost}
    return {"case": case.name, "exit": codes, "wall_s": round(taken_s, 1)} | packets


def outcome(sides: Sides, first: Path | None) -> dict[str, Any]:
    """Return what the run folder says of itself, and what `check` says of it."""
    checked = subprocess.run(
        [*RTFOCUS, "check", str(sides.run)],
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    report: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        report = json.loads((sides.run / "report.json").read_text("utf-8"))
    return {
        "frames_per_s": round(report.get("throughput", {}).get("frames_per_s", 0), 1),
        "accounting": report.get("accounting"),
        "reason": report.get("reason"),
        "warnings": report.get("warnings"),
        "check": checked.returncode,
        "check_said": (checked.stdout + checked.stderr).strip(),
        "same_pixels": same_pixels(sides.run, first or sides.run),
        "said": {
            side: sides.config(side).with_name("errors.txt").read_text("utf-8")
            for side in ("scope", "processor")
        },
    }


def same_pixels(run: Path, first: Path) -> int:
    """Return how many raw frames of `run` are those of `first`, pixel by pixel."""
    both = [
        np.asarray(zarr.open_array(folder / "raw.ome.zarr" / "0", mode="r")[:])
        for folder in (run, first)
    ]
    return sum(np.array_equal(a, b) for a, b in zip(*both, strict=False))


def whole(found: dict[str, Any], frames: int) -> bool:
    """Tell whether nothing was lost, and everything ended as it should."""
    terms = found["accounting"] or {}
    return (
        {found["exit"][side] for side in ("acquire", "process")} == {0}
        and found["check"] == 0
        and terms.get("unaccounted") == 0
        and terms.get("acquired") == terms.get("written") == frames
        and found["same_pixels"] == frames
    )


def row(found: dict[str, Any]) -> str:
    """Return one line of the table."""
    terms = found["accounting"] or {}
    dropped, failed = (
        sum((terms.get(name) or {}).values()) for name in ("dropped", "in_error")
    )
    parts = (
        f"{terms.get('acquired')} = {terms.get('written')} + {dropped} + {failed}",
        f"unaccounted {terms.get('unaccounted')}",
        f"same pixels {found['same_pixels']}",
        f"check {found['check']}",
        f"exit {found['exit']['acquire']}, {found['exit']['process']}",
    )
    rate = f"{found['frames_per_s']:6.1f} frames/s  {found['wall_s']:6.1f} s"
    return f"{found['case']:24} {rate}  " + "  ".join(parts)


def main() -> int:
    """Play the cases one after the other; print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--interval-s", type=float, default=0.04)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    good = True
    with tempfile.TemporaryDirectory(prefix="two-machines-") as folder:
        first: Path | None = None
        for number, case in enumerate(c for c in CASES if options.only in c.name):
            root = Path(folder) / str(number)
            sides = Sides(root, options.frames, options.interval_s, case.live)
            result = play(case, sides) | outcome(sides, first)
            first = first or sides.run
            found.append(result)
            good &= whole(result, options.frames)
            print(row(result), flush=True)
            if not whole(result, options.frames):
                print(json.dumps(result, indent=1), flush=True)
    settings = {"frames": options.frames, "interval_s": options.interval_s}
    machine.write("two_machines", settings | {"cases": found}, options.out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
