"""Kill: a run whose processor is killed while it records, a hundred times over.

Every store must open in zarr-python and pass the yaozarrs validator, every frame
that was reported durable must be there, correct; a repair must finish the run, and
a restarted processor must go on with it until no frame is missing.

    python -m bench.kill [--kills 100] [--seed 0] [--smoke] [--out FILE]
"""

import argparse
import random
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Literal

from bench import machine
from bench.kill_series import KillCounts, KilledSeries, Mode
from rtfocus.files import resource_folder

KILLS_PER_SERIES = 10

RECORDED = {"classifier": None, "restoration": {"method": "none"}}
PROCESSED = {"classifier": "delpnet", "restoration": {"method": "wiener"}}


def modes() -> list[Mode]:
    """Return the configurations that take turns."""
    unrestored = {"restored": False}
    found = [
        Mode("recorded", unrestored, RECORDED),
        Mode("shards", unrestored | {"shard_frames": 4}, RECORDED),
    ]
    if (resource_folder("engines") / "delpnet" / "engine.yaml").is_file():
        found.append(Mode("processed", {"shard_frames": 2}, PROCESSED))
    # Each by shared memory and by TCP.
    ways: tuple[Literal["auto", "off"], ...] = ("auto", "off")
    return [replace(mode, shared_memory=way) for mode in found for way in ways]


def kill_many(kills: int, seed: int, folder: Path) -> KillCounts:
    """Kill processors in series of `KILLS_PER_SERIES`; return what was found."""
    total = KillCounts()
    for number, mode in enumerate(cycle(modes())):
        left = kills - total.kills.total()
        if left <= 0 or total.faults:
            return total
        here = folder / str(number)
        here.mkdir()
        # Of two series of one way one is killed while it finishes, of two modes, too.
        at_finish = number % 4 in (0, 3)
        series = KilledSeries(here, mode, random.Random(f"{seed}/{number}"))
        before_finish = min(left, KILLS_PER_SERIES) - at_finish
        total.add(
            series.run(before_finish, at_finish=at_finish, with_command=not at_finish)
        )
        what = f"{mode.name} by {mode.way}"
        print(f"{what}: {total.kills.total()} kills, {len(total.faults)} faults")
    raise AssertionError  # cycle() never ends


def main() -> None:
    """Kill, check, print one line and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two kills only")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    kills = 2 if options.smoke else options.kills
    begun_s = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="rtfocus-kill-"))
    found = kill_many(kills, options.seed, folder)
    payload = {
        "kills": found.kills.total(),
        "kills_by_moment": dict(found.kills),
        "frames": found.frames,
        "frames_resent": found.resent,
        "frames_compared_after_kills": found.reported,
        "faults": found.faults,
        "seconds": time.monotonic() - begun_s,
        "seed": options.seed,
        "modes": [asdict(mode) for mode in modes()],
    }
    machine.write("kill", payload, options.out)
    print(
        f"kills {found.kills.total()}, frames {found.frames}, "
        f"faults found {len(found.faults)}, frames resent {found.resent}"
    )
    if found.faults:
        raise SystemExit("\n".join([*found.faults, f"evidence kept in {folder}"]))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
