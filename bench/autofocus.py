"""Autofocus: how surely, with how many images and moves, and within which limits.

    nice python -m bench.autofocus --runs 1000 --resume runs.ndjson

Our search and the classical ones, same starts, on the image formation of the virtual
microscope with the real engine in process. Fixed seeds; Wilson intervals.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench import machine
from bench.autofocus_rivals import RIVALS, RivalVerdict
from bench.autofocus_scenes import (
    CASES,
    DARK,
    Scene,
    Stage,
    camera,
    drawn_optics,
    spoiled,
    true_optics,
)
from rtfocus.autofocus.estimator import EstimatorSettings, read_focus
from rtfocus.autofocus.execution import Verdict, run_search
from rtfocus.autofocus.planes import PlaneComparison
from rtfocus.autofocus.policy import Limits, MoveRule, SearchRule
from rtfocus.autofocus.search import FocusSearch
from rtfocus.channel import OpticalSystem
from rtfocus.config import parse_config
from rtfocus.engines.registry import find_engine, parts, step_um
from rtfocus.frame import FocusReading
from rtfocus.offline import ImageProcessor
from rtfocus.specimens import SpecimenKind, draw_specimen

KINDS: tuple[SpecimenKind, ...] = ("nuclei", "filaments", "tissue", "beads")
SIDE_PX = 256
GROUP = 8
"""Runs that share their optics, told and true."""


@dataclass
class SearchRun:
    """One run of one method."""

    method: str
    start: float
    """Defocus at the start, in depths of field."""
    end: float
    """True defocus at the end."""
    focused: bool
    reason: str
    images: int
    moves: int
    outside: bool
    """A command left the limits."""
    kind: str = ""
    run: int = 0
    sharpest: float = 0.0
    """True defocus at which the true image is sharpest; 0 with a spike there."""
    notes: list[str] = field(default_factory=list)
    network: list[tuple[float, float, float]] = field(default_factory=list)
    """Of every image: true defocus, reading and its deviation in depths of field."""
    belief: list[tuple[float, float]] = field(default_factory=list)
    """After every image but the first: error and deviation in depths of field."""


class Reader:
    """Images to readings, by an engine of rtfocus in this process."""

    def __init__(
        self, engine: str, optics: OpticalSystem, *, fine: bool = False
    ) -> None:
        settings = {
            "processing": {
                "classifier": engine,
                "threads": 1,
                "device": "cpu",
                "ignore_optics": True,
                "restoration": {"method": "none"},
            },
            "camera": {"offset_counts": DARK},
        }
        self._processor = ImageProcessor(parse_config(settings), optics)
        self.comparison = PlaneComparison(optics, fine=fine)
        card = find_engine(engine, []).card
        levels, _ = parts(card)
        self.settings = EstimatorSettings(
            unit_um=optics.defocus_unit_um,
            range_um=(levels.count - 1) * step_um(card, optics),
            dark_counts=DARK,
            saturation_counts=65535,
        )

    def read(self, pixels: NDArray[np.generic]) -> FocusReading:
        """Read one image."""
        found = self._processor.classify(pixels).defocus
        assert found is not None
        return read_focus(found, pixels, self.settings)

    def close(self) -> None:
        """Close the engine."""
        self._processor.close()


def ours(
    reader: Reader,
    scene: Scene,
    stage: Stage,
    limits: Limits,
    *,
    calibrated: bool,
    approach: bool = True,
) -> Verdict:
    """Run our search; not `approach`: the user says that there is no backlash."""
    unit = reader.comparison.unit_um
    # As `rtfocus.autofocus.policy.move_rule` and `rtfocus.autofocus.focuser.Focuser`.
    side, overshoot_um = (1, unit) if approach else (0, 0.0)
    search = FocusSearch(
        reader.comparison,
        MoveRule(limits, 0.1 * unit, 12 * unit, side, overshoot_um),
        SearchRule(verify=not calibrated),
    )
    for stop_um in search.moves.settling(stage.position_um()):
        stage.go_to(stop_um)
    return run_search(
        search, stage, lambda _: reader.read(scene.expose(stage.seen_um()))
    )


def cases(number: int, seed: int, *, even: bool) -> Iterator[tuple[int, OpticalSystem]]:
    """Yield a seed and told optics per run; `GROUP` runs share their optics."""
    for first in range(0, number, GROUP):
        rng = np.random.default_rng([seed, first])
        told = drawn_optics(rng, even=even)
        for run in range(first, min(first + GROUP, number)):
            yield run, told


def make(run: int, seed: int, told: OpticalSystem) -> tuple[Scene, Stage, Limits, str]:
    """Draw the scene of one run and where its stage stands.

    The runs of a group share the true optics, every four of them a specimen.
    """
    optics = true_optics(told, np.random.default_rng([seed, run // GROUP, 2]))
    rng = np.random.default_rng([seed, run // 4, 3])
    kind = KINDS[run // 4 % len(KINDS)]
    sharp = _specimen(kind, seed, run // 4)
    photons = float(np.exp(rng.uniform(np.log(300), np.log(5000))))
    rng = np.random.default_rng([seed, run, 1])
    unit = told.defocus_unit_um
    scene = Scene(sharp.copy(), optics, camera(photons), rng)
    scene.focus_um = float(rng.uniform(-100, 100))
    start = scene.focus_um + float(rng.uniform(-5.0, 5.0)) * unit
    return scene, Stage(start), Limits(start - 20 * unit, start + 20 * unit), kind


@lru_cache(maxsize=1)
def _specimen(kind: SpecimenKind, seed: int, number: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([seed, number, 4])
    return draw_specimen(kind, (SIDE_PX, SIDE_PX), rng, scale=rng.uniform(0.7, 1.6))


def measure(
    given: argparse.Namespace, methods: list[str], known: list[SearchRun]
) -> Iterator[SearchRun]:
    """Run every method on the same starts, those that are `known` left out."""
    seed, engine = given.seed, given.engine
    done = {(one.method, one.run) for one in known}
    reader, before = None, None
    try:
        for run, told in cases(given.runs, seed, even=given.even):
            wanted = [method for method in methods if (method, run) not in done]
            if wanted and told != before:
                if reader is not None:
                    reader.close()
                fine = not given.uncalibrated
                reader, before = Reader(engine, told, fine=fine), told
            for method in wanted:
                assert reader is not None
                yield _measured(given, reader, method, run, told)
    finally:
        if reader is not None:
            reader.close()


def _measured(
    given: argparse.Namespace,
    reader: Reader,
    method: str,
    run: int,
    told: OpticalSystem,
) -> SearchRun:
    scene, stage, limits, kind = make(run, given.seed, told)
    unit = told.defocus_unit_um
    scene.keep_focus = given.spike
    stage = spoiled(given.case, scene, stage, unit, given.amount)
    begun = (scene.focus_um - stage.z_um) / unit
    found = SearchRun(method, begun, 0.0, False, "", 0, 0, False, kind, run)
    verdict: Verdict | RivalVerdict
    if method == "rtfocus":
        verdict = ours(
            reader,
            scene,
            stage,
            limits,
            calibrated=not given.uncalibrated,
            approach=not given.no_approach,
        )
        _note(found, verdict, scene, unit)
    else:
        verdict = RIVALS[method](scene, stage, unit, limits)
    found.end = (scene.focus_um - stage.rests_um) / unit
    if not given.spike and given.case != "blank":
        found.sharpest = scene.sharpest() / unit
    found.focused, found.reason = verdict.focused, verdict.reason
    found.images, found.moves = scene.images, verdict.moves
    found.outside = any(not limits.holds(z) for z in stage.commands)
    return found


def _note(found: SearchRun, verdict: Verdict, scene: Scene, unit: float) -> None:
    """Keep what the estimates were and what was true, as far as the stage obeys."""
    found.notes = list(verdict.notes)
    for number, step in enumerate(verdict.steps):
        reading = step.reading
        if reading.defocus_um is not None and reading.sd_um is not None:
            true = (scene.focus_um - step.z_um) / unit
            found.network.append(
                (true, reading.defocus_um / unit, reading.sd_um / unit)
            )
        if number and step.belief_um is not None and step.belief_sd_um is not None:
            error = (step.belief_um - scene.focus_um) / unit
            found.belief.append((error, step.belief_sd_um / unit))


def load(path: Path | None) -> list[SearchRun]:
    """Return the runs that a file of one JSON object a line already holds."""
    if path is None or not path.exists():
        return []
    lines = path.read_text("utf-8").splitlines()
    return [SearchRun(**json.loads(line)) for line in lines]


def wilson(hits: int, number: int) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    if number == 0:
        return 0.0, 1.0
    z, share = 1.96, hits / number
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    half /= 1 + z**2 / number
    return float(middle - half), float(middle + half)


def summarise(runs: list[SearchRun]) -> dict[str, object]:
    """Sum up the runs of one method."""
    hits = sum(abs(one.end) <= 0.5 for one in runs)
    number = len(runs)
    images = [one.images for one in runs]
    moves = [one.moves for one in runs]
    return {
        "runs": number,
        "within half a depth of field": hits / number,
        "wilson": wilson(hits, number),
        "within half a depth of field of the sharpest plane": sum(
            abs(one.end - one.sharpest) <= 0.5 for one in runs
        )
        / number,
        "said focused and was not": sum(
            one.focused and abs(one.end) > 0.5 for one in runs
        ),
        "refused": sum(not one.focused for one in runs),
        "blurrier than at the start": sum(
            abs(one.end) > abs(one.start) + 0.25 for one in runs
        ),
        "median images": float(np.median(images)),
        "p95 images": float(np.percentile(images, 95)),
        "median moves": float(np.median(moves)),
        "p95 moves": float(np.percentile(moves, 95)),
        "median |defocus| at the end": float(np.median([abs(o.end) for o in runs])),
        "mean images": float(np.mean(images)),
        "mean moves": float(np.mean(moves)),
        "p90 |defocus| at the end": float(
            np.percentile([abs(o.end) for o in runs], 90)
        ),
        "deviation of belief covers": _covered(
            [error / sd for one in runs for error, sd in one.belief[-1:]]
        ),
        "deviation of the second image's belief covers": _covered(
            [error / sd for one in runs for error, sd in one.belief[:1]]
        ),
        "deviation of the engine's estimate covers": _covered(
            [
                (abs(read) - abs(true)) / sd
                for one in runs
                for true, read, sd in one.network
            ]
        ),
        "notes": dict(Counter(note for one in runs for note in one.notes)),
        "reasons": dict(Counter(one.reason.split(":")[0] for one in runs)),
        "commands outside the limits": sum(one.outside for one in runs),
    }


def _covered(ratios: list[float]) -> dict[str, float]:
    """Return the shares of errors within one and 1.96 deviations."""
    if not ratios:
        return {}
    away = np.abs(ratios)
    return {"68": float(np.mean(away <= 1)), "95": float(np.mean(away <= 1.96))}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--even", action="store_true", help="PSF even in z")
    parser.add_argument("--engine", default="delpnet")
    parser.add_argument("--methods", default="rtfocus")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", choices=CASES, default="none")
    parser.add_argument(
        "--uncalibrated", action="store_true", help="check every answer on both sides"
    )
    parser.add_argument("--amount", type=float, help="of the case, see CASES")
    parser.add_argument(
        "--no-approach", action="store_true", help="the user says: no backlash"
    )
    parser.add_argument(
        "--spike", action="store_true", help="show the drawing unblurred in focus"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", type=Path, help="file of runs: go on where it ends")
    parser.add_argument("--list", action="store_true", help="print runs that missed")
    given = parser.parse_args()
    begun = time.perf_counter()
    methods = given.methods.split(",")
    runs = load(given.resume)
    for one in measure(given, methods, list(runs)):
        runs.append(one)
        if given.resume:
            with given.resume.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(one), default=float) + "\n")
    table = {
        method: summarise([one for one in runs if one.method == method])
        for method in methods
    }
    for method, figures in table.items():
        print(method)
        for name, value in figures.items():
            print(f"  {name}: {value}")
    if given.list:
        for one in runs:
            if abs(one.end) > 0.5 or not one.focused:
                print(asdict(one))
    print(f"{time.perf_counter() - begun:.0f} s")
    if given.json:
        found = {
            "machine": machine.describe(),
            "arguments": vars(given) | {"json": None, "resume": None},
            "table": table,
        }
        given.json.write_text(
            json.dumps(found, indent=1, default=float) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()
