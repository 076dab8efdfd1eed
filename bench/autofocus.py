"""Autofocus: how surely, with how many images and moves, and within which limits.

    nice python -m bench.autofocus --runs 1000

Our search and the classical ones, same starts, on the image formation of the virtual
microscope with the real engine in process. Fixed seeds; Wilson intervals.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench import machine
from bench.autofocus_rivals import RIVALS
from bench.autofocus_scenes import (
    DARK,
    Scene,
    Stage,
    camera,
    drawn_optics,
    true_optics,
)
from rtfocus.autofocus.estimator import EstimatorSettings, read_focus
from rtfocus.autofocus.planes import PlaneComparison
from rtfocus.autofocus.policy import Limits, MoveRule
from rtfocus.autofocus.run import Verdict, run_search
from rtfocus.autofocus.search import FocusSearch, SearchRule
from rtfocus.channel import OpticalSystem
from rtfocus.config import parse_config
from rtfocus.frame import FocusReading
from rtfocus.processing.engines.registry import find_engine, parts, step_um
from rtfocus.processing.offline import ImageProcessor
from rtfocus.specimens import draw_specimen

KINDS = ("nuclei", "filaments", "tissue", "beads")
SIDE_PX = 320


@dataclass
class Outcome:
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


class Reader:
    """Images to readings, by an engine of rtfocus in this process."""

    def __init__(self, engine: str, optics: OpticalSystem) -> None:
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
        self.comparison = PlaneComparison(optics)
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
) -> Verdict:
    """Run our search."""
    unit = reader.comparison.unit_um
    search = FocusSearch(
        reader.comparison,
        MoveRule(limits, deadband_um=0.1 * unit, most_um=12 * unit),
        SearchRule(verify=not calibrated),
    )
    return run_search(
        search, stage, lambda _: reader.read(scene.expose(stage.seen_um()))
    )


def cases(number: int, seed: int, *, even: bool) -> Iterator[tuple[int, OpticalSystem]]:
    """Yield a seed and told optics per run; every ten runs share their optics."""
    for first in range(0, number, 10):
        rng = np.random.default_rng([seed, first])
        told = drawn_optics(rng, even=even)
        for run in range(first, min(first + 10, number)):
            yield run, told


def make(run: int, seed: int, told: OpticalSystem) -> tuple[Scene, Stage, Limits, str]:
    """Draw the scene of one run and where its stage stands."""
    rng = np.random.default_rng([seed, run, 1])
    unit = told.defocus_unit_um
    kind = KINDS[run % len(KINDS)]
    sharp = draw_specimen(kind, (SIDE_PX, SIDE_PX), rng, scale=rng.uniform(0.7, 1.6))
    photons = float(np.exp(rng.uniform(np.log(300), np.log(5000))))
    scene = Scene(sharp, true_optics(told, rng), camera(photons), rng)
    scene.focus_um = float(rng.uniform(-100, 100))
    start = scene.focus_um + float(rng.uniform(-5.0, 5.0)) * unit
    return scene, Stage(start), Limits(start - 20 * unit, start + 20 * unit), kind


CASES = (
    "none",
    "blank",
    "saturated",
    "bleaching",
    "dust",
    "stuck",
    "reversed",
    "late",
    "backlash",
    "beyond",
)


def spoil(case: str, scene: Scene, stage: Stage, told: OpticalSystem) -> None:
    """Make a run one of `CASES`."""
    if case == "blank":
        scene.sharp = np.full_like(scene.sharp, 0.02)
    elif case == "saturated":
        scene.camera = camera(6e5)
    elif case == "bleaching":
        scene.bleach = 0.85
    elif case == "dust":
        rng = np.random.default_rng(3)
        shadow = draw_specimen("beads", scene.sharp.shape, rng)
        scene.dust = 1.0 - 0.5 * shadow / max(float(shadow.max()), 1e-6)
    elif case in ("stuck", "reversed", "late"):
        stage.fault = case
    elif case == "backlash":
        stage.backlash_um = 0.3 * told.defocus_unit_um
    elif case == "beyond":
        side = np.sign(scene.focus_um - stage.z_um)
        scene.focus_um += float(side) * 15 * told.defocus_unit_um


def measure(given: argparse.Namespace, methods: list[str]) -> list[Outcome]:
    """Run every method on the same starts."""
    seed, engine = given.seed, given.engine
    outcomes, reader, before = [], None, None
    for run, told in cases(given.runs, seed, even=given.even):
        if told != before:
            if reader is not None:
                reader.close()
            reader, before = Reader(engine, told), told
        for method in methods:
            scene, stage, limits, kind = make(run, seed, told)
            unit = told.defocus_unit_um
            begun = (scene.focus_um - stage.z_um) / unit
            spoil(given.case, scene, stage, told)
            if method == "rtfocus":
                assert reader is not None
                calibrated = not given.uncalibrated
                verdict = ours(reader, scene, stage, limits, calibrated=calibrated)
            else:
                verdict = RIVALS[method](scene, stage, unit, limits)
            outcomes.append(
                Outcome(
                    method,
                    begun,
                    (scene.focus_um - stage.z_um) / unit,
                    verdict.focused,
                    verdict.reason,
                    scene.images,
                    verdict.moves,
                    any(not limits.holds(z) for z in stage.commands or ()),
                    kind,
                )
            )
    if reader is not None:
        reader.close()
    return outcomes


def wilson(hits: int, number: int) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    if number == 0:
        return 0.0, 1.0
    z, share = 1.96, hits / number
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    half /= 1 + z**2 / number
    return float(middle - half), float(middle + half)


def summarise(outcomes: list[Outcome]) -> dict[str, object]:
    """Sum up the runs of one method."""
    hits = sum(abs(one.end) <= 0.5 for one in outcomes)
    number = len(outcomes)
    images = [one.images for one in outcomes]
    moves = [one.moves for one in outcomes]
    return {
        "runs": number,
        "within half a depth of field": hits / number,
        "wilson": wilson(hits, number),
        "said focused and was not": sum(
            one.focused and abs(one.end) > 0.5 for one in outcomes
        ),
        "refused": sum(not one.focused for one in outcomes),
        "blurrier than at the start": sum(
            abs(one.end) > abs(one.start) + 0.25 for one in outcomes
        ),
        "median images": float(np.median(images)),
        "p95 images": float(np.percentile(images, 95)),
        "median moves": float(np.median(moves)),
        "p95 moves": float(np.percentile(moves, 95)),
        "median |defocus| at the end": float(np.median([abs(o.end) for o in outcomes])),
        "reasons": dict(Counter(one.reason.split(":")[0] for one in outcomes)),
        "commands outside the limits": sum(one.outside for one in outcomes),
    }


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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="print runs that missed")
    given = parser.parse_args()
    begun = time.perf_counter()
    methods = given.methods.split(",")
    outcomes = measure(given, methods)
    table = {
        method: summarise([one for one in outcomes if one.method == method])
        for method in methods
    }
    for method, figures in table.items():
        print(method)
        for name, value in figures.items():
            print(f"  {name}: {value}")
    if given.list:
        for number, one in enumerate(outcomes):
            if abs(one.end) > 0.5 or not one.focused:
                print(number, asdict(one))
    print(f"{time.perf_counter() - begun:.0f} s")
    if given.json:
        found = {
            "machine": machine.describe(),
            "arguments": vars(given) | {"json": given.json.name},
            "table": table,
            "runs": [asdict(one) for one in outcomes],
        }
        given.json.write_text(json.dumps(found, indent=1, default=float), "utf-8")


if __name__ == "__main__":
    main()
